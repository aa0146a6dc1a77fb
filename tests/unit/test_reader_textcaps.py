"""TextCaps: one entry a caption, val images in train_images, references once an image, OCR tokens from another file."""

from pathlib import Path
from typing import Any

import pytest

from instructblip.data.readers.common import MISSING_IMAGE
from instructblip.errors import UserError
from tests.kit.raw_files import read_raw, records_of, write_images, write_raw_json

STOP, SIGN = "0054c91397f2fe05", "1a2b3c4d5e6f7a8b"
FIVE = ["A red stop sign.", "A sign that says STOP.", "Stop, it says.", "A stop sign.", "The sign says stop."]


def _entry(image_id: str, split: str, caption_id: int | None = None, **more: Any) -> dict[str, Any]:
    fields = {
        "question": "",
        "image_id": image_id,
        "image_classes": ["Sign"],
        "image_width": 20,
        "image_height": 16,
        "set_name": split,
        "image_name": image_id,
        "image_path": f"{split}/{image_id}.jpg",
    }
    if caption_id is None:
        return fields | more
    text = FIVE[caption_id % 5]
    captions = {"caption_id": caption_id, "caption_str": text, "caption_tokens": text.lower().split()}
    return fields | captions | {"reference_strs": FIVE, "reference_tokens": [t.split() for t in FIVE]} | more


def _file(entries: list[Any]) -> dict[str, Any]:
    return {"dataset_type": "x", "dataset_name": "textcaps", "dataset_version": "0.1", "data": entries}


def write_textcaps(raw: Path) -> None:
    """Two train images whose captions are mixed, one val image with five, one test image without any."""
    train = [_entry(STOP, "train", 0), _entry(SIGN, "train", 6), _entry(STOP, "train", 1, caption_str="A  sign.\n")]
    write_raw_json(raw / "TextCaps_0.1_train.json", _file(train))
    write_raw_json(raw / "TextCaps_0.1_val.json", _file([_entry("00aa", "val", 10 + n) for n in range(5)]))
    write_raw_json(raw / "TextCaps_0.1_test.json", _file([_entry("00bb", "test")]))
    tokens = {"train": {SIGN: [], STOP: ["STOP", "ALL WAY"]}, "val": {"00aa": ["stop"]}, "test": {"00bb": ["é"]}}
    for split, images in tokens.items():
        entries = [{"image_id": image, "ocr_tokens": found, "ocr_info": []} for image, found in images.items()]
        write_raw_json(raw / f"TextVQA_Rosetta_OCR_v0.2_{split}.json", {"data": entries})
    write_images(raw / "train_images", f"{STOP}.jpg", f"{SIGN}.jpg", "00aa.jpg")
    write_images(raw / "test_images", "00bb.jpg")


def test_train(tmp_path: Path) -> None:
    write_textcaps(tmp_path)
    media, lost = read_raw("textcaps", tmp_path, "train")
    assert [(item.key, item.media) for item in media] == [
        (f"textcaps_{image}", tmp_path / f"train_images/{image}.jpg") for image in (STOP, SIGN)
    ]
    tokens = ("STOP", "ALL WAY")
    assert records_of(media) == {
        STOP: [
            {"id": "0", "kind": "caption", "answers": (FIVE[0],), "ocr_tokens": tokens},
            {"id": "1", "kind": "caption", "answers": ("A sign.",), "ocr_tokens": tokens},
        ],
        SIGN: [{"id": "6", "kind": "caption", "answers": (FIVE[1],)}],
    }
    assert lost == {}


def test_val_lies_in_train_images_and_has_its_references_once(tmp_path: Path) -> None:
    write_textcaps(tmp_path)
    (item,), lost = read_raw("textcaps", tmp_path, "val")
    assert item.media == tmp_path / "train_images/00aa.jpg"
    assert [(record.id, record.kind) for record in item.records] == [
        *((str(10 + n), "caption") for n in range(5)),
        ("captions-00aa", "captions"),
    ]
    assert item.records[5].captions == tuple(FIVE)
    assert {record.ocr_tokens for record in item.records} == {("stop",)}
    assert lost == {}


def test_test_has_no_captions(tmp_path: Path) -> None:
    write_textcaps(tmp_path)
    media, lost = read_raw("textcaps", tmp_path, "test")
    assert records_of(media) == {"00bb": [{"id": "captions-00bb", "kind": "captions", "ocr_tokens": ("é",)}]}
    assert lost == {}


def test_what_cannot_be_kept_is_counted(tmp_path: Path) -> None:
    write_textcaps(tmp_path)
    train = [
        _entry(STOP, "train", 0),
        _entry(STOP, "train", 0),
        _entry(STOP, "train", 1, caption_str=""),
        _entry(SIGN, "train"),
        _entry(STOP, "val", 3),
        _entry("../x", "train", 4),
        _entry("00cc", "train", 5),
        _entry("00cc", "train", 6),
        _entry("00aa", "train", 7),
    ]
    write_raw_json(tmp_path / "TextCaps_0.1_train.json", _file(train))
    media, lost = read_raw("textcaps", tmp_path, "train")
    assert [record.id for item in media for record in item.records] == ["0", "7"]
    assert lost == {
        "caption id repeats": (1, 1),
        "caption is blank or has no id": (2, 2),
        "entry has no image_id": (1, 1),
        "entry is of another split": (1, 1),
        "image has no captions": (1, 0),
        "image has no OCR entry; kept without tokens": (1, 0),
        MISSING_IMAGE: (1, 2),
    }


def test_the_ocr_file_is_needed(tmp_path: Path) -> None:
    write_textcaps(tmp_path)
    (tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    with pytest.raises(UserError, match=r"lacks TextVQA_Rosetta_OCR_v0\.2_val\.json \(ocr of split val\)"):
        read_raw("textcaps", tmp_path, "val")
