"""VQA 2.0 and OK-VQA: joined by question id, COCO images by number, ten people's answers, hidden test answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instructblip.data.cards import load_card
from instructblip.data.readers.common import MISSING_IMAGE
from instructblip.data.templates import load_templates, render_training
from instructblip.errors import UserError
from tests.kit.raw_files import read_raw, records_of, write_images, write_raw_json

TEN = ["net"] * 3 + ["netting"] * 4 + ["mesh", "screen", "net"]


def _annotation(question_id: int, image_id: int, answers: list[str], **more: Any) -> dict[str, Any]:
    people = [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers, 1)]
    fields = {"question_type": "what is", "multiple_choice_answer": answers[0], "answers": people}
    return {**fields, "image_id": image_id, "answer_type": "other", "question_id": question_id, **more}


def _wrapper(key: str, subtype: str, entries: list[Any], year: str = "v2.0 of the VQA") -> dict[str, Any]:
    info = {"description": f"This is {year} dataset.", "version": "2.0", "year": 2017}
    return {"info": info, "task_type": "Open-Ended", "data_type": "mscoco", key: entries, "data_subtype": subtype}


def write_vqav2(raw: Path) -> None:
    """Questions and annotations in different orders; one train image has the name and folder of 2017's val."""
    questions = [
        {"image_id": 458752, "question": "What is this photo taken\nlooking through? ", "question_id": 458752000},
        {"image_id": 262146, "question": "What color is the snow?", "question_id": 262146000},
        {"image_id": 458752, "question": "Is this man a professional?", "question_id": 458752002},
    ]
    annotations = [
        _annotation(262146000, 262146, ["white"] * 10, question_type="what color is the"),
        _annotation(458752002, 458752, ["yes"] * 9 + ["no"], answer_type="yes/no", question_type="is this"),
        _annotation(458752000, 458752, TEN),
    ]
    name = "v2_OpenEnded_mscoco_{}_questions.json"
    write_raw_json(raw / name.format("train2014"), _wrapper("questions", "train2014", questions))
    write_raw_json(raw / "v2_mscoco_train2014_annotations.json", _wrapper("annotations", "train2014", annotations))
    val = [{"image_id": 42, "question": "How many?", "question_id": 42001}]
    write_raw_json(raw / name.format("val2014"), _wrapper("questions", "val2014", val))
    annotation = _annotation(42001, 42, ["2"] * 10, answer_type="number")
    write_raw_json(raw / "v2_mscoco_val2014_annotations.json", _wrapper("annotations", "val2014", [annotation]))
    test = [
        {"image_id": 1, "question": "Is it?", "question_id": 1000},
        {"image_id": 16, "question": "Who?", "question_id": 16000},
    ]
    write_raw_json(raw / name.format("test2015"), _wrapper("questions", "test2015", test))
    write_raw_json(raw / name.format("test-dev2015"), _wrapper("questions", "test-dev2015", test[1:]))
    write_images(raw, "train2014/COCO_train2014_000000458752.jpg", "val2017/000000262146.jpg")
    write_images(raw, "val2014/COCO_val2014_000000000042.jpg")
    write_images(raw / "test2015", "COCO_test2015_000000000001.jpg", "COCO_test2015_000000000016.jpg")


def write_okvqa(raw: Path) -> None:
    """The stem and the text as typed; the ten answers are those of five people."""
    people = [("racing", "race")] * 4 + [("motocross", "motocross")] * 4 + [("ride", "ride")] * 2
    for split in ("train", "val"):
        answers = [
            {"answer_id": n, "raw_answer": typed, "answer_confidence": "yes", "answer": stem}
            for n, (typed, stem) in enumerate(people, 1)
        ]
        entry = {"image_id": 51606, "question": "What sport is this?", "question_id": 516065}
        fields = {"answer_type": "other", "question_type": "four", "answers": answers, "confidence": 3}
        annotation = {**fields, "image_id": 51606, "question_id": 516065}
        year = "v1.0 of the OK-VQA"
        questions = _wrapper("questions", f"{split}2014", [entry], year)
        write_raw_json(raw / f"OpenEnded_mscoco_{split}2014_questions.json", questions)
        annotations = _wrapper("annotations", f"{split}2014", [annotation], year)
        write_raw_json(raw / f"mscoco_{split}2014_annotations.json", annotations)
    write_images(raw, "train2014/COCO_train2014_000000051606.jpg")


