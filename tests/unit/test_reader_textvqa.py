"""TextVQA: OCR tokens joined by image, images of val among those of train, ten answers, test without any."""

from pathlib import Path
from typing import Any

import pytest

from instructblip.errors import UserError
from tests.kit.raw_files import read_raw, records_of, write_images, write_raw_json


def _question(number: int, image_id: str, question: str, answers: Any = None) -> dict[str, Any]:
    entry = {
        "question": question,
        "image_id": image_id,
        "image_classes": ["Camera"],
        "flickr_original_url": f"https://farm1.staticflickr.com/{image_id}_o.jpg",
        "flickr_300k_url": f"https://c1.staticflickr.com/{image_id}_z.jpg",
        "image_width": 1024,
        "image_height": 664,
        "question_tokens": question.split(),
        "question_id": number,
        "set_name": "val",
    }
    return entry if answers is None else {**entry, "answers": answers}


def _write(raw: Path, split: str, questions: list[Any], ocr: list[Any]) -> None:
    header = {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_raw_json(raw / f"TextVQA_0.5.1_{split}.json", {**header, "data": questions})
    write_raw_json(raw / f"TextVQA_Rosetta_OCR_v0.2_{split}.json", {**header, "data": ocr})


def _ocr(image_id: str, *tokens: str) -> dict[str, Any]:
    box = {"top_left_x": 0.1, "top_left_y": 0.2, "width": 0.3, "height": 0.1, "rotation": 0}
    info = [{"word": token, "bounding_box": box} for token in tokens]
    return {"image_id": image_id, "ocr_tokens": list(tokens), "ocr_info": info}


def write_textvqa(raw: Path) -> None:
    """Three questions on two images of val, one without any words in it, and a question of test; OCR in another order."""
    first, second, third = "003a8ae2ef43b901", "b9dc400eb20bad64", "0a1b2c3d4e5f6071"
    _write(
        raw,
        "val",
        [
            _question(
                34602, first, "what is the brand of this camera?", ["nous les gosses", *["dakota"] * 5, *["DC"] * 4]
            ),
            _question(34603, second, "what does it say?", ["unanswerable"] * 10),
            _question(34604, first, "who made it? ", ["Nestlé"] * 10),
        ],
        [_ocr(second), _ocr(first, "DAKOTA", "café", "35")],
    )
    _write(raw, "test", [_question(39602, third, "what year is it?")], [_ocr(third, "1984")])
    write_images(raw / "train_images", f"{first}.jpg", f"{second}.jpg")
    write_images(raw / "test_images", f"{third}.jpg")


def test_val(tmp_path: Path) -> None:
    write_textvqa(tmp_path)
    media, losses = read_raw("textvqa", tmp_path, "val")
    assert [(item.key, item.media) for item in media] == [
        ("textvqa_003a8ae2ef43b901", tmp_path / "train_images/003a8ae2ef43b901.jpg"),
        ("textvqa_b9dc400eb20bad64", tmp_path / "train_images/b9dc400eb20bad64.jpg"),
    ]
    assert records_of(media) == {
        "003a8ae2ef43b901": [
            {
                "id": "34602",
                "kind": "question",
                "question": "what is the brand of this camera?",
                "answers": ("dakota", "DC", "nous les gosses"),
                "answer_weights": (5.0, 4.0, 1.0),
                "ocr_tokens": ("DAKOTA", "café", "35"),
            },
            {
                "id": "34604",
                "kind": "question",
                "question": "who made it?",
                "answers": ("Nestlé",),
                "answer_weights": (10.0,),
                "ocr_tokens": ("DAKOTA", "café", "35"),
            },
        ],
        "b9dc400eb20bad64": [
            {
                "id": "34603",
                "kind": "question",
                "question": "what does it say?",
                "answers": ("unanswerable",),
                "answer_weights": (10.0,),
            }
        ],
    }
    assert losses == {}


def test_test_split_has_no_answers(tmp_path: Path) -> None:
    write_textvqa(tmp_path)
    media, losses = read_raw("textvqa", tmp_path, "test")
    assert [item.media for item in media] == [tmp_path / "test_images/0a1b2c3d4e5f6071.jpg"]
    assert records_of(media) == {
        "0a1b2c3d4e5f6071": [
            {"id": "39602", "kind": "question", "question": "what year is it?", "ocr_tokens": ("1984",)}
        ]
    }
    assert losses == {}


def test_losses(tmp_path: Path) -> None:
    image = "003a8ae2ef43b901"
    answers = ["a"] * 10
    questions = [
        _question(1, image, "kept without OCR tokens?", ["b", "", *["b"] * 8]),
        _question(1, image, "again?", answers),
        _question(2, image, "no answers?"),
        _question(3, image, "answers as in VQA?", [{"answer": "a", "answer_id": 1}]),
        _question(4, image, "", answers),
        _question(5, "../x", "elsewhere?", answers),
        _question(6, "ffffffffffffffff", "no image?", answers),
        _question(7, "ffffffffffffffff", "nor here?", answers),
        ["x"],
    ]
    _write(tmp_path, "train", questions, [_ocr("ffffffffffffffff")])
    write_images(tmp_path / "train_images", f"{image}.jpg")
    media, losses = read_raw("textvqa", tmp_path, "train")
    assert records_of(media) == {
        image: [
            {
                "id": "1",
                "kind": "question",
                "question": "kept without OCR tokens?",
                "answers": ("b",),
                "answer_weights": (9.0,),
                "annotators": 10,
            }
        ]
    }
    assert losses == {
        "answer of one person is blank or no text": (1, 0),
        "entry lacks question_id, image_id or question": (3, 3),
        "image file is missing": (1, 2),
        "image is not in the OCR file (kept without OCR tokens)": (1, 0),
        "question has no answers": (2, 2),
        "question repeats an id": (1, 1),
    }


def test_a_missing_ocr_file_is_one_line(tmp_path: Path) -> None:
    write_textvqa(tmp_path)
    (tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    with pytest.raises(UserError, match=r"lacks TextVQA_Rosetta_OCR_v0\.2_val\.json \(ocr of split val\)"):
        read_raw("textvqa", tmp_path, "val")
