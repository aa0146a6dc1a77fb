"""Intervals: known values, coverage, clusters, determinism, bounded memory."""

import math

import numpy as np
import pytest

from instructblip.evaluation import statistics
from instructblip.evaluation.metrics import Interval, auroc, cider, visdial
from instructblip.evaluation.metrics.captions import cider_d
from instructblip.evaluation.metrics.score import Score, mean_score
from instructblip.evaluation.statistics import (
    MCNEMAR,
    PERMUTATION,
    bootstrap_interval,
    clustered_bootstrap_interval,
    compare_paired,
    score_interval,
    wilson_interval,
)


def accuracy_of(values: list[float]) -> Score:
    return mean_score(values, metric="accuracy")


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


@pytest.mark.slow
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


# --- the interval of a score -----------------------------------------------------------------------------------------


def test_interval_has_a_width_where_all_are_right_or_wrong() -> None:
    low, high = score_interval(accuracy_of([100.0] * 40), [number // 2 for number in range(40)]) or (0.0, 0.0)
    assert high == 100.0
    assert low == pytest.approx(100 - 16.11, abs=0.01)  # 20 images, not 40 questions
    assert score_interval(accuracy_of([0.0] * 20), range(20)) == pytest.approx((0.0, 16.11), abs=0.01)
    perfect = auroc([0.1, 0.2, 0.3, 0.8, 0.9], [0, 0, 0, 1, 1])
    low, high = score_interval(perfect, range(5), Interval.PAIRS) or (0.0, 0.0)
    assert (low, high) == pytest.approx((100 * wilson_interval(2, 2)[0], 100.0))  # two pairs without a common sample
    all_first = visdial([[0.0, -1.0]] * 20, [0] * 20)
    assert score_interval(all_first, range(20)) == pytest.approx((100 - 16.11, 100.0), abs=0.01)


def test_there_is_no_interval_where_resampling_shows_no_spread() -> None:
    assert score_interval(accuracy_of([30.0] * 20), range(20)) is None
    assert score_interval(accuracy_of([30.0, 60.0]), [1, 1]) is None  # one image
    assert score_interval(accuracy_of([90.0, 0.0] * 7), [n // 2 for n in range(14)]) is None  # seven images alike


def test_a_cider_of_zero_has_no_interval_of_a_proportion() -> None:
    score = cider(["a red bus", "two dogs"], [["xyz uvw"], ["rst"]], tokenizer="python")
    assert score.value == 0
    assert score_interval(score, range(2), Interval.MEAN) is None
    best = mean_score([10.0] * 4, metric="CIDEr", table_factor=10)  # 100 on the tables' scale, which goes to 1000
    assert score_interval(best, range(4), Interval.MEAN) is None


def test_a_mean_beyond_the_scale_of_shares_has_no_interval_of_a_proportion() -> None:
    for values in ([140.0, 160.0] * 10, [-1.0, 0.0] * 10):
        assert score_interval(accuracy_of(values), range(20)) == clustered_bootstrap_interval(values, range(20))


def test_interval_of_a_mean_resamples_images_on_the_tables_scale() -> None:
    values, clusters = [100.0, 0.0, 30.0, 60.0] * 10, list(range(20)) * 2
    assert score_interval(accuracy_of(values), clusters) == clustered_bootstrap_interval(values, clusters)
    fractions = mean_score([value / 100 for value in values], metric="m", table_factor=100)
    assert score_interval(fractions, clusters) == pytest.approx(clustered_bootstrap_interval(values, clusters))


def test_samples_that_a_metric_leaves_out_do_not_count_as_images() -> None:
    score = mean_score([100.0, 0.0, 100.0], metric="m", scored=(0, 2, 3))
    assert score_interval(score, ["a", "left out", "b", "a"]) == clustered_bootstrap_interval(
        [100.0, 0.0, 100.0], ["a", "b", "a"]
    )


def test_auroc_is_computed_anew_on_each_resample() -> None:
    generator = np.random.default_rng(7)
    labels = generator.integers(2, size=60)
    probabilities = np.round(np.clip(generator.normal(0.4 + 0.2 * labels, 0.2), 0, 1), 1)  # many ties
    score = auroc(probabilities.tolist(), labels.tolist())
    assert score.resampled is not None
    times = generator.multinomial(60, np.full(60, 1 / 60), size=50)
    expected = [auroc(np.repeat(probabilities, row).tolist(), np.repeat(labels, row).tolist()).value for row in times]
    assert score.resampled(times) == pytest.approx(expected)
    low, high = score_interval(score, range(60), Interval.PAIRS) or (0.0, 0.0)
    assert low < 100 * score.value < high
    # The standard error of DeLong, DeLong and Clarke-Pearson (1988), from the placement values.
    placements = np.array(score.per_sample)
    variance = sum(placements[labels == label].var(ddof=1) / (labels == label).sum() for label in (0, 1))
    assert high - low == pytest.approx(100 * 2 * 1.96 * math.sqrt(variance), rel=0.1)


def test_a_resample_of_one_class_is_left_out_of_aurocs_interval() -> None:
    score = auroc([0.1, 0.7, 0.4, 0.9], [0, 1, 1, 0])
    assert score.resampled is not None
    assert np.isnan(score.resampled(np.array([[0, 2, 2, 0], [1, 1, 1, 1]]))).tolist() == [True, False]
    low, high = score_interval(score, range(4), Interval.PAIRS) or (0.0, 0.0)
    assert (low, high) == (0.0, 100.0)


def captions(images: int) -> tuple[list[str], list[list[str]]]:
    """Captions of rare and common words, of which a model gets some right."""
    generator = np.random.default_rng(8)
    words = np.array([f"w{number}" for number in range(400)])
    frequency = 1 / np.arange(1, 401)
    references, predictions = [], []
    for _ in range(images):
        truth = generator.choice(words, size=9, p=frequency / frequency.sum())
        given = [np.where(generator.random(9) < 0.7, truth, generator.choice(words, 9)) for _ in range(5)]
        references.append([" ".join(text) for text in given])
        predictions.append(" ".join(np.where(generator.random(9) < 0.5, truth, generator.choice(words, 9))))
    return predictions, references


@pytest.mark.slow
def test_ciders_interval_holds_word_weights_and_is_as_wide_as_with_new_ones() -> None:
    predictions, references = captions(120)
    hypotheses, given = (
        [text.split() for text in predictions],
        [[text.split() for text in texts] for texts in references],
    )
    score = cider(predictions, references, tokenizer="python")
    low, high = score_interval(score, range(120), Interval.MEAN) or (0.0, 0.0)
    assert low < score.table_value < high
    generator = np.random.default_rng(9)
    anew = []
    for _ in range(100):
        drawn = generator.integers(120, size=120)
        anew.append(100 * np.mean(cider_d([hypotheses[n] for n in drawn], [given[n] for n in drawn])))
    assert np.mean(anew) < score.table_value  # doubled images make their words common
    assert 3.92 * np.std(anew) == pytest.approx(high - low, rel=0.25)


def test_visdials_ndcg_is_resampled_by_dialog() -> None:
    generator = np.random.default_rng(10)
    scores = generator.normal(size=(40, 6)).tolist()
    relevance = [generator.random(6).tolist() if number % 2 else None for number in range(40)]
    score = visdial(scores, generator.integers(6, size=40).tolist(), relevance)
    ndcg = score.parts["ndcg"]
    assert ndcg.value == score.details["ndcg"]
    assert ndcg.scored == tuple(range(1, 40, 2))
    low, high = score_interval(ndcg, [number // 2 for number in range(40)]) or (0.0, 0.0)
    assert low < ndcg.table_value < high
    assert score.parts["r@1"].value == score.details["r@1"]


# --- two runs --------------------------------------------------------------------------------------------------------


def test_mcnemar_meets_a_published_example() -> None:
    # Fay, "Exact McNemar's test and matching confidence intervals" (R package exact2x2): 9 against 2 discordant pairs of
    # 101, p = 0.0654.
    first = [100.0] * 80 + [0.0] * 10 + [100.0] * 2 + [0.0] * 9
    second = [100.0] * 80 + [0.0] * 10 + [0.0] * 2 + [100.0] * 9
    found = compare_paired(first, second, range(101))
    assert (found.test, found.p) == (MCNEMAR, pytest.approx(0.0654, abs=5e-5))
    assert found.difference == pytest.approx(700 / 101)
    assert found.low < found.difference < found.high
    back = compare_paired(second, first, range(101))
    assert (back.p, back.difference) == (found.p, -found.difference)


def test_equal_runs_do_not_differ() -> None:
    same = [30.0, 60.0, 0.0, 100.0]
    found = compare_paired(same, same, range(4))
    assert (found.difference, found.low, found.high, found.p) == (0.0, None, None, 1.0)
    assert compare_paired([0.0, 100.0], [0.0, 100.0], range(2)).p == 1.0


def test_few_differing_images_are_permuted_exactly() -> None:
    first, second = [0.0, 10.0, 20.0, 5.0], [30.0, 10.0, 50.0, 5.0]
    found = compare_paired(first, second, range(4))
    assert (found.test, found.p) == (PERMUTATION, 0.5)  # of ++, +-, -+, -- two are as far from 0
    assert compare_paired([0.0] * 6, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], range(6)).p == 2 / 2**6


def test_questions_of_one_image_are_one_piece_of_evidence() -> None:
    first, second = [0.0] * 40, [100.0] * 40
    assert compare_paired(first, second, range(40)).p < 1e-10
    clustered = compare_paired(first, second, [number // 10 for number in range(40)])
    assert (clustered.test, clustered.p) == (PERMUTATION, 2 / 2**4)


def test_p_of_runs_that_are_equally_good_is_uniform() -> None:
    generator = np.random.default_rng(11)
    small = 0
    for _ in range(60):
        first, second = generator.random((2, 50)).round(1).tolist()
        small += compare_paired(first, second, range(50)).p < 0.2
    assert 4 <= small <= 22


def test_empty_and_uneven_input_is_refused() -> None:
    with pytest.raises(ValueError):
        bootstrap_interval([])
    with pytest.raises(ValueError):
        bootstrap_interval([1.0], resamples=0)
    with pytest.raises(ValueError):
        clustered_bootstrap_interval([1.0, 2.0], ["a"])
    with pytest.raises(ValueError):
        score_interval(accuracy_of([100.0, 100.0]), ["a"])
    with pytest.raises(ValueError):
        compare_paired([1.0], [2.0, 3.0], ["a"])
