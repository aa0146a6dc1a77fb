"""VisDial: indexes become texts; 100 options; dense annotations by image and 1-based round; the last round of test."""

from pathlib import Path
from typing import Any

import pytest

from instructblip.errors import UserError
from tests.kit.raw_files import read_raw, write_images, write_raw_json

QUESTIONS = ["is it sunny", "how many dogs", "any people"]
# The answers that are meant, and enough others to make 100 options of.
ANSWERS = ["no", "2", "yes", "i can't tell", *(f"option {number}" for number in range(200))]


def _options(*first: int) -> list[int]:
    """100 indexes of answers: these, and then others."""
    return [*first, *(number for number in range(4, 204) if number not in first)][:100]


def _round(question: int, answer: int, gt_index: int) -> dict[str, Any]:
    options = _options()
    options[gt_index] = answer
    return {"question": question, "answer": answer, "answer_options": options, "gt_index": gt_index}


def _dialogs(split: str, *dialogs: Any) -> dict[str, Any]:
    return {
        "version": "1.0",
        "split": split,
        "data": {"questions": QUESTIONS, "answers": ANSWERS, "dialogs": list(dialogs)},
    }


def write_visdial(raw: Path) -> None:
    """A dialog of three rounds in val, the second one with dense annotations; one of two rounds in test; two in train,
    whose images are COCO's of train2014 and val2014."""
    val = {
        "image_id": 185565,
        "caption": "a dog on grass",
        "dialog": [_round(0, 2, 99), _round(1, 1, 0), _round(2, 0, 40)],
    }
    write_raw_json(raw / "visdial_1.0_val.json", _dialogs("val2018", val))
    relevance = [0.0] * 100
    relevance[0], relevance[3] = 1, 0.4
    dense = [{"image_id": 185565, "round_id": 2, "gt_relevance": relevance}]
    write_raw_json(raw / "visdial_1.0_val_dense_annotations.json", dense)
    write_images(raw / "VisualDialog_val2018", "VisualDialog_val2018_000000185565.jpg")

    asked = {"question": 1, "answer_options": _options(3, 2)}
    test = {"image_id": 568676, "caption": "a cat", "dialog": [{"question": 0, "answer": 2}, asked]}
    write_raw_json(raw / "visdial_1.0_test.json", _dialogs("test2018", test))
    write_images(raw / "VisualDialog_test2018", "VisualDialog_test2018_000000568676.jpg")

    bare = {"image_id": 391895, "caption": "a man", "dialog": [{"question": 2, "answer": 2}]}
    train = {"image_id": 9, "caption": "food", "dialog": [_round(0, 0, 5)]}
    write_raw_json(raw / "visdial_1.0_train.json", _dialogs("train", bare, train))
    dense = [{"image_id": 9, "round_id": 1, "relevance": relevance}]
    write_raw_json(raw / "visdial_1.0_train_dense_annotations.json", dense)
    write_images(raw, "train2014/COCO_train2014_000000000009.jpg", "val2014/COCO_val2014_000000391895.jpg")


def test_val(tmp_path: Path) -> None:
    write_visdial(tmp_path)
    ((image,), losses) = read_raw("visdial", tmp_path, "val")
    # The number may well be that of another image of COCO.
    assert (image.key, image.media_id) == ("visdial_000000185565", "VisualDialog_val2018_000000185565")
    assert image.media == tmp_path / "VisualDialog_val2018/VisualDialog_val2018_000000185565.jpg"
    first, second, third = image.records
    assert {name: value for name, value in first.to_dict().items() if name != "choices"} == {
        "id": "185565-1",
        "kind": "dialog",
        "question": "is it sunny",
        "answers": ("yes",),
        "label": 99,
        "context": "a dog on grass",
    }
    assert (len(first.choices), first.choices[0], first.choices[99]) == (100, "option 0", "yes")
    assert (second.answers, second.label, second.choices[:2]) == (("2",), 0, ("2", "option 1"))
    assert second.history == (("is it sunny", "yes"),)
    assert second.relevance == (1.0, 0.0, 0.0, 0.4, *[0.0] * 96)
    assert (third.answers, third.label, third.choices[40]) == (("no",), 40, "no")
    assert third.history == (("is it sunny", "yes"), ("how many dogs", "2"))
    assert first.relevance == third.relevance == ()
    assert losses == {}


