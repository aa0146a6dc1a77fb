"""Tars read from their first byte to their last: prepared ones without their index, and those of others.

Each dataset is an endless row of slots: its shards in an order that the seed decides for each epoch. The slots are dealt out
to readers, one for each worker process of each rank. A shard's records pass through a bounded buffer that shuffles them by
seed, dataset and slot, so what comes out of a slot is always the same. docs/data.md, "Streams", says what that is worth.
"""

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from instructblip.data.mixture import Int64Array, seeded_generator
from instructblip.data.readers.base import Losses, shown_example
from instructblip.data.readers.columns import Columns
from instructblip.data.readers.foreign_tars import is_media, is_text, sample_row
from instructblip.data.records import Record, parse_records
from instructblip.data.tars import Sample, SampleBytes, grouped, tar_members
from instructblip.data.templates import TemplateSet
from instructblip.data.typed import WrongValueError
from instructblip.errors import UserError
from instructblip.fetch.remote_file import RemoteFile
from instructblip.fetch.shard_cache import RemoteTars, is_url
from instructblip.fetch.streams import shown

_EMPTY_ROUNDS = 10  # a reader of many meets each shard once in some epochs
BUFFERED_RECORDS = 1000
BUFFERED_BYTES = 1 << 26  # 64 MiB, and one record more
_REFUSED_IN_A_ROW = 1000  # members
_TEXT_GROWTH = 16  # of JSON in memory: a number of two signs takes 32 bytes


# --- tars ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TarPlace:
    """Where a tar lies.

    Attributes:
        name: the same wherever its dataset lies.
        location: path or URL.
        cache, sha256, bytes: of a prepared shard elsewhere, which is fetched whole into the shard cache.
    """

    name: str
    location: str
    cache: RemoteTars | None = None
    sha256: str = ""
    bytes: int = 0

    def __str__(self) -> str:
        return shown(self.location) if is_url(self.location) else self.location

    def open(self) -> BinaryIO:
        """The tar from its first byte.

        Raises:
            UserError: it is gone, or cannot be fetched.
        """
        if self.cache is not None:
            return open(self.cache.open(Path(self.location).name, self.sha256, self.bytes), "rb")
        if is_url(self.location):
            return io.BufferedReader(RemoteFile(self.location), 1 << 20)
        try:
            return open(self.location, "rb")
        except OSError as error:
            raise UserError(f"shard {self.location} cannot be read ({error.strerror}); put it back as it was") from None


class StreamedRecord(NamedTuple):
    """A record as it comes out of a tar.

    Attributes:
        key: of its image.
        row: how many samples of the tar stand before its own.
        frames: encoded, one of a picture.
        record: None where it cannot be used.
        lost: why.
        text: bytes of text that it was read from.
    """

    key: str
    row: int
    frames: tuple[bytes, ...] = ()
    record: Record | None = None
    lost: str = ""
    text: int = 0


ReadTar = Callable[[BinaryIO, TarPlace], Iterator[StreamedRecord]]


def read_prepared(kinds: Sequence[str], file: BinaryIO, place: TarPlace) -> Iterator[StreamedRecord]:
    """The records of a prepared shard of these kinds (none given: all), in stored order.

    Raises:
        UserError: the tar is cut short or damaged.
    """
    for row, sample, lost in _samples(file, place):
        yield from (StreamedRecord(key, row, lost=reason) for key, reason in lost)
        if sample is None:
            return
        key = sample["__key__"]
        frames = tuple(content for name, content in sample.items() if is_media(name) and content is not None)
        try:
            records = [Record.from_dict(record) for record in parse_records(sample.get("json") or b"")[1]]
        except WrongValueError as error:
            yield StreamedRecord(key, row, lost=f"image {key} of {place} has damaged records ({error})")
            continue
        if not frames:
            yield StreamedRecord(key, row, lost=f"image {key} of {place} has no picture")
            continue
        yield from _of_kinds(kinds, records, StreamedRecord(key, row, frames, text=_text_bytes(sample)))


def read_foreign(columns: Columns, kinds: Sequence[str], file: BinaryIO, place: TarPlace) -> Iterator[StreamedRecord]:
    """The records of a tar as img2dataset writes it, each sample as a row of columns; of these kinds (none given: all).

    Raises:
        UserError: the tar is cut short or damaged; it holds videos.
    """
    tar = place.name.removesuffix(".tar")
    for row, sample, lost in _samples(file, place):
        yield from (StreamedRecord(key, row, lost=reason) for key, reason in lost)
        if sample is None:
            return
        losses, example = _Losses(), None
        with losses.counting(where := f"{place}: {sample['__key__']}"):
            found = sample_row(sample, tar, where)
            example = columns.example(found, losses)
        key = f"{tar}/{sample['__key__']}"
        yield from (StreamedRecord(key, row, lost=reason) for reason in losses.said)
        if example is not None:
            if example.video:
                raise UserError(f"{where} is a video, which no stream decodes; prepare its dataset (prepare.py)")
            frames = tuple(part for part in example.media if isinstance(part, bytes))
            yield from _of_kinds(kinds, example.records, StreamedRecord(key, row, frames, text=_text_bytes(sample)))


