"""What every metric returns, and the checks that every metric makes of its input."""

from collections.abc import Callable, Hashable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Resampled = Callable[[NDArray[np.int64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Score:
    """A metric over a set of samples.

    Attributes:
        value: the score of the whole set, in the scale that the metric's docstring states.
        per_sample: the score of each scored sample in the order of the predictions, in the same scale. Their mean is the
            value, unless `resampled` is given.
        count: number of samples scored.
        scored: positions among the predictions of the samples in `per_sample`, where a metric leaves some out; None: all.
        table_factor: times this, the value is as papers print it (CIDEr 1.231 -> 123.1); 1 where it already is.
        details: what else the scorer says (other metrics, the variant or tokenizer used), ready for JSON.
        parts: further scores of these samples, or of some of them, that have a value a sample of their own.
        units: independent units behind the value, where the samples are more (AUROC: the samples of the rarer label).
        resampled: for a metric that is no mean over samples: times[resamples, samples], how often each sample of
            `per_sample` is drawn, to the value of each resample; NaN where it is not defined.
    """

    value: float
    per_sample: tuple[float, ...]
    count: int
    scored: tuple[int, ...] | None = None
    table_factor: float = 1.0
    details: Mapping[str, Any] = field(default_factory=dict)
    parts: "Mapping[str, Score]" = field(default_factory=dict)
    units: int | None = None
    resampled: Resampled | None = field(default=None, compare=False)

    @property
    def table_value(self) -> float:
        """The value as papers print it."""
        return self.value * self.table_factor

    def with_details(self, **details: Any) -> "Score":
        """The same score that says more."""
        return replace(self, details={**self.details, **details})


def mean_score(per_sample: Sequence[float], *, metric: str, **fields: Any) -> Score:
    """The mean over samples as a `Score`; `fields` are further attributes of it.

    Raises:
        ValueError: no samples.
    """
    if not per_sample:
        raise ValueError(f"{metric} of no samples is not defined")
    return Score(sum(per_sample) / len(per_sample), tuple(per_sample), len(per_sample), **fields)


def group_means(per_sample: Sequence[float], groups: Sequence[Hashable]) -> dict[Hashable, tuple[float, int]]:
    """Mean and number of samples of each group (question type, relation, subject), groups by first appearance.

    Right wherever a score is a mean over samples; not for CIDEr, whose word weights depend on the set of images, nor for
    AUROC.

    Raises:
        ValueError: different lengths.
    """
    same_length("groups", per_sample, groups)
    members: dict[Hashable, list[float]] = {}
    for value, group in zip(per_sample, groups, strict=True):
        members.setdefault(group, []).append(value)
    return {group: (sum(values) / len(values), len(values)) for group, values in members.items()}


def same_length(what: str, predictions: Sized, others: Sized) -> None:
    """Raise ValueError unless there is one entry of `others` for each prediction."""
    if len(predictions) != len(others):
        raise ValueError(f"{len(predictions)} predictions for {len(others)} {what}: one entry a sample is needed")


def check_references(what: str, predictions: Sequence[object], references: Sequence[Sequence[str]]) -> None:
    """Raise ValueError unless each prediction has a non-empty list of references."""
    same_length(f"lists of {what}", predictions, references)
    for number, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"sample {number} needs a list of at least one of its {what}, got {texts!r}")