def test_vqav2_train(tmp_path: Path) -> None:
    write_vqav2(tmp_path)
    media, lost = read_raw("vqav2", tmp_path, "train")
    assert [(item.key, item.media) for item in media] == [
        ("vqav2_000000262146", tmp_path / "val2017/000000262146.jpg"),
        ("vqav2_000000458752", tmp_path / "train2014/COCO_train2014_000000458752.jpg"),
    ]
    assert records_of(media) == {
        "262146": [
            {
                "id": "262146000",
                "kind": "question",
                "question": "What color is the snow?",
                "answers": ("white",),
                "answer_weights": (10.0,),
                "tags": {"answer_type": "other", "question_type": "what color is the"},
            }
        ],
        "458752": [
            {
                "id": "458752000",
                "kind": "question",
                "question": "What is this photo taken looking through?",
                "answers": ("net", "netting", "mesh", "screen"),
                "answer_weights": (4.0, 4.0, 1.0, 1.0),
                "tags": {"answer_type": "other", "question_type": "what is"},
            },
            {
                "id": "458752002",
                "kind": "question",
                "question": "Is this man a professional?",
                "answers": ("yes", "no"),
                "answer_weights": (9.0, 1.0),
                "tags": {"answer_type": "yes/no", "question_type": "is this"},
            },
        ],
    }
    assert lost == {}


@pytest.mark.parametrize(("split", "ids"), [("val", ["42"]), ("test", ["1", "16"]), ("test-dev", ["16"])])
def test_vqav2_other_splits(tmp_path: Path, split: str, ids: list[str]) -> None:
    write_vqav2(tmp_path)
    media, lost = read_raw("vqav2", tmp_path, split)
    assert ([item.media_id for item in media], lost) == (ids, {})
    fields = {field for records in records_of(media).values() for record in records for field in record}
    answered = {"answers", "answer_weights", "tags"} if split == "val" else set()
    assert fields == {"id", "kind", "question"} | answered


def test_okvqa_trains_on_what_was_typed_and_scores_with_the_stem(tmp_path: Path) -> None:
    write_okvqa(tmp_path)
    expected = {"train": ("racing", "motocross", "ride"), "val": ("race", "motocross", "ride")}
    for split, answers in expected.items():
        media, lost = read_raw("okvqa", tmp_path, split)
        assert [item.key for item in media] == ["okvqa_000000051606"]
        assert records_of(media)["51606"] == [
            {
                "id": "516065",
                "kind": "question",
                "question": "What sport is this?",
                "answers": answers,
                "answer_weights": (4.0, 4.0, 2.0),
                "tags": {"answer_type": "other", "question_type": "four"},
            }
        ]
        assert lost == {}


def test_okvqa_without_the_typed_text_takes_the_stem(tmp_path: Path) -> None:
    write_okvqa(tmp_path)
    path = tmp_path / "mscoco_train2014_annotations.json"
    path.write_text(path.read_text().replace('"raw_answer": "racing"', '"raw_answer": " "'))
    assert read_raw("okvqa", tmp_path, "train")[0][0].records[0].answers == ("race", "motocross", "ride")


@pytest.mark.parametrize("file", ["OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json"])
def test_a_file_of_vqa_1_in_the_folder_of_okvqa_is_refused(tmp_path: Path, file: str) -> None:
    write_okvqa(tmp_path)
    path = tmp_path / file
    path.write_text(path.read_text().replace("v1.0 of the OK-VQA", "v1.0 of the VQA"))
    with pytest.raises(UserError, match=f"{file} says 'This is v1.0 of the VQA dataset.', which is not OKVQA"):
        read_raw("okvqa", tmp_path, "train")


def test_files_of_vqa_1_are_not_taken_for_vqa_2(tmp_path: Path) -> None:
    write_okvqa(tmp_path)
    with pytest.raises(UserError, match=r"lacks v2_OpenEnded_mscoco_train2014_questions\.json"):
        read_raw("vqav2", tmp_path, "train")


