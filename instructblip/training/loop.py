"""The training loop: batches in, optimiser steps out. Data, step, log and checkpoint are separate functions.

A run is a sequence of phases; each has its own length, batch size, schedule and path of the loss. Steps and positions count
on through all of them, so one step number says where a run is.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from instructblip.data.batching import Batch, in_order_of_draws, split_further
from instructblip.errors import UserError
from instructblip.models.instructblip import InstructBLIP, Loss
from instructblip.training.optim import set_learning_rate
from instructblip.training.parallel import StepContext
from instructblip.training.plan.flops import StepWorkload
from instructblip.training.schedule import Phase, StepPosition, locate


class StepResult(NamedTuple):
    """What one optimiser step saw, over all ranks.

    Attributes:
        loss: mean over supervised tokens, nats; `loss_by_dataset` the same for each.
        grad_norm: before clipping.
        samples, tokens: trained on; tokens are supervised ones.
        ids: of the samples, in the order of their positions.
        padding_fraction: share of the places in the passes through the LLM that held nothing, 0 to 1.
        work: what went through each part, padding left out.
        skipped: the loss or the gradient was not finite, and the weights are as they were.
        stop_signal: of the ranks that were asked to stop, the largest number of a signal; else 0.
    """

    loss: float
    loss_by_dataset: dict[str, float]
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
    model: InstructBLIP,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    through_llm: bool,
    packed: bool = False,
    rate: float,
    new_parts_scale: float = 1.0,
    clip_norm: float | None,
    context: StepContext = _ALONE,
) -> StepResult:
    """One optimiser step over a global batch, of which `batches` are this rank's micro-batches.

    The loss is a sum over supervised tokens divided by their number in the global batch: micro-batches and ranks only add
    up, so any split of the batch gives the same gradient.

    Raises:
        UserError: the loss or the gradient is not finite, and is not to be skipped; the weights are as they were, the
            samples are named. Another rank is lost.
    """
    optimizer.zero_grad()
    ranks = context.ranks
    if context.equal_passes:
        batches = split_further(batches, max(ranks.gather(len(batches))))
    with ranks.watched():
        losses = _backward(model, batches, context, through_llm=through_llm, packed=packed)
    result = _result(ranks.gather(_report(batches, losses, context.stop_signal())))
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    for parameter in parameters:
        parameter.grad.div_(result.tokens)  # type: ignore[union-attr]
    norm = float(nn.utils.clip_grad_norm_(parameters, math.inf if clip_norm is None else clip_norm))
    result = result._replace(grad_norm=norm)
    if not math.isfinite(result.loss) or not math.isfinite(norm):
        if context.skip_non_finite:
            return result._replace(skipped=True)
        raise UserError(
            f"{what_is_not_finite(result)}; lower recipe.phases[].learning_rate, look at these samples, "
            "or set recipe.non_finite=skip"
        )
    set_learning_rate(optimizer, rate, new_parts_scale)
    optimizer.step()
    return result


def what_is_not_finite(result: StepResult) -> str:
    """A line that names a step's samples."""
    ids = ", ".join(result.ids)
    return f"loss {result.loss} and gradient norm {result.grad_norm} are not both finite in the batch {ids}"


def _backward(
    model: InstructBLIP, batches: Sequence[Batch], context: StepContext, *, through_llm: bool, packed: bool
) -> list[Loss]:
    losses = []
    for number, batch in enumerate(batches, start=1):
        with context.accumulate(last=number == len(batches)):
            loss = context.forward(
                model, batch.images, batch.instructions, batch.targets, through_llm=through_llm, packed=packed
            )
            loss.total.backward()
        losses.append(loss)
    return losses


def _report(batches: Sequence[Batch], losses: Sequence[Loss], stop_signal: int) -> dict[str, Any]:
    """What a rank tells the others of its micro-batches: sums, which add up."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for batch, loss in zip(batches, losses, strict=True):
        rows = zip(batch.datasets, loss.per_sample.tolist(), loss.tokens_per_sample.tolist(), strict=True)
        for dataset, value, tokens in rows:
            sums[dataset] = sums.get(dataset, 0.0) + value
            counts[dataset] = counts.get(dataset, 0) + tokens
    return {
        "loss": sum(float(loss.total.detach()) for loss in losses),
        "tokens": sum(counts.values()),
        "sums": sums,
        "counts": counts,
        "ids": in_order_of_draws(batches),
        "frames": sum(_frames(batch) for batch in batches),
        "encoded": sum(_frames(batch) for batch in batches if batch.images.dtype == torch.uint8),  # others are tokens
        "text": sum(loss.text for loss in losses),
        "positions": sum(loss.positions for loss in losses),
        "padding": sum(loss.padding for loss in losses),
        "stop_signal": stop_signal,
    }


def _frames(batch: Batch) -> int:
    return batch.images.shape[0] * batch.images.shape[1]


def _result(reports: Sequence[dict[str, Any]]) -> StepResult:
    tokens = sum(report["tokens"] for report in reports)
    names = sorted({name for report in reports for name in report["sums"]})
    sums = {name: sum(report["sums"].get(name, 0.0) for report in reports) for name in names}
    counts = {name: sum(report["counts"].get(name, 0) for report in reports) for name in names}
    ids = [sample_id for report in reports for sample_id in report["ids"]]
    whole = {
        key: sum(report[key] for report in reports) for key in ("frames", "encoded", "text", "positions", "padding")
    }
    return StepResult(
        loss=sum(report["loss"] for report in reports) / tokens,
        loss_by_dataset={name: sums[name] / counts[name] for name in names},
        grad_norm=math.nan,
        samples=len(ids),
        tokens=tokens,
        ids=ids,
        padding_fraction=whole["padding"] / max(whole["positions"], 1),
        work=StepWorkload(
            samples=len(ids),
            frames=whole["frames"],
            encoded=whole["encoded"],
            text=whole["text"],
            positions=whole["positions"] - whole["padding"],
            answers=tokens,
        ),
        stop_signal=max(report["stop_signal"] for report in reports),
    )


def run_steps(
    model: InstructBLIP,
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
        seed: dropout's random stream is made anew from (seed, step, rank), so a resumed run draws the same.
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
            through_llm=place.phase.through_llm,
            packed=place.phase.batching.kind == "packed",
            rate=rate,
            new_parts_scale=place.phase.new_parts_scale,
            clip_norm=clip_norm,
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
        "lr": rate,
        "grad_norm": result.grad_norm,
        "tokens": result.tokens,
        "padding_fraction": result.padding_fraction,
        "sample_ids": result.ids,
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
