"""The gradient of a global batch: one backward pass a micro-batch, each objective's sum over its units in the whole batch
(or, as the released code has it, in the micro-batch).

Objectives that compare samples of the whole batch take two passes (Gao et al. 2021, "Scaling deep contrastive learning batch
size under memory limited setup"): features of all micro-batches without gradient, gathered over the ranks; the loss and its
gradient at the features; then each micro-batch again, which passes that gradient on to the weights.

Shape legend: B samples of a micro-batch, N of the global batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from instructblip.models.base import Inputs, Model, Outputs, PassWorkload
from instructblip.objectives.base import BatchObjective, Objective, SampleObjective, Term
from instructblip.training.parallel import StepContext


class TermSums(NamedTuple):
    """A term as numbers: what is logged of it.

    Attributes:
        mean: its part of the objective's mean, nats: the sum over its units, divided as for the gradient.
        per_sample: sum over units, nats, for each sample.
        counts: units of each sample.
    """

    mean: float
    per_sample: list[float]
    counts: list[int]


def backward(
    model: Model,
    inputs: Sequence[Inputs],
    objectives: Sequence[Objective],
    divisors: Sequence[Sequence[float]],
    *,
    packed: bool,
    context: StepContext,
) -> tuple[list[list[TermSums]], list[PassWorkload]]:
    """Add the global batch's gradient to the weights, this rank's share of it.

    Args:
        model: whose gradients are empty, or are to be added to.
        inputs: this rank's micro-batches.
        objectives: what is trained for.
        divisors: for each objective what each micro-batch's sum is divided by: its units in the global batch, or those of
            the micro-batch, times the number of micro-batches. Of those that compare the whole batch the first counts.
        packed: several samples share a row of the LLM.
        context: how the passes are carried out.

    Returns:
        For each objective its terms by micro-batch; and what each pass went through.
    """
    pairs = list(zip(objectives, divisors, strict=True))
    batch_wide = [(one, of_parts[0]) for one, of_parts in pairs if isinstance(one, BatchObjective)]
    first = _first_pass(model, inputs, batch_wide, context) if batch_wide else _FirstPass()
    wanted = set().union(*(objective.outputs for objective in objectives))
    sums: list[list[TermSums]] = [first.sums.get(objective.name, []) for objective in objectives]
    workloads = []
    start = 0
    for number, part in enumerate(inputs):
        last = number == len(inputs) - 1
        with context.accumulate(last=last):
            first.repeat_random_numbers(number)
            outputs = context.forward(model, part, wanted, packed=packed)
            loss = first.surrogate(outputs, slice(start, start + len(part)), with_shared=last)
            for (objective, of_parts), found in zip(pairs, sums, strict=True):
                if isinstance(objective, SampleObjective):
                    term = objective.term(outputs.tensors, part)
                    loss = loss + term.total * (objective.weight / of_parts[number])
                    found.append(_sums(term, of_parts[number]))
            loss.backward()
        workloads.append(outputs.workload)
        start += len(part)
    return sums, workloads


@dataclass
class _FirstPass:
    """What the pass over features leaves for the second pass.

    Attributes:
        gradients: of the loss at the rows of this rank, (B of all its micro-batches, ...).
        shared: of the loss at shared outputs.
        streams: state of the random streams before each micro-batch, so that dropout draws the same again.
        sums: terms by objective.
    """

    gradients: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    streams: list["_RandomState"] = field(default_factory=list)
    sums: dict[str, list[TermSums]] = field(default_factory=dict)

    def repeat_random_numbers(self, number: int) -> None:
        """Before the second forward pass of a micro-batch: dropout draws what it drew in the first."""
        if self.streams:
            self.streams[number].restore()

    def surrogate(self, outputs: Outputs, rows: slice, *, with_shared: bool) -> Tensor:
        """A scalar whose gradient at a micro-batch's outputs is that of the batch-wide loss."""
        loss = torch.zeros((), device=next(iter(outputs.tensors.values())).device)
        for name, gradient in self.gradients.items():
            loss = loss + (outputs.tensors[name].float() * gradient[rows]).sum()
        for name, gradient in self.shared.items():  # once, not once a micro-batch; in each, so that each uses it
            loss = loss + (outputs.tensors[name].float() * gradient).sum() * (1.0 if with_shared else 0.0)
        return loss


def _first_pass(
    model: Model, inputs: Sequence[Inputs], objectives: Sequence[tuple[BatchObjective, float]], context: StepContext
) -> _FirstPass:
    result = _FirstPass()
    names = sorted({name for objective, _ in objectives for name in objective.rows})
    shared_names = sorted({name for objective, _ in objectives for name in objective.shared})
    parts: list[Mapping[str, Tensor]] = []
    for part in inputs:
        result.streams.append(_RandomState.now(model.device))
        with torch.no_grad():
            parts.append(context.forward(model, part, {*names, *shared_names}, through_wrapper=False).tensors)
    own = {name: torch.cat([part[name].float() for part in parts]).requires_grad_() for name in names}
    shared = {name: parts[0][name].float().clone().requires_grad_() for name in shared_names}
    everyone = {name: context.ranks.gather_rows(rows) for name, rows in own.items()}
    total = torch.zeros((), device=model.device)
    for objective, divisor in objectives:
        first = context.ranks.rank * sum(map(len, inputs))
        term = objective.batch_term(own, everyone, shared, first)
        total = total + term.total * (objective.weight / divisor)
        result.sums[objective.name] = [_sums(term, divisor)]
    # Every rank's backward pass through the gather takes part in the exchange of gradients.
    leaves = [*own.values(), *shared.values()]
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    result.gradients = dict(zip(own, gradients, strict=False))
    result.shared = dict(zip(shared, gradients[len(own) :], strict=True))
    return result


class _RandomState(NamedTuple):
    cpu: Tensor
    device: Tensor | None
    where: torch.device

    @classmethod
    def now(cls, device: torch.device) -> "_RandomState":
        on_gpu = device.type == "cuda"
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None, device)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, self.where)


def _sums(term: Term, divisor: float) -> TermSums:
    return TermSums(float(term.total.detach()) / divisor, term.per_sample.tolist(), term.counts.tolist())
