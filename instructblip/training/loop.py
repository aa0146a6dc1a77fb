"""The training loop: batches in, optimiser steps out. Data, step, log and checkpoint are separate functions.

A run is a sequence of phases; each has its own length, batch size, schedule and objectives. Steps and positions count
on through all of them, so one step number says where a run is.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from instructblip.data.batching import Batch, in_order_of_draws, split_further
from instructblip.errors import UserError
from instructblip.models.arguments import of_samples
from instructblip.models.base import Inputs, Model
from instructblip.objectives import Objective
from instructblip.objectives.base import SampleObjective
from instructblip.training.backward import Passes, backward, remember
from instructblip.training.optim import clip_gradients, follow, set_learning_rate
from instructblip.training.parallel import StepContext
from instructblip.training.plan.flops import StepWorkload
from instructblip.training.schedule import Phase, StepPosition, locate


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


_ALONE = StepContext()


def train_step(
    model: Model,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    objectives: Sequence[Objective],
    packed: bool = False,
    rate: float,
    new_parts_scale: float = 1.0,
    part_scales: Mapping[str, float] = MappingProxyType({}),
    clip_norm: float | None,
    seed: int = 0,
    context: StepContext = _ALONE,
) -> StepResult:
    """One optimiser step over a global batch, of which `batches` are this rank's micro-batches.

    Each objective's sum is divided by the number of its units in the global batch before the backward pass: micro-batches
    and ranks only add up, so any split of the batch gives the same gradient, whatever objectives are mixed. With
    `context.micro_batch_means` it is divided by the units of its micro-batch and the number of these, and the split counts.

    Args:
        objectives: what is trained for.
        packed: several samples share a row of the LLM.
        rate: learning rate of this step; `new_parts_scale` and `part_scales` are multiples of it.
        seed: of what objectives draw.

    Raises:
        UserError: the loss or the gradient is not finite, and is not to be skipped; the weights are as they were, the
            samples are named. A sample that the model cannot take, by its name. Another rank is lost.
    """
    optimizer.zero_grad()
    ranks = context.ranks
    inputs = [_prepared(model, batch) for batch in batches]
    counts = ranks.gather({"passes": len(batches), "units": [sum(map(o.count, inputs)) for o in objectives]})
    divisors = _divisors(objectives, inputs, counts, micro_batch_means=context.micro_batch_means)
    if context.equal_passes and (passes := max(count["passes"] for count in counts)) > len(batches):
        wholes = {place: number for number, batch in enumerate(batches) for place in batch.places}
        batches = split_further(batches, passes)
        divisors = [[of_parts[wholes[batch.places[0]]] for batch in batches] for of_parts in divisors]
        inputs = [_prepared(model, batch) for batch in batches]
    with ranks.watched():
        follow(model.copies(), model.copy_momentum)
        passes = backward(model, inputs, objectives, divisors, packed=packed, seed=seed, context=context)
    result = _result(objectives, ranks.gather(_report(batches, passes, context.stop_signal())))
    with ranks.watched():
        norm = clip_gradients(model.parameters(), math.inf if clip_norm is None else clip_norm)
    result = result._replace(grad_norm=norm)
    if not math.isfinite(result.loss) or not math.isfinite(norm):
        if context.skip_non_finite:
            return result._replace(skipped=True)
        raise UserError(
            f"{what_is_not_finite(result)}; lower recipe.phases.NAME.learning_rate, look at these samples, "
            "or set recipe.non_finite=skip"
        )
    set_learning_rate(optimizer, rate, new_parts_scale, part_scales)
    optimizer.step()
    if passes.batch is not None:
        remember(model, passes.batch)
    return result


def _prepared(model: Model, batch: Batch) -> Inputs:
    try:
        return model.prepare(batch)
    except ValueError as error:
        raise of_samples(error, batch.ids) from None


def _divisors(
    objectives: Sequence[Objective],
    inputs: Sequence[Inputs],
    counts: Sequence[Mapping[str, Any]],
    *,
    micro_batch_means: bool,
) -> list[list[float]]:
    """For each objective what the sum of each of this rank's micro-batches is divided by, from the counts of all ranks."""
    passes = sum(count["passes"] for count in counts)
    divisors: list[list[float]] = []
    for number, objective in enumerate(objectives):
        if micro_batch_means and isinstance(objective, SampleObjective):
            divisors.append([float(max(objective.count(part), 1) * passes) for part in inputs])
        else:
            units = sum(count["units"][number] for count in counts)
            divisors.append([float(units)] * len(inputs))
    return divisors


def what_is_not_finite(result: StepResult) -> str:
    """A line that names a step's samples."""
    ids = ", ".join(result.ids)
    return f"loss {result.loss} and gradient norm {result.grad_norm} are not both finite in the batch {ids}"


