"""VSR: statements judged true or false; images of COCO 2017, in a flat copy or in COCO's own folders."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from instructblip.errors import UserError
from tests.kit.raw_files import read_raw, records_of, write_images


def _line(number: int, caption: str, label: Any, relation: str = "under", **more: Any) -> dict[str, Any]:
    return {
        "image": f"{number:012d}.jpg",
        "image_link": f"http://images.cocodataset.org/train2017/{number:012d}.jpg",
        "caption": caption,
        "label": label,
        "relation": relation,
        "annotator_id": 1,
        "vote_true_validator_id": "[2, 10]",
        "vote_false_validator_id": "[]",
        **more,
    }


def _write_lines(path: Path, *lines: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))


def write_vsr(raw: Path) -> None:
    """The zero-shot test split with three statements about two images, and a random test split with another."""
    _write_lines(
        raw / "data/splits/zeroshot/test.jsonl",
        _line(17697, "The cat is under the bed.", 1, subj="cat", obj="bed"),
        _line(2685, "The person is at the left side of the cake.", 0, "at the left side of"),
        _line(17697, "The bed is under the cat.", 0, reference_frame=None),
    )
    _write_lines(raw / "data/splits/random/test.jsonl", _line(17697, "The cat is on the bed.", 0, "on"))
    write_images(raw / "data/images", "000000017697.jpg", "000000002685.jpg")


RECORDS = {
    "2685": [
        {
            "id": "2685-0",
            "kind": "statement",
            "question": "The person is at the left side of the cake.",
            "answers": ("false",),
            "label": 0,
            "tags": {"relation": "at the left side of"},
        }
    ],
    "17697": [
        {
            "id": "17697-0",
            "kind": "statement",
            "question": "The cat is under the bed.",
            "answers": ("true",),
            "label": 1,
            "tags": {"relation": "under", "subj": "cat", "obj": "bed"},
        },
        {
            "id": "17697-1",
            "kind": "statement",
            "question": "The bed is under the cat.",
            "answers": ("false",),
            "label": 0,
            "tags": {"relation": "under"},
        },
    ],
}


def test_zeroshot_test(tmp_path: Path) -> None:
    write_vsr(tmp_path)
    media, losses = read_raw("vsr", tmp_path, "zeroshot_test")
    assert [item.key for item in media] == ["vsr_000000002685", "vsr_000000017697"]
    assert records_of(media) == RECORDS
    assert losses == {}


def test_the_two_ways_to_split_are_different_files(tmp_path: Path) -> None:
    write_vsr(tmp_path)
    media, _ = read_raw("vsr", tmp_path, "random_test")
    assert [record.question for item in media for record in item.records] == ["The cat is on the bed."]
    with pytest.raises(UserError, match=r"lacks data/splits/zeroshot/dev\.jsonl or splits/zeroshot/dev\.jsonl"):
        read_raw("vsr", tmp_path, "zeroshot_dev")


def test_images_in_cocos_own_folders(tmp_path: Path) -> None:
    write_vsr(tmp_path)
    for folder, name in (("train2017", "000000017697.jpg"), ("val2017", "000000002685.jpg")):
        (tmp_path / folder).mkdir()
        shutil.move(tmp_path / "data/images" / name, tmp_path / folder / name)
    (tmp_path / "data/images").rmdir()
    media, losses = read_raw("vsr", tmp_path, "zeroshot_test")
    assert [item.media for item in media] == [
        tmp_path / "val2017/000000002685.jpg",
        tmp_path / "train2017/000000017697.jpg",
    ]
    assert (records_of(media), losses) == (RECORDS, {})


def test_losses(tmp_path: Path) -> None:
    write_vsr(tmp_path)
    _write_lines(
        tmp_path / "data/splits/zeroshot/test.jsonl",
        _line(17697, "The cat is under the bed.", 1),
        _line(1, "No image.", 1),
        _line(17697, "Label as text.", "1"),
        _line(17697, "Label as a bool.", True),
        _line(17697, "Label 2.", 2),
        _line(17697, " ", 1),
        {**_line(17697, "Not a COCO image.", 1), "image": "../17697.jpg"},
        "[1, 2]\n",
        "\n",
        '{"image": "000000017697.jpg", "capt',
    )
    media, losses = read_raw("vsr", tmp_path, "zeroshot_test")
    assert [record.id for item in media for record in item.records] == ["17697-0"]
    assert losses == {
        "image file is missing": (1, 1),
        "line is not JSON": (1, 1),
        "line lacks image, caption or label 0 or 1": (6, 6),
    }


def test_a_file_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    write_vsr(tmp_path)
    (tmp_path / "data/splits/zeroshot/test.jsonl").write_bytes(b'{"caption": "\xff"}\n')
    with pytest.raises(UserError, match=r"test\.jsonl is not UTF-8 \(byte 13\)"):
        read_raw("vsr", tmp_path, "zeroshot_test")