def test_a_file_of_another_split_is_refused(tmp_path: Path) -> None:
    write_vqav2(tmp_path)
    name = "v2_OpenEnded_mscoco_{}2014_questions.json"
    (tmp_path / name.format("val")).replace(tmp_path / name.format("train"))
    with pytest.raises(UserError, match="says it is of val2014, not of split train"):
        read_raw("vqav2", tmp_path, "train")


def test_what_does_not_fit_together_is_counted(tmp_path: Path) -> None:
    write_vqav2(tmp_path)
    questions = [
        *({"image_id": 458752, "question": f"{n}?", "question_id": n} for n in range(8)),
        {"image_id": 458752, "question": "again?", "question_id": 0},
        {"image_id": 458752, "question": " ", "question_id": 100},
        {"image_id": "abc", "question": "a?", "question_id": 101},
        {"image_id": 458752, "question_id": 102},
        "x",
        *({"image_id": 77, "question": "gone?", "question_id": 770 + n} for n in range(3)),
    ]
    annotations = [
        _annotation(0, 458752, ["a"] * 10),
        _annotation(0, 458752, ["b"] * 10),
        _annotation(1, 458752, ["a"] * 8 + [" ", "b "]),
        _annotation(2, 458752, ["", ""]),
        _annotation(3, 262146, ["a"] * 10),
        _annotation(4, 458752, ["a"]) | {"answers": None},
        _annotation(5, 458752, ["a"]) | {"answers": ["a"]},
        _annotation(99, 458752, ["a"] * 10),
        _annotation(100, 458752, ["a"] * 10),  # of the blank question
        {"answers": []},
        *(_annotation(770 + n, 77, ["a"] * 10) for n in range(3)),
    ]  # 6 and 7 have none
    write_raw_json(tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": questions})
    write_raw_json(tmp_path / "v2_mscoco_train2014_annotations.json", {"annotations": annotations})
    media, lost = read_raw("vqav2", tmp_path, "train")
    (item,) = media
    assert [(r.id, r.answers, r.answer_weights, r.annotators) for r in item.records] == [
        ("0", ("a",), (10.0,), None),
        ("1", ("a", "b"), (8.0, 1.0), 10),
    ]
    assert lost == {
        "question id repeats": (1, 1),
        "question lacks question_id, image_id or text": (4, 4),
        "annotation repeats a question id": (1, 0),
        "answer of one person is blank or no text": (1, 0),
        "annotation has no answer with text": (1, 1),
        "annotation names another image than its question": (1, 1),
        "annotation has no list of answers": (2, 2),
        "annotation has no question": (1, 1),
        "annotation has no question_id": (1, 0),
        "question has no annotation": (2, 2),
        MISSING_IMAGE: (1, 3),
    }
    # Every question is either kept or counted, the annotation without a question apart.
    assert len(item.records) + sum(records for _, records in lost.values()) - 1 == len(questions)


def test_no_images_and_cut_annotations_are_one_line(tmp_path: Path) -> None:
    write_vqav2(tmp_path)
    path = tmp_path / "v2_mscoco_train2014_annotations.json"
    path.write_text(path.read_text()[:-300])
    with pytest.raises(UserError, match=r"annotations\.json is not whole JSON"):
        read_raw("vqav2", tmp_path, "train")
    for folder in ("train2014", "val2014", "val2017"):
        (tmp_path / folder).rename(tmp_path / f"x{folder}")
    with pytest.raises(UserError, match=r"lacks train2014 or val2014 or .* \(images of split train\)"):
        read_raw("vqav2", tmp_path, "train")


@pytest.mark.parametrize("parent", ["vqav2", "okvqa", "aokvqa"])
def test_question_generation_is_a_view_that_teaches_the_question(parent: str) -> None:
    card = load_card(f"{parent}_question_generation")
    assert (card.view_of, card.source, card.role, card.evaluation) == (parent, parent, "held-in", None)
    assert card.expected_records("train") == load_card(parent).expected_records("train")
    assert card.templates == "question_generation"


def test_question_generation_of_a_record(tmp_path: Path) -> None:
    write_vqav2(tmp_path)
    record = read_raw("vqav2_question_generation", tmp_path, "train")[0][0].records[0]
    instruction, target, _ = render_training(record, load_templates("question_generation"), np.random.default_rng(0))
    assert target == "What color is the snow?"
    assert "white" in instruction and target not in instruction
