"""The order of a dataset: every record once an epoch, few shards at a time, no table of records."""

import numpy as np
import pytest

from instructblip.data import mixture as order
from instructblip.data.mixture import WINDOW, RecordOrder, permute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 100, 4096, 4097])
def test_permute_is_a_permutation(size: int) -> None:
    orders = []
    for seed in range(4):
        keys = np.random.default_rng(seed).integers(0, 2**32, size=4, dtype=np.uint64)
        orders.append(permute(np.arange(size), size, keys).tolist())
        assert sorted(orders[-1]) == list(range(size))
    if size >= 100:
        assert len({tuple(order) for order in orders}) == 4
        assert abs(np.corrcoef(np.arange(size), orders[0])[0, 1]) < 0.3


def test_permute_does_not_need_all_values_at_once() -> None:
    keys = np.array([7, 8, 9, 10], dtype=np.uint64)
    whole = permute(np.arange(14_000_000 - 50, 14_000_000), 14_000_000, keys)
    parts = [permute(np.array([value]), 14_000_000, keys)[0] for value in range(14_000_000 - 50, 14_000_000)]
    assert whole.tolist() == parts
    assert whole.max() < 14_000_000


def _epoch(records: RecordOrder, epoch: int) -> np.ndarray:
    return records(np.arange(epoch * records.records, (epoch + 1) * records.records))


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(order, "WINDOW", 100)
    return 100


SHARDS = (70, 0, 31, 150, 5, 5, 260, 79)


def test_up_to_a_window_the_order_is_one_permutation() -> None:
    for size in (1, 50, WINDOW):
        keys = order.seeded_generator(3, "order", 1, 2).integers(0, 2**32, size=4, dtype=np.uint64)
        assert _epoch(RecordOrder(3, 1, size), 2).tolist() == permute(np.arange(size), size, keys).tolist()


@pytest.mark.parametrize("shards", [SHARDS, (600,), (1,) * 600, ()])
def test_every_record_once_an_epoch(small_window: int, shards: tuple[int, ...]) -> None:
    records = RecordOrder(3, 1, 600, shards)
    epochs = [_epoch(records, epoch).tolist() for epoch in range(4)]
    assert all(sorted(epoch) == list(range(600)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_any_place_alone_and_in_any_order(small_window: int) -> None:
    whole = np.concatenate([_epoch(RecordOrder(3, 1, 600, SHARDS), epoch) for epoch in range(5)])
    places = np.random.default_rng(0).permutation(3000)
    assert RecordOrder(3, 1, 600, SHARDS)(places).tolist() == whole[places].tolist()
    one = RecordOrder(3, 1, 600, SHARDS)
    assert [int(one(np.array([place]))[0]) for place in places[:200]] == whole[places[:200]].tolist()


def test_a_window_reads_few_shards_and_mixes_them(small_window: int) -> None:
    sizes = [20] * 50
    epoch = _epoch(RecordOrder(0, 0, 1000, sizes), 0)
    windows = (epoch // 20).reshape(10, 100)
    assert [len(set(window.tolist())) for window in windows] == [5] * 10  # 100 records, whole shards of 20
    assert len({shard for window in windows[:5] for shard in window.tolist()}) == 25
    for window in windows:
        runs = 1 + int((np.diff(window) != 0).sum())
        assert runs > 60  # five shards read one after the other would be 5 runs
    assert sorted(set(windows[0].tolist())) != sorted(set(_epoch(RecordOrder(0, 0, 1000, sizes), 1)[:100] // 20))


def test_shards_are_read_once_or_twice_an_epoch(small_window: int) -> None:
    epoch = _epoch(RecordOrder(7, 0, 600, SHARDS), 0)
    shard_of = np.repeat(np.arange(len(SHARDS)), SHARDS)[epoch]
    for shard, size in enumerate(SHARDS):
        windows = set((np.flatnonzero(shard_of == shard) // 100).tolist())
        assert len(windows) <= -(-size // 100) + 1


def test_seed_dataset_and_epoch_decide_the_order(small_window: int) -> None:
    orders = [_epoch(RecordOrder(*key, 600, SHARDS), 0).tolist() for key in ((3, 1), (4, 1), (3, 2))]
    assert len({tuple(found) for found in orders}) == 3


def test_shards_must_hold_the_records() -> None:
    with pytest.raises(ValueError, match="the shards hold 9 records, not 10"):
        RecordOrder(0, 0, 10, (4, 5))
