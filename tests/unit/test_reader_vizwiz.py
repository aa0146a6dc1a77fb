"""VizWiz-VQA: one question an image, named as the record names it; "unanswerable" is an answer; test has none."""

from pathlib import Path
from typing import Any

import pytest

from instructblip.errors import UserError
from tests.kit.raw_files import read_raw, records_of, write_images, write_raw_json


def _answers(*texts: Any) -> list[dict[str, Any]]:
    return [{"answer": text, "answer_confidence": ("yes", "maybe", "no")[row % 3]} for row, text in enumerate(texts)]


def write_vizwiz(raw: Path) -> None:
    """Two images of val, named by releases that pad differently, and one of test."""
    val = [
        {
            "image": "VizWiz_val_00000001.jpg",
            "question": "Can you tell me what this medicine is please? ",
            "answers": _answers("night time", *["café"] * 8, "night time"),
            "answer_type": "other",
            "answerable": 1,
        },
        {
            "image": "VizWiz_val_000000000000.jpg",
            "question": "Ok. There is another picture I hope it is a better one.",
            "answers": _answers(*["unanswerable"] * 10),
            "answer_type": "unanswerable",
            "answerable": 0,
        },
    ]
    write_raw_json(raw / "Annotations/val.json", val)
    write_raw_json(raw / "Annotations/test.json", [{"image": "VizWiz_test_00000000.jpg", "question": "What is it?"}])
    write_images(raw / "val", "VizWiz_val_00000001.jpg", "VizWiz_val_000000000000.jpg")
    write_images(raw / "test", "VizWiz_test_00000000.jpg")


def test_val(tmp_path: Path) -> None:
    write_vizwiz(tmp_path)
    media, losses = read_raw("vizwiz", tmp_path, "val")
    assert [(item.key, item.media) for item in media] == [
        ("vizwiz_VizWiz_val_00000001", tmp_path / "val/VizWiz_val_00000001.jpg"),
        ("vizwiz_VizWiz_val_000000000000", tmp_path / "val/VizWiz_val_000000000000.jpg"),
    ]
    assert records_of(media) == {
        "VizWiz_val_00000001": [
            {
                "id": "VizWiz_val_00000001",
                "kind": "question",
                "question": "Can you tell me what this medicine is please?",
                "answers": ("café", "night time"),
                "answer_weights": (8.0, 2.0),
                "tags": {"answer_type": "other", "answerable": "true"},
            }
        ],
        "VizWiz_val_000000000000": [
            {
                "id": "VizWiz_val_000000000000",
                "kind": "question",
                "question": "Ok. There is another picture I hope it is a better one.",
                "answers": ("unanswerable",),
                "answer_weights": (10.0,),
                "tags": {"answer_type": "unanswerable", "answerable": "false"},
            }
        ],
    }
    assert losses == {}


def test_test_split_has_no_answers(tmp_path: Path) -> None:
    write_vizwiz(tmp_path)
    media, losses = read_raw("vizwiz", tmp_path, "test")
    assert records_of(media) == {
        "VizWiz_test_00000000": [{"id": "VizWiz_test_00000000", "kind": "question", "question": "What is it?"}]
    }
    assert losses == {}


def test_losses(tmp_path: Path) -> None:
    write_vizwiz(tmp_path)
    entry = {
        "image": "VizWiz_val_00000001.jpg",
        "question": "What?",
        "answers": _answers("a", "", "a"),
        "answerable": 2,
    }
    other = {**entry, "image": "VizWiz_val_000000000000.jpg"}
    entries = [
        {"image": "VizWiz_val_00000001.jpg", "question": "No answers?"},
        entry,
        entry,
        {**other, "answers": []},
        {**other, "answers": "a"},
        {**other, "answers": _answers(None, " ")},
        {**other, "question": "\n"},
        {**entry, "image": "../val/VizWiz_val_00000001.jpg"},
        {**entry, "image": "VizWiz_val_00000009.jpg"},
        "x",
    ]
    write_raw_json(tmp_path / "Annotations/val.json", entries)
    media, losses = read_raw("vizwiz", tmp_path, "val")
    assert records_of(media) == {
        "VizWiz_val_00000001": [
            {
                "id": "VizWiz_val_00000001",
                "kind": "question",
                "question": "What?",
                "answers": ("a",),
                "answer_weights": (2.0,),
                "annotators": 3,
            }
        ]
    }
    assert losses == {
        "answer of one person is blank or no text": (1, 0),
        "entry lacks image or question": (3, 3),
        "entry repeats an image": (1, 1),
        "image file is missing": (1, 1),
        "question has no answers": (4, 4),
    }


def test_an_object_instead_of_the_list_is_refused(tmp_path: Path) -> None:
    write_vizwiz(tmp_path)
    write_raw_json(tmp_path / "Annotations/val.json", {"questions": []})
    with pytest.raises(UserError, match=r"val\.json must hold a list"):
        read_raw("vizwiz", tmp_path, "val")
