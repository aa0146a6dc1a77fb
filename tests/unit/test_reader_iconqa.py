"""IconQA, choices in words: either name of the folder, numbers as choices, the answer as an index, types that agree."""

import json
from pathlib import Path
from typing import Any

import pytest

from instructblip.errors import UserError
from tests.kit.raw_files import read_raw, records_of, write_images, write_raw_json


def _problem(question: str, choices: Any, answer: Any, ques_type: str = "choose_txt") -> dict[str, Any]:
    return {
        "question": question,
        "choices": choices,
        "answer": answer,
        "ques_type": ques_type,
        "grade": "grade1",
        "label": "S2",
    }


def _write_problem(folder: Path, pid: str, problem: Any) -> None:
    write_raw_json(folder / pid / "data.json", problem)
    write_images(folder / pid, "image.png", mode="RGBA")


def write_iconqa(raw: Path) -> None:
    """Two problems of test with choices in words, and one of each other type."""
    folder = raw / "iconqa_data/iconqa/test"
    likely = _problem("How likely is it? ", ["certain", "unlikely", "impossible", "probable"], 2)
    _write_problem(folder / "choose_txt", "60000", likely)
    _write_problem(folder / "choose_txt", "7", _problem("How many dots?", [3, "10", 0.5], 0))
    _write_problem(folder / "choose_img", "8", _problem("Which?", ["choice_0.png"], 0, "choose_img"))
    _write_problem(folder / "fill_in_blank", "9", {"question": "?", "answer": "8,488", "ques_type": "fill_in_blank"})
    splits = {"choose_txt_test": ["60000", "7"], "choose_img_test": ["8"], "fill_in_blank_test": ["9"]}
    write_raw_json(raw / "iconqa_data/pid_splits.json", splits)


RECORDS = {
    "7": [
        {
            "id": "7",
            "kind": "multiple_choice",
            "question": "How many dots?",
            "choices": ("3", "10", "0.5"),
            "label": 0,
            "tags": {"grade": "grade1"},
        }
    ],
    "60000": [
        {
            "id": "60000",
            "kind": "multiple_choice",
            "question": "How likely is it?",
            "choices": ("certain", "unlikely", "impossible", "probable"),
            "label": 2,
            "tags": {"grade": "grade1"},
        }
    ],
}


def test_test_split_in_order_of_the_numbers(tmp_path: Path) -> None:
    write_iconqa(tmp_path)
    media, losses = read_raw("iconqa", tmp_path, "test")
    assert [(item.key, item.media) for item in media] == [
        ("iconqa_7", tmp_path / "iconqa_data/iconqa/test/choose_txt/7/image.png"),
        ("iconqa_60000", tmp_path / "iconqa_data/iconqa/test/choose_txt/60000/image.png"),
    ]
    assert list(records_of(media).items()) == list(RECORDS.items())
    assert losses == {}


def test_the_other_name_of_folder_and_type(tmp_path: Path) -> None:
    write_iconqa(tmp_path)
    folder = tmp_path / "iconqa_data/iconqa/test"
    (folder / "choose_txt").rename(folder / "choose_text")
    for path in (folder / "choose_text").glob("*/data.json"):
        path.write_text(path.read_text().replace("choose_txt", "choose_text"))
    write_raw_json(tmp_path / "iconqa_data/pid_splits.json", {"choose_text_test": [7, 60000]})
    media, losses = read_raw("iconqa", tmp_path, "test")
    assert (records_of(media), losses) == (RECORDS, {})


def test_losses(tmp_path: Path) -> None:
    write_iconqa(tmp_path)
    folder = tmp_path / "iconqa_data/iconqa/test/choose_txt"
    problems: dict[str, Any] = {
        "10": _problem("Which picture?", ["choice_0.png"], 0, "choose_img"),
        "11": _problem("", ["a"], 0),
        "12": _problem("A choice is nothing?", ["a", None], 0),
        "13": _problem("Choices are text?", "ab", 0),
        "14": _problem("No such choice?", ["a", "b"], 2),
        "15": _problem("The answer in words?", ["a", "b"], "a"),
        "16": ["x"],
        "17": _problem("No image?", ["a", "b"], 1),
        "18": _problem("In no split?", ["a", "b"], 1),
        "19": {},
    }
    for pid, problem in problems.items():
        _write_problem(folder, pid, problem)
    (folder / "17/image.png").unlink()
    (folder / "19/data.json").write_text(json.dumps(_problem("Cut?", ["a"], 0))[:30])
    (folder / ".DS_Store").touch()
    pids = ["7", "60000", *problems, "20"]
    pids.remove("18")
    write_raw_json(tmp_path / "iconqa_data/pid_splits.json", {"choose_txt_test": pids})
    media, losses = read_raw("iconqa", tmp_path, "test")
    assert records_of(media) == RECORDS
    assert losses == {
        "answer is not the index of a choice": (2, 2),
        "data.json is missing or damaged": (1, 1),
        "image file is missing": (1, 1),
        "problem has no folder": (1, 1),
        "problem is not among those of its split in pid_splits.json": (1, 1),
        "problem lacks question or choices": (3, 3),
        "ques_type is not that of the folder": (2, 2),
    }


@pytest.mark.parametrize("splits", [{}, {"choose_txt_test": []}, {"choose_txt_test": ["a"]}, {"choose_txt_test": "7"}])
def test_pid_splits_of_another_form_are_refused(tmp_path: Path, splits: Any) -> None:
    write_iconqa(tmp_path)
    write_raw_json(tmp_path / "iconqa_data/pid_splits.json", splits)
    with pytest.raises(UserError, match=r"must hold a list of numbers under 'choose_txt_test' or 'choose_text_test'"):
        read_raw("iconqa", tmp_path, "test")


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "iconqa_data/iconqa/test").mkdir(parents=True)
    (tmp_path / "iconqa_data/iconqa/test/choose_txt").touch()
    with pytest.raises(UserError, match="must be a folder"):
        read_raw("iconqa", tmp_path, "test")
