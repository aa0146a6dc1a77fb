"""The gradient of a global batch: one backward pass a micro-batch, each objective's sum over its units in the whole batch
(or, as the released code has it, in the micro-batch).

Objectives that compare samples of the whole batch take two passes (Gao et al. 2021, "Scaling deep contrastive learning batch
size under memory limited setup"): features of all micro-batches without gradient, gathered over the ranks; the loss and its
gradient at the features; then each micro-batch again, which passes that gradient on to the weights. An objective that reads
partners from the whole batch draws them in between. Image tokens are computed once where the vision encoder is frozen.

Shape legend: B samples of this rank, N of the global batch, T tokens of the longest answer and its length in front.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from instructblip.distributed import Ranks
from instructblip.models.base import Inputs, Model, Outputs, Partners, PassWorkload
from instructblip.objectives.base import BatchObjective, Objective, PairedObjective, SampleObjective, Term, WholeBatch
from instructblip.training.parallel import StepContext


class TermSums(NamedTuple):
    """A term without its gradient, on the device: what is logged of it.

    Attributes:
        total: sum over its units, nats: ().
        per_sample: sum over units, nats, for each sample: (B,).
        counts: units of each sample: (B,).
        divisor: of the total, as for the gradient.
    """

    total: Tensor
    per_sample: Tensor
    counts: Tensor
    divisor: float


class Passes(NamedTuple):
    """What the passes of a step leave beside gradients.

    Attributes:
        sums: for each objective its terms by micro-batch.
        workloads: what each pass went through.
        batch: the whole batch, where objectives have looked at it.
    """

    sums: list[list[TermSums]]
    workloads: list[PassWorkload]
    batch: WholeBatch | None


def backward(
    model: Model,
    inputs: Sequence[Inputs],
    objectives: Sequence[Objective],
    divisors: Sequence[Sequence[float]],
    *,
    packed: bool,
    seed: int,
    context: StepContext,
) -> Passes:
    """Add the global batch's gradient to the weights, this rank's share of it.

    Args:
        model: whose gradients are empty, or are to be added to.
        inputs: this rank's micro-batches.
        objectives: what is trained for.
        divisors: for each objective what each micro-batch's sum is divided by: its units in the global batch, or those of
            the micro-batch, times the number of micro-batches. Of those that compare the whole batch the first counts.
        packed: several samples share a row of the LLM.
        seed: of what objectives draw.
        context: how the passes are carried out.
    """
    pairs = list(zip(objectives, divisors, strict=True))
    first, batch = _FirstPass(), None
    if any(isinstance(objective, _LooksAround) for objective in objectives):
        inputs = _with_image_tokens(model, inputs, context)
        batch, first.streams = _look_around(model, inputs, objectives, context)
        _compare(pairs, batch, first)
        inputs = _with_partners(inputs, objectives, batch, seed, context.ranks)
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
    return Passes(sums, workloads, batch)


def remember(model: Model, batch: WholeBatch) -> None:
    """Tell the model what the objectives have compared, in the order of the samples' positions, whatever rank had them."""
    order_N = batch.positions_N.argsort()
    rows = {name: tensor.detach()[order_N] for name, tensor in batch.everyone.items()}
    model.remember(rows, batch.image_ids_N[order_N])


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


_LooksAround = BatchObjective | PairedObjective


def _with_image_tokens(model: Model, inputs: Sequence[Inputs], context: StepContext) -> Sequence[Inputs]:
    """The same with image tokens in place of pixels, where no gradient goes to the encoder."""
    if "vision" in model.trained_parts:
        return inputs
    with torch.no_grad(), context.autocasting(model):
        return [replace(part, images=model.image_tokens(part.images, part.pixel_ids)) for part in inputs]


