"""95% intervals of scores over the drawn samples, and paired tests of two runs.

Images are resampled, each with all its questions. Questions about one image are not independent: resampling single questions
would make intervals too narrow and p values too small.
"""

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # loads scipy.stats, which takes a second, when it is first used
from numpy.typing import NDArray

from instructblip.evaluation.metrics.metric import Interval
from instructblip.evaluation.metrics.score import Resampled, Score

RESAMPLES = 2000
PERMUTATIONS = 10_000
MCNEMAR = "exact McNemar"
PERMUTATION = "permutation by image"
_DRAWS_PER_CHUNK = 1 << 20  # random indices held at a time: 8 MiB, however many samples there are
_ROUNDING = 1e-9  # relative; sums in another order differ by less
_ALL_SIGNS = 14  # differing images up to which every assignment of signs is tried, 2^14 of them

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Paired:
    """How two runs on the same samples compare.

    Attributes:
        difference: second minus first, in the scale of the scores.
        low, high: its 95% bootstrap interval, images resampled; None where all images differ alike, or not at all.
        p: two-sided probability of a difference at least as large if the two were equally good.
        test: `MCNEMAR` or `PERMUTATION`.
    """

    difference: float
    low: float | None
    high: float | None
    p: float
    test: str


def score_interval(
    score: Score, clusters: Sequence[Hashable], interval: Interval = Interval.SHARE
) -> tuple[float, float] | None:
    """The 95% interval to report beside `score.table_value`, on that scale: images resampled.

    A mean over samples (accuracies, VQA accuracy, MRR): `clustered_bootstrap_interval`. CIDEr too, with word weights held at
    those of the whole set: they are part of the measure, and a resample that holds an image twice would take its words for
    common ones. Weights made anew on each resample lower CIDEr itself by 1 to 5% and give standard errors 0.85 to 1.08 times
    as large (the 150 test vectors, and made-up captions of 120 to 1,000 images). A metric of pairs (AUROC) is computed anew
    on each resample; those for which it is not defined are left out.

    Where every sample scores 0, or every one 100, resampling shows no spread although the true score need not be 0 or 100.
    There a metric that ends at 0 and 100 has the Wilson interval with the number of images as the count. That is cautious
    for means of fractions too, of which a proportion has the widest spread. For AUROC the count is that of the rarer label's
    images: so many pairs share no sample, and all of them are in the right order. A mean on another scale, such as CIDEr,
    knows no such bound: then, and wherever else resampling shows no spread (one image, equal scores), there is no interval.

    Args:
        score: of all predictions.
        clusters: the image of each prediction, also of those that the metric leaves out.
        interval: the metric's.

    Returns:
        Both ends, the lower one below the upper; None where the samples do not say how far the score could be off.

    Raises:
        ValueError: different lengths, or no resample for which the metric is defined.
    """
    if score.scored is not None:
        clusters = [clusters[number] for number in score.scored]
    if len(clusters) != len(score.per_sample):
        raise ValueError(f"{len(score.per_sample)} samples for {len(clusters)} cluster names")
    values = [value * score.table_factor for value in score.per_sample]
    at_an_end = min(abs(score.table_value), abs(100 - score.table_value)) < _ROUNDING
    if interval is not Interval.MEAN and at_an_end:
        images = len(set(clusters))
        count = images if score.units is None else min(images, score.units)
        low, high = wilson_interval(count if score.table_value > 50 else 0, count)
        return 100 * low, 100 * high
    if score.resampled is None:
        low, high = clustered_bootstrap_interval(values, clusters)
    else:
        ends = _resampled_interval(score.resampled, clusters, RESAMPLES, seed=0)
        low, high = (end * score.table_factor for end in ends)
    return _with_spread(low, high)


def compare_paired(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable], *, seed: int = 0
) -> Paired:
    """Compare two runs by their scores of the same samples.

    The interval is that of the mean difference (`clustered_bootstrap_interval`). The test flips the signs of the images'
    differences, which are as likely either way if the runs are equally good: Good, "Permutation, Parametric and Bootstrap
    Tests of Hypotheses" (2005), section 3.2. With scores of 0 and 1 (or 100) and one sample an image that is McNemar's test
    ("Note on the sampling error of the difference between correlated proportions", Psychometrika 12, 1947) and is computed
    exactly from the binomial distribution; up to 14 differing images all signs are tried; else 10,000 at random.

    Args:
        first, second: score of each sample; any scale, the same for both.
        clusters: the image of each sample.

    Raises:
        ValueError: no samples, or different lengths.
    """
    if not len(first) == len(second) == len(clusters):
        raise ValueError(f"{len(first)} and {len(second)} scores for {len(clusters)} cluster names")
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    low, high = _with_spread(*clustered_bootstrap_interval(differences.tolist(), clusters, seed=seed)) or (None, None)
    rows = _cluster_rows(clusters)
    sums = np.bincount(rows, weights=differences).astype(np.float64)
    changed = sums[np.abs(sums) > 1e-9]  # images whose scores differ by rounding alone do not differ
    one_each = len(sums) == len(rows)
    if one_each and len({*first, *second} - {0.0}) <= 1:
        return Paired(float(differences.mean()), low, high, _sign_test(changed), MCNEMAR)
    return Paired(float(differences.mean()), low, high, _sign_flips(changed, seed), PERMUTATION)


