"""What a step leaves on the device, read later: the numbers of several steps in one exchange between ranks.

A step is launched without waiting for the device. Its losses stay there until logging is due; then the ranks tell each
other, for all steps since, their sums and the ids of their samples.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from instructblip.data.batching import Batch, in_order_of_draws
from instructblip.devices import Readout, to_device
from instructblip.objectives import Objective
from instructblip.training.backward import Passes
from instructblip.training.parallel import StepContext
from instructblip.training.plan.flops import StepWorkload


class StepResult(NamedTuple):
    """What one optimiser step saw, over all ranks.

    Attributes:
        loss: weighted sum of the objectives' means over their units, nats; `loss_by_dataset` that for each, always over
            the units of the global batch.
        loss_by_objective: each objective's mean, without its weight.
        grad_norm: before clipping.
        samples, tokens: trained on; tokens are the units of the first objective, supervised tokens in most phases.
        ids: of the samples, in the order of their positions.
        padding_fraction: share of the places in the passes through the LLM that held nothing, 0 to 1.
        work: what went through each part, padding left out.
        skipped: the loss or the gradient was not finite, and the weights are as they were.
        stop_signal: of the ranks that were asked to stop, the largest number of a signal; else 0.
    """

    loss: float
    loss_by_dataset: dict[str, float]
    loss_by_objective: dict[str, float]
    grad_norm: float
    samples: int
    tokens: int
    ids: list[str]
    padding_fraction: float = 0.0
    work: StepWorkload = StepWorkload()
    skipped: bool = False
    stop_signal: int = 0


class LaunchedStep(NamedTuple):
    """A step that the device may still be computing.

    Attributes:
        objectives: what was trained for.
        batches: this rank's micro-batches.
        passes: what they left.
        numbers: whether anything was not finite, the norm of the gradient, and then for each objective and micro-batch the
            sum, the sums by sample and the units by sample.
    """

    objectives: Sequence[Objective]
    batches: Sequence[Batch]
    passes: Passes
    numbers: Readout


def launched(
    objectives: Sequence[Objective], batches: Sequence[Batch], passes: Passes, not_finite: Tensor, norm: Tensor
) -> LaunchedStep:
    """Send a step's numbers to the host, in float64, which holds all of them exactly."""
    terms = [tensor for of_objective in passes.sums for part in of_objective for tensor in part[:3]]
    numbers = torch.cat(
        [to_device(tensor.detach().double().reshape(-1), norm.device) for tensor in (not_finite, norm, *terms)]
    )
    return LaunchedStep(objectives, batches, passes, Readout(numbers))


def read_steps(steps: Sequence[LaunchedStep], context: StepContext) -> list[StepResult]:
    """The results of steps that were launched one after the other; every rank calls this after the same steps.

    A request to stop is in the last one's.

    Raises:
        UserError: another rank is lost.
    """
    own = [_report(step) for step in steps]
    reports = context.ranks.gather({"steps": own, "stop_signal": context.stop_signal()})
    results = [
        _result(step.objectives, [report["steps"][number] for report in reports]) for number, step in enumerate(steps)
    ]
    results[-1] = results[-1]._replace(stop_signal=max(report["stop_signal"] for report in reports))
    return results


def what_is_not_finite(result: StepResult) -> str:
    """A line that names a step's samples."""
    ids = ", ".join(result.ids)
    return f"loss {result.loss} and gradient norm {result.grad_norm} are not both finite in the batch {ids}"


def _report(step: LaunchedStep) -> dict[str, Any]:
    """What a rank tells the others of its micro-batches: sums, which add up."""
    numbers, workloads = iter(step.numbers.numbers()), step.passes.workloads
    not_finite, norm = bool(next(numbers)), next(numbers)
    datasets = [name for batch in step.batches for name in batch.datasets]
    terms = []
    for of_objective in step.passes.sums:
        mean, rows = 0.0, list[tuple[float, float]]()
        for part in of_objective:
            mean += next(numbers) / part.divisor
            values, units = ([next(numbers) for _ in range(len(part.per_sample))] for _ in range(2))
            rows += zip(values, units, strict=True)
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for dataset, (value, unit) in zip(datasets, rows, strict=True):
            sums[dataset] = sums.get(dataset, 0.0) + value
            counts[dataset] = counts.get(dataset, 0) + int(unit)
        terms.append({"mean": mean, "sums": sums, "counts": counts})
    return {
        "terms": terms,
        "not_finite": not_finite,
        "norm": norm,
        "ids": in_order_of_draws(step.batches),
        "frames": sum(_frames(batch) for batch in step.batches),
        # Others are image tokens.
        "encoded": sum(_encoded(batch) for batch in step.batches),
        "text": sum(work.text for work in workloads),
        "positions": sum(work.positions for work in workloads),
        "padding": sum(work.padding for work in workloads),
    }


def _frames(batch: Batch) -> int:
    return batch.images.shape[0] * batch.images.shape[1]


def _encoded(batch: Batch) -> int:
    """Frames that go through the vision encoder: none of tokens, and the same pixels once."""
    if batch.images.dtype != torch.uint8:
        return 0
    return (len(set(batch.pixel_ids)) or len(batch.images)) * batch.images.shape[1]


def _result(objectives: Sequence[Objective], reports: Sequence[dict[str, Any]]) -> StepResult:
    means: dict[str, float] = {}
    by_dataset: dict[str, float] = {}
    units: list[int] = []
    for number, objective in enumerate(objectives):
        terms = [report["terms"][number] for report in reports]
        counts = _added(term["counts"] for term in terms)
        units.append(int(sum(counts.values())))
        means[objective.name] = sum(term["mean"] for term in terms)
        for name, value in _added(term["sums"] for term in terms).items():
            by_dataset[name] = by_dataset.get(name, 0.0) + objective.weight * value / counts[name]
    ids = [sample_id for report in reports for sample_id in report["ids"]]
    whole = {
        key: sum(report[key] for report in reports) for key in ("frames", "encoded", "text", "positions", "padding")
    }
    loss = sum(objective.weight * means[objective.name] for objective in objectives)
    norm = reports[0]["norm"]  # over all ranks, and the same on each
    return StepResult(
        loss=loss,
        loss_by_dataset=dict(sorted(by_dataset.items())),
        loss_by_objective=means,
        grad_norm=norm,
        samples=len(ids),
        tokens=units[0],
        ids=ids,
        padding_fraction=whole["padding"] / max(whole["positions"], 1),
        work=StepWorkload(
            samples=len(ids),
            frames=whole["frames"],
            encoded=whole["encoded"],
            text=whole["text"],
            positions=whole["positions"] - whole["padding"],
            answers=units[0],
        ),
        skipped=any(report["not_finite"] for report in reports) or not math.isfinite(loss) or not math.isfinite(norm),
    )


def _added(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0) + value
    return total
