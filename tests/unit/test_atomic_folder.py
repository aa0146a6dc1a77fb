"""Whole folders or none."""

from pathlib import Path

import pytest

from instructblip.errors import UserError
from instructblip.files import atomic_folder


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a/b") as partial:
        (partial / "file").write_text("1")
        assert not (tmp_path / "a/b").exists()
    assert (tmp_path / "a/b/file").read_text() == "1"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_after_an_error_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half-way"), atomic_folder(tmp_path / "a") as partial:
        (partial / "file").write_text("1")
        raise RuntimeError("half-way")
    assert not list(tmp_path.iterdir())


def test_only_a_folder_of_the_same_kind_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    with atomic_folder(folder):  # an empty one is no loss
        pass
    (folder / "mark").write_text("old")
    with pytest.raises(UserError, match="exists already"), atomic_folder(folder):
        pass
    with (
        pytest.raises(UserError, match="has no other, so it is not replaced"),
        atomic_folder(folder, overwrite_if="other"),
    ):
        pass
    with pytest.raises(RuntimeError), atomic_folder(folder, overwrite_if="mark"):
        raise RuntimeError
    assert (folder / "mark").read_text() == "old"
    with atomic_folder(folder, overwrite_if="mark") as partial:
        (partial / "mark").write_text("new")
    assert (folder / "mark").read_text() == "new"


def test_errors_of_the_disk_are_for_the_user(tmp_path: Path, small_disk: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"), atomic_folder(tmp_path / "file/a"):
        pass
    with pytest.raises(UserError, match="disk full while writing"), atomic_folder(small_disk / "a") as partial:
        (partial / "file").write_bytes(b"0" * 400_000)
    assert not list(small_disk.iterdir())
