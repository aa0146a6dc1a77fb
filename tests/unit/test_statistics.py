"""Intervals: known values, coverage, clusters, determinism, bounded memory."""

import math

import numpy as np
import pytest

from instructblip.evaluation import statistics
from instructblip.evaluation.statistics import (
    accuracy_interval,
    bootstrap_interval,
    clustered_bootstrap_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, score method
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_meets_published_values(correct: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(correct, count) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_and_ends_exactly_at_the_limits() -> None:
    low, high = wilson_interval(3, 10)
    assert wilson_interval(7, 10) == pytest.approx((1 - high, 1 - low))
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0


@pytest.mark.parametrize(("correct", "count"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_what_is_no_proportion(correct: int, count: int) -> None:
    with pytest.raises(ValueError):
        wilson_interval(correct, count)


def test_bootstrap_of_a_large_sample_is_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(50.0, 10.0, size=2000)
    low, high = bootstrap_interval(values.tolist())
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.06)
    assert high == pytest.approx(values.mean() + half, abs=0.06)


def test_the_true_mean_lies_inside_about_95_of_100_times() -> None:
    generator = np.random.default_rng(2)
    inside = 0
    for _ in range(200):
        low, high = bootstrap_interval(generator.binomial(1, 0.3, size=150).tolist(), resamples=400)
        inside += low <= 0.3 <= high
    assert 178 <= inside <= 199


def test_same_seed_same_interval_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).normal(size=97).tolist()
    whole = bootstrap_interval(values, seed=5)
    assert bootstrap_interval(values, seed=6) != whole
    monkeypatch.setattr(statistics, "_DRAWS_PER_CHUNK", 300)
    assert bootstrap_interval(values, seed=5) == whole


def test_clusters_of_one_are_the_plain_bootstrap() -> None:
    values = [0.0, 100.0, 100.0, 0.0, 100.0]
    assert clustered_bootstrap_interval(values, "abcde") == bootstrap_interval(values)


def test_equal_answers_within_an_image_widen_the_interval_by_the_root_of_their_number() -> None:
    images = np.random.default_rng(4).binomial(1, 0.5, size=300) * 100.0
    values, clusters = np.repeat(images, 9).tolist(), np.repeat(np.arange(300), 9).tolist()
    low, high = clustered_bootstrap_interval(values, clusters)
    plain_low, plain_high = bootstrap_interval(values)
    assert (high - low) / (plain_high - plain_low) == pytest.approx(3.0, rel=0.12)


def test_clusters_need_not_be_neighbours_and_larger_ones_weigh_more() -> None:
    values, clusters = [100.0, 0.0, 100.0, 100.0], ["a", "b", "a", "a"]
    means = {100.0, 75.0, 0.0}  # both draws a; one of each; both draws b
    assert set(clustered_bootstrap_interval(values, clusters, resamples=1)) <= means
    assert clustered_bootstrap_interval(values, clusters) == (0.0, 100.0)


def test_accuracy_interval_has_a_width_where_all_are_right_or_wrong() -> None:
    low, high = accuracy_interval([100.0] * 40, [number // 2 for number in range(40)])
    assert high == 100.0
    assert low == pytest.approx(100 - 16.11, abs=0.01)  # 20 images, not 40 questions
    assert accuracy_interval([0.0] * 20, range(20)) == pytest.approx((0.0, 16.11), abs=0.01)


def test_accuracy_interval_otherwise_resamples_images() -> None:
    values, clusters = [100.0, 0.0, 100.0, 100.0] * 10, list(range(20)) * 2
    assert accuracy_interval(values, clusters) == clustered_bootstrap_interval(values, clusters)
    with pytest.raises(ValueError, match="0 or 100"):
        accuracy_interval([0.5, 1.0], [0, 1])


def test_empty_and_uneven_input_is_refused() -> None:
    with pytest.raises(ValueError):
        bootstrap_interval([])
    with pytest.raises(ValueError):
        bootstrap_interval([1.0], resamples=0)
    with pytest.raises(ValueError):
        clustered_bootstrap_interval([1.0, 2.0], ["a"])
    with pytest.raises(ValueError):
        accuracy_interval([100.0, 100.0], ["a"])
