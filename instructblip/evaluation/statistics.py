"""95% intervals of scores over the drawn samples, and paired tests of two runs.

Images are resampled, each with all its questions. Questions about one image are not independent: resampling single questions
would make intervals too narrow and p values too small.
"""

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from instructblip.evaluation.metrics.score import Resampled, Score

RESAMPLES = 2000
PERMUTATIONS = 10_000
MCNEMAR = "exact McNemar"
PERMUTATION = "permutation by image"
_Z_95 = 1.959963984540054  # the 97.5% point of the standard normal distribution
_DRAWS_PER_CHUNK = 1 << 20  # random indices held at a time: 8 MiB, however many samples there are
_ALL_SIGNS = 14  # differing images up to which every assignment of signs is tried, 2^14 of them

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Paired:
    """How two runs on the same samples compare.

    Attributes:
        difference: second minus first, in the scale of the scores.
        low, high: its 95% bootstrap interval, images resampled.
        p: two-sided probability of a difference at least as large if the two were equally good.
        test: `MCNEMAR` or `PERMUTATION`.
    """

    difference: float
    low: float
    high: float
    p: float
    test: str


def score_interval(score: Score, clusters: Sequence[Hashable]) -> tuple[float, float]:
    """The 95% interval to report beside `score.table_value`, on that scale: images resampled.

    A mean over samples (accuracies, VQA accuracy, MRR): `clustered_bootstrap_interval`. CIDEr too, with word weights held at
    those of the whole set: they are part of the measure, and a resample that holds an image twice would take its words for
    common ones. Weights made anew on each resample lower CIDEr itself by 1 to 5% and give standard errors 0.85 to 1.08 times
    as large (the 150 test vectors, and made-up captions of 120 to 1,000 images). A metric with `resampled` (AUROC) is
    computed anew on each resample; those for which it is not defined are left out.

    Where every sample scores 0, or every one 100, resampling shows no spread although the true score need not be 0 or 100;
    there the Wilson interval is given with the number of images as the count, the cautious choice.

    Args:
        score: of all predictions.
        clusters: the image of each prediction, also of those that the metric leaves out.

    Raises:
        ValueError: different lengths, or no resample for which the metric is defined.
    """
    if score.scored is not None:
        clusters = [clusters[number] for number in score.scored]
    if len(clusters) != len(score.per_sample):
        raise ValueError(f"{len(score.per_sample)} samples for {len(clusters)} cluster names")
    values = [value * score.table_factor for value in score.per_sample]
    if set(values) in ({0.0}, {100.0}):
        images = len(set(clusters))
        low, high = wilson_interval(images if values[0] else 0, images)
        return 100 * low, 100 * high
    if score.resampled is None:
        return clustered_bootstrap_interval(values, clusters)
    low, high = _resampled_interval(score.resampled, clusters, RESAMPLES, seed=0)
    return low * score.table_factor, high * score.table_factor


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
    low, high = clustered_bootstrap_interval(differences.tolist(), clusters, seed=seed)
    rows = _cluster_rows(clusters)
    sums = np.bincount(rows, weights=differences).astype(np.float64)
    changed = sums[np.abs(sums) > 1e-9]  # images whose scores differ by rounding alone do not differ
    one_each = len(sums) == len(rows)
    if one_each and len({*first, *second} - {0.0}) <= 1:
        return Paired(float(differences.mean()), low, high, _sign_test(changed), MCNEMAR)
    return Paired(float(differences.mean()), low, high, _sign_flips(changed, seed), PERMUTATION)


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
    proportion, z2 = correct / count, _Z_95 * _Z_95
    centre = (proportion + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z_95 / (1 + z2 / count) * math.sqrt(proportion * (1 - proportion) / count + z2 / (4 * count * count))
    low = 0.0 if correct == 0 else centre - half  # exact in theory, off by an ulp in floating point
    high = 1.0 if correct == count else centre + half
    return low, high


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
    count, fewer = len(changed), int(min((changed > 0).sum(), (changed < 0).sum()))
    if 2 * fewer >= count - 1:  # as even as can be
        return 1.0
    logs = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(value - count * math.log(2)) for value in logs))


def _sign_flips(changed: Floats, seed: int) -> float:
    """Two-sided p of the sum of changes under random signs."""
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
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    chunk = max(1, _DRAWS_PER_CHUNK // len(sums))
    for start in range(0, resamples, chunk):
        drawn = generator.integers(len(sums), size=(min(chunk, resamples - start), len(sums)))  # [resamples, clusters]
        means[start : start + chunk] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
