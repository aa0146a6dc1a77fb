"""The plan of a training run: which record stands at global position i.

The sample at position i is a pure function of (mixture, seed, i): nothing else, not the number of ranks, workers or
restarts, decides it. So a resumed run needs its step number only.

* Datasets are interleaved in blocks. Before block b dataset d has been drawn `floor(b * size * P_d + u_d)` minus the same
  for its predecessor times, where P_d are cumulative probabilities: realised shares stay within two samples of p_d at
  every block border instead of wandering like independent draws. Inside a block the order is a seeded shuffle.
* Within a dataset every record comes once per epoch, in an order given by a keyed permutation (a Feistel network with
  cycle walking), which needs no memory: position 10,000,000 costs as much as position 0.

The paper's weights are p_d = sqrt(n_d) / sum sqrt(n) (section 2.4), n_d in records.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_BLOCK = 512
_MAX_BLOCK = 1 << 20  # 24 MB; a share of two in a million still fits
_FEISTEL_ROUNDS = 4
_MASK32 = np.uint64(0xFFFFFFFF)

WEIGHTINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sqrt": np.sqrt,
    "proportional": lambda records: records,
    "uniform": np.ones_like,
}


class Draw(NamedTuple):
    """One position of the plan: place in the run, dataset number, epoch of that dataset, record within it."""

    position: int
    dataset: int
    epoch: int
    record: int


@dataclass(frozen=True)
class MixtureEntry:
    """One dataset of a mixture: its name, how many records it has, and its named multiplier."""

    name: str
    records: int
    multiplier: float = 1.0


class Mixture:
    """A deterministic, random-access sequence of draws.

    Args:
        entries: the datasets.
        weighting: `sqrt`, `proportional` or `uniform`, times each entry's multiplier.
        seed: decides every order.

    Raises:
        ValueError: no entries, an empty dataset, an unknown weighting, a multiplier that is not positive, or a dataset so
            rare that the largest block would not hold two samples of it.
    """

    def __init__(self, entries: Sequence[MixtureEntry], *, weighting: str = "sqrt", seed: int = 0) -> None:
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting {weighting!r} is not known; choose one of {', '.join(WEIGHTINGS)}")
        for entry in entries:
            if entry.records < 1:
                raise ValueError(f"dataset {entry.name} has no records; remove it")
            if entry.multiplier <= 0:
                raise ValueError(
                    f"dataset {entry.name} has multiplier {entry.multiplier:g}; give more than 0, or remove it"
                )
        if not entries:
            raise ValueError("a mixture needs at least one dataset")
        self.entries = tuple(entries)
        self.seed = seed
        records = np.array([entry.records for entry in entries], dtype=np.float64)
        weights = WEIGHTINGS[weighting](records) * np.array([entry.multiplier for entry in entries])
        self.shares = weights / weights.sum()
        # Cumulative counts must grow by at least one a block for the difference of two floors never to fall.
        self._block = _BLOCK
        while self.shares.min() * self._block < 2 and len(entries) > 1:
            self._block *= 2
            if self._block > _MAX_BLOCK:
                rarest = int(self.shares.argmin())
                raise ValueError(
                    f"dataset {self.entries[rarest].name} has a share of {self.shares[rarest]:.1e}, too small to be "
                    "planned; raise its multiplier or remove it"
                )
        self._phase = _generator(seed, "phase").random(len(entries) - 1)
        self._cached_block = -1
        self._cached = np.empty((0, 3), dtype=np.int64)

    def draw(self, position: int) -> Draw:
        """The draw at a global position (0, 1, 2, ...)."""
        if position < 0:
            raise ValueError(f"position {position} is negative")
        block, offset = divmod(position, self._block)
        if self._cached_block != block:
            self._cached, self._cached_block = self._draw_block(block), block
        return Draw(position, *self._cached[offset].tolist())

    def counts_before(self, block: int) -> np.ndarray:
        """How often each dataset has been drawn in the positions before block number `block`."""
        inner = np.floor(block * self._block * np.cumsum(self.shares)[:-1] + self._phase * (block > 0))
        borders = np.concatenate([[0], inner, [block * self._block]]).astype(np.int64)
        return np.diff(borders)

    def _draw_block(self, block: int) -> np.ndarray:
        """Dataset, epoch and record of each position of a block: int64 (block size, 3)."""
        before, after = self.counts_before(block), self.counts_before(block + 1)
        datasets = np.repeat(np.arange(len(self.entries)), after - before)
        datasets = _generator(self.seed, "block", block).permutation(datasets)
        epochs, records = np.empty_like(datasets), np.empty_like(datasets)
        for number, entry in enumerate(self.entries):
            places = np.flatnonzero(datasets == number)
            ordinals = before[number] + np.arange(len(places))
            epochs[places] = ordinals // entry.records
            records[places] = self._records(number, ordinals)
        return np.stack([datasets, epochs, records], axis=1)

    def _records(self, dataset: int, ordinals: np.ndarray) -> np.ndarray:
        """The records that the given draws of one dataset give: each epoch is a permutation of all records."""
        size = self.entries[dataset].records
        epochs = ordinals // size
        records = np.empty_like(ordinals)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            keys = _generator(self.seed, "order", dataset, int(epoch)).integers(
                0, 2**32, size=_FEISTEL_ROUNDS, dtype=np.uint64
            )
            records[inside] = permute(ordinals[inside] % size, size, keys)
        return records


def permute(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
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


def _feistel(values: np.ndarray, keys: np.ndarray, half: np.uint64, low: np.uint64) -> np.ndarray:
    left, right = values >> half, values & low
    for key in keys:
        left, right = right, left ^ (_mix(right, key) & low)
    return (left << half) | right


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    # A multiply-xorshift hash of 32 bits; the odd constants are those of the SplitMix and Murmur finalisers.
    mixed = ((values ^ key) * np.uint64(0x85EBCA6B)) & _MASK32
    mixed = ((mixed ^ (mixed >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & _MASK32
    return mixed ^ (mixed >> np.uint64(16))


def position_generator(seed: int, position: int) -> np.random.Generator:
    """The random stream that belongs to one position: template choice and augmentation draw from it."""
    return _generator(seed, "position", position)


def _generator(seed: int, *purpose: str | int) -> np.random.Generator:
    words = [seed, *(int.from_bytes(part.encode(), "big") if isinstance(part, str) else part for part in purpose)]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def share_table(mixture: Mixture, samples: int) -> list[dict[str, float | int | str]]:
    """One row a dataset: records, share p_d, and the samples and epochs to expect of a run of `samples` draws."""
    return [
        {
            "dataset": entry.name,
            "records": entry.records,
            "multiplier": entry.multiplier,
            "share": float(share),
            "samples": float(share) * samples,
            "epochs": float(share) * samples / entry.records,
        }
        for entry, share in zip(mixture.entries, mixture.shares, strict=True)
    ]
