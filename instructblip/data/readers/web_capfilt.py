"""BLIP's filtered and synthetic web captions (CapFilt): JSON lists of `{"url", "caption"}`, gigabytes long.

The lists say nothing about files, and the captions of one picture are scattered over them. So:

* A list is streamed; (picture, caption) pairs go to an SQLite file in the folder for temporary files (`TMPDIR` chooses
  it), which sorts them on disk. It needs about twice the size of the lists. Memory stays flat.
* The picture of a url is the file `<first two digits>/<digest>.jpg` below `images/`, where the digest is the SHA-256 of
  the url (UTF-8) in hexadecimal; `file_of_url` computes it. The extension is always `.jpg`, whatever the content.
* Or else `url_to_file.jsonl` says for each url, as `{"url": ..., "file": "00000/000000012.jpg"}` on a line of its own,
  which file below `images/` it is: as made from the output of img2dataset. A url that it lacks follows the rule above.
* An entry may also be `{"image": <path>, "caption"}`, with the path below the raw folder or below `images/`.

Links die: an entry without a file is counted, not an error.
"""

import contextlib
import hashlib
import json
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit
from instructblip.data.readers.common import clean_text, find_image, image_folders, is_text, path_below, stream_list
from instructblip.data.records import Record
from instructblip.errors import UserError

_SETUP = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA temp_store = FILE;
PRAGMA cache_size = -16384;
CREATE TABLE captions (number INTEGER PRIMARY KEY, is_url INTEGER, media TEXT, caption TEXT);
CREATE TABLE files (url TEXT PRIMARY KEY, file TEXT) WITHOUT ROWID;
"""
_SORTED = """
SELECT is_url, media, caption, file FROM captions LEFT JOIN files ON is_url AND url = media
ORDER BY is_url, media, number
"""

Row = tuple[int, str, str, str | None]  # whether it is a url, url or path, caption, file of the url where one is given


def file_of_url(url: str) -> str:
    """Where the picture of a url is looked for below `images/`."""
    digest = hashlib.sha256(url.encode()).hexdigest()
    return f"{digest[:2]}/{digest}.jpg"


def read_web_capfilt(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the pictures of all lists that are there, those given by path first, in the order of path or url.

    Raises:
        UserError: no list or no folder of images, a list is damaged, no space for sorting.
    """
    source.path("captions")  # says so when there is none
    folders = image_folders(source)
    with (
        tempfile.TemporaryDirectory(prefix="web_capfilt_") as folder,
        contextlib.closing(sqlite3.connect(Path(folder) / "sorted.sqlite", check_same_thread=False)) as database,
    ):
        try:
            database.executescript(_SETUP)
            for path in source.paths("captions"):
                rows = _entries(path, losses)
                database.executemany("INSERT INTO captions (is_url, media, caption) VALUES (?, ?, ?)", rows)
            for path in source.paths("url_to_file"):
                database.executemany("INSERT OR IGNORE INTO files VALUES (?, ?)", _files_of_urls(path, losses))
            yield from _pictures(database.execute(_SORTED), source.raw, folders, losses)
        except sqlite3.OperationalError as error:
            raise UserError(
                f"cannot sort captions in {folder} ({error}); set TMPDIR to a folder with twice the lists' size free"
            ) from None


def _entries(path: Path, losses: Losses) -> Iterator[tuple[int, str, str]]:
    for row, entry in enumerate(stream_list(path)):
        fields = entry if isinstance(entry, dict) else {}
        caption, image, url = clean_text(fields.get("caption")), fields.get("image"), fields.get("url")
        if caption is None:
            losses.add("caption is blank or no text", f"{path.name} entry {row}")
        elif (path_of_image := path_below(image)) is not None:
            yield 0, path_of_image, caption
        elif image is not None:
            losses.add("image is no path below the raw folder", f"{path.name} entry {row}: {str(image)[:80]!r}")
        elif is_text(url):
            yield 1, url.strip(), caption
        else:
            losses.add("entry has neither url nor image", f"{path.name} entry {row}")


def _files_of_urls(path: Path, losses: Losses) -> Iterator[tuple[str, str]]:
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                pair = _parse(line)
                if pair is None:
                    losses.add("line does not give a url its file", f"{path.name} line {number}", records=0)
                else:
                    yield pair
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); it must be UTF-8 with one JSON object a line") from None


def _parse(line: str) -> tuple[str, str] | None:
    try:
        fields: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    url, file = (fields.get("url"), path_below(fields.get("file"))) if isinstance(fields, dict) else (None, None)
    return (url.strip(), file) if is_text(url) and file is not None else None


def _pictures(rows: Iterable[Row], raw: Path, folders: list[Path], losses: Losses) -> Iterator[MediaRecords]:
    """One picture for each run of rows of one url or path."""
    for (is_url, media), group in groupby(rows, key=lambda row: row[:2]):
        same = list(group)
        captions = list(dict.fromkeys(caption for _, _, caption, _ in same))
        if repeated := len(same) - len(captions):
            losses.add("caption repeats for its picture", media[:200], records=repeated)
        file = same[0][3]
        if is_url:
            path = find_image(folders, [name for name in (file, file_of_url(media)) if name])
        else:
            path = find_image([raw, *folders], [media])
        if path is None:
            reason = "url has no file: its link is dead or was never fetched" if is_url else "image file is missing"
            losses.add(reason, media[:200], records=len(captions))
            continue
        digest = hashlib.sha256(media.encode()).hexdigest()[:32]
        records = [Record(f"{digest}-{n}", "caption", answers=(caption,)) for n, caption in enumerate(captions)]
        yield MediaRecords(f"web_capfilt_{digest}", media, path, records)
