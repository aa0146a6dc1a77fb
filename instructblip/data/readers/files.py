"""The one file layer of all readers: text, JSON, lines, tables and pictures as they lie on people's disks.

Read are what editors, spreadsheets, cameras and copying make of the official files: a byte order mark, UTF-16, `NaN` in
JSON, semicolons between cells, `.JPG` for `.jpg`, another Unicode form of a name. Every other file is refused in one line.
"""

import codecs
import csv
import io
import logging
import os
import re
import string
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import ijson

from instructblip.data.readers.base import Losses
from instructblip.data.typed import WrongValueError, parse_json
from instructblip.errors import UserError

logger = logging.getLogger(__name__)

MAX_OPENED = 5000  # brackets in one chunk of the parser, 64 KiB
DELIMITERS = (",", ";", "\t", "|")
# What stands for each other at the end of a picture's name: datasets are copied and converted with the names left alone.
PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
VIDEO_EXTENSIONS = ("avi", "mp4", "webm", "mkv", "mov")
_PACKED = {  # how it begins -> what it is packed with
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"PK\x03\x04": "zip (or is a spreadsheet)",
}
BROKEN: Any = object()  # stands for a row of a table that cannot be read
_CONSTANT = re.compile(rb'"(?:[^"\\]|\\.)*"|-?Infinity|NaN', re.DOTALL)
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_WORD = b"-" + string.ascii_letters.encode()  # what a constant is made of


# --- text ------------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """A whole text file, without its byte order mark.

    Raises:
        UserError: missing, unreadable, neither UTF-8 nor UTF-16 with a mark.
    """
    with _open_text(path) as file:
        return "".join(_decoded(file, path))


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, cut at line feeds only, one at a time.

    Raises:
        UserError: as `read_text`, on reaching the bad place.
    """
    with _open_text(path) as file:
        yield from (line.rstrip("\n") for line in _decoded(file, path))


def first_bytes(path: Path, count: int = 4096) -> bytes:
    """How a file begins, by which its kind is told.

    Raises:
        UserError: missing or unreadable.
    """
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


def check_not_packed(path: Path) -> None:
    """Refuse a file that was packed.

    Raises:
        UserError: it was; or as `first_bytes`.
    """
    start = first_bytes(path)
    if packed := next((name for magic, name in _PACKED.items() if start.startswith(magic)), None):
        raise UserError(
            f"{path} is packed with {packed}; unpack it, or save it as CSV, and name the file that comes out"
        )


def _open_text(path: Path) -> TextIO:
    try:
        with open(path, "rb") as file:
            encoding = "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        return open(path, encoding=encoding, newline="\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); it must be a text file") from None


def _decoded(file: TextIO, path: Path) -> Iterator[str]:
    try:
        yield from file
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); copy or fetch it again") from None
    except UnicodeError as error:
        place = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        raise UserError(f"{path} is not UTF-8{place}; save it as UTF-8, or fetch it again") from None


def json_lines(path: Path, losses: Losses, records: int = 1) -> Iterator[tuple[str, Any]]:
    """The values of a file with one JSON value a line, each with the place it stands in; a bad line is counted.

    Args:
        records: how many are lost with a line.

    Raises:
        UserError: as `text_lines`.
    """
    return ((place, value) for place, value in every_json_line(path, losses, records) if value is not BROKEN)


def every_json_line(path: Path, losses: Losses, records: int = 1) -> Iterator[tuple[str, Any]]:
    """As `json_lines`, with `BROKEN` for each bad line, so that what follows keeps its number."""
    constants: list[str] = []
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        place, known, value = f"{path.name} line {number}", len(constants), BROKEN
        try:
            value = parse_json(line, constant=constants.append)
        except WrongValueError:
            losses.add("line is not JSON", place, records)
        if constants and not known:
            _warn_of_constant(path, constants[0], f"line {number}")
        yield place, value


