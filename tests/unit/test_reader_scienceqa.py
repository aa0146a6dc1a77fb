"""ScienceQA with images: only problems with one, the hint as context, numbers in order, the picture the problem names."""

from pathlib import Path
from typing import Any

import pytest

from instructblip.errors import UserError
from tests.kit.raw_files import read_raw, records_of, write_images, write_raw_json


def _problem(split: str, image: Any = "image.png", **changes: Any) -> dict[str, Any]:
    return {
        "question": "Which of these states is farthest north?",
        "choices": ["West Virginia", "Louisiana"],
        "answer": 0,
        "hint": "",
        "image": image,
        "task": "closed choice",
        "grade": "grade2",
        "subject": "social science",
        "topic": "geography",
        "category": "Geography",
        "skill": "Read a map: cardinal directions",
        "lecture": "Maps have four cardinal directions.",
        "solution": "",
        "split": split,
        **changes,
    }


TAGS = {"subject": "social science", "topic": "geography", "grade": "grade2"}


def write_scienceqa_img(raw: Path) -> None:
    """Two problems of test with an image, beside which other pictures lie, one without, and one of train."""
    hinted = _problem(
        "test", question=" Which one? ", choices=["a", "b", "c"], answer=2, hint="A passage.\nIts second line.\n"
    )
    problems = {"1": _problem("train"), "10": hinted, "2": _problem("test"), "3": _problem("test", None)}
    write_raw_json(raw / "problems.json", problems)
    splits = {"train": ["1"], "test": ["10", "2", "3"], "minitest": ["2"]}
    write_raw_json(raw / "pid_splits.json", splits)
    write_images(raw / "images", "test/10/image.png", "test/10/choice_0.png", "test/2/image.png", "test/2/image_2.png")
    write_images(raw / "images", "train/1/image.png", "test/3/choice_0.png")


def test_test_split(tmp_path: Path) -> None:
    write_scienceqa_img(tmp_path)
    media, losses = read_raw("scienceqa_img", tmp_path, "test")
    assert [(item.key, item.media) for item in media] == [
        ("scienceqa_img_2", tmp_path / "images/test/2/image.png"),
        ("scienceqa_img_10", tmp_path / "images/test/10/image.png"),
    ]
    assert records_of(media) == {
        "2": [
            {
                "id": "2",
                "kind": "multiple_choice",
                "question": "Which of these states is farthest north?",
                "choices": ("West Virginia", "Louisiana"),
                "label": 0,
                "tags": TAGS,
            }
        ],
        "10": [
            {
                "id": "10",
                "kind": "multiple_choice",
                "question": "Which one?",
                "choices": ("a", "b", "c"),
                "label": 2,
                "context": "A passage.\nIts second line.",
                "tags": TAGS,
            }
        ],
    }
    assert losses == {}


def test_losses(tmp_path: Path) -> None:
    write_scienceqa_img(tmp_path)
    problems = {
        "1": _problem("train"),
        "2": _problem("test"),
        "4": _problem("test", ""),
        "5": _problem("test", "../2/image.png"),
        "6": _problem("test", "image.jpg"),
        "7": _problem("val"),
        "8": _problem("test"),
        "9": _problem("test", answer=2),
        "11": _problem("test", answer="0"),
        "12": _problem("test", choices=[]),
        "13": _problem("test", choices=["a", 1]),
        "14": _problem("test", question=None),
        "15": "x",
        "x": _problem("test"),
    }
    write_raw_json(tmp_path / "problems.json", problems)
    pids = {"test": ["2", "4", "5", "6", "7", "9", "11", "12", "13", "14", "15", "16"]}
    write_raw_json(tmp_path / "pid_splits.json", pids)
    media, losses = read_raw("scienceqa_img", tmp_path, "test")
    assert list(records_of(media)) == ["2"]
    assert losses == {
        "answer is not the index of a choice": (2, 2),
        "image file is missing": (3, 3),
        "problem is not in problems.json": (2, 2),
        "problem lacks question or choices": (3, 3),
        "problem's split is not that of pid_splits.json": (3, 3),
    }


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("problems.json", [], "must hold an object"),
        ("pid_splits.json", {"train": ["1"]}, "must hold a list of numbers under 'test'"),
        ("pid_splits.json", {"test": [["2"]]}, "must hold a list of numbers under 'test'"),
    ],
)
def test_files_of_another_form_are_one_line(tmp_path: Path, name: str, value: Any, words: str) -> None:
    write_scienceqa_img(tmp_path)
    write_raw_json(tmp_path / name, value)
    with pytest.raises(UserError, match=words):
        read_raw("scienceqa_img", tmp_path, "test")
