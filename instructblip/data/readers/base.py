"""What every reader takes and gives."""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from instructblip.data.records import Record
from instructblip.data.typed import WrongValueError
from instructblip.errors import UserError

MEDIA_ROLES = ("images", "videos")  # what a card calls folders of images or videos; all other files are annotations
REMOTE = "hf://datasets/"  # begins the address of a dataset of the Hugging Face hub, as everywhere in its libraries
OCR_ROLE = "ocr"  # a dataset's own OCR tokens; a split is read without them where its files name none
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
MAX_EXAMPLES = 5
MAX_EXAMPLE_LENGTH = 200


@dataclass(frozen=True)
class RawSplit:
    """One split of the raw files, as a reader sees it.

    Attributes:
        raw: the folder that the user downloaded and unpacked.
        split: name of the split.
        files: role -> places below `raw` where that file or folder may lie, in the order they are tried; from the card.
        options: what else the card tells the reader, such as the prefix of its ids.
        scratch: a folder for a reader's own files, which stays until all of its media are converted.
    """

    raw: Path
    split: str
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    scratch: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))

    def path(self, role: str) -> Path:
        """The first of a role's places that exists.

        Raises:
            UserError: none does; names all of them.
        """
        found = self.paths(role)
        if not found and role not in self.files:
            raise UserError(
                f"the card names no file for {role} of split {self.split}; add it to splits.{self.split}.files"
            )
        if not found:
            places = " or ".join(self.files[role])
            raise UserError(
                f"{self.raw} lacks {places} ({role} of split {self.split}); {unpack_hint(self.raw)}put it there, correct "
                "raw=, or prepare other splits with split="
            )
        return found[0]

    def paths(self, role: str) -> list[Path]:
        """All places of a role that exist, none where the card names none: images may lie in several folders."""
        return [self.raw / place for place in self.files.get(role, ()) if (self.raw / place).exists()]


def is_remote(place: str) -> bool:
    """Whether a card's place is a dataset of the Hugging Face hub, and no file below the raw folder."""
    return place.startswith(REMOTE)


def is_there(raw: Path, place: str) -> bool:
    """Whether a card's place has files; of one on the hub only fetching would tell."""
    return is_remote(place) or (raw / place).exists() or any(_matched(raw, place).values())


def found(raw: Path, place: str) -> list[Path]:
    """The files below the raw folder that a place of own data names, in order: one, or all of a pattern.

    A pattern has `*`, `?` and `[...]` as a shell has, and braces as WebDataset has: `{00000..00331}.tar`, `{a,b}.csv`. What
    braces name must all be there.

    Raises:
        UserError: one of them is not.
    """
    if (raw / place).exists():
        return [raw / place]
    matched = _matched(raw, place)
    paths = [path for paths in matched.values() for path in paths]
    missing = [name for name, paths in matched.items() if not paths]
    if paths and missing:
        raise UserError(f"{raw} lacks {missing[0]} of {place}; put it there, or correct the card")
    return paths


def _matched(raw: Path, place: str) -> dict[str, list[Path]]:
    """The names that a pattern stands for, each with the files of that name."""
    return {
        name: [raw / name] if (raw / name).exists() else sorted(raw.glob(name)) if _GLOB.search(name) else []
        for name in without_braces(place)
    }


_GLOB = re.compile(r"[*?\[]")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def without_braces(place: str) -> list[str]:
    """The names that a pattern with braces stands for, in order."""
    pieces = [[piece] if number % 2 == 0 else _alternatives(piece) for number, piece in enumerate(_BRACES.split(place))]
    return ["".join(chosen) for chosen in product(*pieces)]


def _alternatives(inside: str) -> list[str]:
    if match := _RANGE.fullmatch(inside):
        return [str(number).zfill(len(match[1])) for number in range(int(match[1]), int(match[2]) + 1)]
    return inside.split(",")


