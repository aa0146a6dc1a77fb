"""What readers share: JSON in flat memory with clear errors, clean text, safe names, COCO images by number."""

import json
import logging
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instructblip.data.readers.base import Losses, RawSplit
from instructblip.data.readers.common import (
    coco_id,
    coco_images,
    given_answers,
    image_folders,
    in_number_order,
    media_key,
    rosetta_tokens,
    split_ids,
    weigh_answers,
)
from instructblip.data.readers.files import (
    find_image,
    json_lines,
    load_json,
    load_list,
    load_object,
    peek,
    stream_list,
    stream_pairs,
    table_rows,
    text_lines,
)
from instructblip.data.typed import (
    Fields,
    WrongValueError,
    clean_text,
    file_name,
    identifier,
    is_text,
    path_below,
    spoken,
    texts,
    whole_number,
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
    assert [texts(value) for value in (["a", 1], ["a", ""], "ab", None, [])] == [()] * 5
    assert [spoken(value) for value in (3, 3.0, 0.5, True, "x", None)] == ["3", "3", "0.5", True, "x", None]


def test_ids_and_paths_stay_in_their_folder() -> None:
    assert [identifier(value) for value in (7, 7.0, "0a-B_c", "a.b (1)", "é")] == ["7", "7", "0a-B_c", "a.b (1)", "é"]
    assert [identifier(value) for value in ("../a", "a/b", ".a", "", None, 1.5, True, "a\nb", 10**30)] == [None] * 9
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
        (1.0, 1),
        (1.5, None),
        ("000000442786.PNG", 442786),
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
        ("OCR entry is a text where an object is due", 1, 0),
        ("OCR entry repeats an image", 1, 0),
        ("ocr_tokens is missing", 1, 0),
    ]


def test_json_lines_and_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x\u2028y"}\r\n\n[1\n' + "9" * 5000 + '\n"last"', encoding="utf-8")
    losses = Losses()
    assert list(json_lines(path, losses)) == [("a.jsonl line 1", {"a": "x\u2028y"}), ("a.jsonl line 5", "last")]
    examples = ["a.jsonl line 3", "a.jsonl line 4"]
    assert losses.to_list() == [{"reason": "line is not JSON", "count": 2, "records": 2, "examples": examples}]


