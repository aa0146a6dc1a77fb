"""Cut one rank's share of a step into micro-batches: `fixed`, `bucketed` or `packed` (docs/train.md, "Batching").

No cut changes a gradient: the loss is a sum over supervised tokens divided by their number in the global batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from instructblip.data.records import Sample
from instructblip.errors import UserError

BATCHINGS = ("fixed", "bucketed", "packed")
# Cost of one more pass, in tokens: below some hundreds of tokens a GPU reads the weights for longer than it computes.
_PASS_TOKENS = 64

Item = tuple[Sample, Tensor]  # a drawn sample and its image tokens (F, P, V) or uint8 pixels (F, 3, H, W)
Length = Callable[[str, str, int], int]  # (instruction, target, frames) -> tokens of the language model


class Batch(NamedTuple):
    """A micro-batch. `images` holds image tokens (B, F, P, V) when features are cached, else uint8 (B, F, 3, H, W).

    F is 1 for pictures, the number of frames for videos. `places` says where each sample stands in its rank's share of the
    step, in the order of the draws, `positions` where it was drawn in the run; `image_ids` are equal for samples of one
    image. `pixel_ids` are equal for samples whose pixels are the same, which need encoding once; none where images come as
    tokens. `answers` has all accepted ones of each sample with their weights, where all are learnt; else it is empty.
    `encoded` holds the tokens of `images` where these were encoded before the step; else it is empty.
    """

    ids: list[str]
    datasets: list[str]
    instructions: list[str]
    targets: list[str]
    images: Tensor
    places: list[int]
    image_ids: list[str]
    positions: list[int]
    answers: Sequence[Sequence[tuple[str, float]]] = ()
    encoded: tuple[Tensor, ...] = ()
    pixel_ids: Sequence[int] = ()


@dataclass(frozen=True)
class Batching:
    """How a rank's share of a step becomes micro-batches. Goes to worker processes, so `length` must be picklable.

    Attributes:
        kind: one of `BATCHINGS`.
        micro_batch_size: samples of a micro-batch, at most; None sets no limit.
        micro_batch_tokens: language-model tokens of a micro-batch, at most: with the padding that `bucketed` rows need,
            without any when `packed`. A longer sample comes alone. None sets no limit. Not for `fixed`.
            `bucketed` makes smaller micro-batches than it may where less padding is worth the further passes.
        length: counts a sample's tokens in the language model; `fixed` needs none.

    Raises:
        ValueError: an unknown kind, or a kind without what it needs.
    """

    kind: str = "fixed"
    micro_batch_size: int | None = None
    micro_batch_tokens: int | None = None
    length: Length | None = None

    def __post_init__(self) -> None:
        if self.kind not in BATCHINGS:
            raise ValueError(f"batching is one of {', '.join(BATCHINGS)}, not {self.kind!r}")
        if self.kind == "fixed" and self.micro_batch_tokens is not None:
            raise ValueError("a token budget needs batching bucketed or packed")
        if self.kind != "fixed" and self.length is None:
            raise ValueError(f"{self.kind} batching needs to know how long a sample is")

    def split(self, items: Sequence[Item]) -> list[Batch]:
        """Cut the drawn samples of one step, in the order of their draws, into micro-batches.

        `bucketed` and `packed` also keep samples of one number of frames together.

        Raises:
            UserError: `fixed` put pictures and videos, or videos of different numbers of frames, together.
        """
        return [collate([items[place] for place in places], places) for places in self._cut(items)]

    def _cut(self, items: Sequence[Item]) -> Iterator[list[int]]:
        if self.kind == "fixed":
            size = self.micro_batch_size or max(len(items), 1)
            yield from (list(range(at, min(at + size, len(items)))) for at in range(0, len(items), size))
            return
        frames, lengths = [len(image) for _, image in items], [self._length(item) for item in items]
        pixels = pixel_ids(items)
        longest = [0] * len(items)
        for place, first in enumerate(pixels):
            longest[first] = max(longest[first], lengths[place])
        # Longest first: what does not fit into memory fails in the first pass of a step, not somewhere in the run. Samples
        # of one picture stay together.
        order = sorted(
            range(len(items)),
            key=lambda place: (-frames[place], -longest[pixels[place]], pixels[place], -lengths[place], place),
        )
        cut = self._fewest if self.kind == "packed" else self._least_padded
        for _, group in groupby(order, key=frames.__getitem__):
            yield from cut(list(group), lengths)

    def _fewest(self, order: list[int], lengths: list[int]) -> Iterator[list[int]]:
        group: list[int] = []
        for place in order:
            if group and not self._fits(len(group) + 1, sum(lengths[k] for k in group) + lengths[place]):
                yield group
                group = []
            group.append(place)
        yield group

    def _least_padded(self, order: list[int], lengths: list[int]) -> Iterator[list[int]]:
        """Of all ways to cut the sorted samples, the one with the fewest padded tokens and passes: dynamic programming."""
        least, starts = [0.0], [0]  # for the first 0, 1, ... samples: the cost, and where its last micro-batch starts
        for end in range(1, len(order) + 1):
            costs = {}
            for start in range(end - 1, -1, -1):
                tokens = (end - start) * lengths[order[start]]
                if end - start > 1 and not self._fits(end - start, tokens):
                    break
                costs[start] = least[start] + tokens + _PASS_TOKENS
            starts.append(min(costs, key=costs.__getitem__))
            least.append(costs[starts[-1]])
        cuts = [len(order)]
        while cuts[-1]:
            cuts.append(starts[cuts[-1]])
        yield from (order[start:end] for end, start in reversed(list(pairwise(cuts))))

    def _fits(self, samples: int, tokens: int) -> bool:
        few = self.micro_batch_size is None or samples <= self.micro_batch_size
        return few and (self.micro_batch_tokens is None or tokens <= self.micro_batch_tokens)

    def _length(self, item: Item) -> int:
        assert self.length is not None
        sample, image = item
        return self.length(sample.instruction, sample.target or "", len(image))


def collate(items: Sequence[Item], places: Sequence[int] | None = None) -> Batch:
    """Stack drawn samples into a batch; `places` are theirs in the rank's share, by default 0, 1, 2, ...

    Raises:
        UserError: pictures and videos, or videos of different numbers of frames, together.
    """
    samples = [sample for sample, _ in items]
    if len({len(image) for _, image in items}) > 1:
        frames = {sample.dataset: len(image) for sample, image in items}
        found = ", ".join(f"{name} {count}" for name, count in sorted(frames.items()))
        raise UserError(
            f"a micro-batch needs one number of frames, but has {found}; "
            "set recipe.phases.NAME.batching=bucketed or packed, which keep pictures and videos apart"
        )
    return Batch(
        ids=[sample.id for sample in samples],
        datasets=[sample.dataset for sample in samples],
        instructions=[sample.instruction for sample in samples],
        targets=[sample.target or "" for sample in samples],
        images=torch.stack([image for _, image in items]),
        places=list(range(len(items)) if places is None else places),
        image_ids=[sample.image_id for sample in samples],
        positions=[sample.position for sample in samples],
        answers=[sample.answers or ((sample.target or "", 1.0),) for sample in samples]
        if any(sample.answers for sample in samples)
        else (),
        pixel_ids=pixel_ids(items) if items[0][1].dtype == torch.uint8 else (),
    )


def pixel_ids(items: Sequence[Item]) -> list[int]:
    """For each item the first one with the same pixels. Only samples of one image are compared."""
    found: list[int] = []
    firsts: dict[str, list[int]] = {}
    for place, (sample, image) in enumerate(items):
        seen = firsts.setdefault(sample.image_id, [])
        same = (first for first in seen if torch.equal(items[first][1], image))
        found.append(next(same, place))
        if found[-1] == place:
            seen.append(place)
    return found


def split_further(batches: Sequence[Batch], count: int) -> list[Batch]:
    """Halve the largest micro-batches until there are `count`: ranks that compute in step need equally many.

    Raises:
        ValueError: more micro-batches than samples.
    """
    parts = list(batches)
    while len(parts) < count:
        at = max(range(len(parts)), key=lambda number: (len(parts[number].ids), -number))
        middle = len(parts[at].ids) // 2
        if not middle:
            raise ValueError(f"{len(parts)} samples do not make {count} micro-batches")
        parts[at : at + 1] = [_rows(parts[at], slice(middle)), _rows(parts[at], slice(middle, None))]
    return parts


def _rows(batch: Batch, rows: slice) -> Batch:
    columns = {name: column[rows] for name, column in batch._asdict().items() if name != "encoded"}
    return Batch(**columns, encoded=tuple(tokens[rows] for tokens in batch.encoded))


def in_order_of_draws(batches: Sequence[Batch]) -> list[str]:
    """The ids of a step's samples in the order of their draws, however they were cut."""
    placed = [pair for batch in batches for pair in zip(batch.places, batch.ids, strict=True)]
    return [sample_id for _, sample_id in sorted(placed, key=lambda pair: pair[0])]
