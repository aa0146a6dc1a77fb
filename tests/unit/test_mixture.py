"""The plan of a run: a pure function of (mixture, seed, position), every record once an epoch, shares as planned."""

import pickle
import time
import tracemalloc

import numpy as np
import pytest

from instructblip.data.mixture import Draw, Mixture, MixtureEntry, MixtureSegment, position_generator, share_table

SMALL = (MixtureEntry("a", 3), MixtureEntry("b", 50), MixtureEntry("c", 7, 2.0))
BLOCK = 512

# The 13 held-in datasets, train splits in records (paper's order of size).
HELD_IN = {
    "capfilt": 14_000_000,
    "ocr_vqa": 798_245,
    "coco_caption": 566_747,
    "vqav2": 443_752,
    "vqav2_questions": 443_752,
    "llava_conversation": 257_000,
    "textcaps": 109_765,
    "llava_reasoning": 77_000,
    "llava_detail": 23_000,
    "aokvqa": 17_056,
    "aokvqa_questions": 17_056,
    "okvqa": 9_009,
    "okvqa_questions": 9_009,
}
# Percent, by the square root of the sizes.
HELD_IN_SHARES = [44.3, 10.6, 8.9, 7.9, 7.9, 6.0, 3.9, 3.3, 1.8, 1.6, 1.6, 1.1, 1.1]


def _small(seed: int = 5, weighting: str = "sqrt") -> Mixture:
    return Mixture(SMALL, weighting=weighting, seed=seed)


def _draws(mixture: Mixture, positions: range) -> list[Draw]:
    return [mixture.draw(position) for position in positions]


def test_golden_sequence() -> None:
    """(dataset, epoch, record) of the first 20 positions. A change here changes every run of every user: say why."""
    expected = [
        (1, 0, 9), (2, 0, 6), (0, 0, 1), (2, 0, 0), (1, 0, 41), (2, 0, 4), (2, 0, 5), (2, 0, 3), (2, 0, 2), (1, 0, 45),
        (2, 0, 1), (1, 0, 19), (2, 1, 0), (2, 1, 1), (0, 0, 0), (2, 1, 6), (2, 1, 3), (2, 1, 4), (1, 0, 1), (2, 1, 5),
    ]  # fmt: skip
    assert _draws(_small(), range(20)) == [Draw(position, *rest) for position, rest in enumerate(expected)]
    assert _draws(_small(), range(511, 513)) == [(511, 0, 20, 2), (512, 1, 5, 15)]
    assert _small().draw(10_000_000) == (10_000_000, 0, 409_623, 0)


def test_golden_draws_of_the_demo() -> None:
    """The demo's published figures were measured with these draws: (dataset, epoch, record) by position, seed 0."""
    sizes = {"present": 4623, "absent": 20924, "shape": 4497, "color": 4632}
    mixture = Mixture([MixtureEntry(name, size) for name, size in sizes.items()], seed=0)
    expected = [
        (1, 11281), (1, 19081), (2, 3611), (3, 173), (3, 3405), (2, 1348), (2, 2089), (3, 4511), (3, 718), (1, 9638),
        (0, 4576), (0, 635), (1, 1366), (1, 16467), (3, 1975), (2, 1781), (1, 13915), (3, 4187), (3, 1333), (3, 236),
        (1, 17065), (1, 12844), (3, 4412), (1, 1476), (1, 13419), (1, 7616), (3, 2594), (1, 18274), (2, 2077), (0, 344),
        (3, 4077), (3, 1003), (3, 1187), (3, 3695), (2, 1296), (0, 1177), (0, 943), (3, 162), (2, 4113), (1, 993),
        (1, 1214), (1, 20336), (3, 4241), (1, 11510), (1, 907), (1, 1989), (3, 1128), (2, 836), (2, 332), (3, 973),
    ]  # fmt: skip
    assert _draws(mixture, range(50)) == [Draw(i, dataset, 0, record) for i, (dataset, record) in enumerate(expected)]
    assert _draws(mixture, range(31198, 31200)) == [(31198, 1, 0, 7742), (31199, 3, 1, 741)]


