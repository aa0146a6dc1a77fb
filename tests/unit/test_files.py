"""Places that cannot be written are one line for the user; a lock that is not waited for says who is at work."""

import os
import re
from pathlib import Path

import pytest

from instructblip.errors import UserError
from instructblip.files import exclusive, write_atomically


def _folder(tmp_path: Path) -> Path:
    (tmp_path / "taken").mkdir()
    return tmp_path / "taken"


def _below_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file/page.html"


def _circle(tmp_path: Path) -> Path:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    return tmp_path / "circle/page.html"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (_folder, "taken cannot be written: .*taken is a folder; choose another name"),
        (_below_a_file, r"page\.html cannot be written: .*file is not a folder; choose another"),
        (_circle, r"page\.html cannot be written"),
        (lambda tmp_path: tmp_path / ("long" * 100) / "page.html", r"cannot be written \(File name too long\); choose"),
        (lambda _: Path("/proc/nowhere/page.html"), r"cannot be written \(No such file or directory\); choose"),
    ],
)
def test_a_place_that_cannot_be_written(tmp_path: Path, place: object, message: str) -> None:
    assert callable(place)
    path = place(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        write_atomically(path, "text")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.partial"))


def test_another_file_that_is_missing_is_no_fault_of_the_place(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), exclusive(tmp_path / "lock", "reading"):
        (tmp_path / "elsewhere").read_bytes()


def test_a_lock_that_is_held_is_said_at_once_and_let_go_of(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    for _ in range(2):  # again: the file stays, the lock does not
        with (
            exclusive(lock, "working"),
            pytest.raises(UserError, match=re.escape("somebody is at work")),
            exclusive(lock, "working", busy="somebody is at work"),
        ):
            pass
        assert os.path.getsize(lock) == 0
