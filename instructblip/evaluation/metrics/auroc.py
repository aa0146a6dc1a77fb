"""Area under the ROC curve, for HatefulMemes."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from instructblip.evaluation.metrics.metric import Outputs, Records, labels_of
from instructblip.evaluation.metrics.score import Score, same_length

Floats = NDArray[np.float64]


def auroc(probabilities: Sequence[float], labels: Sequence[int]) -> Score:
    """Area under the ROC curve between 0 and 1: how often a positive sample scores above a negative one, ties half.

    Equal to scikit-learn's `roc_auc_score` in float64. (torchmetrics divides counts in float32, which is 3e-8 off; and
    beside the placement values, which intervals and pairs need, the value costs nothing.)

    A sample's own score is the share of samples of the other class that it is on the right side of (its placement value;
    DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988); their mean over either class, and over both, is the value.

    Rounding makes and breaks ties and moves the result in the third decimal: give float64, not float32 or rounded values.

    Args:
        probabilities: of class 1, a sample each. Continuous, not 0 or 1 (`probability_of_class` makes them).
        labels: 0 or 1 a sample.

    Raises:
        ValueError: different lengths, a label other than 0 and 1, only one of them, or a probability that is not a number
            between 0 and 1.
    """
    same_length("labels", probabilities, labels)
    values = np.asarray(probabilities, dtype=np.float64)
    positive = np.asarray(labels) == 1
    if not set(labels) <= {0, 1}:
        raise ValueError(f"AUROC needs labels 0 and 1, got {sorted(set(labels))[:5]}")
    if positive.all() or not positive.any():
        raise ValueError(f"AUROC needs samples of both labels, got {int(positive.sum())} of 1 among {len(labels)}")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("AUROC needs probabilities between 0 and 1 without NaN")
    per_sample = np.empty(len(values))
    wins = _wins(values[positive], values[~positive])
    per_sample[positive] = wins / (~positive).sum()
    per_sample[~positive] = 1 - _wins(values[~positive], values[positive]) / positive.sum()
    return Score(
        float(wins.sum() / (positive.sum() * (~positive).sum())),
        tuple(per_sample.tolist()),
        len(per_sample),
        table_factor=100,
        units=int(min(positive.sum(), (~positive).sum())),
        resampled=partial(_resampled, values, positive),
    )


def probability_of_class(log_likelihoods: Sequence[Sequence[float]], index: int = 1) -> list[float]:
    """Softmax over each sample's class log-likelihoods (nats), in float64: the probability of class `index`."""
    import torch  # a table of scores needs none

    return [float(torch.tensor(row, dtype=torch.float64).softmax(0)[index]) for row in log_likelihoods]


def auroc_of_records(outputs: Outputs, records: Records) -> Score:
    """p(class of label 1) by softmax over the class log-likelihoods; that class is what records of label 1 answer."""
    labels = labels_of(records)
    positive = {
        answer for record, label in zip(records, labels, strict=True) if label == 1 for answer in record.answers
    }
    if len(positive) != 1:
        raise ValueError(f"AUROC needs one answer that stands for label 1, got {sorted(positive)}")
    (name,) = positive
    probabilities = []
    for output, record in zip(outputs, records, strict=True):
        if output.classes.count(name) != 1 or len(output.scores) != len(output.classes):
            raise ValueError(f"record {record.id!r}: AUROC needs a score of class {name!r}; rank, do not generate")
        probabilities += probability_of_class([output.scores], output.classes.index(name))
    return auroc(probabilities, labels)


def _resampled(values: Floats, positive: NDArray[np.bool_], times: NDArray[np.int64]) -> Floats:
    """AUROC of each resample [resamples]; NaN for one that has samples of one class only."""
    order = np.argsort(values, kind="stable")
    first_of_equals = np.flatnonzero(np.r_[True, np.diff(values[order]) > 0])
    ordered, is_positive = times[:, order], positive[order]
    ups = np.add.reduceat(ordered * is_positive, first_of_equals, axis=1)  # [resamples, different values]
    downs = np.add.reduceat(ordered * ~is_positive, first_of_equals, axis=1)
    below = downs.cumsum(axis=1) - downs / 2
    pairs = ups.sum(axis=1) * downs.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return (ups * below).sum(axis=1) / np.where(pairs > 0, pairs, np.nan)


def _wins(values: Floats, others: Floats) -> Floats:
    """For each value the number of `others` below it, equal ones counted half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, values, side="left")
    not_above = np.searchsorted(ordered, values, side="right")
    return (below + not_above) / 2
