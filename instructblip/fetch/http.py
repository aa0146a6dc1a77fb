"""Download one file over http or https: resume a broken transfer, check the file, and name it only when it is whole."""

import contextlib
import http.client
import os
import re
import shutil
import ssl
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instructblip.errors import UserError
from instructblip.files import errors_for_users, read_json, sha256_file, write_json
from instructblip.progress import bytes_bar

TIMEOUT_SECONDS = 60.0
TRIES = 4  # without a single new byte
_CHUNK_BYTES = 1 << 20
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP answers after which the same request may succeed
_BROKEN = (ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)


class DownloadError(UserError):
    """A file that could not be fetched, or is not the one that was expected."""


class _BrokenOffError(Exception):
    """The transfer broke off, and another try may succeed; the message is a short reason."""


class _UnreachableError(_BrokenOffError):
    """The server gave no answer."""


def download(
    url: str,
    path: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    show: bool = True,
    pause: float = 1.0,
) -> None:
    """Fetch `url` to `path`.

    The bytes so far are kept as `<name>.partial`. Another call goes on there if the server can resume and the file is
    still the same, by its ETag or its date, which `<name>.partial.json` remembers.

    Args:
        size, sha256: bytes and hash that the file must have, where known.
        show: show a progress bar.
        pause: seconds before a broken connection is tried again, and so many more each time.

    Raises:
        DownloadError: no such file, no connection, a connection that keeps breaking, another size or hash.
        UserError: disk full, or the folder may not be written.
    """
    partial = path.with_name(path.name + ".partial")
    with errors_for_users(path), bytes_bar(path.name, size, show=show) as (bar, task):
        path.parent.mkdir(parents=True, exist_ok=True)
        longest, fruitless = _size(partial), 0
        while not _is_whole(url, partial):
            try:
                for done, total in _transfer(url, partial, size):
                    bar.update(task, completed=done, total=total)
                break
            except _BrokenOffError as error:
                fruitless = 0 if _size(partial) > longest else fruitless + 1
                longest = max(longest, _size(partial))
                if fruitless == TRIES or (isinstance(error, _UnreachableError) and fruitless == 1 and not longest):
                    reason = f"{url} cannot be fetched ({error}); run the same command again to go on"
                    raise DownloadError(reason) from None
                time.sleep(pause * fruitless)
        _verify(url, partial, size, sha256)
        os.replace(partial, path)
        _note(partial).unlink()


def _is_whole(url: str, partial: Path) -> bool:
    """Whether an earlier call got all bytes, and was stopped before it could rename the file."""
    known = _known(url, partial)
    return known.get("bytes") is not None and known["bytes"] == _size(partial)


def _transfer(url: str, partial: Path, size: int | None) -> Iterator[tuple[int, int | None]]:
    """Append the missing bytes to `partial`, or start over where that is impossible; yields (bytes so far, total)."""
    asked, condition = _resume_at(url, partial)
    headers = {"Accept-Encoding": "identity", "User-Agent": "instructblip"}
    if asked:
        headers |= {"Range": f"bytes={asked}-", "If-Range": condition}
    with _open(url, headers, partial) as response:
        start = asked if response.status == 206 and _range_start(response) == asked else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None and length.isdecimal() else None
        _check_answer(url, response, start, total, size, partial)
        if not start:
            partial.unlink(
                missing_ok=True
            )  # before the note: old bytes must never stand beside the new file's validator
        write_json(_note(partial), {"url": url, "validator": _validator(response), "bytes": total})
        done = start
        with open(partial, "ab") as file:
            while chunk := _read(response):
                file.write(chunk)
                file.flush()  # a kill loses nothing that has come
                done += len(chunk)
                yield done, total
        if total is not None and done < total:
            raise _BrokenOffError(f"the connection ended after {done:,} of {total:,} bytes")


def _resume_at(url: str, partial: Path) -> tuple[int, str]:
    """The first byte to ask for, and the validator of the file that the earlier bytes belong to; 0 asks for all."""
    known = _known(url, partial)
    return (_size(partial), known["validator"]) if known.get("validator") else (0, "")


def _known(url: str, partial: Path) -> dict[str, Any]:
    """The note on the file that the bytes in `partial` belong to; empty if there is none, or it is of another URL."""
    note = _note(partial)
    known: dict[str, Any] = read_json(note) if partial.is_file() and note.is_file() else {}
    return known if known.get("url") == url else {}


def _validator(response: http.client.HTTPResponse) -> str | None:
    """A value for If-Range: a strong ETag, or the date of the last change."""
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _range_start(response: http.client.HTTPResponse) -> int | None:
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


@contextlib.contextmanager
def _open(url: str, headers: dict[str, str], partial: Path) -> Iterator[http.client.HTTPResponse]:
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # no bytes beyond ours: the file has changed, or ours was whole already
            partial.unlink(missing_ok=True)
            raise _BrokenOffError("the server has no such part of the file") from None
        if error.code in _PASSING:
            raise _BrokenOffError(f"HTTP {error.code} {error.reason}") from None
        raise DownloadError(f"{url} cannot be fetched (HTTP {error.code} {error.reason})") from None
    except urllib.error.URLError as error:
        raise _UnreachableError(f"no connection: {error.reason}") from None
    except _BROKEN as error:
        raise _UnreachableError(f"no connection: {error}") from None
    with response:
        yield response


def _check_answer(
    url: str,
    response: http.client.HTTPResponse,
    start: int,
    total: int | None,
    size: int | None,
    partial: Path,
) -> None:
    if response.status == 206 and start == 0:
        partial.unlink(missing_ok=True)
        raise _BrokenOffError("the server sent another part of the file than was asked for")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise DownloadError(f"{url} comes encoded as {response.headers['Content-Encoding']}; fetch it with a browser")
    if size is not None and total is not None and total != size:
        partial.unlink(missing_ok=True)
        raise DownloadError(f"{url} has {total:,} bytes, expected {size:,}: the file was changed at its source")
    missing, free = (total or 0) - start, shutil.disk_usage(partial.parent).free
    if missing > free:
        raise UserError(f"{partial.parent} has {free:,} bytes free, {url} needs {missing:,}; free some space")


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_CHUNK_BYTES)
    except _BROKEN as error:
        raise _BrokenOffError(f"the connection broke: {type(error).__name__}") from None


def _verify(url: str, partial: Path, size: int | None, sha256: str | None) -> None:
    """Remove a file that is not the expected one.

    Raises:
        DownloadError: another size or hash.
    """
    found = _size(partial)
    reason = f"{found:,} bytes, expected {size:,}" if size is not None and found != size else None
    if reason is None and sha256 is not None and (digest := sha256_file(partial)) != sha256:
        reason = f"sha256 {digest}, expected {sha256}"
    if reason is not None:
        partial.unlink()
        _note(partial).unlink(missing_ok=True)
        raise DownloadError(f"{url} has {reason}: the file was changed at its source or on its way")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _note(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")