def _report(batches: Sequence[Batch], passes: Passes, stop_signal: int) -> dict[str, Any]:
    """What a rank tells the others of its micro-batches: sums, which add up."""
    terms = []
    for of_objective in passes.sums:
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        datasets = [name for batch in batches for name in batch.datasets]
        rows = [row for part in of_objective for row in zip(part.per_sample, part.counts, strict=True)]
        for dataset, (value, units) in zip(datasets, rows, strict=True):
            sums[dataset] = sums.get(dataset, 0.0) + value
            counts[dataset] = counts.get(dataset, 0) + units
        terms.append({"mean": sum(part.mean for part in of_objective), "sums": sums, "counts": counts})
    return {
        "terms": terms,
        "ids": in_order_of_draws(batches),
        "frames": sum(_frames(batch) for batch in batches),
        "encoded": sum(_encoded(batch) for batch in batches),
        "text": sum(work.text for work in passes.workloads),
        "positions": sum(work.positions for work in passes.workloads),
        "padding": sum(work.padding for work in passes.workloads),
        "stop_signal": stop_signal,
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
    return StepResult(
        loss=sum(objective.weight * means[objective.name] for objective in objectives),
        loss_by_dataset=dict(sorted(by_dataset.items())),
        loss_by_objective=means,
        grad_norm=math.nan,
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
        stop_signal=max(report["stop_signal"] for report in reports),
    )


def _added(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0) + value
    return total


def run_steps(
    model: Model,
    optimizer: torch.optim.Optimizer,
    phases: Sequence[Phase],
    batches: Iterable[tuple[int, list[Batch]]],
    *,
    start_step: int,
    seed: int,
    clip_norm: float | None,
    after_step: Callable[[int, StepPosition, float, StepResult], bool],
    context: StepContext = _ALONE,
) -> int:
    """Train over `batches`, (global step, micro-batches) pairs; return the number of steps taken in the whole run.

    Args:
        start_step: steps taken before.
        seed: dropout's random stream is made anew from (seed, step, rank), so a resumed run draws the same. Also of what
            objectives draw.
        after_step: called after each step with (global step, place, learning rate, result); True ends the loop.
    """
    model.train()
    done = start_step
    for step, micro_batches in batches:
        place = locate(phases, step)
        torch.manual_seed(_step_seed(seed, step, context.ranks.rank))
        rate = place.phase.rate(place.step)
        result = train_step(
            model,
            optimizer,
            micro_batches,
            objectives=[objective.at(place.step) for objective in place.phase.objectives],
            packed=place.phase.batching.kind == "packed",
            rate=rate,
            new_parts_scale=place.phase.new_parts_scale,
            part_scales=place.phase.part_scales,
            clip_norm=clip_norm,
            seed=seed,
            context=context,
        )
        done = step + 1
        if after_step(step, place, rate, result):
            break
    return done


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step + rank * 2**40) % 2**63


def log_entry(
    step: int, place: StepPosition, rate: float, result: StepResult, speed: dict[str, float]
) -> dict[str, Any]:
    """The line of metrics.jsonl for one step; `step` counts finished steps."""
    return {
        "step": step + 1,
        "phase": place.phase.name,
        "loss": result.loss,
        "loss_by_dataset": result.loss_by_dataset,
        **({"loss_by_objective": result.loss_by_objective} if len(result.loss_by_objective) > 1 else {}),
        "lr": rate,
        "grad_norm": result.grad_norm,
        "tokens": result.tokens,
        "padding_fraction": result.padding_fraction,
        "sample_ids": result.ids,
        **({"skipped": True} if result.skipped else {}),
        **speed,
    }


TRACED_STEPS = 5


@contextlib.contextmanager
def traced_steps(first: int | None, folder: Path, say: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
    """Give a function to call after each step with the number of steps done; it begins and ends the trace.

    Args:
        first: the `TRACED_STEPS` steps after this one are traced; None traces nothing.
        folder: gets trace.json.gz.
        say: prints a line.
    """
    recorder: profile | None = None

    def end() -> None:
        nonlocal recorder
        if recorder is not None:
            recorder.stop()
            recorder.export_chrome_trace(str(folder / "trace.json.gz"))
            say(f"wrote {folder / 'trace.json.gz'}")
            recorder = None

    def after(done: int) -> None:
        nonlocal recorder
        if first is not None and done == first + TRACED_STEPS:
            end()
        elif done == first:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            recorder = profile(activities=[ProfilerActivity.CPU, *cuda])
            recorder.start()

    try:
        yield after
    finally:
        end()
