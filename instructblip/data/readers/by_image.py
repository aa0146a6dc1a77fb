"""Rows about images in any order -> each image once with all its records, in flat memory.

The rows go to an SQLite file in the reader's scratch folder, which sorts them on disk; pictures that stand in cells go to
one file beside it, each once. Both need about as much space as the tables.
"""

import hashlib
import json
import sqlite3
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import IO, Any, Self

from instructblip.data.readers.base import FileSlice
from instructblip.data.readers.columns import Example, MediaValue
from instructblip.data.records import Record
from instructblip.errors import UserError
from instructblip.files import errors_for_users

_SETUP = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA temp_store = FILE;
PRAGMA cache_size = -16384;
CREATE TABLE rows (number INTEGER PRIMARY KEY, media TEXT, place TEXT, video INTEGER, records TEXT);
CREATE TABLE pictures (hash TEXT PRIMARY KEY, place INTEGER, size INTEGER, name TEXT) WITHOUT ROWID;
"""
# In the order of each image's first row, and of its rows.
_SORTED = """
SELECT media, place, video, records FROM (SELECT *, MIN(number) OVER (PARTITION BY media) AS first FROM rows)
ORDER BY first, number
"""


@dataclass(frozen=True)
class ImageRows:
    """One image or video, or several images together, as the rows say it.

    Attributes:
        media: of each, the path below the folder of images, or the part of the scratch file where it stands.
        media_id: the paths, or the beginnings of the hashes.
        place: of its first row.
        records: of all its rows.
    """

    media: tuple[str | FileSlice, ...]
    media_id: str
    place: str
    video: bool
    records: tuple[Record, ...]


class RowsByImage:
    """`with RowsByImage.open(scratch) as rows: rows.add(...); for image in rows.images(): ...`."""

    def __init__(self, database: sqlite3.Connection, file: IO[bytes], pictures: Path) -> None:
        self._database = database
        self._file = file
        self._pictures = pictures

    @classmethod
    @contextmanager
    def open(cls, scratch: Path) -> Iterator[Self]:
        """A collection of rows in a folder; the pictures that `images` gives stay in that folder.

        Raises:
            UserError: no space left.
        """
        with (
            tempfile.TemporaryDirectory(prefix="rows_", dir=scratch) as folder,
            tempfile.NamedTemporaryFile(prefix="pictures_", dir=scratch, delete=False) as file,
            closing(sqlite3.connect(Path(folder) / "rows.sqlite", check_same_thread=False)) as database,
        ):
            try:
                database.executescript(_SETUP)
                yield cls(database, file, Path(file.name))
            except sqlite3.OperationalError as error:
                raise UserError(
                    f"cannot sort rows in {scratch} ({error}); free as much space as the tables take"
                ) from None
            finally:
                if not file.tell():
                    Path(file.name).unlink()

    def add(self, examples: Iterable[tuple[int, str, Example]]) -> None:
        """Take rows: (number, place, what it gives)."""
        rows = (
            (
                number,
                json.dumps([self._identity(media, place) for media in example.media]),
                place,
                example.video,
                json.dumps([record.to_dict() for record in example.records]),
            )
            for number, place, example in examples
        )
        self._database.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?)", rows)
        with errors_for_users(self._pictures):
            self._file.flush()

    def _identity(self, media: MediaValue, place: str) -> list[str]:
        """What tells an image from others: its path in one form of Unicode, or the hash of what stands in the cell."""
        assert not isinstance(media, FileSlice)  # no cell of a table is one
        if isinstance(media, str):
            return ["path", unicodedata.normalize("NFC", media)]
        digest = hashlib.sha256(media).hexdigest()
        values = (digest, self._file.tell(), len(media), place)
        if self._database.execute("INSERT OR IGNORE INTO pictures VALUES (?, ?, ?, ?)", values).rowcount:
            with errors_for_users(self._pictures):
                self._file.write(media)
        return ["hash", digest]

    def images(self) -> Iterator[ImageRows]:
        """Each image once, in the order of their first rows."""
        for media, rows in groupby(self._database.execute(_SORTED), key=lambda row: row[0]):
            same = list(rows)
            identities = json.loads(media)
            yield ImageRows(
                media=tuple(value if kind == "path" else self._slice(value) for kind, value in identities),
                media_id=" ".join(value if kind == "path" else value[:32] for kind, value in identities),
                place=same[0][1],
                video=bool(same[0][2]),
                records=_together([Record.from_dict(fields) for row in same for fields in json.loads(row[3])]),
            )

    def _slice(self, digest: str) -> FileSlice:
        found = self._database.execute("SELECT place, size, name FROM pictures WHERE hash = ?", (digest,)).fetchone()
        return FileSlice(self._pictures, *found)


def _together(records: list[Record]) -> tuple[Record, ...]:
    """The records of one image: those with its captions become one, for captions are compared with all references."""
    listed: dict[Any, Record] = {}
    for record in records:
        key = "captions" if record.kind == "captions" else len(listed)
        if key in listed:
            record = replace(listed[key], captions=listed[key].captions + record.captions)
        listed[key] = record
    return tuple(listed.values())
