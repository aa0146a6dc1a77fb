"""How far a score could be off by the luck of which samples were drawn: 95% intervals.

Questions about one image are not independent, so reported intervals resample images (`clustered_bootstrap_interval`);
treating every question as a separate draw would make them too narrow.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
_Z_95 = 1.959963984540054  # the 97.5% point of the standard normal distribution
_DRAWS_PER_CHUNK = 1 << 20  # random indices held at a time: 8 MiB, however many samples there are

Floats = NDArray[np.float64]


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
    rows: dict[Hashable, int] = {}  # clusters numbered by first appearance
    row_of_sample = np.array([rows.setdefault(cluster, len(rows)) for cluster in clusters], dtype=np.int64)
    sums = np.bincount(row_of_sample, weights=values).astype(np.float64)
    sizes = np.bincount(row_of_sample).astype(np.float64)
    return _percentile_interval(sums, sizes, resamples, seed)


def accuracy_interval(per_sample: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """The interval to report beside an accuracy on a scale of 0 to 100: images resampled.

    Where every sample is right, or every one wrong, resampling shows no spread although the true accuracy need not be
    100 or 0; there the Wilson interval is given with the number of images as the count, the cautious choice.

    Raises:
        ValueError: as `clustered_bootstrap_interval`, or a sample that scores anything but 0 or 100.
    """
    scores = set(per_sample)
    if not scores <= {0.0, 100.0}:
        raise ValueError(f"an accuracy scores 0 or 100 a sample, got {sorted(scores - {0.0, 100.0})[:3]}")
    if len(scores) != 1:
        return clustered_bootstrap_interval(per_sample, clusters)
    if len(per_sample) != len(clusters):
        raise ValueError(f"{len(per_sample)} samples for {len(clusters)} cluster names")
    images = len(set(clusters))
    low, high = wilson_interval(images if scores == {100.0} else 0, images)
    return 100 * low, 100 * high


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