@dataclass(frozen=True)
class Spread:
    """A few independent values, such as one a seed, and what they say of the mean that they are drawn around.

    Attributes:
        mean: theirs.
        deviation: standard deviation, with n - 1; None of one value.
        low, high: the mean's 95% interval by Student's t; None where nothing varies, which does not say that nothing can.
        p: two-sided probability of a mean as far from 0 if it were 0, by Student's t; None with them.
    """

    mean: float
    deviation: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation, interval and test of a few values, taken for independent and normal.

    Student, "The probable error of a mean", Biometrika 6 (1908). Of paired differences it is the paired t test.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a mean of no values is not defined")
    found = np.asarray(values, dtype=np.float64)
    mean = float(found.mean())
    if len(found) == 1:
        return Spread(mean)
    deviation = float(found.std(ddof=1))
    if deviation <= _ROUNDING * max(1.0, abs(mean)):
        return Spread(mean, 0.0)
    test = scipy.stats.ttest_1samp(found, 0.0)
    ends = test.confidence_interval(0.95)
    return Spread(mean, deviation, float(ends.low), float(ends.high), float(test.pvalue))


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """95% score interval of the proportion `correct / count`, between 0 and 1, for independent samples.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927); the form is that of
    Brown, Cai and DasGupta, "Interval estimation for a binomial proportion", Statistical Science 16 (2001). Unlike a
    bootstrap it has a width at 0 and at 1.

    Raises:
        ValueError: not 0 <= correct <= count, or no samples.
    """
    if count < 1 or not 0 <= correct <= count:
        raise ValueError(f"{correct} correct of {count} is not a proportion")
    found = scipy.stats.binomtest(correct, count).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def bootstrap_interval(
    per_sample: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean, in the scale of `per_sample`, for independent samples.

    Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3. The same input and seed give the same
    interval. Where all values are equal the interval is a point.

    Raises:
        ValueError: no samples or no resamples.
    """
    values = np.asarray(per_sample, dtype=np.float64)
    return _percentile_interval(values, np.ones_like(values), resamples, seed)


def clustered_bootstrap_interval(
    per_sample: Sequence[float], clusters: Sequence[Hashable], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean over samples when whole clusters (images) are drawn together.

    Each resample draws as many clusters as there are, with replacement, and takes the mean over all their samples: an
    image with more questions weighs more, as it does in the score itself. Davison and Hinkley, "Bootstrap Methods and
    their Application" (1997), section 3.8, resampling of whole clusters. With every sample its own cluster this equals
    `bootstrap_interval`.

    Args:
        per_sample: score of each sample.
        clusters: what each sample belongs to, such as its image id; same length.

    Raises:
        ValueError: no samples, no resamples, or different lengths.
    """
    values = np.asarray(per_sample, dtype=np.float64)
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} samples for {len(clusters)} cluster names")
    row_of_sample = _cluster_rows(clusters)
    sums = np.bincount(row_of_sample, weights=values).astype(np.float64)
    sizes = np.bincount(row_of_sample).astype(np.float64)
    return _percentile_interval(sums, sizes, resamples, seed)


def _with_spread(low: float, high: float) -> tuple[float, float] | None:
    """The interval, unless resampling showed no spread."""
    return (low, high) if high - low > _ROUNDING * max(1.0, abs(high)) else None


def _cluster_rows(clusters: Sequence[Hashable]) -> Integers:
    """The number of each sample's cluster, by first appearance."""
    rows: dict[Hashable, int] = {}
    return np.array([rows.setdefault(cluster, len(rows)) for cluster in clusters], dtype=np.int64)


def _resampled_interval(
    resampled: Resampled, clusters: Sequence[Hashable], resamples: int, seed: int
) -> tuple[float, float]:
    rows = _cluster_rows(clusters)
    images = int(rows.max()) + 1
    generator = np.random.default_rng(seed)
    chunk = max(1, _DRAWS_PER_CHUNK // len(rows))
    values = []
    for start in range(0, resamples, chunk):
        drawn = generator.multinomial(images, np.full(images, 1 / images), size=min(chunk, resamples - start))
        values.append(resampled(drawn[:, rows]))
    found = np.concatenate(values)
    found = found[~np.isnan(found)]
    if not len(found):
        raise ValueError("the metric is not defined for any resample")
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def _sign_test(changed: Floats) -> float:
    """Two-sided exact binomial p of how many of the changes go up."""
    if not len(changed):
        return 1.0
    return float(scipy.stats.binomtest(int((changed > 0).sum()), len(changed)).pvalue)


def _sign_flips(changed: Floats, seed: int) -> float:
    """Two-sided p of the sum of changes under random signs.

    scipy's `permutation_test` sorts a random number for each sign of each resample: thirty times the time for 10,000 images.
    """
    if not len(changed):
        return 1.0
    observed = abs(changed.sum()) * (1 - 1e-12)  # equal sums in another order must count as equal
    if len(changed) <= _ALL_SIGNS:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(changed))))
        return float((np.abs(signs @ changed) >= observed).mean())
    generator = np.random.default_rng(seed)
    as_large, chunk = 0, max(1, _DRAWS_PER_CHUNK // len(changed))
    for start in range(0, PERMUTATIONS, chunk):
        signs = 2 * generator.integers(2, size=(min(chunk, PERMUTATIONS - start), len(changed)), dtype=np.int8) - 1
        as_large += int((np.abs(signs @ changed) >= observed).sum())
    return (as_large + 1) / (PERMUTATIONS + 1)


def _percentile_interval(sums: Floats, sizes: Floats, resamples: int, seed: int) -> tuple[float, float]:
    """2.5% and 97.5% points of sum/size over resampled clusters; `sums` and `sizes` are [clusters]."""
    if not len(sums):
        raise ValueError("an interval of no samples is not defined")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if len(sums) == 1:  # every resample is the sample itself, which scipy refuses
        return (float(sums[0] / sizes[0]),) * 2
    found = scipy.stats.bootstrap(
        (sums, sizes),
        lambda sums, sizes, axis: sums.sum(axis=axis) / sizes.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _DRAWS_PER_CHUNK // len(sums)),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
