"""What readers share: JSON in flat memory with clear errors, clean text, safe names, COCO images by number."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instructblip.data.readers.base import Losses, RawSplit
from instructblip.data.readers.common import (
    clean_text,
    coco_id,
    coco_images,
    find_image,
    is_text,
    load_json,
    load_list,
    path_below,
    peek,
    plain_id,
    rosetta_tokens,
    stream_list,
    stream_pairs,
    texts,
    weigh_answers,
)
from instructblip.errors import UserError


def test_lists_and_objects_are_streamed_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    entries = [{"a": 1, "b": 0.5, "c": [None, True]}, "é", 3]
    path.write_text(json.dumps(entries))
    assert list(stream_list(path)) == load_list(path) == entries
    path.write_text(json.dumps({"info": {"x": 1}, "data": entries, "type": "t"}))
    assert list(stream_list(path, "data")) == load_list(path, "data") == entries
    assert (peek(path, "info"), peek(path, "type"), peek(path, "absent")) == ({"x": 1}, "t", None)
    path.write_text('{"b": 1, "a": [2], "b": 3}')
    assert list(stream_pairs(path)) == [("b", 1), ("a", [2]), ("b", 3)]


READ: list[Callable[[Path], Any]] = [
    load_list,
    lambda path: list(stream_list(path)),
    lambda path: list(stream_list(path, "data")),
    lambda path: list(stream_pairs(path)),
]


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'[{"a": 1}, {"a"',
        b'{"data": [{"a": 1}, {"a"',
        b"<html>404</html>",
        b'["\xff\xfe"]',
        b'{"data": ["\xff"]}',
        b'"data"',
        b"[1] [2]",
        b'{"data": [1]} x',
        b"[" * 100_000,
        None,
        "folder",
    ],
)
def test_a_file_that_is_not_whole_is_one_line(tmp_path: Path, read: Callable[[Path], Any], content: Any) -> None:
    path = tmp_path / "a.json"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json") as error:
        read(path)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("content", ['{"dat": [1]}', '{"data": {"a": 1}}', '{"data": []}', "[1]"])
def test_a_list_that_is_not_there_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError, match="must hold a list under 'data'"):
        list(stream_list(path, "data"))


def test_json_that_is_nested_absurdly_deep(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(UserError, match="nested too deep"):
        load_json(path)


def test_text() -> None:
    assert clean_text("  a\n b\t c\r\n") == "a b c"
    values = ["", " \n", None, 3, ["a"], "half a pair \ud800"]
    assert [clean_text(value) for value in values] == [None] * 6
    assert [is_text(value) for value in [*values, "é "]] == [False] * 6 + [True]
    assert texts([" a", "b "]) == ("a", "b")
    assert [texts(value) for value in (["a", 1], ["a", ""], "ab", None)] == [None] * 4
    assert texts([]) == ()


def test_ids_and_paths_stay_in_their_folder() -> None:
    assert [plain_id(value) for value in (7, "0a-B_c", "n161313")] == ["7", "0a-B_c", "n161313"]
    assert [plain_id(value) for value in ("a.b", "../a", "", None, 1.5, True, "a b", "é")] == [None] * 8
    assert [path_below(value) for value in ("a/b.jpg", "./a.jpg")] == ["a/b.jpg", "a.jpg"]
    bad = ["/etc/passwd", "../a", "a/../../b", "a\0b", "x" * 300, "a/" * 600, "", 3]
    assert [path_below(value) for value in bad] == [None] * 8


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (442786, 442786),
        ("442786", 442786),
        ("000000442786", 442786),
        ("000000442786.jpg", 442786),
        ("COCO_val2014_000000442786.jpg", 442786),
        ("val2014/COCO_val2014_000000442786.jpg", 442786),
        ("VisualDialog_val2018_000000442786.jpg", 442786),
        ("n442786", None),
        ("442786.jpg", None),
        (True, None),
        (1.0, None),
        (-1, None),
        (None, None),
        ("٣", None),
    ],
)
def test_coco_number(value: Any, number: int | None) -> None:
    assert coco_id(value) == number


def test_coco_images_are_found_by_number_in_the_first_folder_that_has_them(tmp_path: Path) -> None:
    names = [
        "val2014/COCO_val2014_000000000009.jpg",
        "train2017/000000000009.jpg",
        "train2017/000000000025.jpg",
        "train2017/25.jpg",
        "train2017/readme.txt",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folders = [tmp_path / "val2014", tmp_path / "train2017"]
    assert coco_images(folders) == {9: tmp_path / names[0], 25: tmp_path / names[2]}
    assert coco_images(folders[::-1]) == {9: tmp_path / names[1], 25: tmp_path / names[2]}
    assert find_image(folders, ["a.jpg", "25.jpg", "readme.txt"]) == tmp_path / "train2017/25.jpg"
    assert find_image(folders, ["a.jpg", "b.jpg"]) is None
    with pytest.raises(UserError, match="must be a folder of images"):
        coco_images([tmp_path / names[0]])


def test_answers_are_weighed_most_usual_first() -> None:
    assert weigh_answers(["b", "a", "c", "a", "b", "a"]) == (("a", "b", "c"), (3.0, 2.0, 1.0))
    assert weigh_answers(["b", "a"]) == (("b", "a"), (1.0, 1.0))
    assert weigh_answers([]) == ((), ())


def test_rosetta_tokens(tmp_path: Path) -> None:
    entries = [
        {"image_id": "0a", "ocr_tokens": ["STOP", " ", "é"], "ocr_info": []},
        {"image_id": "0b", "ocr_tokens": []},
        {"image_id": "0a", "ocr_tokens": ["GO"]},
        {"image_id": "0c"},
        "x",
    ]
    (tmp_path / "ocr.json").write_text(json.dumps({"data": entries}))
    losses = Losses()
    source = RawSplit(tmp_path, "val", {"ocr": ("ocr.json",)})
    assert rosetta_tokens(source, losses) == {"0a": ("STOP", "é"), "0b": ()}
    assert rosetta_tokens(RawSplit(tmp_path, "val", {"images": ("images",)}), losses) is None
    assert [(loss["reason"], loss["count"], loss["records"]) for loss in losses.to_list()] == [
        ("OCR entry lacks image_id or ocr_tokens", 2, 0),
        ("OCR entry repeats an image", 1, 0),
    ]