def test_text_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Is a directory"):
        list(text_lines(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        list(text_lines(tmp_path / "absent"))
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(UserError, match="must hold an object"):
        load_object(tmp_path / "a.json")


def test_answers_are_kept_as_given() -> None:
    losses = Losses()
    assert given_answers([" New  York ", "", "a", None, 3, "a"], "question 7", losses) == ("New  York", "a", "3", "a")
    assert [(loss["count"], loss["records"], loss["examples"]) for loss in losses.to_list()] == [(1, 0, ["question 7"])]
    assert [given_answers(values, "question 8", losses) for values in ([], ["", None], "ab", None)] == [()] * 4
    assert len(losses.to_list()) == 1


def test_numbers_of_a_split(tmp_path: Path) -> None:
    path = tmp_path / "pid_splits.json"
    path.write_text('{"a_test": ["10", 9], "b_test": ["1"], "c": ["1.5"]}')
    assert split_ids(path, "a_test") == {"9", "10"}
    assert split_ids(path, "absent", "b_test") == {"1"}
    for key in ("absent", "c"):
        with pytest.raises(UserError, match=f"must hold a list of numbers under '{key}'"):
            split_ids(path, key)
    assert in_number_order({"10", "9", "x", "0", "11"}) == ["0", "9", "10", "11", "x"]


def test_names_of_files_stay_in_their_folder() -> None:
    names = ["VizWiz_val_00000000.jpg", "choice-0.png", "0013ea2087020901", "a b (1).tar.gz", "é.jpg"]
    assert [file_name(name) for name in names] == names
    bad = [
        "../a.jpg",
        "/a.jpg",
        "a/b.jpg",
        "a\\b.jpg",
        ".hidden",
        "a\n.jpg",
        "",
        "x" * 300,
        None,
        3,
        ["a.jpg"],
        "\ud800",
    ]
    assert [file_name(name) for name in bad] == [None] * len(bad)
    assert media_key("vizwiz", "VizWiz_val_00000001") == "vizwiz_VizWiz_val_00000001"
    keys = {media_key("mine", name) for name in (*names, "a b [1].tar.gz", "é" * 100)}
    assert len(keys) == 7 and all(re.fullmatch(r"[A-Za-z0-9_-]{1,150}", key) for key in keys)


def test_folders_of_images(tmp_path: Path) -> None:
    source = RawSplit(tmp_path, "test", {"images": ("a", "b", "c")})
    with pytest.raises(UserError, match=r"lacks a or b or c \(images of split test\)"):
        image_folders(source)
    (tmp_path / "c").mkdir()
    (tmp_path / "b").mkdir()
    assert image_folders(source) == [tmp_path / "b", tmp_path / "c"]


# --- what people's disks hold -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 200_000])
def test_constants_that_json_does_not_have_are_read_as_no_value_and_named_with_their_place(
    tmp_path: Path, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the chunks of the parser: a text of 200,000 characters goes over three of them."""
    path, text = tmp_path / "a.json", r"NaN \" Infinity \\" + "x" * size
    path.write_text('{"data": [\n {"a": "' + text + '"},\n {"a": NaN, "b": -Infinity}, {"c": [Infinity]}\n]}')
    values = [{"a": json.loads(f'"{text}"')}, {"a": None, "b": None}, {"c": [None]}]
    with caplog.at_level(logging.WARNING):
        assert list(stream_list(path, "data")) == values
        assert load_list(path, "data") == values
    assert [message.partition(": ")[2][:29] for message in caplog.messages] == ["NaN at line 3, character 8 is"] * 2
    path.write_text('{"data": [NaN')
    with pytest.raises(UserError, match="not whole JSON"):
        list(stream_list(path, "data"))


def test_a_table_may_have_other_delimiters_and_orders_of_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for mark in (",", ";", "\t", "|"):
        path.write_text(f'\ufeffAnswer{mark} ID\n"x{mark}\ny"{mark}7\nz\n')
        rows = list(table_rows(path, ("id", "answer")))
        assert rows == [
            ("a.csv line 3", {"answer": f"x{mark}\ny", "id": "7"}),
            ("a.csv line 4", {"answer": "z", "id": ""}),
        ]


def test_a_picture_is_found_under_a_near_name_only_where_there_is_none_of_its_own(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.PNG", "b.JPEG", "c.d.png", unicodedata.normalize("NFD", "ü.jpg"), "e.MP4", "f"):
        (tmp_path / name).touch()
    wanted = ["a.jpg", "a.png", "b.jpg", "c.d.jpg", unicodedata.normalize("NFC", "ü.png"), "e.mp4"]
    found = [find_image([tmp_path], [name]) for name in wanted]
    names = ["a.jpg", "a.PNG", "b.JPEG", "c.d.png", unicodedata.normalize("NFD", "ü.jpg"), "e.MP4"]
    assert [path and path.name for path in found] == names
    assert [find_image([tmp_path], [name]) for name in ("c.jpg", "e.jpg", "f.jpg", "absent/a.jpg")] == [None] * 4
    (tmp_path / "c.jpg").touch()  # the folder's names are not remembered beyond its change
    assert find_image([tmp_path], ["c.png"]) == tmp_path / "c.jpg"


def test_fields_give_a_value_or_the_reason_why_not() -> None:
    fields = Fields.of({"text": " a\nb ", "blank": " ", "half": "\ud800", "list": [1, "b"], "one": "1.0", "big": 2**70})
    assert (fields.text("text"), fields.texts("list"), fields.whole("one", high=1)) == ("a b", ("1", "b"), 1)
    assert (fields.id("one"), fields.answer("one"), fields.inner("text").values) == ("1.0", "1.0", {})
    for call, reason in (
        (lambda: fields.text("blank"), "blank is blank"),
        (lambda: fields.text("half"), "half holds half a Unicode pair"),
        (lambda: fields.text("list"), "list is a list where text is due"),
        (lambda: fields.text("none"), "none is missing"),
        (lambda: fields.whole("text"), "text is a text where a whole number is due"),
        (lambda: fields.whole("one", high=0), "one is not from 0 to 0"),
        (lambda: fields.id("big"), "big is a number where an id is due"),
        (lambda: Fields.of([]), "entry is a list where an object is due"),
    ):
        with pytest.raises(WrongValueError) as caught:
            call()
        assert str(caught.value) == reason
    numbers = [whole_number(value) for value in (7, 7.0, " 7 ", "-7.0", 7.5, "x", True, 2**63, float("nan"), "٣")]
    assert numbers == [7, 7, 7, -7, None, None, None, None, None, None]
