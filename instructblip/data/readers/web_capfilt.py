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
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.common import (
    MISSING_IMAGE,
    image_folders,
)
from instructblip.data.readers.files import (
    find_image,
    json_lines,
    stream_list,
)
from instructblip.data.records import Record
from instructblip.data.typed import (
    Fields,
    WrongValueError,
    is_text,
    path_below,
)
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
        with losses.counting(f"{path.name} entry {row}"):
            fields = Fields.of(entry)
            caption = fields.text("caption")
            if fields.has("image"):
                if (image := path_below(fields.get("image"))) is None:
                    raise WrongValueError("image is no path below the raw folder", repr(fields.get("image"))[:80])
                yield 0, image, caption
            else:
                yield 1, fields.verbatim("url"), caption


def _files_of_urls(path: Path, losses: Losses) -> Iterator[tuple[str, str]]:
    for place, entry in json_lines(path, losses, records=0):
        url, file = (entry.get("url"), path_below(entry.get("file"))) if isinstance(entry, dict) else (None, None)
        if is_text(url) and file is not None:
            yield url.strip(), file
        else:
            losses.add("line does not give a url its file", place, records=0)


def _pictures(rows: Iterable[Row], raw: Path, folders: list[Path], losses: Losses) -> Iterator[MediaRecords]:
    """One picture for each run of rows of one url or path."""
    for (is_url, media), group in groupby(rows, key=lambda row: row[:2]):
        same = list(group)
        captions = list(dict.fromkeys(caption for _, _, caption, _ in same))
        if repeated := len(same) - len(captions):
            losses.add("caption repeats for its picture", media[:200], records=repeated)
        file = same[0][3]
        path = _of_url(media, file, folders) if is_url else find_image([raw, *folders], [media])
        if path is None:
            reason = "url has no file: its link is dead or was never fetched" if is_url else MISSING_IMAGE
            losses.add(reason, media[:200], records=len(captions))
            continue
        digest = hashlib.sha256(media.encode()).hexdigest()[:32]
        records = [Record(f"{digest}-{n}", "caption", answers=(caption,)) for n, caption in enumerate(captions)]
        yield MediaRecords(f"web_capfilt_{digest}", media, path, records)


def _of_url(url: str, file: str | None, folders: list[Path]) -> Path | None:
    """By its digest a file has that very name: links are dead by the million, and to look for a like one lists a folder."""
    if file is not None and (given := find_image(folders, [file])) is not None:
        return given
    name = file_of_url(url)
    return next((path for folder in folders if (path := folder / name).is_file()), None)


READERS = {"web_capfilt": Reader(read_web_capfilt, needs=("captions", "images"), may_name=("url_to_file",))}
