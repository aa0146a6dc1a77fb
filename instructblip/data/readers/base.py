"""What every reader takes and gives."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instructblip.data.records import Record
from instructblip.data.typed import WrongValueError
from instructblip.errors import UserError

MEDIA_ROLES = ("images", "videos")  # what a card calls folders of images or videos; all other files are annotations
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
    """

    raw: Path
    split: str
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

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


def unpack_hint(raw: Path) -> str:
    """`unpack train2014.zip, which lies there still packed, or `; empty where no archive lies in the raw folder."""
    try:
        found = sorted(path.name for path in raw.iterdir() if path.suffix.lower() in ARCHIVES and path.is_file())
    except OSError:
        return ""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"unpack {', '.join(found[:3])}{more}, which lies there still packed, or " if found else ""


@dataclass(frozen=True)
class MediaRecords:
    """One image or video with all records that use it.

    Attributes:
        key: its name in the shard, unique within the split: letters, digits, `_` and `-` only (a dot would split the sample
            in a WebDataset tar).
        media_id: its id in the source.
        media: file to read, or the encoded bytes themselves. A reader does not open the file: preparation does.
        records: the annotations, in a fixed order.
        video: whether `media` is a video, which is stored as frames.
    """

    key: str
    media_id: str
    media: Path | bytes
    records: list[Record]
    video: bool = False


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
        shown = example[:MAX_EXAMPLE_LENGTH]
        if not shown.isprintable():
            shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in shown)
        self.merge([{"reason": reason, "count": 1, "records": records, "examples": [shown]}])

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
    """

    read: Callable[[RawSplit, Losses], Iterator[MediaRecords]]
    needs: tuple[str, ...] = ()
    may_name: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def __call__(self, source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
        """The images of a split with their records."""
        return self.read(source, losses)
