"""What every metric returns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A metric over a set of samples.

    Attributes:
        value: the score of the whole set, in the scale that the metric's docstring states.
        per_sample: the score of each sample in the order of the predictions, in the same scale.
        count: number of samples scored.
    """

    value: float
    per_sample: tuple[float, ...]
    count: int