def table_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV file by column, each with the place it stands in; a cell that a short row lacks is empty.

    The first line names the columns, in any order and case, with any of `DELIMITERS` between them.

    Args:
        columns: names that must be among them, in lower case.

    Raises:
        UserError: as `read_text`; no CSV, a column is missing.
    """
    text = read_text(path)
    head = text.partition("\n")[0].lower()
    delimiter = max(DELIMITERS, key=lambda mark: len(_names(head, mark) & set(columns)))
    reader = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True, delimiter=delimiter)
    try:
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
        if missing := [name for name in columns if name not in reader.fieldnames]:
            raise UserError(f"{path} has no column {missing[0]}; fetch it again, or correct raw=")
        for row in reader:
            yield f"{path.name} line {reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{path} is not CSV (after line {reader.line_num}: {error}); fetch it again") from None


def _names(head: str, delimiter: str) -> set[str]:
    return {name.strip().strip('"').strip() for name in head.split(delimiter)}


# --- JSON ------------------------------------------------------------------------------------------------------------


def load_json(path: Path) -> Any:
    """A whole JSON file.

    Raises:
        UserError: as `read_text`; cut short, not JSON, nested absurdly deep.
    """
    text, constants = read_text(path), list[str]()
    try:
        value = parse_json(text, constant=constants.append)
    except WrongValueError as error:
        raise UserError(f"{path} is {error}; fetch it again") from None
    if constants:
        content = text.encode("utf-8", "replace")
        found = next(match for match in _CONSTANT.finditer(content) if match[0][:1] != b'"')
        _warn_of_constant(path, constants[0], _place(content[: found.start()]))
    return value


def load_list(path: Path, key: str | None = None) -> list[Any]:
    """The list that a JSON file holds, or holds under `key`; else a UserError."""
    content = load_json(path)
    entries = content if key is None else content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise wrong_content(path, "a list" if key is None else f"a list under {key!r}")
    return entries


def load_object(path: Path) -> dict[str, Any]:
    """The object of keys and values that a JSON file holds; else a UserError."""
    content = load_json(path)
    if not isinstance(content, dict):
        raise wrong_content(path, "an object of keys and values")
    return content


def stream_list(path: Path, key: str | None = None) -> Iterator[Any]:
    """The entries of a JSON list (of the list under `key` of an object), one at a time, in flat memory.

    Raises:
        UserError: as `load_json`, on reaching the bad place; nothing under `key`.
    """
    wanted = "a list" if key is None else f"a list under {key!r} with something in it"
    found = False
    for entry in _stream(path, b"[" if key is None else b"{", wanted, lambda file: _items(file, key)):
        found = True
        yield entry
    if key is not None and not found:
        raise wrong_content(path, wanted)


def peek(path: Path, key: str) -> Any:
    """The value under `key` of the object in a JSON file, None without one; read only as far as it stands.

    Raises:
        UserError: as `stream_list`.
    """
    wanted = "an object of keys and values"
    return next(_stream(path, b"{", wanted, lambda file: ijson.items(file, key, use_float=True)), None)


def stream_pairs(path: Path) -> Iterator[tuple[str, Any]]:
    """Key and value pairs of a JSON object in the file's order; a key that occurs twice is given twice.

    Raises:
        UserError: as `load_json`, on reaching the bad place.
    """
    return _stream(path, b"{", "an object of keys and values", lambda file: ijson.kvitems(file, "", use_float=True))


def wrong_content(path: Path, wanted: str) -> UserError:
    """The error of a file that is sound and holds something else than it should."""
    return UserError(f"{path} must hold {wanted}; fetch it again, or correct raw=")


def _items(file: "_Source", key: str | None) -> Iterator[Any]:
    return ijson.items(file, "item" if key is None else f"{key}.item", use_float=True)


def _stream(path: Path, first: bytes, wanted: str, parse: Callable[["_Source"], Iterator[Any]]) -> Iterator[Any]:
    """The values that `parse` finds. A file with `NaN` in it, which the parser stops at, is read again without them."""
    given = 0
    try:
        with _open_utf8(path) as file:
            if not file.read(4096).lstrip().startswith(first):
                raise wrong_content(path, wanted)
        for clean in (False, True):
            with _open_utf8(path) as file:
                source = _WithoutConstants(file, path) if clean else _Source(file)
                try:
                    for value in islice(parse(source), given, None):
                        given += 1
                        yield value
                    return
                except ijson.JSONError:
                    if clean:
                        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); it must be a JSON file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; fetch it again") from None
    except (ijson.JSONError, RecursionError) as error:
        lines = str(error).splitlines() or ["damaged"]
        raise UserError(f"{path} is not whole JSON ({lines[0]}); fetch it again") from None


def _open_utf8(path: Path) -> BinaryIO:
    """A file after its byte order mark; one in UTF-16, which no official file is in, is held in memory as UTF-8."""
    file = open(path, "rb")
    mark = file.read(3)
    if mark[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        file.close()
        return io.BytesIO(read_text(path).encode("utf-8", "surrogatepass"))
    file.seek(3 if mark == codecs.BOM_UTF8 else 0)
    return file


class _Source:
    """A file that refuses to be read where it opens thousands of brackets without closing them: the parser's time grows
    with the square of the depth, so that a megabyte of brackets would keep it busy for an hour.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        """The next bytes, some `size` of them; none at the end."""
        chunk = self._file.read(size)
        opened = chunk.count(b"[") + chunk.count(b"{") - chunk.count(b"]") - chunk.count(b"}")
        if opened > MAX_OPENED:
            raise ijson.JSONError("nested too deep")
        return chunk


