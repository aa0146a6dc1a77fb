"""What readers of text lines and of `pid_splits.json` share: bad lines counted, people's answers kept, numbers in order."""

from pathlib import Path

import pytest

from instructblip.data.readers.base import Losses, RawSplit
from instructblip.data.readers.common import (
    file_name,
    given_answers,
    image_folders,
    in_number_order,
    json_lines,
    load_object,
    split_ids,
    text_lines,
)
from instructblip.errors import UserError


def test_json_lines_and_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x\u2028y"}\r\n\n[1\n' + "9" * 5000 + '\n"last"', encoding="utf-8")
    losses = Losses()
    assert list(json_lines(path, losses)) == [("a.jsonl line 1", {"a": "x\u2028y"}), ("a.jsonl line 5", "last")]
    examples = ["a.jsonl line 3", "a.jsonl line 4"]
    assert losses.to_list() == [{"reason": "line is not JSON", "count": 2, "records": 2, "examples": examples}]


def test_text_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Is a directory"):
        text_lines(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        text_lines(tmp_path / "absent")
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(UserError, match="must hold an object"):
        load_object(tmp_path / "a.json")


def test_answers_are_kept_as_given() -> None:
    losses = Losses()
    assert given_answers([" New  York ", "", "a", None, 3, "a"], "question 7", losses) == ("New  York", "a", "a")
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
    names = ["VizWiz_val_00000000.jpg", "choice-0.png", "0013ea2087020901"]
    assert [file_name(name) for name in names] == names
    bad = ["../a.jpg", "/a.jpg", "a/b.jpg", ".hidden", "a.tar.gz", "a b.jpg", "", "x" * 300, None, 3, ["a.jpg"]]
    assert [file_name(name) for name in bad] == [None] * len(bad)


def test_folders_of_images(tmp_path: Path) -> None:
    source = RawSplit(tmp_path, "test", {"images": ("a", "b", "c")})
    with pytest.raises(UserError, match=r"lacks a or b or c \(images of split test\)"):
        image_folders(source)
    (tmp_path / "c").mkdir()
    (tmp_path / "b").mkdir()
    assert image_folders(source) == [tmp_path / "b", tmp_path / "c"]
