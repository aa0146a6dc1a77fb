"""Objectives: named outputs of a model in, loss terms out.

A term is a sum over its own units (supervised tokens, samples, pairs), never a mean: only the training loop knows how many
units the global batch has. It learns that before the backward pass and divides each term by it, so objectives with
different units mix, and any split into micro-batches or ranks gives the same gradient.

Shape legend: B batch, N global batch, S units in the batch, V classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from instructblip.config.schema import Gather
from instructblip.devices import on_device
from instructblip.models.base import Inputs


class Term(NamedTuple):
    """One objective's loss on a micro-batch.

    Attributes:
        total: sum over the units, nats, with its gradient: ().
        per_sample: the units' losses summed for each sample, detached: (B,).
        counts: units of each sample: (B,), int64, where the others are or on the host.
    """

    total: Tensor
    per_sample: Tensor
    counts: Tensor


@dataclass(frozen=True)
class ObjectiveSettings:
    """What a phase says of its objectives beside their weights; see `config.PhaseConfig`."""

    gather: Gather = "gradient"
    soft_targets: float = 0.4
    soft_targets_ramp: int = 0
    negatives_among: int | None = None


class Objective(ABC):
    """What a phase of training is for.

    Args:
        weight: factor of this objective in the loss; the loss is `sum over objectives of weight * sum / units`.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    outputs: ClassVar[frozenset[str]]
    """The model's outputs that its gradient flows through."""
    rows: ClassVar[tuple[str, ...]] = ()
    """Outputs with one row a sample, (B, ...), of which it reads those of the whole batch."""
    shared: ClassVar[tuple[str, ...]] = ()
    """Outputs that are the same for every micro-batch, such as a temperature."""
    validated: ClassVar[bool] = True
    """Whether what it teaches shows in a validation."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    @classmethod
    def of(cls, weight: float, settings: ObjectiveSettings) -> Self:
        """The objective as a phase has it."""
        return cls(weight)

    @classmethod
    def needed(cls) -> frozenset[str]:
        """All outputs of the model that it reads, with gradient or without."""
        return cls.outputs | {*cls.rows, *cls.shared}

    def at(self, step: int) -> "Objective":
        """What it is at a step of its phase, counted from 0: the same, unless something of it follows the steps."""
        return self

    @abstractmethod
    def count(self, inputs: Inputs) -> int:
        """Units in a micro-batch. Needs no forward pass."""


class SampleObjective(Objective):
    """An objective whose term on a micro-batch depends on that micro-batch alone."""

    @abstractmethod
    def term(self, outputs: Mapping[str, Tensor], inputs: Inputs) -> Term:
        """The loss on a micro-batch."""


class WholeBatch(NamedTuple):
    """The global batch of N samples as a rank sees it, which has B of them itself.

    Attributes:
        own: outputs with one row a sample, (B, ...).
        everyone: the same outputs of all ranks, (N, ...).
        shared: outputs that all samples share, such as a temperature or a queue.
        image_ids_N: a number of each sample's image, int64.
        positions_N: where each sample was drawn in the run, int64.
        own_rows_B: this rank's samples among the N.
    """

    own: Mapping[str, Tensor]
    everyone: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    image_ids_N: Tensor
    positions_N: Tensor
    own_rows_B: Tensor

    def same_image(self) -> Tensor:
        """Whether an own sample and another one show the same image: (B, N)."""
        return self.image_ids_N[self.own_rows_B, None] == self.image_ids_N


class BatchObjective(Objective):
    """An objective that compares samples with all others of the global batch.

    The loop computes `rows` of all micro-batches without gradient, gathers them over the ranks, asks for the term and
    its gradient at those rows that are `outputs`, and passes that on through a second forward pass of each micro-batch.

    Args:
        weight: as in `Objective`.
        gather: `gradient` is that of the whole batch's loss. `detached` takes everyone's rows, the own ones among them, for
            constants, as LAVIS does: each sample learns from its own comparisons alone.
    """

    def __init__(self, weight: float = 1.0, gather: Gather = "gradient") -> None:
        super().__init__(weight)
        self.gather = gather

    @classmethod
    def of(cls, weight: float, settings: ObjectiveSettings) -> Self:
        """With the phase's gather."""
        return cls(weight, settings.gather)

    @abstractmethod
    def batch_term(self, batch: WholeBatch) -> Term:
        """The loss of this rank's samples among those of all ranks; a sum over the own B samples' units."""


class PartnerRows(NamedTuple):
    """For each of a rank's B samples the rows in the global batch of two others, whose image and answer are wrong for it."""

    images: list[int]
    answers: list[int]


class PairedObjective(SampleObjective):
    """An objective whose forward pass reads, beside each sample, wrong partners drawn from the global batch.

    The loop computes `rows` as for a `BatchObjective`, asks for the partners, fetches them from the ranks that have them,
    and puts them into the inputs of the second forward pass.
    """

    @abstractmethod
    def draw(self, batch: WholeBatch, seed: int) -> PartnerRows:
        """Draw partners for this rank's samples: a function of the whole batch, the seed and each sample's position."""


def summed_cross_entropy(
    logits_SV: Tensor, labels_S: Tensor, counts: Sequence[int], *, label_smoothing: float = 0.0
) -> Term:
    """Cross-entropy (nats) summed over units, which stand sample after sample.

    Args:
        logits_SV: one row a unit.
        labels_S: the right class of each.
        counts: units of each of the B samples; they sum to S.
        label_smoothing: probability that is taken from the right class and given to all evenly.
    """
    losses_S = F.cross_entropy(logits_SV, labels_S, reduction="none", label_smoothing=label_smoothing)
    sample_S = on_device([sample for sample, count in enumerate(counts) for _ in range(count)], losses_S.device)
    per_sample_B = torch.zeros(len(counts), device=losses_S.device).index_add(0, sample_S, losses_S.detach())
    return Term(losses_S.sum(), per_sample_B, torch.tensor(counts))
