"""The phases of a run: which steps, positions, rates and batches belong to each."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from instructblip.data.batching import Batching
from instructblip.objectives import Objective
from instructblip.objectives.distillation import COPIES
from instructblip.training.optim import learning_rate


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    Attributes:
        name: shown while it runs.
        steps: optimiser steps.
        batch_size: samples a step, over all ranks.
        batching: how a rank's share of the batch is cut into forward passes.
        learning_rate, warmup_steps, warmup_learning_rate, final_learning_rate: linear warm-up, then cosine, both within
            the phase.
        new_parts_scale: learning rate of what BERT does not bring (query tokens, cross-attention) as a multiple.
        objectives: what is trained for, each with its weight.
        part_rates: peak learning rate of parts that have their own in place of the phase's; scheduled alike.
        plateau_steps: None is a cosine of every step; a number is the released code's staircase of so long plateaus.
        plateau_decay: factor from plateau to plateau, in place of the cosine.
    """

    name: str
    steps: int
    batch_size: int
    batching: Batching
    learning_rate: float
    warmup_steps: int
    warmup_learning_rate: float
    final_learning_rate: float
    new_parts_scale: float
    objectives: tuple[Objective, ...]
    plateau_steps: int | None = None
    plateau_decay: float | None = None
    part_rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def outputs(self) -> frozenset[str]:
        """The model's outputs that the objectives need."""
        return frozenset[str]().union(*(objective.outputs for objective in self.objectives))

    @property
    def copied(self) -> frozenset[str]:
        """Outputs of the model's copies that the objectives compare with."""
        return frozenset[str]().union(*(objective.needed() for objective in self.objectives)) & COPIES

    @property
    def is_validated(self) -> bool:
        """Whether what it teaches shows in a validation."""
        return any(objective.validated for objective in self.objectives)

    @property
    def part_scales(self) -> dict[str, float]:
        """Learning rate of each part that has its own, as a multiple of the phase's."""
        return {part: rate / self.learning_rate for part, rate in self.part_rates.items()}

    def rate(self, step: int) -> float:
        """Learning rate at a step of this phase."""
        return learning_rate(
            step,
            steps=self.steps,
            peak=self.learning_rate,
            warmup_steps=self.warmup_steps,
            start=self.warmup_learning_rate,
            final=self.final_learning_rate,
            plateau_steps=self.plateau_steps,
            plateau_decay=self.plateau_decay,
        )


class StepPosition(NamedTuple):
    """Where a global step lies: its phase, the step within it, and the first position of its batch."""

    phase: Phase
    step: int
    position: int


def locate(phases: Sequence[Phase], step: int) -> StepPosition:
    """Find a global step's phase.

    Raises:
        ValueError: beyond the last phase.
    """
    position, inside = 0, step
    for phase in phases:
        if inside < phase.steps:
            return StepPosition(phase, inside, position + inside * phase.batch_size)
        inside -= phase.steps
        position += phase.steps * phase.batch_size
    raise ValueError(f"step {step} lies beyond the last phase")


def rank_positions(
    phases: Sequence[Phase], start_step: int, *, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[int, list[int]]]:
    """For each remaining global step, the positions of this rank's share of the global batch.

    Raises:
        ValueError: a global batch does not divide among the ranks.
    """
    for step in range(start_step, total_steps(phases)):
        place = locate(phases, step)
        share, rest = divmod(place.phase.batch_size, world_size)
        if rest:
            raise ValueError(f"a global batch of {place.phase.batch_size} does not divide among {world_size} ranks")
        first = place.position + rank * share
        yield step, list(range(first, first + share))


def step_batching(phases: Sequence[Phase], step: int) -> Batching:
    """How the samples of a global step are cut into forward passes."""
    return locate(phases, step).phase.batching


def total_steps(phases: Iterable[Phase]) -> int:
    """Optimiser steps of the whole run."""
    return sum(phase.steps for phase in phases)
