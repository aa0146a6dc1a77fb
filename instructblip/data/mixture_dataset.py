"""The training set: a position of the mixture in, its images and texts out."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from instructblip.config.schema import TextProcessor
from instructblip.data.batching import Item
from instructblip.data.lost import LostSample
from instructblip.data.mixture import Draw, Mixture, position_generator, seeded_generator
from instructblip.data.records import Record, Sample
from instructblip.data.shards import PreparedSplit, ShardReader
from instructblip.data.templates import TemplateSet, answer_shares, cut_prefix, render_training
from instructblip.data.text_processors import TEXT_PROCESSORS
from instructblip.data.transforms import AUGMENTATIONS, augment_frames
from instructblip.errors import DamagedSample, UserError
from instructblip.images import fit_frames

_IMAGE_BITS = 32  # of an image's number that say its row in the shard
TRIES = 50  # records in a row that cannot be used: not damage here and there

# (shard, row) -> image tokens (F, P, V) of the F frames, one of a picture
ReadTokens = Callable[[ShardReader, int], Tensor]


@dataclass(frozen=True)
class TrainingSet:
    """One dataset of a mixture, opened.

    Attributes:
        name: of its card.
        split: its prepared training split.
        kinds: of the records that are drawn; none: all.
        templates: it is rendered by.
        flip: whether its images may be mirrored.
    """

    name: str
    split: PreparedSplit
    kinds: tuple[str, ...]
    templates: TemplateSet
    flip: bool = True

    @property
    def source(self) -> str:
        """`<dataset>/<split>` that its records are of."""
        return f"{self.split.dataset}/{self.split.split}"

    @property
    def fingerprint(self) -> str:
        """Of what is read."""
        return self.split.fingerprint

    @cached_property
    def shard_records(self) -> tuple[int, ...]:
        """How many records each shard holds."""
        return self.split.record_counts(self.kinds)

    def __len__(self) -> int:
        """Number of records."""
        return sum(self.shard_records)

    def locate(self, record: int) -> tuple[int, int, int]:
        """Shard, image row and place in that image's list of a record in [0, len), in stored order."""
        number = int(np.searchsorted(self._ends, record, side="right"))
        shard = self.split.shards[number]
        inside = record - int(self._ends[number]) + self.shard_records[number]
        stored = int(shard.records_of(self.kinds)[inside])
        return number, int(shard.arrays["record_image"][stored]), int(shard.arrays["record_number"][stored])

    def images(self, records: np.ndarray) -> np.ndarray:
        """A number for the image of each of these records, in stored order each."""
        numbers = np.searchsorted(self._ends, records, side="right")
        found = np.empty_like(records)
        for number in np.unique(numbers).tolist():
            at, shard = numbers == number, self.split.shards[number]
            inside = records[at] - int(self._ends[number]) + self.shard_records[number]
            rows = shard.arrays["record_image"][shard.records_of(self.kinds)[inside]]
            found[at] = (number << _IMAGE_BITS) + rows.astype(np.int64)
        return found

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.shard_records, dtype=np.int64)


class DrawnImage(NamedTuple):
    """What an image is made from: its name in messages, its encoded frames, the position's random stream, and whether its
    dataset allows mirroring; where it lies, unless it comes from a stream."""

    name: str
    frames: tuple[bytes, ...]
    random: np.random.Generator
    flip: bool
    shard: ShardReader | None = None
    row: int = 0


MakeImage = Callable[[DrawnImage], Tensor]  # image tokens (F, P, V) or uint8 pixels (F, 3, H, W) of the F frames


def decoded(transform: str, image_size: int) -> MakeImage:
    """Decode each drawn image under a transform of `transforms.TRANSFORMS`; gives uint8 (F, 3, image_size, image_size)."""
    return partial(_augment if transform in AUGMENTATIONS else _fit, transform, image_size)


def _augment(transform: str, size: int, image: DrawnImage) -> Tensor:
    return augment_frames(image.frames, image.name, transform, size, image.random, flip=image.flip)


def _fit(transform: str, size: int, image: DrawnImage) -> Tensor:
    return fit_frames(image.frames, image.name, transform, size)


def cached(tokens: ReadTokens) -> MakeImage:
    """Take the image tokens (F, P, V) of each drawn image from where they are kept."""
    return partial(_tokens, tokens)


def _tokens(tokens: ReadTokens, image: DrawnImage) -> Tensor:
    assert image.shard is not None  # the configuration refuses data.cache_features of a stream
    return tokens(image.shard, image.row)


@dataclass(frozen=True)
class Texts:
    """How the texts of training samples are made.

    Attributes:
        text_processor: what is done to each target, one of `text_processors.TEXT_PROCESSORS`.
        cut_prefixes: a target without an instruction gives its beginning to it (`templates.cut_prefix`).
        all_answers: a sample holds all accepted answers beside the one that is drawn.
        prompt_processor: what is done to each instruction.
    """

    text_processor: TextProcessor = "none"
    cut_prefixes: bool = False
    all_answers: bool = False
    prompt_processor: TextProcessor = "none"

    def sample(
        self,
        chosen: "NamedSet",
        record: Record,
        random: np.random.Generator,
        *,
        position: int,
        frames: tuple[bytes, ...],
        image: tuple[int, int],
        image_id: str,
        place: str,
    ) -> Sample:
        """The sample that a record gives.

        Args:
            chosen: its dataset.
            random: the position's stream.
            position, frames, image, image_id: as the sample has them; `image` is its location.
            place: of the image, for messages.

        Raises:
            DamagedSample: the record lacks what its templates need.
        """
        try:
            instruction, target, template = render_training(record, chosen.templates, random)
        except ValueError as error:
            raise DamagedSample(f"{error} (image {place})") from None
        instruction = TEXT_PROCESSORS[self.prompt_processor](instruction)
        processed = TEXT_PROCESSORS[self.text_processor]
        all_answers = self.all_answers and chosen.templates.target == "answer"
        target = processed(target)
        if self.cut_prefixes and not instruction:
            instruction, target = cut_prefix(target, random)
        return Sample(
            id=f"{chosen.name}/{record.id}",
            dataset=chosen.name,
            record=record,
            frames=frames,
            image_location=image,
            image_id=image_id,
            position=position,
            instruction=instruction,
            target=target,
            template=template,
            answers=tuple((processed(text), share) for text, share in answer_shares(record)) if all_answers else (),
        )