def _of_kinds(kinds: Sequence[str], records: Sequence[Record], found: StreamedRecord) -> Iterator[StreamedRecord]:
    """The wanted records of a sample, each of which takes its share of the text."""
    share = found.text // max(1, len(records))
    for record in records:
        if not kinds or record.kind in kinds:
            yield found._replace(record=record, text=share)


def _text_bytes(sample: Sample) -> int:
    return sum(len(content) for name, content in sample.items() if isinstance(content, bytes) and not is_media(name))


def look_at_foreign(columns: Columns, place: TarPlace) -> None:
    """Look at the first samples of a tar for the columns that the task needs.

    Raises:
        UserError: they are not there, or it is no tar.
    """
    with place.open() as file:
        samples = itertools.islice(_samples(file, place), 100)
        known: set[str] = set()
        for _, sample, _ in samples:
            with Losses().counting(""):
                known |= sample_row(sample, place.name, str(place)).values.keys() if sample else set()
    columns.check(known, Path(place.name), Losses())


class _Losses(Losses):
    """Says each loss by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def add(self, reason: str, example: str, records: int = 1) -> None:
        self.said.append(f"{reason} ({shown_example(example)})")


def _samples(file: BinaryIO, place: TarPlace) -> Iterator[tuple[int, Sample | None, list[tuple[str, str]]]]:
    """Number and members of each sample, with what before its end was refused: (key, why). Last, what stood behind all."""
    refused: list[tuple[str, str]] = []

    def members() -> Iterator[Sample]:
        taken = SampleBytes()
        for member in tar_members(file, str(place)):
            wanted = is_media(member.name) or is_text(member)
            if reason := taken.refusal(member) if wanted else member.refusal:
                name = shown_example(member.name)
                refused.append((name, f"{reason} ({place}: {name})"))
                if len(refused) > _REFUSED_IN_A_ROW:
                    raise UserError(
                        f"{place} is not to be trusted: {reason}, as {len(refused):,} of its members in a row"
                    )
                continue
            content = member.read() if wanted else None
            yield {"fname": member.name, "data": content, "__url__": place.location}

    def repeated(name: str) -> None:
        refused.append((name, f"member occurs twice in its sample ({place}: {name})"))

    row = 0
    for sample in grouped(members(), repeated):
        yield row, sample, refused[:]
        refused.clear()
        row += 1
    yield row, None, refused


def shuffled(records: Iterator[StreamedRecord], random: np.random.Generator) -> Iterator[StreamedRecord]:
    """Records through a buffer of a bounded number and size, from which one is drawn whenever it is full."""
    buffer: list[StreamedRecord] = []
    held = 0
    for record in records:
        buffer.append(record)
        held += _size(record)
        while len(buffer) >= BUFFERED_RECORDS or held > BUFFERED_BYTES:
            drawn = _drawn(buffer, random)
            held -= _size(drawn)
            yield drawn
    while buffer:
        yield _drawn(buffer, random)


def _drawn(buffer: list[StreamedRecord], random: np.random.Generator) -> StreamedRecord:
    place = int(random.integers(len(buffer)))
    buffer[place], buffer[-1] = buffer[-1], buffer[place]
    return buffer.pop()


def _size(record: StreamedRecord) -> int:
    return 1024 + sum(map(len, record.frames)) + _TEXT_GROWTH * record.text


# --- datasets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StreamSet:
    """One dataset of a mixture, read as a stream.

    Attributes:
        name: of its card.
        source: `<dataset>/<split>` that its records are of.
        places: its tars.
        read: gives a tar's records.
        records: how many there are, of the kinds that are drawn.
        templates, flip: as of a `TrainingSet`.
        kinds: of the records that are drawn; none: all.
        fingerprint: of what decides which records there are, as far as it is known without reading them.
    """

    name: str
    source: str
    places: tuple[TarPlace, ...]
    read: ReadTar
    records: int
    templates: TemplateSet
    flip: bool = True
    kinds: tuple[str, ...] = ()
    fingerprint: str = ""

    images = None  # the images of its records are known once they are read

    def __len__(self) -> int:
        """Number of records."""
        return self.records

    @property
    def shard_records(self) -> tuple[int, ...]:
        """Not known, and not needed: a stream has an order of its own."""
        return ()


class Place(NamedTuple):
    """How far a reader has come: slots behind it, and records taken of the one it stands in."""

    slots: int = 0
    taken: int = 0


class Slot(NamedTuple):
    """A shard in an epoch, by its number in the row of all, and how many of its records were taken before it was dealt."""

    number: int
    taken: int = 0


@dataclass(frozen=True)
class Deal:
    """Which slots of a dataset each reader gets: of `left` and all from `frontier` on, in turn.

    Attributes:
        readers: how many there are.
        left: slots before the frontier that others began, or had before them, when the run was stopped.
        frontier: the first slot that nobody had.
    """

    readers: int
    left: tuple[Slot, ...] = ()
    frontier: int = 0

    def slot(self, reader: int, number: int) -> Slot:
        """The `number`-th slot of a reader."""
        return self._at(reader + number * self.readers)

    def _at(self, place: int) -> Slot:
        return self.left[place] if place < len(self.left) else Slot(self.frontier + place - len(self.left))

    def begin(self, reader: int) -> Place:
        """Where a reader starts."""
        return Place(0, self.slot(reader, 0).taken)

    def again(self, places: Sequence[Place], readers: int) -> "Deal":
        """The same for another number of readers, after the earlier ones came to these places."""
        current = [reader + place.slots * self.readers for reader, place in enumerate(places)]
        end = max(*current, len(self.left) - 1) + 1
        left = []
        for place in range(min(current), end):
            reader = place % self.readers
            if place >= current[reader]:
                number, taken = self._at(place)
                left.append(Slot(number, places[reader].taken if place == current[reader] else taken))
        return Deal(readers, tuple(left), self.frontier + end - len(self.left))

    def to_json(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return {"readers": self.readers, "left": [list(slot) for slot in self.left], "frontier": self.frontier}

    @classmethod
    def from_json(cls, stated: dict[str, Any]) -> "Deal":
        """From `to_json`."""
        return cls(stated["readers"], tuple(Slot(*slot) for slot in stated["left"]), stated["frontier"])


class StreamReader:
    """One reader's way through a dataset.

    Args:
        chosen: the dataset.
        seed, number: decide the order; the dataset by its number in the mixture.
        deal, reader: which slots it gets.
        begin: where it starts.

    Attributes:
        place: how far it has come.
        shard: the number of the shard that it stands in.
    """

    def __init__(self, chosen: StreamSet, seed: int, number: int, deal: Deal, reader: int, begin: Place) -> None:
        self.chosen = chosen
        self.place = begin
        self.shard = 0
        self._seed, self._number = seed, number
        self._deal, self._reader = deal, reader
        self._file: BinaryIO | None = None
        self._records: Iterator[StreamedRecord] = iter(())
        self._epoch = -1
        self._order: Int64Array = np.empty(0, dtype=np.int64)

    def next(self) -> StreamedRecord:
        """The next record.

        Raises:
            UserError: a shard is gone, cut short or no tar; there are no records at all.
        """
        for _ in range(_EMPTY_ROUNDS * len(self.chosen.places)):
            if self._file is None:
                self._open()
            found = next(self._records, None)
            if found is not None:
                self.place = Place(self.place.slots, self.place.taken + 1)
                return found
            self.close()
            following = self.place.slots + 1
            self.place = Place(following, self._deal.slot(self._reader, following).taken)
        kinds = f" of kind {' or '.join(self.chosen.kinds)}" if self.chosen.kinds else ""
        raise UserError(f"no shard of {self.chosen.name} ({len(self.chosen.places):,}) holds a record{kinds}")

    def close(self) -> None:
        """Let go of the tar."""
        self._records = iter(())
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        slot = self._deal.slot(self._reader, self.place.slots).number
        epoch, turn = divmod(slot, len(self.chosen.places))
        if epoch != self._epoch:
            stream = seeded_generator(self._seed, "shards", self._number, epoch)
            self._epoch, self._order = epoch, stream.permutation(len(self.chosen.places))
        self.shard = int(self._order[turn])
        place = self.chosen.places[self.shard]
        self._file = place.open()
        records = shuffled(
            self.chosen.read(self._file, place), seeded_generator(self._seed, "slot", self._number, slot)
        )
        self._records = itertools.islice(records, self.place.taken, None)


def prepared_places(folder: Path, entries: Sequence[dict[str, Any]], cache: RemoteTars | None) -> tuple[TarPlace, ...]:
    """The tars that a manifest lists."""
    return tuple(
        TarPlace(entry["name"], str(folder / entry["name"]), cache, entry["sha256"], int(entry["bytes"]))
        for entry in entries
    )


def prepared_reader(kinds: Sequence[str]) -> ReadTar:
    """Reads prepared shards."""
    return partial(read_prepared, tuple(kinds))


def foreign_reader(columns: Columns, kinds: Sequence[str]) -> ReadTar:
    """Reads tars of others."""
    return partial(read_foreign, columns, tuple(kinds))
