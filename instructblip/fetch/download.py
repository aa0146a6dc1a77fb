"""The one way in which bytes come from elsewhere: resumed where they broke off, bounded, checked, named only when whole.

What goes through an ordinary client of its own is left to it: pip fetches wheels, huggingface_hub snapshots.
"""

import contextlib
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from instructblip.errors import UserError
from instructblip.fetch.filesystem import open_file
from instructblip.fetch.http import open_http
from instructblip.fetch.streams import (
    BrokenOffError,
    CannotResumeError,
    DownloadError,
    NoAnswerError,
    Stream,
    is_http,
    shown,
)
from instructblip.files import errors_for_users, read_json, sha256_digits, sha256_file, write_json
from instructblip.progress import bytes_bar

PAUSE_SECONDS = 1.0  # before a second try; twice as long before each further one
LONGEST_WAIT_SECONDS = 300.0  # that a server may ask for
TRIES = 6  # without a single new byte
_FAIR_SHARE = 0.5  # of the free space, for a file of which nobody says how large it is
_jitter = random.Random()  # of its own: the global one decides what a run draws


class WrongFileError(DownloadError):
    """A file of another size or hash than was expected."""


@dataclass(frozen=True)
class Wanted:
    """A file that is to come.

    Attributes:
        url: of a web server, or any that fsspec reads.
        size, sha256: bytes and hash that it must have, where known.
        limit: bytes that it may have at most, where its size is not known; None: half of what the disk has free.
        patient: go on trying where the server gives no answer at all, as in the midst of a run.
    """

    url: str
    size: int | None = None
    sha256: str | None = None
    limit: int | None = None
    patient: bool = False


def download(wanted: Wanted, path: Path, *, show: bool = True) -> None:
    """Fetch a file to `path`.

    The bytes so far are kept as `<name>.partial`. Another call goes on there if the server can resume and the file is
    still the same, by its ETag or its date, which `<name>.partial.json` remembers, or by its hash, which is checked.

    Args:
        show: show a progress bar.

    Raises:
        NotThereError: there is no such file.
        WrongFileError: another size or hash, or more than the limit; nothing is kept.
        DownloadError: refused, no connection, or one that keeps breaking.
        UserError: disk full, or the folder may not be written.
    """
    partial = path.with_name(path.name + ".partial")
    fetch_partial(wanted, partial, path.name, show=show)
    with errors_for_users(path):
        os.replace(partial, path)
        note_of(partial).unlink()


def fetch_partial(wanted: Wanted, partial: Path, name: str, *, show: bool = True) -> None:
    """Fetch a file to `partial`, whole and checked, for the caller to rename, and its note to remove.

    Args:
        name: shown beside the bar.

    Raises:
        UserError: as `download`.
    """
    if wanted.sha256 is not None:
        sha256_digits(wanted.sha256)
    with errors_for_users(partial), bytes_bar(name, wanted.size, show=show) as bar:
        partial.parent.mkdir(parents=True, exist_ok=True)
        in_parts = _fetch(wanted, partial, name, bar)
        try:
            _verify(wanted, partial)
        except WrongFileError:
            if not in_parts:
                raise
            _fetch(wanted, partial, name, bar)  # the parts may be of two files; now there is none to go on with
            _verify(wanted, partial)


def note_of(partial: Path) -> Path:
    """The file beside a partial one that says what its bytes belong to."""
    return partial.with_name(partial.name + ".json")


def _fetch(wanted: Wanted, partial: Path, name: str, shown_in: tuple[Progress, TaskID]) -> bool:
    """Transfer until all bytes are there, as often as it takes; return whether they came in several parts."""
    bar, task = shown_in
    longest, fruitless = _size(partial), 0
    in_parts = longest > 0
    while not _is_whole(wanted, partial):
        try:
            for done, total in _transfer(wanted, partial):
                bar.update(task, completed=done, total=total)
            return in_parts
        except BrokenOffError as error:
            if isinstance(error, CannotResumeError):
                _remove(partial)
            fruitless = 0 if _size(partial) > longest else fruitless + 1
            longest = max(longest, _size(partial))
            in_parts = in_parts or longest > 0
            gone = isinstance(error, NoAnswerError) and not (wanted.patient or longest)
            if fruitless == TRIES or gone:
                line = f"{shown(wanted.url)} cannot be fetched ({error}); run the same command again to go on"
                raise DownloadError(line) from None
            seconds = seconds_to_pause(wanted, error, fruitless)
            bar.update(task, description=f"{name}: {error}; again in {seconds:.0f} s" if seconds >= 1 else name)
            time.sleep(seconds)
            bar.update(task, description=name)
    return in_parts


