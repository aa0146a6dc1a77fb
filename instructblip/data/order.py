"""The order of one dataset's records: every record once an epoch, at any place without a table of records.

A dataset of at most `WINDOW` records is permuted as a whole. In a larger one each epoch lays the shards in a random order,
cuts that line into windows of `WINDOW` records, whatever shard they are of, and permutes each window. So the reader is busy
with the few shards of one window at a time, reads each of them once or twice an epoch, and still mixes 65,536 records.

The permutation is a keyed one (a Feistel network with cycle walking) that needs no memory; what is kept is the order of the
shards of two epochs: 8 bytes a shard, not a record.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

WINDOW = 65_536  # records
ASSUMED_SHARD = 1_000  # records of a shard where nobody says; what prepare.py writes in images
_FEISTEL_ROUNDS = 4
_MASK32 = np.uint64(0xFFFFFFFF)
_EPOCHS_KEPT = 2  # a block of draws may reach over the end of an epoch

Int64Array = npt.NDArray[np.int64]


class _Line(NamedTuple):
    """The shards of an epoch in their order: where each begins in the line, its records' number, and its first record."""

    start: Int64Array
    first: Int64Array


class RecordOrder:
    """Ordinal of a draw (0, 1, 2, ... through all epochs) -> record in [0, `records`).

    Args:
        seed, dataset: decide the order; the dataset by its number in the mixture.
        records: how many there are.
        shards: how many of them each shard holds, in stored order; none given: as if every 1,000 were one.
    """

    def __init__(self, seed: int, dataset: int, records: int, shards: Sequence[int] = ()) -> None:
        self.seed = seed
        self.dataset = dataset
        self.records = records
        sizes = np.asarray(shards, dtype=np.int64)
        if not len(sizes):
            whole, rest = divmod(records, ASSUMED_SHARD)
            sizes = np.array([ASSUMED_SHARD] * whole + [rest] * (rest > 0), dtype=np.int64)
        if int(sizes.sum()) != records:
            raise ValueError(f"the shards hold {int(sizes.sum()):,} records, not {records:,}")
        self._sizes = sizes[sizes > 0]
        self._first = np.cumsum(self._sizes) - self._sizes
        self._lines: OrderedDict[int, _Line] = OrderedDict()

    def __call__(self, ordinals: Int64Array) -> Int64Array:
        """The records of these draws, int64 of the same length."""
        epochs, places = np.divmod(ordinals, self.records)
        found = np.empty_like(ordinals)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            found[inside] = self._in_epoch(epoch, places[inside])
        return found

    def _in_epoch(self, epoch: int, places: Int64Array) -> Int64Array:
        if self.records <= WINDOW:
            return permute(places, self.records, self._keys("order", epoch))
        line = np.empty_like(places)
        windows = places // WINDOW
        for window in np.unique(windows).tolist():
            inside = windows == window
            start = window * WINDOW
            size = min(WINDOW, self.records - start)
            line[inside] = start + permute(places[inside] - start, size, self._keys("window", epoch, window))
        shards = self._line(epoch)
        slots = np.searchsorted(shards.start, line, side="right") - 1
        return shards.first[slots] + line - shards.start[slots]

    def _line(self, epoch: int) -> _Line:
        if epoch not in self._lines:
            order = seeded_generator(self.seed, "shards", self.dataset, epoch).permutation(len(self._sizes))
            sizes = self._sizes[order]
            self._lines[epoch] = _Line(np.cumsum(sizes) - sizes, self._first[order])
            while len(self._lines) > _EPOCHS_KEPT:
                self._lines.popitem(last=False)
        return self._lines[epoch]

    def _keys(self, purpose: str, *number: int) -> npt.NDArray[np.uint64]:
        stream = seeded_generator(self.seed, purpose, self.dataset, *number)
        return stream.integers(0, 2**32, size=_FEISTEL_ROUNDS, dtype=np.uint64)


def permute(values: Int64Array, size: int, keys: npt.NDArray[np.uint64]) -> Int64Array:
    """Map distinct integers in [0, size) to distinct integers in [0, size): a keyed permutation without a table.

    A balanced Feistel network on the smallest even number of bits that holds `size`; results outside are sent through
    again (cycle walking) until they fall inside.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    out = _feistel(values.astype(np.uint64), keys, half, low)
    while (outside := out >= size).any():
        out[outside] = _feistel(out[outside], keys, half, low)
    return out.astype(np.int64)


def _feistel(
    values: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64], half: np.uint64, low: np.uint64
) -> npt.NDArray[np.uint64]:
    left, right = values >> half, values & low
    for key in keys:
        left, right = right, left ^ (_mix(right, key) & low)
    return (left << half) | right


def _mix(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    # A multiply-xorshift hash of 32 bits; the odd constants are those of the SplitMix and Murmur finalisers.
    mixed = ((values ^ key) * np.uint64(0x85EBCA6B)) & _MASK32
    mixed = ((mixed ^ (mixed >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & _MASK32
    return mixed ^ (mixed >> np.uint64(16))


def seeded_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A counter-based random stream of its own for each purpose, made of texts and numbers."""
    words = [seed, *(int.from_bytes(part.encode(), "big") if isinstance(part, str) else part for part in purpose)]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
