"""From the plan to batches: global positions in, plain tensors and strings out.

What a step holds is decided by positions alone (`training.loop.rank_positions`); worker processes and prefetching
never change the sequence.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from instructblip.data.batching import Batch, Batching
from instructblip.data.mixture import Mixture, position_generator
from instructblip.data.sample import Sample
from instructblip.data.shards import PreparedSplit, ShardReader
from instructblip.data.templates import TemplateSet, render_training

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


class _Steps(Dataset[list[Batch]]):
    """Random access by (step, positions): the micro-batches of one rank's share."""

    def __init__(self, dataset: MixtureDataset, batching: Callable[[int], Batching]) -> None:
        self.dataset = dataset
        self.batching = batching

    def __getitem__(self, share: tuple[int, list[int]]) -> list[Batch]:
        step, positions = share
        return self.batching(step).split([self.dataset[position] for position in positions])


def load_batches(
    dataset: MixtureDataset,
    steps: Iterable[tuple[int, list[int]]],
    *,
    batching: Callable[[int], Batching],
    workers: int = 0,
) -> Iterator[tuple[int, list[Batch]]]:
    """Read the positions of each step: (step, this rank's positions) in, (step, micro-batches) out, in the same order.

    `batching` says how a step's samples are cut. `workers` processes read ahead, each whole steps; the sequence does not
    depend on their number.
    """
    plan = list(steps)
    batches = DataLoader(_Steps(dataset, batching), sampler=plan, batch_size=None, num_workers=workers)
    for (step, _), micro_batches in zip(plan, batches, strict=True):
        yield step, micro_batches
