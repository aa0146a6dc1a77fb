"""Flickr30K: splits from Karpathy's file only; captions of the token file, of Kaggle's with its broken row, or his own."""

from pathlib import Path
from typing import Any

import pytest

from instructblip.errors import UserError
from tests.kit.raw_files import read_raw, records_of, write_images, write_raw_json

SPLIT_OF_IMAGE = {"1000092795": "train", "2199200615": "test", "36979": "val"}
NO_SPLIT = "65567"


def _caption(image_id: str, number: int) -> str:
    return f"A dog runs across the grass of {image_id}-{number} ."


def _karpathy_image(image_id: str, split: str, row: int) -> dict[str, Any]:
    sentences = [
        {
            "tokens": ["a", "dog"],
            "raw": f"Karpathy's {number} of {image_id}.\n",
            "imgid": row,
            "sentid": 5 * row + number,
        }
        for number in range(5)
    ]
    sentids = [5 * row + number for number in range(5)]
    return {"sentids": sentids, "imgid": row, "sentences": sentences, "split": split, "filename": f"{image_id}.jpg"}


def write_flickr30k(raw: Path) -> None:
    """An image of each split and one of none; the token file names a fifth image before a fourth caption."""
    images = [_karpathy_image(image_id, split, row) for row, (image_id, split) in enumerate(SPLIT_OF_IMAGE.items())]
    write_raw_json(raw / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    lines = [
        f"{image_id}.jpg#{number}\t{_caption(image_id, number)}"
        for image_id in (*SPLIT_OF_IMAGE, NO_SPLIT)
        for number in (0, 1, 2, 4, 3)
    ]
    (raw / "results_20130124.token").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_images(raw / "flickr30k-images", *(f"{image_id}.jpg" for image_id in (*SPLIT_OF_IMAGE, NO_SPLIT)))
    (raw / "flickr30k-images/readme.txt").write_text("The 31,784th entry of some archives.")


def _write_csv(raw: Path) -> None:
    """Kaggle's form; caption 4 of an image lacks its second separator."""
    lines = ["image_name| comment_number| comment"]
    for image_id in (*SPLIT_OF_IMAGE, NO_SPLIT):
        lines += [f"{image_id}.jpg| {number}| {_caption(image_id, number)}" for number in range(5)]
    broken = lines.index(f"2199200615.jpg| 4| {_caption('2199200615', 4)}")
    lines[broken] = f"2199200615.jpg| 4   {_caption('2199200615', 4)}"
    (raw / "results.csv").write_text("\n".join(lines), encoding="utf-8")


ALL_FIVE = {
    "2199200615": [
        {
            "id": "2199200615",
            "kind": "captions",
            "captions": tuple(_caption("2199200615", number) for number in range(5)),
        }
    ]
}


def test_test_split_has_all_five_captions_in_order(tmp_path: Path) -> None:
    write_flickr30k(tmp_path)
    media, losses = read_raw("flickr30k", tmp_path, "test")
    assert [(item.key, item.media) for item in media] == [
        ("flickr30k_2199200615", tmp_path / "flickr30k-images/2199200615.jpg")
    ]
    assert (records_of(media), losses) == (ALL_FIVE, {})


def test_train_has_a_record_a_caption_and_counts_images_of_no_split(tmp_path: Path) -> None:
    write_flickr30k(tmp_path)
    media, losses = read_raw("flickr30k", tmp_path, "train")
    assert records_of(media) == {
        "1000092795": [
            {"id": f"1000092795-{number}", "kind": "caption", "answers": (_caption("1000092795", number),)}
            for number in range(5)
        ]
    }
    assert losses == {"image is in no split": (1, 5)}


def test_kaggles_file_with_its_broken_row(tmp_path: Path) -> None:
    write_flickr30k(tmp_path)
    (tmp_path / "results_20130124.token").unlink()
    _write_csv(tmp_path)
    media, losses = read_raw("flickr30k", tmp_path, "test")
    assert (records_of(media), losses) == (ALL_FIVE, {})
    assert read_raw("flickr30k", tmp_path, "train")[1] == {"image is in no split": (1, 5)}


def test_karpathys_own_sentences(tmp_path: Path) -> None:
    write_flickr30k(tmp_path)
    (tmp_path / "results_20130124.token").unlink()
    media, losses = read_raw("flickr30k", tmp_path, "val")
    captions = tuple(f"Karpathy's {number} of 36979." for number in range(5))
    assert records_of(media) == {"36979": [{"id": "36979", "kind": "captions", "captions": captions}]}
    assert losses == {}


def test_losses(tmp_path: Path) -> None:
    write_flickr30k(tmp_path)
    names = ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    images = [{"filename": name, "split": "test"} for name in [*names, names[0]]]
    malformed = [{"filename": "5.jpg", "split": "restval"}, {"filename": "../6.jpg", "split": "test"}, "x"]
    write_raw_json(tmp_path / "dataset_flickr30k.json", {"images": images + malformed})
    lines = [f"{name}#{number}\tA {number}" for name in names[:3] for number in range(5)]
    lines[0] = lines[1]  # twice number 1, and no number 0
    (tmp_path / "results_20130124.token").write_text("\n".join([*lines, "no separator", "1.jpg#7\t ", ""]))
    write_images(tmp_path / "flickr30k-images", *names[:2])
    media, losses = read_raw("flickr30k", tmp_path, "test")
    assert [(item.media_id, item.records[0].captions) for item in media] == [
        ("1", ("A 1", "A 2", "A 3", "A 4")),
        ("2", ("A 0", "A 1", "A 2", "A 3", "A 4")),
    ]
    shared = {
        "caption repeats a number": (1, 0),
        "image entry lacks filename or split": (3, 3),
        "line is not a caption of an image": (2, 0),
    }
    assert losses == shared | {
        "image entry repeats a filename": (1, 1),
        "image file is missing": (1, 1),
        "image has no captions": (1, 1),
        "image has not 5 captions (kept)": (1, 0),
    }
    assert read_raw("flickr30k", tmp_path, "train")[1] == shared


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("dataset_flickr30k.json", b'{"images": [{"filename"', "is not whole JSON"),
        ("dataset_flickr30k.json", b"[]", "must hold a list under 'images'"),
        ("results_20130124.token", b"1.jpg#0\t\xff\n", r"is not UTF-8 \(byte 8\)"),
    ],
)
def test_damaged_files_are_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    write_flickr30k(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_raw("flickr30k", tmp_path, "test")


def test_without_karpathys_file_there_is_no_split(tmp_path: Path) -> None:
    write_flickr30k(tmp_path)
    (tmp_path / "dataset_flickr30k.json").unlink()
    with pytest.raises(UserError, match=r"lacks dataset_flickr30k\.json"):
        read_raw("flickr30k", tmp_path, "test")