@pytest.mark.slow
def test_order_of_access_does_not_matter() -> None:
    forward = _draws(_small(), range(2000))
    backward = _small()
    assert [backward.draw(position) for position in reversed(range(2000))] == forward[::-1]
    jumping = _small()
    for position in np.random.default_rng(0).integers(2000, size=60).tolist():
        assert jumping.draw(position) == forward[position]
    assert [_small().draw(position) for position in range(0, 2000, 97)] == forward[::97]


def test_seed_weights_and_sizes_change_the_sequence() -> None:
    base = _draws(_small(), range(100))
    assert _draws(_small(seed=6), range(100)) != base
    assert _draws(_small(weighting="uniform"), range(100)) != base
    assert _draws(Mixture((*SMALL[:2], MixtureEntry("c", 8, 2.0)), seed=5), range(100)) != base


def test_renaming_a_dataset_does_not_change_the_sequence() -> None:
    renamed = Mixture([MixtureEntry(f"new_{e.name}", e.records, e.multiplier) for e in SMALL], seed=5)
    assert _draws(renamed, range(600)) == _draws(_small(), range(600))


def test_every_record_comes_once_an_epoch() -> None:
    mixture = _small()
    seen: dict[tuple[int, int], list[int]] = {}
    for draw in _draws(mixture, range(4 * BLOCK)):
        seen.setdefault((draw.dataset, draw.epoch), []).append(draw.record)
    for number, entry in enumerate(SMALL):
        epochs = [records for (dataset, _), records in sorted(seen.items()) if dataset == number]
        assert len(epochs) > 5
        assert all(sorted(records) == list(range(entry.records)) for records in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])


def test_epochs_have_different_orders() -> None:
    mixture = Mixture([MixtureEntry("a", 40)], seed=1)
    epochs = [[mixture.draw(40 * epoch + i).record for i in range(40)] for epoch in range(4)]
    assert len({tuple(records) for records in epochs}) == 4
    assert sorted(range(40)) not in epochs


@pytest.mark.parametrize("entries", [SMALL, [MixtureEntry(name, size) for name, size in HELD_IN.items()]])
def test_realised_shares_stay_within_two_samples_at_block_borders(entries: list[MixtureEntry]) -> None:
    mixture = Mixture(entries, seed=3)
    counts = np.zeros(len(entries))
    size = mixture._block
    for block in range(12):
        assert (np.abs(counts - block * size * mixture.shares) < 2).all()
        assert counts.tolist() == mixture.counts_before(block).tolist()
        for draw in _draws(mixture, range(block * size, (block + 1) * size)):
            counts[draw.dataset] += 1


def test_weightings_and_multipliers() -> None:
    entries = [MixtureEntry("a", 400), MixtureEntry("b", 100)]
    assert Mixture(entries).shares.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert Mixture(entries, weighting="proportional").shares.tolist() == pytest.approx([0.8, 0.2])
    assert Mixture(entries, weighting="uniform").shares.tolist() == [0.5, 0.5]
    doubled = [entries[0], MixtureEntry("b", 100, multiplier=2.0)]
    assert Mixture(doubled).shares.tolist() == pytest.approx([0.5, 0.5])
    assert Mixture(doubled, weighting="uniform").shares.tolist() == pytest.approx([1 / 3, 2 / 3])


def test_shares_of_the_papers_thirteen_datasets() -> None:
    entries = [MixtureEntry(name, size) for name, size in HELD_IN.items()]
    percent = (100 * Mixture(entries).shares).round(1).tolist()
    assert percent == pytest.approx(HELD_IN_SHARES, abs=0.1 + 1e-9)
    assert 100 * Mixture(entries, weighting="proportional").shares[0] == pytest.approx(83, abs=0.6)
    epochs = {row["dataset"]: row["epochs"] for row in share_table(Mixture(entries), 60_000 * 128)}
    assert epochs["okvqa"] == pytest.approx(9.6, abs=0.1)
    assert epochs["capfilt"] == pytest.approx(0.24, abs=0.01)