def seconds_to_pause(wanted: Wanted, error: BrokenOffError, fruitless: int) -> float:
    """How long to wait before another try, after so many that brought nothing.

    Raises:
        DownloadError: the server wants to be asked again much later.
    """
    if error.wait is not None and error.wait > LONGEST_WAIT_SECONDS:
        line = f"{error}, and is to be asked again in {error.wait:,.0f} seconds"
        raise DownloadError(f"{shown(wanted.url)} cannot be fetched ({line}); run the same command again then")
    # Not all at the same moment, when many processes were turned away by one server.
    backed_off = PAUSE_SECONDS * 2 ** (fruitless - 1) * _jitter.uniform(0.75, 1.25) if fruitless else 0.0
    return max(error.wait or 0.0, backed_off)


def _is_whole(wanted: Wanted, partial: Path) -> bool:
    """Whether an earlier call got all bytes, and was stopped before it could rename the file."""
    known = _known(wanted.url, partial)
    return known.get("bytes") is not None and known["bytes"] == _size(partial)


def _transfer(wanted: Wanted, partial: Path) -> Iterator[tuple[int, int | None]]:
    """Append the missing bytes to `partial`, or start over where that is impossible; yields (bytes so far, total)."""
    with _open(wanted, partial) as stream:
        limit = _check_size(wanted, stream, partial)
        if not stream.start:
            # Before the note: old bytes must never stand beside the new validator. Its name stays: it holds room in a cache.
            partial.write_bytes(b"")
        write_json(note_of(partial), {"url": wanted.url, "validator": stream.validator, "bytes": stream.total})
        done = stream.start
        with open(partial, "ab") as file:
            while chunk := stream.read():
                done += len(chunk)
                if done > limit:
                    _remove(partial)
                    raise WrongFileError(
                        f"{shown(wanted.url)} sends more than {limit:,} bytes, which is all it may have"
                    )
                file.write(chunk)
                file.flush()  # a kill loses nothing that has come
                yield done, stream.total
            os.fsync(file.fileno())
        if stream.total is not None and done < stream.total:
            raise BrokenOffError(f"the connection ended after {done:,} of {stream.total:,} bytes")


def _open(wanted: Wanted, partial: Path) -> AbstractContextManager[Stream]:
    """Ask for the bytes that are missing, where the earlier ones can be told to be of the same file."""
    start, known = _size(partial), _known(wanted.url, partial)
    if not known.get("validator") and not (known and wanted.sha256):
        start = 0
    open_stream = open_http if is_http(wanted.url) else open_file
    return open_stream(wanted.url, start, known.get("validator") if start else None)


def _known(url: str, partial: Path) -> dict[str, Any]:
    """The note on the file that the bytes in `partial` belong to; empty if there is none, or it is of another URL."""
    note = note_of(partial)
    if not partial.is_file() or not note.is_file():
        return {}
    with contextlib.suppress(UserError):  # damaged: as good as none
        known = read_json(note)
        if isinstance(known, dict) and known.get("url") == url:
            return known
    return {}


def _check_size(wanted: Wanted, stream: Stream, partial: Path) -> int:
    """How many bytes may come.

    Raises:
        WrongFileError: the source states another size than the file must have, or more than it may.
        UserError: the disk has less free than is missing.
    """
    free = shutil.disk_usage(partial.parent).free
    if stream.total is None:
        room = wanted.limit if wanted.limit is not None else int(free * _FAIR_SHARE)
        return wanted.size if wanted.size is not None else room
    if wanted.size is not None and stream.total != wanted.size:
        _remove(partial)
        line = f"{shown(wanted.url)} has {stream.total:,} bytes, expected {wanted.size:,}: the file was changed"
        raise WrongFileError(f"{line} at its source")
    if wanted.limit is not None and stream.total > wanted.limit:
        _remove(partial)
        raise WrongFileError(f"{shown(wanted.url)} has {stream.total:,} bytes, allowed are {wanted.limit:,}")
    missing = stream.total - stream.start
    if missing > free:
        line = f"{partial.parent} has {free:,} bytes free, {shown(wanted.url)} needs {missing:,}; free some space"
        raise UserError(line)
    return stream.total


def _verify(wanted: Wanted, partial: Path) -> None:
    """Remove a file that is not the expected one.

    Raises:
        WrongFileError: another size or hash.
    """
    found = _size(partial)
    reason = None
    if wanted.size is not None and found != wanted.size:
        reason = f"{found:,} bytes, expected {wanted.size:,}"
    elif wanted.sha256 is not None and (digest := sha256_file(partial)) != sha256_digits(wanted.sha256):
        reason = f"sha256 {digest}, expected {wanted.sha256}"
    if reason is not None:
        _remove(partial)
        raise WrongFileError(f"{shown(wanted.url)} has {reason}: the file was changed at its source or on its way")


def _remove(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    note_of(partial).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
