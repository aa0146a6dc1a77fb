"""The plan of a training run: which record stands at global position i.

The sample at position i is a pure function of (mixture, seed, i): ranks, workers and restarts do not enter. `Mixture` deals
groups of positions out to datasets; `RecordOrder` orders the records of one dataset. docs/data.md, "The mixture", explains
both.

The paper's weights are p_d = sqrt(n_d) / sum sqrt(n) (section 2.4), n_d in records.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_BLOCK = 512  # groups of a block, at least
_MAX_BLOCK = 1 << 20  # 24 MB; a share of two in a million still fits
_CHUNK = 512  # positions whose records are computed together

# weighting -> (records of each dataset, temperature) -> weights
WEIGHTINGS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "sqrt": lambda records, _: np.sqrt(records),
    "proportional": lambda records, _: records,
    "uniform": lambda records, _: np.ones_like(records),
    "temperature": lambda records, temperature: records ** (1 / temperature),
}


class Draw(NamedTuple):
    """One position of the plan: place in the run, dataset number, epoch of that dataset, record within it."""

    position: int
    dataset: int
    epoch: int
    record: int


class MixtureSegment(NamedTuple):
    """`positions` consecutive positions of a run, drawn in groups of `group`: all of a group come from one dataset."""

    positions: int
    group: int


@dataclass(frozen=True)
class MixtureEntry:
    """One dataset of a mixture.

    Attributes:
        name: of the dataset.
        records: how many it has.
        multiplier: of its weight.
        shards: the records of each.
        images: a number for the image of each of these records, where records of one image are drawn together.
    """

    name: str
    records: int
    multiplier: float = 1.0
    shards: tuple[int, ...] = ()
    images: Callable[["Int64Array"], "Int64Array"] | None = None


Int64Array = npt.NDArray[np.int64]


class Mixture:
    """A deterministic, random-access sequence of draws.

    Args:
        entries: the datasets.
        weighting: `sqrt`, `proportional`, `uniform` or `temperature`, times each entry's multiplier.
        temperature: T of p_d ~ n_d ** (1 / T), for `temperature` alone: 1 is proportional, 2 the square root.
        seed: decides every order.
        segments: how many positions are drawn in groups of which size, in order; the last one goes on for ever. None
            given: sample by sample. Where entries say the images of their records, all groups have one size, and a group
            holds as few images as there may be.

    Raises:
        ValueError: no entries, an empty dataset, an unknown weighting, a multiplier or temperature that is not positive, a
            temperature that is missing or not used, a segment that is not of whole groups, or a dataset so rare that the
            largest block would hold less than two groups of it.
    """

    def __init__(
        self,
        entries: Sequence[MixtureEntry],
        *,
        weighting: str = "sqrt",
        temperature: float | None = None,
        seed: int = 0,
        segments: Sequence[MixtureSegment] = (),
    ) -> None:
        _check(entries, weighting, temperature, segments)
        self.entries = tuple(entries)
        self.seed = seed
        records = np.array([entry.records for entry in entries], dtype=np.float64)
        weights = WEIGHTINGS[weighting](records, temperature or 1.0)
        weights = weights * np.array([entry.multiplier for entry in entries])
        self.shares = weights / weights.sum()
        self._block = self._block_size()
        self._phase = seeded_generator(seed, "phase").random(len(entries) - 1)
        self._orders = [_order(seed, number, entry, segments) for number, entry in enumerate(entries)]
        self._cached_block = -1
        self._groups = np.empty((0, 2), dtype=np.int64)  # dataset and ordinal among its groups, of the cached block
        self._chunk_start = 0
        self._chunk = np.empty((0, 3), dtype=np.int64)  # dataset, epoch, record of the positions from there on
        self._lay_segments(segments or [MixtureSegment(1, 1)])

    def draw(self, position: int) -> Draw:
        """The draw at a global position (0, 1, 2, ...)."""
        if position < 0:
            raise ValueError(f"position {position} is negative")
        if not self._chunk_start <= position < self._chunk_start + len(self._chunk):
            self._draw_chunk(position)
        return Draw(position, *self._chunk[position - self._chunk_start].tolist())

    def replacement(self, position: int, tries: int) -> Draw:
        """The draw that replaces an unusable record: the `tries`-th draw of the same dataset after the position's own."""
        group, offset = self._group_of(position)
        dataset, first = self._first_ordinal(group)
        epoch, place = divmod(first + offset + tries, self.entries[dataset].records)
        ordinals = np.array([epoch * self.entries[dataset].records + place], dtype=np.int64)
        return Draw(position, dataset, epoch, int(self._orders[dataset](ordinals)[0]))

    def group(self, position: int) -> range:
        """The positions that are drawn together with this one."""
        segment = int(np.searchsorted(self._position_starts, position, side="right")) - 1
        start = position - self._group_of(position)[1]
        return range(start, start + int(self._sizes[segment]))

    def counts(self, positions: int) -> Int64Array:
        """Draws of each dataset in the first `positions` positions, (datasets,). The cost does not grow with `positions`."""
        group, offset = self._group_of(positions)
        counts = self._samples_before(group)
        if offset:
            counts[self._block_groups(group // self._block)[group % self._block, 0]] += offset
        return counts

    def counts_before(self, block: int) -> Int64Array:
        """How many groups each dataset has had before block number `block`."""
        inner = np.floor(block * self._block * np.cumsum(self.shares)[:-1] + self._phase * (block > 0))
        borders = np.concatenate([[0], inner, [block * self._block]]).astype(np.int64)
        return np.diff(borders)

    # --- groups and segments -------------------------------------------------------------------------------------------

    def _block_size(self) -> int:
        # With less than two groups of a dataset a block, its `counts_before` could fall from one block to the next.
        size = _BLOCK
        while self.shares.min() * size < 2 and len(self.entries) > 1:
            size *= 2
            if size > _MAX_BLOCK:
                rarest = int(self.shares.argmin())
                raise ValueError(
                    f"dataset {self.entries[rarest].name} has a share of {self.shares[rarest]:.1e}, too small to be "
                    "planned; raise its multiplier or remove it"
                )
        return size

    def _lay_segments(self, segments: Sequence[MixtureSegment]) -> None:
        """Where each segment begins, counted in positions, in groups, and in groups and samples of each dataset."""
        self._sizes = np.array([segment.group for segment in segments], dtype=np.int64)
        lengths = np.array([segment.positions for segment in segments], dtype=np.int64)
        self._position_starts = np.cumsum(lengths) - lengths
        groups = lengths // self._sizes
        self._group_starts = np.cumsum(groups) - groups
        self._groups_before = np.stack([self._count_groups(int(start)) for start in self._group_starts])
        grown = np.diff(self._groups_before, axis=0) * self._sizes[:-1, None]
        start = np.zeros((1, len(self.entries)), dtype=np.int64)
        self._samples_at_start = np.concatenate([start, np.cumsum(grown, axis=0)])

    def _group_of(self, position: int) -> tuple[int, int]:
        """The group that a position is in, and its place within the group."""
        segment = int(np.searchsorted(self._position_starts, position, side="right")) - 1
        group, offset = divmod(position - int(self._position_starts[segment]), int(self._sizes[segment]))
        return int(self._group_starts[segment]) + group, offset

    def _count_groups(self, group: int) -> Int64Array:
        """How many groups each dataset has had before group number `group`."""
        block, offset = divmod(group, self._block)
        inside = self._block_groups(block)[:offset, 0] if offset else np.empty(0, dtype=np.int64)
        return self.counts_before(block) + np.bincount(inside, minlength=len(self.entries))

    def _samples_before(self, group: int) -> Int64Array:
        segment = int(np.searchsorted(self._group_starts, group, side="right")) - 1
        grown = (self._count_groups(group) - self._groups_before[segment]) * self._sizes[segment]
        counts: Int64Array = self._samples_at_start[segment] + grown
        return counts

    def _block_groups(self, block: int) -> Int64Array:
        """Dataset, and ordinal among that dataset's groups, of each group of a block: int64 (block size, 2)."""
        if self._cached_block != block:
            before, after = self.counts_before(block), self.counts_before(block + 1)
            datasets = np.repeat(np.arange(len(self.entries)), after - before)
            datasets = seeded_generator(self.seed, "block", block).permutation(datasets)
            ordinals = np.empty_like(datasets)
            for number in range(len(self.entries)):
                places = np.flatnonzero(datasets == number)
                ordinals[places] = before[number] + np.arange(len(places))
            self._groups, self._cached_block = np.stack([datasets, ordinals], axis=1), block
        return self._groups

    def _first_ordinal(self, group: int) -> tuple[int, int]:
        """Dataset of a group, and ordinal of its first sample among that dataset's samples."""
        dataset, ordinal = self._block_groups(group // self._block)[group % self._block].tolist()
        segment = int(np.searchsorted(self._group_starts, group, side="right")) - 1
        before = ordinal - int(self._groups_before[segment, dataset])
        return dataset, int(self._samples_at_start[segment, dataset]) + before * int(self._sizes[segment])

    def _draw_chunk(self, position: int) -> None:
        """Compute the draws of a position's group and, where groups are small, of its neighbours."""
        group, offset = self._group_of(position)
        segment = int(np.searchsorted(self._group_starts, group, side="right")) - 1
        size = int(self._sizes[segment])
        many = max(1, _CHUNK // size)
        block, place = divmod(group, self._block)
        low = place // many * many
        # A chunk has one group size, so it stays in one segment.
        low = max(low, int(self._group_starts[segment]) - block * self._block)
        high = min(place // many * many + many, self._block)
        if segment + 1 < len(self._sizes):
            high = min(high, int(self._group_starts[segment + 1]) - block * self._block)
        groups = self._block_groups(block)[low:high]
        datasets, ordinals = groups[:, 0], groups[:, 1]
        ordinals = ordinals - self._groups_before[segment][datasets]
        firsts = self._samples_at_start[segment][datasets] + ordinals * size
        datasets = np.repeat(datasets, size)
        ordinals = np.repeat(firsts, size) + np.tile(np.arange(size), len(groups))
        epochs, records = np.empty_like(datasets), np.empty_like(datasets)
        for number in np.unique(datasets).tolist():
            places = datasets == number
            epochs[places] = ordinals[places] // self.entries[number].records
            records[places] = self._orders[number](ordinals[places])
        self._chunk = np.stack([datasets, epochs, records], axis=1)
        self._chunk_start = position - offset - (place - low) * size


def _check(
    entries: Sequence[MixtureEntry], weighting: str, temperature: float | None, segments: Sequence[MixtureSegment]
) -> None:
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting {weighting!r} is not known; choose one of {', '.join(WEIGHTINGS)}")
    if (temperature is not None) != (weighting == "temperature"):
        raise ValueError("a temperature belongs to weights=temperature, which needs one; give both or neither")
    if temperature is not None and temperature <= 0:
        raise ValueError(f"temperature {temperature:g} is not positive; 1 is proportional, 2 the square root")
    for entry in entries:
        if entry.records < 1:
            raise ValueError(f"dataset {entry.name} has no records; remove it")
        if entry.multiplier <= 0:
            raise ValueError(
                f"dataset {entry.name} has multiplier {entry.multiplier:g}; give more than 0, or remove it"
            )
        if entry.shards and sum(entry.shards) != entry.records:
            raise ValueError(f"dataset {entry.name}: its shards hold {sum(entry.shards)} records, not {entry.records}")
    if not entries:
        raise ValueError("a mixture needs at least one dataset")
    if any(entry.images for entry in entries) and len({segment.group for segment in segments}) != 1:
        raise ValueError("records of one image are drawn together in groups of one size")
    for segment in segments:
        if segment.group < 1 or segment.positions % segment.group:
            raise ValueError(f"{segment.positions} positions are not whole groups of {segment.group}")


def _order(seed: int, number: int, entry: MixtureEntry, segments: Sequence[MixtureSegment]) -> "RecordOrder":
    if entry.images is None:
        return RecordOrder(seed, number, entry.records, entry.shards)
    return ImageOrder(seed, number, entry.records, entry.shards, images=entry.images, group=segments[0].group)


def position_generator(seed: int, position: int) -> np.random.Generator:
    """The random stream that belongs to one position: template choice and augmentation draw from it."""
    return seeded_generator(seed, "position", position)


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


WINDOW = 65_536  # records permuted together; a larger dataset is read shard by shard, so that reading stays local
ASSUMED_SHARD = 1_000  # records of a shard whose size is not given; prepare.py writes 1,000 images a shard
_FEISTEL_ROUNDS = 4
_MASK32 = np.uint64(0xFFFFFFFF)
_EPOCHS_KEPT = 2  # a block of draws may reach over the end of an epoch


class _Line(NamedTuple):
    """An epoch's shards, shuffled and laid end to end: where each starts in the line, and its first record's number."""

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


class ImageOrder(RecordOrder):
    """An order in which every `group` ordinals hold as few images as there may be; each record still once an epoch.

    Args:
        seed, dataset, records, shards: see `RecordOrder`.
        images: a number for the image of each of these records.
        group: ordinals 0 to `group` - 1 are the first group, and so on.
    """

    def __init__(
        self,
        seed: int,
        dataset: int,
        records: int,
        shards: Sequence[int] = (),
        *,
        images: Callable[[Int64Array], Int64Array],
        group: int,
    ) -> None:
        super().__init__(seed, dataset, records, shards)
        self.images = images
        self.group = group
        self._windows: OrderedDict[tuple[int, int], Int64Array] = OrderedDict()

    def _in_epoch(self, epoch: int, places: Int64Array) -> Int64Array:
        found, windows = np.empty_like(places), places // WINDOW
        for window in np.unique(windows).tolist():
            inside = windows == window
            found[inside] = self._window(epoch, window)[places[inside] - window * WINDOW]
        return found

    def _window(self, epoch: int, window: int) -> Int64Array:
        """The records of a window, in their order."""
        if (epoch, window) not in self._windows:
            start = window * WINDOW
            line = start + np.arange(min(WINDOW, self.records - start))
            if self.records > WINDOW:
                shards = self._line(epoch)
                slots = np.searchsorted(shards.start, line, side="right") - 1
                line = shards.first[slots] + line - shards.start[slots]
            lead = -(epoch * self.records + start) % self.group
            stream = seeded_generator(self.seed, "images", self.dataset, epoch, window)
            self._windows[epoch, window] = line[order_by_image(self.images(line), self.group, lead, stream)]
            while len(self._windows) > _EPOCHS_KEPT:
                self._windows.popitem(last=False)
        return self._windows[epoch, window]


def order_by_image(images: Int64Array, group: int, lead: int, stream: np.random.Generator) -> Int64Array:
    """A random order of records in which groups hold few images: first `lead` records, then group after group.

    An image's records are cut into units of `group` and one smaller. Smaller units fill groups together where they can,
    largest first; those that are left are laid end to end. Only these are in two groups.

    Args:
        images: a number for each record's image.
        group: records of a group.
        lead: fewer than that, which stand in front.
        stream: is drawn from.

    Returns:
        A permutation of the places of `images`.
    """
    _, numbers = np.unique(images, return_inverse=True)
    priorities = stream.permutation(int(numbers.max()) + 1)[numbers]
    order = np.lexsort((stream.random(len(images)), priorities))
    starts = np.flatnonzero(np.diff(priorities[order], prepend=-1))
    ends = np.append(starts[1:], len(order))
    # Where each unit starts, and how long it is.
    pieces = -(-(ends - starts) // group)
    inside = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    firsts = np.repeat(starts, pieces) + inside * group
    lengths = np.minimum(np.repeat(ends, pieces) - firsts, group)
    laid = _fill_groups(lengths, group)
    within = np.arange(len(order)) - np.repeat(np.cumsum(lengths[laid]) - lengths[laid], lengths[laid])
    order = order[np.repeat(firsts[laid], lengths[laid]) + within]
    whole = (len(order) - lead) // group if len(order) > lead else 0
    groups = order[: whole * group].reshape(whole, group)[stream.permutation(whole)].reshape(-1)
    rest = order[whole * group :]
    return np.concatenate([rest[:lead], groups, rest[lead:]])


def _fill_groups(lengths: Int64Array, group: int) -> Int64Array:
    """Numbers of the units, in an order in which as many as may be fill groups together."""
    left = [list(np.flatnonzero(lengths == length)) for length in range(group + 1)]
    laid: list[int] = []
    while True:
        taken, room = [0] * (group + 1), group
        for length in range(group, 0, -1):
            taken[length] = min(room // length, len(left[length]))
            room -= taken[length] * length
        if room:  # the last of them do not fill one
            break
        times = min(len(left[length]) // count for length, count in enumerate(taken) if count)
        columns = []
        for length, count in enumerate(taken):
            if count:
                columns.append(np.array(left[length][: times * count]).reshape(times, count))
                left[length] = left[length][times * count :]
        laid += np.concatenate(columns, axis=1).reshape(-1).tolist()
    return np.array(laid + sorted(number for units in left for number in units), dtype=np.int64)


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
