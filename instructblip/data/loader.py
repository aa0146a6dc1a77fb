"""From the plan to batches: global positions in, plain tensors and strings out.

What a step holds is decided by positions alone (`training.loop.micro_batch_positions`); worker processes and prefetching
never change the sequence.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from instructblip.data.mixture import Mixture, position_generator
from instructblip.data.sample import Sample
from instructblip.data.shards import PreparedSplit, ShardReader
from instructblip.data.templates import TemplateSet, render_training
from instructblip.errors import UserError

# (shard, row) -> image tokens (F, P, V) or uint8 pixels (F, 3, H, W) of the F frames, one of a picture
ReadTokens = Callable[[ShardReader, int], Tensor]


@dataclass(frozen=True)
class TrainingSet:
    """One dataset of a mixture, opened: its card's name, prepared split, selected records and templates.

    `locations` is int64 (n, 3): shard, image row, place of the record in that image's list.
    """

    name: str
    split: PreparedSplit
    locations: np.ndarray
    templates: TemplateSet


class Batch(NamedTuple):
    """A micro-batch. `images` holds image tokens (B, F, P, V) when features are cached, else uint8 (B, F, 3, H, W).

    F is 1 for pictures, the number of frames for videos.
    """

    ids: list[str]
    datasets: list[str]
    instructions: list[str]
    targets: list[str]
    images: Tensor


class MixtureDataset(Dataset[tuple[Sample, Tensor]]):
    """Random access by global position: the sample drawn there and its image.

    Args:
        mixture: the plan.
        sets: the datasets, in the order of the mixture's entries.
        read_image: gives the image tokens or pixels of (shard, row).
    """

    def __init__(self, mixture: Mixture, sets: Sequence[TrainingSet], read_image: ReadTokens) -> None:
        self.mixture = mixture
        self.sets = list(sets)
        self.read_image = read_image

    def __getitem__(self, position: int) -> tuple[Sample, Tensor]:
        draw = self.mixture.draw(position)
        chosen = self.sets[draw.dataset]
        shard_number, row, place = (int(value) for value in chosen.locations[draw.record])
        shard = chosen.split.shards[shard_number]
        frames, records = shard.read(row)
        record = records[place]
        random = position_generator(self.mixture.seed, position)
        instruction, target, template = render_training(record, chosen.templates, random)
        sample = Sample(
            id=f"{chosen.name}/{record.id}",
            dataset=chosen.name,
            record=record,
            frames=frames,
            image_location=(shard_number, row),
            instruction=instruction,
            target=target,
            template=template,
        )
        return sample, self.read_image(shard, row)


def collate(items: Sequence[tuple[Sample, Tensor]]) -> Batch:
    """Stack drawn samples into a batch.

    Raises:
        UserError: pictures and videos, or videos of different numbers of frames, together.
    """
    samples = [sample for sample, _ in items]
    if len({len(image) for _, image in items}) > 1:
        frames = {sample.dataset: len(image) for sample, image in items}
        found = ", ".join(f"{name} {count}" for name, count in sorted(frames.items()))
        raise UserError(f"a batch needs one number of frames, but has {found}; train on pictures and videos apart")
    return Batch(
        ids=[sample.id for sample in samples],
        datasets=[sample.dataset for sample in samples],
        instructions=[sample.instruction for sample in samples],
        targets=[sample.target or "" for sample in samples],
        images=torch.stack([image for _, image in items]),
    )


def load_batches(
    dataset: MixtureDataset, steps: Iterable[tuple[int, list[list[int]]]], *, workers: int = 0
) -> Iterator[tuple[int, list[Batch]]]:
    """Read the positions of each step: (step, lists of positions) in, (step, micro-batches) out, in the same order.

    `workers` processes read ahead; the sequence does not depend on their number.
    """
    plan = list(steps)
    positions = [micro_batch for _, micro_batches in plan for micro_batch in micro_batches]
    batches = iter(DataLoader(dataset, batch_sampler=positions, collate_fn=collate, num_workers=workers))
    for step, micro_batches in plan:
        yield step, [next(batches) for _ in micro_batches]
