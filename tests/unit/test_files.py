"""Places that cannot be written are one line for the user; locks let go when their process ends; checksums tell damage."""

import errno
import json
import multiprocessing
import os
import re
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from safetensors import SafetensorError

from instructblip.errors import UserError
from instructblip.files import (
    CHECKSUM,
    atomic_path,
    checksum_holds,
    claimed_folder,
    error_number,
    errors_for_users,
    exclusive,
    with_checksum,
    write_atomically,
)


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


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EFBIG, errno.ENOTCONN, errno.ETIMEDOUT])
def test_a_disk_that_fails_is_one_line(number: int) -> None:
    reason = re.escape(os.strerror(number))
    for error in (OSError(number, os.strerror(number)), SafetensorError(f"I/O error: x (os error {number})")):
        with pytest.raises(UserError, match=rf"^a/b cannot be written \({reason}\); look at its disk, .* run the same"):  # noqa: SIM117
            with errors_for_users(Path("a/b")):
                raise error


def test_the_number_of_an_error_is_found_in_what_safetensors_says() -> None:
    assert error_number(SafetensorError("I/O error: File too large (os error 27)")) == errno.EFBIG
    assert error_number(SafetensorError('IoError(Os { code: 28, message: "No space left" })')) == errno.ENOSPC
    assert error_number(SafetensorError("header too large")) is None
    assert error_number(ValueError("(os error 5)")) is None


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def noted_sync(descriptor: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", lambda *names: done.append("rename") or replace(*names))
    write_atomically(tmp_path / "a", "text")
    assert done == [f"sync a.{os.getpid()}.partial", "rename", f"sync {tmp_path.name}"]
    done.clear()
    with atomic_path(tmp_path / "a", durable=False) as partial:
        partial.write_text("of many")
    assert (done, (tmp_path / "a").read_text()) == (["rename"], "of many")


# --- locks -----------------------------------------------------------------------------------------------------------


def test_one_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "train/demo"
    busy = f"^another run is writing to {folder}; wait until it has ended, or give another name=$"
    for _ in range(2):
        with (
            claimed_folder(folder, "run"),
            claimed_folder(folder, "run", locked=False),  # another rank of it
            claimed_folder(tmp_path / "train/other", "run"),
            pytest.raises(UserError, match=busy),
            claimed_folder(folder, "run"),
        ):
            pass


def _hold(folder: Path, told: Connection) -> None:
    with claimed_folder(folder, "run"):
        child = os.fork()  # as a data worker, which may outlive its process for some seconds
        if child:
            told.send(child)
        time.sleep(60)


def test_a_killed_process_lets_go_though_a_worker_of_it_lives_on(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    holder = context.Process(target=_hold, args=(tmp_path, there))
    holder.start()
    child = here.recv()
    try:
        with pytest.raises(UserError, match="another run is writing to"), claimed_folder(tmp_path, "run"):
            pass
        holder.kill()
        holder.join()
        with claimed_folder(tmp_path, "run"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"file is not a folder; choose another"),
        claimed_folder(tmp_path / "file", "run"),
    ):
        pass


# --- checksums -------------------------------------------------------------------------------------------------------


def test_a_checksum_tells_every_change(tmp_path: Path) -> None:
    values = {"key": "a1", "score": 0.1 + 0.2, "list": [1, None, "ü"], "inner": {"b": True}}
    written = with_checksum(values)
    assert checksum_holds(json.loads(json.dumps(written)))
    assert checksum_holds(dict(reversed(written.items())))
    assert not checksum_holds(values)
    for key in values:
        assert not checksum_holds(written | {key: 7})
        assert not checksum_holds({name: value for name, value in written.items() if name != key})
    assert not checksum_holds(written | {"more": 1})
    assert not checksum_holds(written | {CHECKSUM: written[CHECKSUM][::-1]})