_PLAIN = Texts()


class NamedSet(Protocol):
    """A dataset to train on, wherever its records come from."""

    @property
    def name(self) -> str:
        """Of its card."""
        ...

    @property
    def templates(self) -> TemplateSet:
        """It is rendered by."""
        ...


class ReadShare(NamedTuple):
    """A rank's share of a step.

    Attributes:
        items: its samples, in the order of their positions.
        lost: what could not be used, and was replaced.
        places: of a stream, how far this reader has come in each dataset (`streaming.Place`).
    """

    items: list[Item]
    lost: list[LostSample]
    places: tuple[tuple[int, int], ...] | None = None


class TrainingData(Protocol):
    """What the loader reads steps from."""

    def read_share(self, step: int, positions: Sequence[int]) -> ReadShare:
        """The samples of a step's positions."""
        ...


class MixtureDataset(Dataset[Item]):
    """Random access by global position: the sample drawn there and its image.

    Args:
        mixture: the plan.
        sets: the datasets, in the order of the mixture's entries.
        make_image: gives the image tokens or pixels of a drawn image.
        texts: how texts are made.
    """

    def __init__(
        self,
        mixture: Mixture,
        sets: Sequence[TrainingSet],
        make_image: MakeImage,
        texts: Texts = _PLAIN,
    ) -> None:
        self.mixture = mixture
        self.sets = list(sets)
        self.make_image = make_image
        self.texts = texts
        # Of records of one image that are drawn together: what it was made for, and the image, which the next may need.
        self._made: tuple[tuple[int, ...], Tensor] = ((), torch.empty(0))

    def __getitem__(self, position: int) -> Item:
        return self.read(position)[0]

    def read_share(self, step: int, positions: Sequence[int]) -> ReadShare:
        """The samples of a step's positions.

        Raises:
            UserError: as `read`.
        """
        read = [self.read(position) for position in positions]
        return ReadShare([item for item, _ in read], [missing for _, lost in read for missing in lost])

    def first(self, count: int) -> ReadShare:
        """The first samples of the sequence."""
        return self.read_share(0, range(count))

    def with_images(self, make_image: MakeImage) -> Self:
        """The same dataset with other images."""
        other = copy.copy(self)
        other.make_image = make_image
        return other

    def read(self, position: int) -> tuple[Item, list[LostSample]]:
        """The sample of a position, and what was lost before one could be used.

        A damaged record gives way to the next draw of its dataset. Template and augmentation come from the position's
        stream, anew for each try.

        Raises:
            UserError: a shard is gone or not the one of its index, or nothing near the draw can be used.
        """
        lost: list[LostSample] = []
        for tries in range(TRIES):
            draw = self.mixture.replacement(position, tries) if tries else self.mixture.draw(position)
            chosen = self.sets[draw.dataset]
            number, row, place = chosen.locate(draw.record)
            shard = chosen.split.shards[number]
            try:
                return self._read_draw(draw, shard, (number, row, place)), lost
            except DamagedSample as error:
                lost.append(LostSample(position, chosen.name, str(shard.path), shard.keys[row], str(error)))
        raise UserError(f"{TRIES} records of {lost[0].dataset} in a row cannot be used, the last: {lost[-1].reason}")

    def _read_draw(self, draw: Draw, shard: ShardReader, location: tuple[int, int, int]) -> Item:
        chosen = self.sets[draw.dataset]
        number, row, place = location
        frames, record = shard.read_record(row, place)
        looked_at = self._looked_at(draw, location)
        random = position_generator(self.mixture.seed, draw.position)
        where = f"{shard.keys[row]} of {shard.path}"
        sample = self.texts.sample(
            chosen,
            record,
            random,
            position=draw.position,
            frames=frames,
            image=(number, row),
            image_id=f"{chosen.split.dataset}/{shard.keys[row]}",
            place=where,
        )
        if looked_at is None:
            return sample, self.make_image(DrawnImage(where, frames, random, chosen.flip, shard, row))
        if self._made[0] != (draw.dataset, number, row, looked_at):
            random = seeded_generator(self.mixture.seed, "image", looked_at)
            image = self.make_image(DrawnImage(where, frames, random, chosen.flip, shard, row))
            self._made = (draw.dataset, number, row, looked_at), image
        return sample, self._made[1]

    def _looked_at(self, draw: Draw, location: tuple[int, int, int]) -> int | None:
        """The position whose stream the image is made with, where records of one image are drawn together.

        The first one of the group that draws the image.
        """
        if self.mixture.entries[draw.dataset].images is None:
            return None
        for position in self.mixture.group(draw.position):
            if position == draw.position:
                break
            if self.sets[draw.dataset].locate(self.mixture.draw(position).record)[:2] == location[:2]:
                return position
        return draw.position