def test_test_split_asks_the_last_round_without_its_answer(tmp_path: Path) -> None:
    write_visdial(tmp_path)
    ((image,), losses) = read_raw("visdial", tmp_path, "test")
    (record,) = image.records
    assert {name: value for name, value in record.to_dict().items() if name != "choices"} == {
        "id": "568676-2",
        "kind": "dialog",
        "question": "how many dogs",
        "context": "a cat",
        "history": (("is it sunny", "yes"),),
    }
    assert (len(record.choices), record.choices[:2]) == (100, ("i can't tell", "yes"))
    assert losses == {}


def test_train_with_images_of_both_folders_of_coco_and_rounds_without_options(tmp_path: Path) -> None:
    write_visdial(tmp_path)
    media, losses = read_raw("visdial", tmp_path, "train")
    assert [(item.key, item.media_id) for item in media] == [
        ("visdial_000000391895", "391895"),
        ("visdial_000000000009", "9"),
    ]
    assert [item.media for item in media] == [
        tmp_path / "val2014/COCO_val2014_000000391895.jpg",
        tmp_path / "train2014/COCO_train2014_000000000009.jpg",
    ]
    (bare,), (record,) = (item.records for item in media)
    assert (bare.answers, bare.choices, bare.label, bare.relevance) == (("yes",), (), None, ())
    assert (record.label, record.choices[5], record.relevance[3]) == (5, "no", 0.4)
    assert losses == {}


def _changed(**changes: Any) -> dict[str, Any]:
    return {**_round(0, 2, 3), **changes}


def test_losses(tmp_path: Path) -> None:
    write_visdial(tmp_path)
    good = _round(0, 2, 3)
    numbers = iter(range(1, 100))

    def dialog(*rounds: Any) -> dict[str, Any]:
        return {"image_id": next(numbers), "caption": "c", "dialog": list(rounds)}

    dialogs = [
        {"image_id": 185565, "caption": None, "dialog": [good]},
        {"image_id": 185565, "caption": "again", "dialog": [good, good]},
        {"image_id": 77, "caption": "no image", "dialog": [good]},
        dialog(good, _changed(question=3)),
        dialog(_changed(question=-1)),
        dialog(_changed(answer="2"), good, good),
        dialog(_changed(answer_options=good["answer_options"][:99])),
        dialog(_changed(answer_options=[*good["answer_options"][:99], 204])),
        dialog(_changed(gt_index=4)),
        dialog(_changed(gt_index=None)),
        dialog(_changed(gt_index=100)),
        dialog("x"),
        {"image_id": 78, "dialog": []},
        {"image_id": "n1", "dialog": [good]},
        None,
    ]
    write_raw_json(tmp_path / "visdial_1.0_val.json", _dialogs("val2018", *dialogs))
    scores = [0.5] * 100
    dense = [
        {"image_id": 185565, "round_id": 1, "gt_relevance": scores},
        {"image_id": 185565, "round_id": 1, "gt_relevance": [0.1] * 100},
        {"image_id": 185565, "round_id": 0, "gt_relevance": scores},
        {"image_id": 185565, "round_id": 2, "gt_relevance": scores[:99]},
        {"image_id": 185565, "round_id": 2, "gt_relevance": [*scores[:99], 1.5]},
        {"image_id": 185565, "round_id": 3, "gt_relevance": [0] * 100},
        "x",
    ]
    write_raw_json(tmp_path / "visdial_1.0_val_dense_annotations.json", dense)
    ((image,), losses) = read_raw("visdial", tmp_path, "val")
    assert [(record.id, record.context, record.relevance) for record in image.records] == [
        ("185565-1", None, (0.5,) * 100)
    ]
    assert losses == {
        "a round has not 100 options": (1, 1),
        "a round is no object": (1, 1),
        "a round's answer is not an index of the list of answers": (2, 4),
        "a round's question is not an index of the list of questions": (2, 3),
        "dense annotation lacks image_id, round_id or 100 scores, not all of them 0": (4, 0),
        "dense annotation of a round that is not there": (1, 0),
        "dense annotation repeats a round": (1, 0),
        "dialog lacks image_id or rounds": (3, 3),
        "dialog repeats an image": (1, 2),
        "gt_index is not the place of the answer among the options": (3, 3),
        "image file is missing": (1, 1),
    }


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("visdial_1.0_val.json", {"data": {"questions": QUESTIONS, "dialogs": [1]}}, "list under 'data.answers'"),
        ("visdial_1.0_val.json", [], "must hold a list under 'data.questions'"),
        ("visdial_1.0_val_dense_annotations.json", {}, "must hold a list"),
    ],
)
def test_files_of_another_form_are_one_line(tmp_path: Path, name: str, value: Any, words: str) -> None:
    write_visdial(tmp_path)
    write_raw_json(tmp_path / name, value)
    with pytest.raises(UserError, match=words):
        read_raw("visdial", tmp_path, "val")
