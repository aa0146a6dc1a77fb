"""Samples lost on the way: counted by dataset, named once, and too many of them end the run.

A record that cannot be used is replaced by the next draw of its dataset (`mixture.replacement`), so the sequence stays a
pure function of the plan and the data. A shard that is gone, cut short or not the one of its index is no lost sample: it
ends the run with one line.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from instructblip.errors import UserError

_NAMED = 20  # in the line that ends a run, and in its state


class LostSample(NamedTuple):
    """A draw that could not be used: its global position, dataset, shard file, image key, and why."""

    position: int
    dataset: str
    shard: str
    key: str
    reason: str


class LostSamples:
    """What a run has lost so far, over all ranks.

    Args:
        fraction: of a dataset's drawn samples that may be lost, 0 to 1.
        samples: that may be lost of each dataset in any case.
        say: prints a line.

    Attributes:
        counts: dataset -> lost draws; a record that is drawn in each of three epochs is lost three times.
    """

    def __init__(self, *, fraction: float, samples: int, say: Callable[[str], None]) -> None:
        self.fraction = fraction
        self.samples = samples
        self.say = say
        self.counts: dict[str, int] = {}
        self._named: dict[str, list[str]] = {}
        self._known: set[tuple[str, str, str]] = set()

    def add(self, lost: Sequence[LostSample], drawn: Mapping[str, int]) -> None:
        """Count the lost samples of one step and say each image that is new.

        Args:
            lost: of all ranks.
            drawn: dataset -> samples drawn up to this step.

        Raises:
            UserError: a dataset has lost more than is tolerated; names the first ones.
        """
        for sample in lost:
            self.counts[sample.dataset] = self.counts.get(sample.dataset, 0) + 1
            image = (sample.dataset, sample.shard, sample.key)
            if image not in self._known:
                self._known.add(image)
                self.say(f"lost a sample of {sample.dataset}: {sample.reason}; another takes its place")
                named = self._named.setdefault(sample.dataset, [])
                if len(named) < _NAMED:
                    named.append(f"{sample.key} of {sample.shard}")
        for dataset in sorted({sample.dataset for sample in lost}):
            self._check(dataset, drawn[dataset])

    def _check(self, dataset: str, drawn: int) -> None:
        count = self.counts[dataset]
        if count <= max(self.samples, self.fraction * drawn):
            return
        named = self._named[dataset]
        raise UserError(
            f"{dataset} has lost {count:,} of {drawn:,} drawn samples, more than {self.samples} and "
            f"{100 * self.fraction:g}%: {', '.join(named)}{', ...' if len(named) == _NAMED else ''}; prepare it again, "
            "or raise data.tolerance.fraction or data.tolerance.samples"
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain JSON."""
        return {name: {"lost": count, "first": self._named[name]} for name, count in sorted(self.counts.items())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on counting from a checkpoint's `state`."""
        self.counts = {name: entry["lost"] for name, entry in state.items()}
        self._named = {name: list(entry["first"]) for name, entry in state.items()}
        for name, images in self._named.items():
            for image in images:
                key, shard = image.split(" of ", maxsplit=1)
                self._known.add((name, shard, key))