@pytest.mark.slow
def test_a_million_draws_of_the_papers_thirteen_datasets() -> None:
    """Shares within sampling error of p_d, and no record twice before all others of its dataset have come."""
    mixture = Mixture([MixtureEntry(name, size) for name, size in HELD_IN.items()], seed=2)
    draws = np.array([mixture.draw(position)[1:] for position in range(1_000_000)])
    counts = np.bincount(draws[:, 0], minlength=13)
    assert (np.abs(counts - 1e6 * mixture.shares) < 3 * np.sqrt(1e6 * mixture.shares * (1 - mixture.shares))).all()
    assert counts.tolist() == mixture.counts(1_000_000).tolist()
    for number, size in enumerate(HELD_IN.values()):
        epochs, records = draws[draws[:, 0] == number, 1:].T
        assert epochs.tolist() == (np.arange(len(epochs)) // size).tolist()
        for epoch in range(int(epochs[-1]) + 1):
            drawn = np.sort(records[epochs == epoch])
            whole = epoch < epochs[-1]
            assert (drawn.tolist() == list(range(size))) if whole else (np.diff(drawn) > 0).all()


def test_a_far_position_is_reached_at_once() -> None:
    mixture = Mixture([MixtureEntry(name, size) for name, size in HELD_IN.items()], seed=2)
    begun = time.perf_counter()
    mixture.draw(10_000_000)
    mixture.counts(10_000_000)
    assert time.perf_counter() - begun < 0.5


@pytest.mark.parametrize("positions", [0, 1, 511, 512, 513, 3000, 100_000])
def test_counts_without_drawing(positions: int) -> None:
    for mixture in (_small(), Mixture(SMALL, seed=5, segments=SEGMENTS)):
        drawn = [draw.dataset for draw in _draws(mixture, range(min(positions, 6000)))]
        if positions < 6000:
            assert mixture.counts(positions).tolist() == np.bincount(drawn, minlength=3).tolist()
        assert mixture.counts(positions).sum() == positions


SEGMENTS = (MixtureSegment(30, 6), MixtureSegment(4 * 700, 4), MixtureSegment(300, 100))


@pytest.mark.slow
def test_groups_come_from_one_dataset_and_count_on_through_the_stretches() -> None:
    mixture = Mixture(SMALL, seed=5, segments=SEGMENTS)
    draws = _draws(mixture, range(30 + 2800 + 300 + 200))  # two groups beyond the last stretch, which goes on
    at = 0
    for size, groups in ((6, 5), (4, 700), (100, 5)):
        for _ in range(groups):
            assert len({draw.dataset for draw in draws[at : at + size]}) == 1
            at += size
    assert at == len(draws)
    for number, entry in enumerate(SMALL):
        mine = [draw for draw in draws if draw.dataset == number]
        assert [draw.epoch for draw in mine] == [place // entry.records for place in range(len(mine))]
        for epoch in range(mine[-1].epoch):
            assert sorted(draw.record for draw in mine if draw.epoch == epoch) == list(range(entry.records))
    jumping = Mixture(SMALL, seed=5, segments=SEGMENTS)
    for position in np.random.default_rng(1).integers(len(draws), size=200).tolist():
        assert jumping.draw(position) == draws[position]
    shares = np.bincount([draws[at].dataset for at in range(30, 2830, 4)]) / 700
    assert np.abs(shares - mixture.shares).max() < 0.02


def test_groups_of_one_are_sample_by_sample() -> None:
    grouped = Mixture(SMALL, seed=5, segments=[MixtureSegment(10, 1), MixtureSegment(700, 1)])
    assert _draws(grouped, range(1500)) == _draws(_small(), range(1500))


def test_a_replacement_is_the_next_draw_of_the_dataset() -> None:
    for mixture in (_small(), Mixture(SMALL, seed=5, segments=SEGMENTS)):
        draws = _draws(mixture, range(1500))
        for position in (0, 1, 29, 30, 77, 511, 512, 600):
            later = [draw for draw in draws[position + 1 :] if draw.dataset == draws[position].dataset]
            for tries in range(1, 9):  # dataset a has three records: over the end of its epoch too
                found = mixture.replacement(position, tries)
                assert found == (position, *later[tries - 1][1:])
            assert mixture.replacement(position, 0) == draws[position]


def test_temperature() -> None:
    entries = [MixtureEntry("a", 400), MixtureEntry("b", 100)]

    def shares(temperature: float) -> list[float]:
        return Mixture(entries, weighting="temperature", temperature=temperature).shares.tolist()

    assert shares(1.0) == pytest.approx([0.8, 0.2])
    assert shares(2.0) == pytest.approx(Mixture(entries).shares.tolist())
    assert shares(4.0) == pytest.approx([2**0.5 / (1 + 2**0.5), 1 / (1 + 2**0.5)])


def test_a_rare_dataset_enlarges_the_block() -> None:
    rare = Mixture([MixtureEntry("big", 1_000_000), MixtureEntry("rare", 300)], weighting="proportional", seed=0)
    assert rare._block == 8192
    for block in range(3):
        drawn = [draw.dataset for draw in _draws(rare, range(block * rare._block, (block + 1) * rare._block))]
        assert 1 <= sum(drawn) <= 4


def test_a_far_position_costs_no_memory() -> None:
    mixture = Mixture([MixtureEntry(name, size) for name, size in HELD_IN.items()], seed=0)
    tracemalloc.start()
    try:
        mixture.draw(0)
        near = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        assert mixture.draw(10_000_000).position == 10_000_000
        far = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert far < near + 200_000


def test_share_table() -> None:
    rows = share_table(_small(), 1000)
    assert [row["dataset"] for row in rows] == ["a", "b", "c"]
    assert sum(float(row["samples"]) for row in rows) == pytest.approx(1000)
    assert rows[2]["multiplier"] == 2.0
    assert rows[0]["epochs"] == pytest.approx(float(rows[0]["samples"]) / 3)


def test_a_plan_may_be_pickled() -> None:
    mixture = Mixture(SMALL, seed=5, segments=SEGMENTS)
    draws = _draws(mixture, range(100))
    assert _draws(pickle.loads(pickle.dumps(mixture)), range(100)) == draws


def test_position_streams_are_their_own() -> None:
    first = position_generator(1, 2).integers(1 << 60)
    assert first == position_generator(1, 2).integers(1 << 60)
    others = [position_generator(*pair).integers(1 << 60) for pair in ((1, 3), (2, 2), (2, 1))]
    assert len({first, *others}) == 4


@pytest.mark.parametrize(
    ("entries", "weighting", "words"),
    [
        ([], "sqrt", ["at least one dataset"]),
        ([MixtureEntry("a", 0)], "sqrt", ["dataset a", "no records"]),
        ([MixtureEntry("a", 5, 0.0)], "sqrt", ["dataset a", "multiplier 0"]),
        ([MixtureEntry("a", 5, -1.0)], "sqrt", ["dataset a", "multiplier -1"]),
        ([MixtureEntry("a", 5)], "squareroot", ["'squareroot'", "sqrt, proportional, uniform, temperature"]),
        ([MixtureEntry("a", 5), MixtureEntry("b", 5, 1e-9)], "sqrt", ["dataset b", "1.0e-09", "raise its multiplier"]),
        ([MixtureEntry("a", 5)], "temperature", ["temperature belongs to weights=temperature", "both or neither"]),
        ([MixtureEntry("a", 5, shards=(2, 2))], "sqrt", ["dataset a", "shards hold 4 records, not 5"]),
    ],
)
def test_what_cannot_be_planned(entries: list[MixtureEntry], weighting: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"dataset|weight") as error:
        Mixture(entries, weighting=weighting)
    assert all(word in str(error.value) for word in words)


def test_what_cannot_be_grouped() -> None:
    with pytest.raises(ValueError, match="10 positions are not whole groups of 4"):
        Mixture(SMALL, segments=[MixtureSegment(10, 4)])
    with pytest.raises(ValueError, match="temperature -1 is not positive"):
        Mixture(SMALL, weighting="temperature", temperature=-1.0)
    with pytest.raises(ValueError, match="both or neither"):
        Mixture(SMALL, temperature=2.0)


def test_negative_position() -> None:
    with pytest.raises(ValueError, match="position -1 is negative"):
        _small().draw(-1)
