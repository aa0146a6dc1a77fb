"""The training loop: batches in, optimiser steps out. Data, step, log and checkpoint are separate functions.

A run is a sequence of phases; each has its own length, batch size, schedule and objectives. Steps and positions count
on through all of them, so one step number says where a run is.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from instructblip.data.batching import Batch, split_further
from instructblip.errors import UserError
from instructblip.files import errors_for_users
from instructblip.models.arguments import of_samples
from instructblip.models.base import Inputs, Model
from instructblip.objectives import Objective
from instructblip.objectives.base import SampleObjective
from instructblip.training.backward import Passes, backward, remember
from instructblip.training.optim import clip_gradients, follow, set_learning_rate, step_unless
from instructblip.training.parallel import StepContext
from instructblip.training.reading import LaunchedStep, StepResult, launched, read_steps, what_is_not_finite
from instructblip.training.schedule import Phase, StepPosition, locate

_ALONE = StepContext()


def train_step(
    model: Model,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    context: StepContext = _ALONE,
    **settings: Any,
) -> StepResult:
    """One optimiser step, and what it saw: `launch_step`, read at once.

    Raises:
        UserError: as `launch_step` and `checked`; another rank is lost.
    """
    step = launch_step(model, optimizer, batches, context=context, **settings)
    return checked(read_steps([step], context)[0], context)


def launch_step(
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
) -> LaunchedStep:
    """One optimiser step over a global batch, of which `batches` are this rank's micro-batches.

    Each objective's sum is divided by the number of its units in the global batch before the backward pass: micro-batches
    and ranks only add up, so any split of the batch gives the same gradient, whatever objectives are mixed. With
    `context.micro_batch_means` it is divided by the units of its micro-batch and the number of these, and the split counts.

    Where the loss or the gradient is not finite on any rank, weights and optimiser stay as they were. That is decided where
    the weights are: the host reads nothing, unless objectives compare the whole batch or weights that train are sharded.

    Args:
        objectives: what is trained for.
        packed: several samples share a row of the LLM.
        rate: learning rate of this step; `new_parts_scale` and `part_scales` are multiples of it.
        seed: of what objectives draw.

    Raises:
        UserError: a sample that the model cannot take, by its name. Another rank is lost.
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
        norm = clip_gradients(model.parameters(), math.inf if clip_norm is None else clip_norm)
        not_finite = ranks.any(_not_finite(passes, norm))
    set_learning_rate(optimizer, rate, new_parts_scale, part_scales)
    step_unless(optimizer, not_finite)
    if passes.batch is not None and not bool(not_finite):
        remember(model, passes.batch)
    return launched(objectives, batches, passes, not_finite, norm)


def _not_finite(passes: Passes, norm: Tensor) -> Tensor:
    """1 where any sum of a step or its gradient's norm is not finite, else 0: a scalar in float32, on the device."""
    totals = [part.total.detach().float().to(norm.device) for of_objective in passes.sums for part in of_objective]
    return torch.stack([norm.float(), *totals]).isfinite().logical_not().any().float()


def checked(result: StepResult, context: StepContext) -> StepResult:
    """The result of a step, if the run may go on after it.

    Raises:
        UserError: the loss or the gradient is not finite, and is not to be skipped; the samples are named.
    """
    if result.skipped and not context.skip_non_finite:
        raise UserError(
            f"{what_is_not_finite(result)}; lower recipe.phases.NAME.learning_rate, look at these samples, "
            "or set recipe.non_finite=skip"
        )
    return result


def _prepared(model: Model, batch: Batch) -> Inputs:
    try:
        inputs = model.prepare(batch)
        return replace(inputs, images=batch.encoded[0]) if batch.encoded else inputs
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
    read_after: Callable[[int], bool] = lambda done: True,
    context: StepContext = _ALONE,
) -> int:
    """Train over `batches`, (global step, micro-batches) pairs; return the number of steps taken in the whole run.

    Args:
        start_step: steps taken before.
        seed: dropout's random stream is made anew from (seed, step, rank), so a resumed run draws the same. Also of what
            objectives draw.
        after_step: called for each step with (global step, place, learning rate, result); True ends the loop, after the
            steps that were read together.
        read_after: whether the results since the last reading are to be read, after so many steps of the whole run; the
            same on all ranks. Until then they stay on the device.

    Raises:
        UserError: as `launch_step` and `checked`.
    """
    model.train()
    done, unread = start_step, list[tuple[int, StepPosition, float, LaunchedStep]]()
    for step, micro_batches in batches:
        place = locate(phases, step)
        torch.manual_seed(_step_seed(seed, step, context.ranks.rank))
        rate = place.phase.rate(place.step)
        launched_step = launch_step(
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
        unread.append((step, place, rate, launched_step))
        if read_after(done):
            results = read_steps([launched_step for *_, launched_step in unread], context)
            ends = [
                after_step(taken, where, at_rate, checked(result, context))
                for (taken, where, at_rate, _), result in zip(unread, results, strict=True)
            ]
            unread.clear()
            if any(ends):
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
def traced_steps(
    first: int | None, folder: Path, say: Callable[[str], None], *, done: int = 0
) -> Iterator[Callable[[int], None]]:
    """Give a function to call after each step with the number of steps done; it begins and ends the trace.

    Args:
        first: the `TRACED_STEPS` steps after this one are traced; None traces nothing.
        folder: gets trace.json.gz.
        say: prints a line.
        done: steps taken before.

    Raises:
        UserError: the trace cannot be written.
    """
    recorder: profile | None = None

    def end() -> None:
        nonlocal recorder
        if recorder is not None:
            ended, recorder = recorder, None
            ended.stop()
            with errors_for_users(folder / "trace.json.gz"):
                ended.export_chrome_trace(str(folder / "trace.json.gz"))
            say(f"wrote {folder / 'trace.json.gz'}")

    def after(done: int) -> None:
        nonlocal recorder
        if first is not None and done == first + TRACED_STEPS:
            end()
        elif done == first:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            recorder = profile(activities=[ProfilerActivity.CPU, *cuda])
            recorder.start()

    try:
        after(done)
        yield after
    finally:
        end()
