"""COCO captions: restval is training data, images by number wherever they lie, captions brought to one line."""

from pathlib import Path
from typing import Any

import pytest

from instructblip.data.readers import Losses, RawSplit
from instructblip.data.readers.coco_caption import read_coco_captions
from instructblip.data.readers.common import MISSING_IMAGE
from instructblip.errors import UserError
from tests.kit.raw_files import read_raw, records_of, write_images, write_raw_json


def _image(number: int, split: str, captions: dict[int, str], year: str = "val2014", **more: Any) -> dict[str, Any]:
    sentences = [
        {"tokens": text.lower().split(), "raw": text, "imgid": 0, "sentid": sentid} for sentid, text in captions.items()
    ]
    name = f"COCO_{year}_{number:012d}.jpg"
    fields = {"filepath": year, "sentids": list(captions), "filename": name, "imgid": 0, "split": split}
    return fields | {"sentences": sentences, "cocoid": number} | more


def write_coco_caption(raw: Path) -> None:
    """An image of each of Karpathy's four splits. That of `restval` lies in val2014, and val's has 2017's name."""
    images = [
        _image(391895, "test", {770337: "A man with a red helmet", 771687: "Man riding a motor bike"}),
        _image(522418, "restval", {681330: "A woman in a net cutting a cake. \n", 686718: " A woman\ncutting  a cake"}),
        _image(184613, "val", {474921: "A child holding an umbrella.", 479322: "A boy."}),
        _image(57870, "train", {787980: "A restaurant has modern tables."}, "train2014"),
    ]
    write_raw_json(raw / "dataset_coco.json", {"images": images, "dataset": "coco"})
    write_images(raw / "val2014", "COCO_val2014_000000391895.jpg", "COCO_val2014_000000522418.jpg")
    write_images(raw, "train2017/000000184613.jpg")
    write_images(raw, "train2014/COCO_train2014_000000057870.jpg", mode="L")


def test_restval_is_trained_on(tmp_path: Path) -> None:
    write_coco_caption(tmp_path)
    media, lost = read_raw("coco_caption", tmp_path, "train")
    assert [(item.key, item.media) for item in media] == [
        ("coco_caption_000000522418", tmp_path / "val2014/COCO_val2014_000000522418.jpg"),
        ("coco_caption_000000057870", tmp_path / "train2014/COCO_train2014_000000057870.jpg"),
    ]
    assert records_of(media) == {
        "522418": [
            {"id": "681330", "kind": "caption", "answers": ("A woman in a net cutting a cake.",)},
            {"id": "686718", "kind": "caption", "answers": ("A woman cutting a cake",)},
        ],
        "57870": [{"id": "787980", "kind": "caption", "answers": ("A restaurant has modern tables.",)}],
    }
    assert lost == {}


def test_val_serves_training_loss_and_scores_and_test_scores(tmp_path: Path) -> None:
    write_coco_caption(tmp_path)
    both = ("A child holding an umbrella.", "A boy.")
    assert records_of(read_raw("coco_caption", tmp_path, "val")[0]) == {
        "184613": [
            {"id": "474921", "kind": "caption", "answers": both[:1]},
            {"id": "479322", "kind": "caption", "answers": both[1:]},
            {"id": "captions-184613", "kind": "captions", "captions": both},
        ]
    }
    references = ("A man with a red helmet", "Man riding a motor bike")
    assert records_of(read_raw("coco_caption", tmp_path, "test")[0]) == {
        "391895": [{"id": "captions-391895", "kind": "captions", "captions": references}]
    }


def test_what_cannot_be_kept_is_counted(tmp_path: Path) -> None:
    write_coco_caption(tmp_path)
    images = [
        _image(57870, "train", {1: "a", 2: " ", 3: "c"}),
        _image(57870, "restval", {4: "d"}),
        _image(522418, "train", {1: "again"}),
        _image(391895, "train", {5: "e"}, filename="COCO_val2014_000000000001.jpg"),
        _image(391895, "tset", {6: "f", 7: "g"}),
        _image(77, "train", {8: "h", 9: "i"}),
        _image(184613, "train", {10: "j"}, sentences=None),
        _image(184613, "val", {11: "k"}),
        "x",
    ]
    write_raw_json(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    media, lost = read_raw("coco_caption", tmp_path, "train")
    assert [record.id for item in media for record in item.records] == ["1", "3"]
    assert lost == {
        "caption is blank or has no id": (1, 1),
        "caption id repeats": (1, 1),
        "image has no captions": (2, 0),
        "image has no number, or two": (1, 1),
        "image is listed twice": (1, 1),
        "image is of no known split": (2, 2),
        MISSING_IMAGE: (1, 2),
    }
    assert read_raw("coco_caption", tmp_path, "val")[1] == {}


def test_an_lfs_pointer_is_one_line(tmp_path: Path) -> None:
    write_coco_caption(tmp_path)
    (tmp_path / "dataset_coco.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=r"dataset_coco\.json must hold a list under 'images'"):
        read_raw("coco_caption", tmp_path, "val")


def test_cocos_own_caption_files(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n:012d}.jpg", "license": 4} for n in (25, 9, 77)]
    annotations = [
        {"image_id": 9, "id": 440, "caption": "A tan toilet.\n"},
        {"image_id": 25, "id": 441, "caption": "A giraffe."},
        {"image_id": 9, "id": 540, "caption": "A sink."},
        {"image_id": 9, "id": 540, "caption": "A sink again."},
        {"image_id": 5, "id": 6, "caption": "Nothing."},
        "x",
    ]
    write_raw_json(tmp_path / "c.json", {"info": {}, "images": images, "licenses": [], "annotations": annotations})
    write_images(tmp_path / "val2017", "000000000009.jpg", "000000000025.jpg")
    losses = Losses()
    files = {"annotations": ("c.json",), "images": ("val2017",)}
    media = list(read_coco_captions(RawSplit(tmp_path, "train", files, {"prefix": "coco"}), losses))
    assert [item.key for item in media] == ["coco_000000000009", "coco_000000000025"]
    assert [record.answers for item in media for record in item.records] == [
        ("A tan toilet.",),
        ("A sink.",),
        ("A giraffe.",),
    ]
    assert [(loss["reason"], loss["count"], loss["records"]) for loss in losses.to_list()] == [
        ("caption id repeats", 1, 1),
        ("caption is of no listed image", 2, 2),
        ("image has no captions", 1, 0),
    ]