class _WithoutConstants(_Source):
    """A file in which `NaN`, `Infinity` and `-Infinity` outside of texts are `null`; says where the first one stands."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self._path = path
        self._held = b""
        self._lines, self._column = 0, 0  # of what was given: line feeds, and bytes after the last of them
        self._found = False

    def read(self, size: int) -> bytes:
        """As of `_Source`, but it may be more than `size`: what is no whole text or word yet waits for the next bytes."""
        while chunk := super().read(size):
            self._held += chunk
            if cut := _whole_tokens(self._held):
                ready, self._held = self._held[:cut], self._held[cut:]
                return self._replace(ready)
        ready, self._held = self._held, b""
        return self._replace(ready)

    def _replace(self, content: bytes) -> bytes:
        found = (match for match in _CONSTANT.finditer(content) if match[0][:1] != b'"')
        if not self._found and (first := next(found, None)) is not None:
            self._found = True
            before = content[: first.start()]
            line, column = self._after(before)
            _warn_of_constant(self._path, first[0].decode(), f"line {line + 1}, character {column + 1}")
        self._lines, self._column = self._after(content)
        return _CONSTANT.sub(lambda match: match[0] if match[0][:1] == b'"' else b"null", content)

    def _after(self, content: bytes) -> tuple[int, int]:
        """Lines and column after some more bytes."""
        feeds = content.count(b"\n")
        return self._lines + feeds, len(content) - content.rfind(b"\n") - 1 if feeds else self._column + len(content)


def _whole_tokens(content: bytes) -> int:
    """Where a text or word begins that more bytes may belong to; the length where there is none."""
    end = 0
    for match in _STRING.finditer(content):
        end = match.end()
    quote = content.find(b'"', end)
    if quote >= 0:
        return quote
    return max(end, len(content.rstrip(_WORD)))


def _place(before: bytes) -> str:
    line, column = before.count(b"\n") + 1, len(before) - before.rfind(b"\n")
    return f"line {line}, character {column}"


def _warn_of_constant(path: Path, name: str, place: str) -> None:
    logger.warning("%s: %s at %s is no JSON; all of its kind are read as no value", path, name, place)


# --- pictures and videos ---------------------------------------------------------------------------------------------


def find_image(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    """The first of these names that is a file in one of the folders; earlier folders first.

    Where there is none, a file that differs in the case or kind of its extension (`PICTURE_EXTENSIONS`), or in the form
    of its Unicode, as archives unpacked on another system do; for a name without an extension the one picture of that name.
    """
    paths = [folder / name for folder in folders for name in names]
    found = next((path for path in paths if path.is_file()), None)
    return found or next((near for path in paths if (near := _near(path)) is not None), None)


def _near(path: Path) -> Path | None:
    try:
        names = _names_in(path.parent, path.parent.stat().st_mtime_ns)
    except OSError:
        return None
    candidates = names.get(_stem(path.name), ())
    same = [name for name in candidates if _kind(name) == _kind(path.name)]
    if not same and "." not in path.name:  # as a table has it that calls pictures by their numbers
        pictures = [name for name in candidates if _kind(name) == "picture"]
        same = pictures if len(pictures) == 1 else []
    return next((path.parent / name for name in same if (path.parent / name).is_file()), None)


@lru_cache(maxsize=64)
def _names_in(folder: Path, changed: int) -> dict[str, tuple[str, ...]]:
    """The names in a folder by stem; listed anew once the folder has changed."""
    names: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        names.setdefault(_stem(name), []).append(name)
    return {stem: tuple(found) for stem, found in names.items()}


def _stem(name: str) -> str:
    """A name without an extension of pictures or videos, in one form of Unicode."""
    stem, dot, extension = name.rpartition(".")
    return unicodedata.normalize("NFC", stem if dot and extension.isalnum() else name)


def _kind(name: str) -> str:
    """What an extension says: one word for all of pictures, the extension in lower case for any other."""
    extension = name.rpartition(".")[2].lower()
    return "picture" if extension in PICTURE_EXTENSIONS else extension
