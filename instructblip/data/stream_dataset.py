"""The training set as a stream: a step in, its images and texts out, whatever comes next in this reader's shards.

The datasets of a step's positions are those of the mixture, and templates and augmentation are drawn from the positions' own
streams, as everywhere. Which record stands at a position depends on the number of readers, and on what was read before.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from torch.utils.data import Dataset

from instructblip.data.batching import Item
from instructblip.data.lost import LostSample
from instructblip.data.mixture import Mixture, position_generator
from instructblip.data.mixture_dataset import TRIES, DrawnImage, MakeImage, ReadShare, Texts
from instructblip.data.streaming import Deal, Place, StreamedRecord, StreamReader, StreamSet
from instructblip.errors import DamagedSample, UserError


class Readers(NamedTuple):
    """Who reads: `workers` processes (0: the main one) of each of `world_size` ranks, this being one of rank `rank`.

    A rank's lanes take its steps in turn.
    """

    rank: int = 0
    world_size: int = 1
    workers: int = 0

    @property
    def lanes(self) -> int:
        """How many read for this rank."""
        return max(1, self.workers)

    @property
    def total(self) -> int:
        """How many there are."""
        return self.world_size * self.lanes


class StreamDataset(Dataset[Item]):
    """Sequential access by step. Each lane of a rank is read by one process, its steps in order.

    Args:
        mixture: the plan, of which the datasets of positions are taken.
        sets: the datasets, in the order of the mixture's entries.
        make_image: gives the pixels of a drawn image.
        texts: how texts are made.
        readers: who reads.
    """

    def __init__(
        self, mixture: Mixture, sets: Sequence[StreamSet], make_image: MakeImage, texts: Texts, readers: Readers
    ) -> None:
        self.mixture = mixture
        self.sets = list(sets)
        self.make_image = make_image
        self.texts = texts
        self.readers = readers
        self._deals = [Deal(readers.total) for _ in sets]
        self._begin = [self._places(lane, None) for lane in range(readers.lanes)]
        self._open: dict[int, list[StreamReader]] = {}  # of the lanes that this process reads
        self._ahead: list[tuple[int, tuple[Place, ...]]] = []  # places of steps that were read, and not trained on yet

    def read_share(self, step: int, positions: Sequence[int]) -> ReadShare:
        """The samples of a step's positions. A damaged record gives way to the next of its dataset.

        Raises:
            UserError: a shard is gone, cut short or no tar, or nothing near can be used.
        """
        lane = step % self.readers.lanes
        readers = self._open[lane] = self._open.get(lane) or self._start(lane)
        lost: list[LostSample] = []
        items = [self._read(readers[self.mixture.draw(position).dataset], position, lost) for position in positions]
        return ReadShare(items, lost, tuple(reader.place for reader in readers))

    def first(self, count: int) -> ReadShare:
        """The first samples of the sequence of one reader alone, whoever asks."""
        alone = StreamDataset(self.mixture, self.sets, self.make_image, self.texts, Readers())
        return alone.read_share(0, range(count))

    def with_images(self, make_image: MakeImage) -> Self:
        """The same dataset with other images, from its beginning."""
        other = copy.copy(self)
        other.make_image, other._open = make_image, {}
        return other

    def _start(self, lane: int) -> list[StreamReader]:
        reader = self.readers.rank * self.readers.lanes + lane
        return [
            StreamReader(chosen, self.mixture.seed, number, deal, reader, place)
            for number, (chosen, deal, place) in enumerate(zip(self.sets, self._deals, self._begin[lane], strict=True))
        ]

    def _read(self, reader: StreamReader, position: int, lost: list[LostSample]) -> Item:
        reason = ""
        for _ in range(TRIES):
            found = reader.next()
            try:
                return self._item(reader, found, position)
            except DamagedSample as error:
                reason = str(error)
                shard = str(reader.chosen.places[reader.shard])
                lost.append(LostSample(position, reader.chosen.name, shard, found.key, reason))
        raise UserError(f"{TRIES} records of {reader.chosen.name} in a row cannot be used, the last: {reason}")

    def _item(self, reader: StreamReader, found: StreamedRecord, position: int) -> Item:
        if found.record is None:
            raise DamagedSample(found.lost)
        chosen, random = reader.chosen, position_generator(self.mixture.seed, position)
        place = f"{found.key} of {chosen.places[reader.shard]}"
        sample = self.texts.sample(
            chosen,
            found.record,
            random,
            position=position,
            frames=found.frames,
            image=(reader.shard, found.row),
            image_id=f"{chosen.source.partition('/')[0]}/{found.key}",
            place=place,
        )
        try:
            return sample, self.make_image(DrawnImage(place, found.frames, random, chosen.flip))
        except UserError:
            raise
        except Exception as error:  # a decoder fed with bytes that nobody prepared may raise anything; it is counted
            raise DamagedSample(f"image {place} cannot be decoded ({type(error).__name__}: {error})") from error

    # --- where a run stands ------------------------------------------------------------------------------------------

    def read_ahead(self, step: int, places: Sequence[tuple[int, int]]) -> None:
        """Take note of how far the reader of a step has come with it."""
        self._ahead.append((step, tuple(Place(*place) for place in places)))

    def places(self, done: int) -> list[tuple[Place, ...]]:
        """How far this rank's lanes have come in each dataset with the first `done` steps of the run."""
        for step, places in self._ahead:
            if step < done:
                self._begin[step % self.readers.lanes] = places
        self._ahead = [item for item in self._ahead if item[0] >= done]
        return list(self._begin)

    def state(self, ranks: Sequence[Sequence[Sequence[Sequence[int]]]]) -> dict[str, Any]:
        """What a checkpoint keeps, from `places` of all ranks."""
        of_readers = [places for lanes in ranks for places in lanes]
        return {
            chosen.name: {
                "deal": self._deals[number].to_json(),
                "places": [list(places[number]) for places in of_readers],
            }
            for number, chosen in enumerate(self.sets)
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's `state`; another number of readers share what was left. A new dataset begins."""
        of_sets: list[list[Place] | None] = []
        for number, chosen in enumerate(self.sets):
            if (stated := state.get(chosen.name)) is None:
                of_sets.append(None)
                continue
            deal, places = Deal.from_json(stated["deal"]), [Place(*place) for place in stated["places"]]
            same = deal.readers == self.readers.total
            self._deals[number] = deal if same else deal.again(places, self.readers.total)
            of_sets.append(places if same else None)
        self._begin = [self._places(lane, of_sets) for lane in range(self.readers.lanes)]
        self._open, self._ahead = {}, []

    def _places(self, lane: int, of_sets: Sequence[Sequence[Place] | None] | None) -> tuple[Place, ...]:
        """Where a lane begins in each dataset: where it stood, or at the first slot that it is dealt."""
        reader = self.readers.rank * self.readers.lanes + lane
        stood = of_sets or [None] * len(self.sets)
        return tuple(
            deal.begin(reader) if places is None else places[reader]
            for deal, places in zip(self._deals, stood, strict=True)
        )
