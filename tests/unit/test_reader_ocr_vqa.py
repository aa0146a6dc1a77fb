"""OCR-VQA: parallel lists, integer splits, file names with the extension of the url, vanished covers."""

import json
from pathlib import Path
from typing import Any

import pytest

from instructblip.data.cards import load_card
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.data.readers.common import MISSING_IMAGE
from instructblip.errors import UserError
from tests.kit.raw_files import read_raw, records_of, write_images, write_raw_json


def _book(
    split: int, url: str = "http://ecx.images-amazon.com/images/I/51l6XIoa3rL.jpg", **more: Any
) -> dict[str, Any]:
    fields = {"imageURL": url, "title": "Mom's", "authorName": "Sandra Boynton", "genre": "Calendars", "split": split}
    questions = ["Who wrote this book?", "Is this a financial book? "]
    return fields | {"questions": questions, "answers": ["Sandra Boynton", "No"]} | more


def write_ocr_vqa(raw: Path) -> None:
    """Covers in three formats and splits; ids with and without a letter, a leading zero, an extra "image" key."""
    books = {
        "0761183272": _book(1),
        "B00A": _book(2, "http://x/y.png"),
        "1578": _book(3, "http://x/y.gif", image="1578.gif"),
        "000": _book(1, "http://x/y.jpg?size=1", answers=["é", "Yes"]),
    }
    write_raw_json(raw / "dataset.json", books)
    write_images(raw / "images", "0761183272.jpg", "B00A.png", "1578.gif", "000.jpg")


def test_train(tmp_path: Path) -> None:
    write_ocr_vqa(tmp_path)
    media, lost = read_raw("ocr_vqa", tmp_path, "train")
    assert [(item.key, item.media) for item in media] == [
        ("ocr_vqa_0761183272", tmp_path / "images/0761183272.jpg"),
        ("ocr_vqa_000", tmp_path / "images/000.jpg"),
    ]
    fields = {"kind": "question", "tags": {"genre": "Calendars"}}
    assert records_of(media) == {
        "0761183272": [
            {"id": "0761183272-0", "question": "Who wrote this book?", "answers": ("Sandra Boynton",), **fields},
            {"id": "0761183272-1", "question": "Is this a financial book?", "answers": ("No",), **fields},
        ],
        "000": [
            {"id": "000-0", "question": "Who wrote this book?", "answers": ("é",), **fields},
            {"id": "000-1", "question": "Is this a financial book?", "answers": ("Yes",), **fields},
        ],
    }
    assert lost == {}


def test_the_extension_is_that_of_the_url(tmp_path: Path) -> None:
    write_ocr_vqa(tmp_path)
    paths = [read_raw("ocr_vqa", tmp_path, split)[0][0].media for split in ("val", "test")]
    assert paths == [tmp_path / "images/B00A.png", tmp_path / "images/1578.gif"]
    write_images(tmp_path / "images", "B00A.jpg")  # the url's own comes first
    assert read_raw("ocr_vqa", tmp_path, "val")[0][0].media == tmp_path / "images/B00A.png"
    (tmp_path / "images/B00A.png").unlink()
    assert read_raw("ocr_vqa", tmp_path, "val")[0][0].media == tmp_path / "images/B00A.jpg"


def test_what_cannot_be_kept_is_counted(tmp_path: Path) -> None:
    write_ocr_vqa(tmp_path)
    books = {
        "000": _book(1, questions=["a?", " ", "c?"], answers=["b", "b", None]),
        "111": _book(1),
        "222": _book(1, answers=["one"]),
        "333": _book(1, questions=None),
        "../x": _book(1),
        "444": _book(4),
        "555": _book("1"),  # type: ignore[arg-type]
        "666": "x",
        "777": _book(2),
    }
    text = json.dumps(books)[:-1] + ', "000": ' + json.dumps(_book(1)) + "}"
    (tmp_path / "dataset.json").write_text(text)
    media, lost = read_raw("ocr_vqa", tmp_path, "train")
    assert [record.id for item in media for record in item.records] == ["000-0"]
    assert lost == {
        "book has no split 1, 2 or 3": (3, 4),
        "book id is not of letters and digits": (1, 2),
        "book id repeats": (1, 2),
        "book's questions and answers are not two lists of one length": (2, 2),
        "question or answer is blank or no text": (2, 2),
        MISSING_IMAGE: (1, 2),
    }
    assert read_raw("ocr_vqa", tmp_path, "test") == ([], {})


def test_an_error_page_saved_as_a_cover_is_found_by_preparation(tmp_path: Path) -> None:
    write_ocr_vqa(tmp_path / "raw")
    (tmp_path / "raw/images/000.jpg").write_text("<html>gone</html>")
    (path,) = prepare_dataset(load_card("ocr_vqa"), tmp_path / "raw", tmp_path, splits=["train"], progress=False)
    manifest = json.loads(path.read_text())
    lost = [{"reason": "file is not an image", "count": 1, "records": 2, "examples": ["images/000.jpg"]}]
    assert (manifest["records_by_kind"], manifest["lost"]) == ({"question": 2}, lost)


def test_another_layout_or_split_is_one_line(tmp_path: Path) -> None:
    write_ocr_vqa(tmp_path)
    write_raw_json(tmp_path / "dataset.json", [])
    with pytest.raises(UserError, match=r"dataset\.json must hold an object of keys and values"):
        read_raw("ocr_vqa", tmp_path, "train")
