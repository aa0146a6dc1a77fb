"""Web pictures in tars of img2dataset that nobody prepared: found by the reader that prepares them, stored alike."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from instructblip.data.cards import OwnCard, load_card, source_facts
from instructblip.data.prepare.convert import without_repeats
from instructblip.data.prepare.media import MediaError, MediaOptions, read_media, stored_frames
from instructblip.data.readers import Losses, MediaRecords, RawSplit
from instructblip.data.readers.foreign_tars import look_at_tars, read_foreign_tar
from instructblip.data.readers.records import own_files
from instructblip.data.records import Record
from instructblip.data.shards import KeptOpen, image_json
from instructblip.errors import DamagedSample, UserError

_READER = "webdataset"
_TARS_KEPT = 4


class ForeignTar:
    """One tar of others, its samples looked up once; read by number as a `ShardReader` is.

    Args:
        path: of the tar.
        source: the split that it is of.

    Attributes:
        path: of the tar.
        keys: of its images, as preparing would name them.
        losses: what of it cannot be used.
    """

    def __init__(self, path: Path, source: RawSplit) -> None:
        self.path = path
        self.losses = Losses()
        self._raw = source.raw
        found = without_repeats(read_foreign_tar(source, path, self.losses), self.losses)
        self._images: list[MediaRecords] = [image for image in found if self._can_be_written(image)]
        self.keys = [image.key for image in self._images]

    def __len__(self) -> int:
        """How many images."""
        return len(self._images)

    def read(self, row: int) -> tuple[tuple[bytes, ...], list[Record]]:
        """The frames of an image, as preparing would store them, and its records.

        Raises:
            DamagedSample: it cannot be read.
        """
        return tuple(self._frames(row).values()), self._images[row].records

    def read_encoded(self, row: int) -> tuple[tuple[bytes, ...], bytes]:
        """The frames of an image and the JSON of its records, as preparing would store them."""
        image = self._images[row]
        return tuple(self._frames(row).values()), image_json(image.media_id, image.records)

    def read_records(self, row: int) -> list[Record]:
        """The records of an image."""
        return self._images[row].records

    def extension(self, row: int) -> str:
        """Of a picture, as preparing would store it."""
        return next(iter(self._frames(row)))

    def _can_be_written(self, image: MediaRecords) -> bool:
        """Whether UTF-8 can hold what its records say; it is lost otherwise, as where it is prepared."""
        try:
            image_json(image.media_id, image.records)
        except UnicodeEncodeError:
            self.losses.add("record holds half a Unicode pair", image.media_id, records=len(image.records))
            return False
        return True

    def _frames(self, row: int) -> dict[str, bytes]:
        image = self._images[row]
        try:
            return stored_frames(read_media(image, self._raw), image.video, MediaOptions())[0]
        except MediaError as error:
            raise DamagedSample(f"{self.keys[row]} of {self.path}: {error}") from None


@dataclass(frozen=True)
class ForeignSplit:
    """The tars that a card names for a split, in place of a `PreparedSplit`."""

    card: OwnCard
    split: str

    @property
    def dataset(self) -> str:
        """Name of the dataset."""
        return self.card.source

    @property
    def folder(self) -> Path:
        """That the tars lie below."""
        return Path(self.card.path).expanduser().parent

    @property
    def source(self) -> RawSplit:
        """As a reader is told of it."""
        return RawSplit(self.folder, self.split, self.card.splits[self.split].files, self.card.told)

    @cached_property
    def paths(self) -> list[Path]:
        """Of the tars, in order; each once, where several places name it."""
        return list(dict.fromkeys(own_files(self.source, "shards")))

    @cached_property
    def shards(self) -> Sequence[ForeignTar]:
        """The tars, looked into when they are asked for."""
        paths = self.paths
        return KeptOpen(len(paths), lambda number: ForeignTar(paths[number], self.source), _TARS_KEPT)

    @property
    def manifest(self) -> dict[str, Any]:
        """What is known without looking into them: images by the card's number of records, if it says one."""
        about = (self.card.expected_records(self.split) or 0) // max(1, len(self.paths))
        return {"shards": [{"images": about}] * len(self.paths), "licence": self.card.licence}

    @cached_property
    def fingerprint(self) -> str:
        """Of names and sizes: to hash the tars would be to read them all."""
        sizes = [[path.relative_to(self.folder).as_posix(), path.stat().st_size] for path in self.paths]
        stated = [source_facts(self.card, self.split), sizes]
        return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def foreign_split(path: str, split: str) -> ForeignSplit:
    """The tars that a card of one's own names.

    Raises:
        UserError: no such card, one of another reader or without that split; a tar is missing, or a column that is needed.
    """
    card = load_card(path)
    if not isinstance(card, OwnCard) or card.reader != _READER or card.view_of is not None:
        raise UserError(
            f"shards={path} is no card of tars (reader: {_READER}); prepare its dataset, and give the folder"
        )
    if split not in card.splits:
        raise UserError(f"shards={path} has no split {split}, but {', '.join(card.splits)}; set split=")
    found = ForeignSplit(card, split)
    if not found.paths:
        raise UserError(f"shards={path} names no tars of split {split}")
    look_at_tars(found.source)
    return found