def unpack_hint(raw: Path) -> str:
    """`unpack train2014.zip, which lies there still packed, or `; empty where no archive lies in the raw folder."""
    try:
        found = sorted(path.name for path in raw.iterdir() if path.suffix.lower() in ARCHIVES and path.is_file())
    except OSError:
        return ""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"unpack {', '.join(found[:3])}{more}, which lies there still packed, or " if found else ""


@dataclass(frozen=True)
class FileSlice:
    """The bytes of an image or video within a file: a member of a tar.

    Attributes:
        path, offset, size: the file, and which of its bytes.
        name: what it is called in messages.
    """

    path: Path
    offset: int
    size: int
    name: str


Media = Path | FileSlice


@dataclass(frozen=True)
class MediaRecords:
    """One image or video, or several images together, with all records that use it.

    Attributes:
        key: its name in the shard, unique within the split: letters, digits, `_` and `-` only (a dot would split the sample
            in a WebDataset tar).
        media_id: its id in the source.
        media: file to read, or part of one; a tuple: several images, which a sample shows in this order, as it would the
            frames of a video. A reader does not open the file: preparation does.
        records: the annotations, in a fixed order.
        video: whether `media` is a video, which is stored as frames.
    """

    key: str
    media_id: str
    media: Media | tuple[Media, ...]
    records: list[Record]
    video: bool = False


def shown_example(example: str) -> str:
    """What raw files say, cut to a readable length and without signs that a terminal would obey."""
    shown = example[:MAX_EXAMPLE_LENGTH]
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in shown)


@dataclass
class Losses:
    """What could not be kept: counted by reason, with the first few examples of each.

    Attributes:
        reasons: reason -> {"reason", "count" (entries or images lost), "records" (records lost with them), "examples"}.
    """

    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, reason: str, example: str, records: int = 1) -> None:
        """Count one lost entry or image and the `records` that are lost with it; `example` says which one it was.

        What an example holds comes from the raw files: it is cut to a readable length and to one line.
        """
        self.merge([{"reason": reason, "count": 1, "records": records, "examples": [shown_example(example)]}])

    @contextlib.contextmanager
    def counting(self, place: str, records: int = 1) -> Iterator[None]:
        """Count an entry under its reason where a `WrongValueError` leaves the block, and go on after it."""
        try:
            yield
        except WrongValueError as error:
            self.add(str(error), f"{place}: {error.detail}" if error.detail else place, records)

    def merge(self, losses: list[dict[str, Any]]) -> None:
        """Add what another `to_list` counted."""
        for loss in losses:
            empty: dict[str, Any] = {"reason": loss["reason"], "count": 0, "records": 0, "examples": []}
            entry = self.reasons.setdefault(loss["reason"], empty)
            entry["count"] += loss["count"]
            entry["records"] += loss["records"]
            entry["examples"] = (entry["examples"] + loss["examples"])[:MAX_EXAMPLES]

    def to_list(self) -> list[dict[str, Any]]:
        """All losses, sorted by reason, as they stand in a manifest."""
        return [self.reasons[reason] for reason in sorted(self.reasons)]


@dataclass(frozen=True)
class Reader:
    """A raw format: the function that reads it, and what a card says to that function.

    Attributes:
        read: (raw files of a split, losses) -> images in an order that depends on the raw files alone.
        needs: the roles of files that every split names.
        may_name: those that a split may name besides.
        options: what `reader_options` may hold; `prefix`, of the images' keys, is the dataset's name where a card says none.
        tasks: of a reader of people's own data, the tasks that it reads records for, one of which it is told; all of the
            files that a card names are read by it. None of a reader of a published format.
        columns: those of its tables, which a card may say are called otherwise.
        look: raises a UserError where a split's files are not what `read` needs, from a look at how they begin; preparation
            takes it at all splits before it converts the first.
    """

    read: Callable[[RawSplit, Losses], Iterator[MediaRecords]]
    needs: tuple[str, ...] = ()
    may_name: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    look: Callable[[RawSplit], None] | None = None

    def __call__(self, source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
        """The images of a split with their records."""
        return self.read(source, losses)
