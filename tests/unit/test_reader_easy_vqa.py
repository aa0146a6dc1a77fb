"""The easy-VQA reader: splits by image, kinds by answer, statements by explicit rules, losses counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from instructblip.data.readers import READERS, Losses, MediaRecords, RawSplit
from instructblip.data.readers.easy_vqa import split_of_image, statement_of
from instructblip.errors import UserError

STATEMENTS = {
    "is there a circle?": "There is a circle.",
    "is there a red shape?": "There is a red shape.",
    "is there a triangle in the image?": "There is a triangle in the image.",
    "is there a teal shape in the image?": "There is a teal shape in the image.",
    "is a rectangle present?": "A rectangle is present.",
    "is a gray shape present?": "A gray shape is present.",
    "does the image contain a circle?": "The image contains a circle.",
    "does the image contain a brown shape?": "The image contains a brown shape.",
    "is there not a circle?": "There is not a circle.",
    "is there not a blue shape?": "There is not a blue shape.",
    "is there not a triangle in the image?": "There is not a triangle in the image.",
    "is there not a green shape in the image?": "There is not a green shape in the image.",
    "does the image not contain a rectangle?": "The image does not contain a rectangle.",
    "does the image not contain a red shape?": "The image does not contain a red shape.",
    "is no circle present?": "No circle is present.",
    "is no yellow shape present?": "No yellow shape is present.",
}


def _read(raw: Path, split: str, entries: Any, package_split: str = "test") -> tuple[list[MediaRecords], Losses]:
    (raw / package_split).mkdir(parents=True, exist_ok=True)
    (raw / package_split / "questions.json").write_text(json.dumps(entries))
    losses = Losses()
    return list(READERS["easy_vqa"](RawSplit(raw, split), losses)), losses


def test_records_equal_what_a_person_reads_off_the_file(tmp_path: Path) -> None:
    entries = [
        ["what color is the shape?", "blue", 7],
        ["what is the blue shape?", "circle", 3],
        ["is there not a red shape?", "yes", 7],
        ["is a circle present?", "no", 7],
    ]
    images, losses = _read(tmp_path, "test", entries)
    assert [(image.key, image.media_id) for image in images] == [
        ("easy_vqa_test_000003", "3"),
        ("easy_vqa_test_000007", "7"),
    ]
    assert images[1].media == tmp_path / "test/images/7.png"
    assert [record.to_dict() for record in images[1].records] == [
        {"id": "test-7-0", "kind": "color", "question": "what color is the shape?", "answers": ("blue",)},
        {"id": "test-7-1", "kind": "absent", "question": "is there not a red shape?", "answers": ("yes",)},
        {
            "id": "test-7-1-statement",
            "kind": "statement",
            "question": "There is not a red shape.",
            "answers": ("true",),
            "label": 1,
        },
        {"id": "test-7-2", "kind": "absent", "question": "is a circle present?", "answers": ("no",)},
        {
            "id": "test-7-2-statement",
            "kind": "statement",
            "question": "A circle is present.",
            "answers": ("false",),
            "label": 0,
        },
    ]
    assert [record.kind for record in images[0].records] == ["shape"]
    assert losses.to_list() == []


@pytest.mark.parametrize(("question", "statement"), STATEMENTS.items())
def test_each_of_the_sixteen_forms(question: str, statement: str) -> None:
    assert statement_of(question) == statement


@pytest.mark.parametrize("question", ["is there a purple shape?", "is there a red circle?", "is there no circle?", "x"])
def test_unknown_form_is_never_guessed(question: str) -> None:
    assert statement_of(question) is None


def test_losses_are_counted_with_examples(tmp_path: Path) -> None:
    entries = [
        ["is there a purple shape?", "no", 1],
        ["how many?", "three", 1],
        ["no id", "yes"],
        ["id is text", "yes", "4"],
        *[["how many?", str(number), 2] for number in range(7)],
    ]
    images, losses = _read(tmp_path, "test", entries)
    by_reason = {loss["reason"]: loss for loss in losses.to_list()}
    assert {reason: loss["count"] for reason, loss in by_reason.items()} == {
        "answer is not among the 13": 8,
        "entry is not [question, answer, image id]": 2,
        "yes/no question of unknown form gives no statement": 1,
    }
    assert by_reason["answer is not among the 13"]["examples"][:2] == ["test-1-1: 'three'", "test-2-0: '0'"]
    assert len(by_reason["answer is not among the 13"]["examples"]) == 5
    assert [record.id for record in images[0].records] == ["test-1-0"]


def test_train_and_validation_share_no_image_and_miss_none(tmp_path: Path) -> None:
    entries = [["what shape is present?", "circle", number] for number in range(200)]
    train, _ = _read(tmp_path, "train", entries, "train")
    validation, _ = _read(tmp_path, "validation", entries, "train")
    ids = [[int(image.media_id) for image in images] for images in (train, validation)]
    assert sorted(ids[0] + ids[1]) == list(range(200))
    assert ids[0] == sorted(ids[0])
    assert ids[1] == [number for number in range(200) if split_of_image("train", number) == "validation"]
    # Golden: the split is part of every published number.
    assert ids[1][:5] == [7, 11, 18, 19, 23]
    assert all(image.media == tmp_path / f"train/images/{image.media_id}.png" for image in validation)


def test_malformed_entry_of_the_shared_file_is_counted_in_one_split(tmp_path: Path) -> None:
    counts = [len(_read(tmp_path, split, [["x"]], "train")[1].to_list()) for split in ("train", "validation")]
    assert counts == [1, 0]


@pytest.mark.parametrize(
    ("split", "content", "words"),
    [
        ("dev", "[]", "no split 'dev'"),
        ("test", '[["is there a circle?", "y', "not whole JSON"),
        ("test", '{"questions": []}', "must hold a list"),
        ("train", "[]", "does not exist"),
    ],
)
def test_bad_raw_files_are_one_clear_line(tmp_path: Path, split: str, content: str, words: str) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test/questions.json").write_text(content)
    with pytest.raises(UserError, match=words):
        list(READERS["easy_vqa"](RawSplit(tmp_path, split), Losses()))


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("is there a red shape?", "yes", "present"),
        ("is there not a red shape?", "no", "present"),
        ("is no circle present?", "yes", "absent"),
        ("does the image contain a circle?", "no", "absent"),
    ],
)
def test_yes_no_questions_are_divided_by_what_the_picture_shows(
    tmp_path: Path, question: str, answer: str, kind: str
) -> None:
    (image,), losses = _read(tmp_path, "test", [[question, answer, 1]])
    assert [record.kind for record in image.records] == [kind, "statement"]
    assert losses.to_list() == []