def _look_around(
    model: Model, inputs: Sequence[Inputs], objectives: Sequence[Objective], context: StepContext
) -> tuple[WholeBatch, list["_RandomState"]]:
    """The outputs of the whole batch that objectives compare; and the random streams that each micro-batch began with.

    Those of a model's copies, which never learn, need no second pass.
    """
    looking = [objective for objective in objectives if isinstance(objective, _LooksAround)]
    rows, shared = _names(o.rows for o in looking), _names(o.shared for o in looking)
    parts: list[Mapping[str, Tensor]] = []
    streams = []
    for part in inputs:
        streams.append(_RandomState.now(model.device))
        with torch.no_grad():
            parts.append(context.forward(model, part, {*rows, *shared}, through_wrapper=False).tensors)
    learnt = frozenset[str]().union(*(objective.outputs for objective in looking))
    own = {name: torch.cat([part[name].float() for part in parts]).requires_grad_(name in learnt) for name in rows}
    count = sum(map(len, inputs))
    batch = WholeBatch(
        own=own,
        everyone={name: context.ranks.gather_rows(tensor) for name, tensor in own.items()},
        shared={name: _leaf(parts[0][name]) if name in learnt else parts[0][name] for name in shared},
        image_ids_N=_gathered(
            [image_number(image) for part in inputs for image in part.image_ids], model, context.ranks
        ),
        positions_N=_gathered([place for part in inputs for place in part.positions], model, context.ranks),
        own_rows_B=torch.arange(count, device=model.device) + context.ranks.rank * count,
    )
    return batch, streams


def _leaf(output: Tensor) -> Tensor:
    return output.float().clone().requires_grad_()


def _names(groups: Iterable[Collection[str]]) -> list[str]:
    return sorted({name for names in groups for name in names})


def _gathered(own: Sequence[int], model: Model, ranks: Ranks) -> Tensor:
    return ranks.gather_rows(torch.tensor(own, dtype=torch.int64, device=model.device))


def image_number(image_id: str) -> int:
    """A number for a text, such that two texts of a batch never share one."""
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "big", signed=True)


def _compare(pairs: Sequence[tuple[Objective, Sequence[float]]], batch: WholeBatch, first: "_FirstPass") -> None:
    """Note the terms of the objectives over the whole batch, and their gradient at its outputs."""
    total = torch.zeros((), device=batch.own_rows_B.device)
    for objective, of_parts in pairs:
        if isinstance(objective, BatchObjective):
            detached = {name: tensor.detach() for name, tensor in batch.everyone.items()}
            seen = batch._replace(everyone=detached) if objective.gather == "detached" else batch
            term = objective.batch_term(seen)
            total = total + term.total * (objective.weight / of_parts[0])
            first.sums[objective.name] = [_sums(term, of_parts[0])]
    if not first.sums:
        return
    # Every rank's backward pass through the gather takes part in the exchange of gradients.
    own, shared = _with_gradient(batch.own), _with_gradient(batch.shared)
    leaves = [*own.values(), *shared.values()]
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    first.gradients = dict(zip(own, gradients, strict=False))
    first.shared = dict(zip(shared, gradients[len(own) :], strict=True))


def _with_gradient(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}


@torch.no_grad()
def _with_partners(
    inputs: Sequence[Inputs], objectives: Sequence[Objective], batch: WholeBatch, seed: int, ranks: Ranks
) -> Sequence[Inputs]:
    """The same with the partners that an objective draws, from whatever ranks they are on."""
    paired = next((objective for objective in objectives if isinstance(objective, PairedObjective)), None)
    if paired is None:
        return inputs
    drawn = paired.draw(batch, seed)
    images = ranks.take_rows(torch.cat([torch.as_tensor(part.images) for part in inputs]), drawn.images)
    answers = _take_answers([answer for part in inputs for answer in part.answers], drawn.answers, ranks)
    result, start = [], 0
    for part in inputs:
        rows = slice(start, start + len(part))
        result.append(replace(part, partners=Partners(images[rows], answers[rows])))
        start += len(part)
    return result


def _take_answers(own: Sequence[Sequence[int]], rows: Sequence[int], ranks: Ranks) -> list[list[int]]:
    longest = max(ranks.gather(max(map(len, own))))
    padded_BT = torch.tensor([[len(ids), *ids, *[0] * (longest - len(ids))] for ids in own])
    return [ids[1 : 1 + ids[0]] for ids in ranks.take_rows(padded_BT, rows).tolist()]


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
    return TermSums(term.total.detach(), term.per_sample, term.counts, divisor)
