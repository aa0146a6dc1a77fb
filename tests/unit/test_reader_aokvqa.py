"""A-OKVQA: string question ids, names of COCO 2017, choices beside direct answers, hidden test answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instructblip.data.cards import load_card
from instructblip.data.readers.common import MISSING_IMAGE
from instructblip.data.templates import load_templates, render_training
from instructblip.errors import UserError
from tests.kit.raw_files import read_raw, records_of, write_images, write_raw_json

DIRECT = ["ride", "ride", "bus", "taxi", "travelling", "traffic", "taxi", "cab", "cab", "his ride"]


def _entry(question_id: str, image_id: int, split: str = "train", **more: Any) -> dict[str, Any]:
    fields = {
        "split": split,
        "image_id": image_id,
        "question_id": question_id,
        "question": "What is the man by the bags awaiting?",
        "choices": ["skateboarder", "train", "delivery", "cab"],
    }
    answers = {"correct_choice_idx": 3, "direct_answers": DIRECT, "rationales": ["a", "b", "c"]}
    return fields | (answers if split != "test" else {}) | {"difficult_direct_answer": False} | more


def write_aokvqa(raw: Path) -> None:
    """Train, val and test; the images named as in 2017, one of them as in 2014."""
    train = [
        _entry("22MexNkBPpdZGX6sxbxVBH", 299207),
        _entry("2aaaaaaaaaaaaaaaaaaaaB", 9, difficult_direct_answer=True),
    ]
    write_raw_json(raw / "aokvqa_v1p0_train.json", train)
    write_raw_json(raw / "aokvqa_v1p0_val.json", [_entry("22jbM6gDxdaMaunuzgrsBB", 461751, "val")])
    write_raw_json(raw / "aokvqa_v1p0_test.json", [_entry("2285MTjLNuhRVcNTRkbRyQ", 1, "test")])
    write_images(raw, "train2017/000000299207.jpg", "train2014/COCO_train2014_000000000009.jpg")
    write_images(raw, "val2017/000000461751.jpg", "test2017/000000000001.jpg")


def test_train(tmp_path: Path) -> None:
    write_aokvqa(tmp_path)
    media, lost = read_raw("aokvqa", tmp_path, "train")
    assert [(item.key, item.media.name) for item in media if isinstance(item.media, Path)] == [
        ("aokvqa_000000000009", "COCO_train2014_000000000009.jpg"),
        ("aokvqa_000000299207", "000000299207.jpg"),
    ]
    record = {
        "id": "22MexNkBPpdZGX6sxbxVBH",
        "kind": "question",
        "question": "What is the man by the bags awaiting?",
        "answers": ("ride", "taxi", "cab", "bus", "travelling", "traffic", "his ride"),
        "answer_weights": (2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0),
        "choices": ("skateboarder", "train", "delivery", "cab"),
        "label": 3,
        "tags": {"difficult_direct_answer": "false"},
    }
    difficult = record | {"id": "2aaaaaaaaaaaaaaaaaaaaB", "tags": {"difficult_direct_answer": "true"}}
    assert records_of(media) == {"9": [difficult], "299207": [record]}
    assert lost == {}


def test_val_has_answers_and_test_has_none(tmp_path: Path) -> None:
    write_aokvqa(tmp_path)
    (val,) = read_raw("aokvqa", tmp_path, "val")[0]
    assert (val.media_id, val.records[0].label, val.records[0].answers[0]) == ("461751", 3, "ride")
    media, lost = read_raw("aokvqa", tmp_path, "test")
    assert records_of(media)["1"] == [
        {
            "id": "2285MTjLNuhRVcNTRkbRyQ",
            "kind": "question",
            "question": "What is the man by the bags awaiting?",
            "choices": ("skateboarder", "train", "delivery", "cab"),
            "tags": {"difficult_direct_answer": "false"},
        }
    ]
    assert lost == {}


def test_what_cannot_be_kept_is_counted(tmp_path: Path) -> None:
    write_aokvqa(tmp_path)
    entries = [
        _entry("a", 9),
        _entry("a", 9),
        _entry("b", 9, "val"),
        _entry("c", 9, choices=["x", 2]),
        _entry("d", 9, correct_choice_idx=4),
        _entry("e", 9, correct_choice_idx=True),
        _entry("f", 9, direct_answers=[]),
        _entry("g", 9, question=""),
        _entry("h.i", 9),
        {key: value for key, value in _entry("j", 9).items() if key != "direct_answers"},
        _entry("k", 77),
        3,
    ]
    write_raw_json(tmp_path / "aokvqa_v1p0_train.json", entries)
    media, lost = read_raw("aokvqa", tmp_path, "train")
    assert [record.id for item in media for record in item.records] == ["a"]
    assert lost == {
        "question id repeats": (1, 1),
        "question is of another split": (1, 1),
        "question lacks an id, an image, text, choices or answers": (8, 8),
        MISSING_IMAGE: (1, 1),
    }


def test_another_layout_is_one_line(tmp_path: Path) -> None:
    write_aokvqa(tmp_path)
    write_raw_json(tmp_path / "aokvqa_v1p0_val.json", {"questions": []})
    with pytest.raises(UserError, match=r"aokvqa_v1p0_val\.json must hold a list"):
        read_raw("aokvqa", tmp_path, "val")


def test_the_view_of_multiple_choice_teaches_the_right_choice(tmp_path: Path) -> None:
    write_aokvqa(tmp_path)
    card = load_card("aokvqa_multiple_choice")
    record = read_raw(card.name, tmp_path, "train")[0][1].records[0]
    assert card.templates == "multiple_choice"
    instruction, target, _ = render_training(record, load_templates(card.templates), np.random.default_rng(0))
    assert target == "cab"
    assert "(a) skateboarder (b) train (c) delivery (d) cab" in instruction
