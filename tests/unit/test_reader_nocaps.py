"""nocaps: all ten references an image, scores by the integer id, domains where the file has them, test without captions."""

from pathlib import Path
from typing import Any

import pytest

from instructblip.errors import UserError
from tests.kit.raw_files import read_raw, records_of, write_images, write_raw_json

VAL_FILE = "nocaps_val_4500_captions.json"
TEST_FILE = "nocaps_test_image_info.json"


def _image(number: int, hex_id: str, **more: Any) -> dict[str, Any]:
    url = f"https://s3.amazonaws.com/nocaps/val/{hex_id}.jpg"
    return {
        "id": number,
        "open_images_id": hex_id,
        "height": 1024,
        "width": 732,
        "coco_url": url,
        "file_name": f"{hex_id}.jpg",
        "license": 0,
        "date_captured": "2018-11-06 11:04:33",
        **more,
    }


def _captions(image_id: int, first_id: int, count: int = 10) -> list[dict[str, Any]]:
    return [
        {"image_id": image_id, "id": first_id + number, "caption": f"Caption {number} of {image_id}."}
        for number in range(count)
    ]


def write_nocaps(raw: Path) -> None:
    """Two images of val, whose annotations are mixed, one without a domain, and one image of test without captions."""
    images = [_image(0, "0013ea2087020901", domain="in-domain"), _image(1, "00a1b2c3d4e5f607")]
    annotations = [*_captions(1, 10), *_captions(0, 0)[::-1]]
    annotations[0]["caption"] = "  A dog\nand a\u2028cat. "
    write_raw_json(raw / VAL_FILE, {"licenses": [], "info": {}, "images": images, "annotations": annotations})
    write_raw_json(raw / TEST_FILE, {"licenses": [], "info": {}, "images": [_image(0, "ffff000011112222")]})
    write_images(raw / "val", "0013ea2087020901.jpg", "00a1b2c3d4e5f607.jpg", mode="L")
    write_images(raw / "test", "ffff000011112222.jpg")


def test_val(tmp_path: Path) -> None:
    write_nocaps(tmp_path)
    media, losses = read_raw("nocaps", tmp_path, "val")
    assert [(item.key, item.media) for item in media] == [
        ("nocaps_0013ea2087020901", tmp_path / "val/0013ea2087020901.jpg"),
        ("nocaps_00a1b2c3d4e5f607", tmp_path / "val/00a1b2c3d4e5f607.jpg"),
    ]
    assert records_of(media) == {
        "0013ea2087020901": [
            {
                "id": "0",
                "kind": "captions",
                "captions": tuple(f"Caption {number} of 0." for number in range(10)),
                "tags": {"domain": "in-domain"},
            }
        ],
        "00a1b2c3d4e5f607": [
            {
                "id": "1",
                "kind": "captions",
                "captions": ("A dog and a cat.", *(f"Caption {number} of 1." for number in range(1, 10))),
            }
        ],
    }
    assert losses == {}


def test_test_split_has_no_captions(tmp_path: Path) -> None:
    write_nocaps(tmp_path)
    media, losses = read_raw("nocaps", tmp_path, "test")
    assert records_of(media) == {"ffff000011112222": [{"id": "0", "kind": "captions"}]}
    assert losses == {}


def test_losses(tmp_path: Path) -> None:
    names = [f"{number:016x}" for number in range(6)]
    images = [
        *(_image(number, name) for number, name in enumerate(names[:4])),
        _image(0, names[4]),
        _image(7, names[0]),
        {"id": "8", "file_name": "x.jpg"},
        _image(9, "../../etc/passwd"),
        "x",
    ]
    annotations = [
        *_captions(0, 0),
        *_captions(1, 100, 9),
        *_captions(3, 200),
        *_captions(77, 300, 1),
        {"image_id": 1, "id": 100, "caption": "again"},
        {"image_id": 1, "id": 400, "caption": " "},
        None,
    ]
    write_raw_json(tmp_path / VAL_FILE, {"images": images, "annotations": annotations})
    write_images(tmp_path / "val", *(f"{name}.jpg" for name in names[:3]))
    media, losses = read_raw("nocaps", tmp_path, "val")
    assert [(item.records[0].id, len(item.records[0].captions)) for item in media] == [("0", 10), ("1", 9)]
    assert losses == {
        "caption entry lacks id, image_id or caption": (2, 0),
        "caption of an image that is not listed": (1, 0),
        "caption repeats an id": (1, 0),
        "image entry lacks id or file_name": (3, 3),
        "image entry repeats an id or file_name": (2, 2),
        "image file is missing": (1, 1),
        "image has no captions": (1, 1),
        "image has not all of its 10 captions (kept)": (1, 0),
    }


def test_a_val_file_without_captions_is_refused(tmp_path: Path) -> None:
    write_nocaps(tmp_path)
    (tmp_path / TEST_FILE).rename(tmp_path / VAL_FILE)
    with pytest.raises(UserError, match="must hold a list under 'annotations'"):
        read_raw("nocaps", tmp_path, "val")
