"""Evaluation while a run trains and when it ends, shared among its processes."""

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from instructblip.data.synthetic import NOTE
from instructblip.distributed import Ranks, whole_tensors
from instructblip.errors import UserError
from instructblip.evaluation.heartbeat import watched
from instructblip.evaluation.journal import forget_given_up
from instructblip.evaluation.report.content import tracked_samples
from instructblip.evaluation.results_file import NotEvaluated
from instructblip.evaluation.runner import answer_share, run_task
from instructblip.evaluation.suite import evaluate_tasks, finish_evaluation, log_scores, model_identity, refuse_failed
from instructblip.models.fingerprint import fingerprint_tensors
from instructblip.training.curves import draw_curves
from instructblip.training.layout import is_sharded
from instructblip.training.parallel import forget_gathered
from instructblip.training.schedule import total_steps
from instructblip.training.setup import TrainingRun
from instructblip.training.signals import Stopped, StopRequest
from instructblip.weights.checkpoint import checkpoint_folders
from instructblip.weights.load import frozen_parts
from instructblip.weights.start import Standing

_EVALUATION = "evaluation"  # folder of what a run scores at its end, below its own


def run_validation(run: TrainingRun, step: int, stop: StopRequest) -> dict[str, float] | None:
    """Scores by dataset after a step, the same on all ranks; None when one of them was told to stop before it was done."""
    scores: dict[str, float] = {}
    try:
        with _to_evaluate(run), _sharing(run, stop) as ranks, _stoppable(run, stop):
            scores = _validation_scores(run, step, ranks)
        ended = False
    except Stopped:
        ended = True
    # A signal may have reached some ranks only, and some of them after their last answer.
    reports = run.ranks.gather({"ended": ended, "signal": stop.received or 0, "scores": scores})
    stop.stop_signal = stop.stop_signal or max(report["signal"] for report in reports) or None
    if any(report["ended"] for report in reports):
        return None
    found: dict[str, float] = reports[0]["scores"]
    return found


def clear_stop_file(run: TrainingRun) -> None:
    """Before the ranks begin: what an earlier process of the run left."""
    if run.ranks.is_first and _stop_file(run).exists():
        _stop_file(run).unlink()


def _stoppable(run: TrainingRun, stop: StopRequest) -> contextlib.AbstractContextManager[None]:
    """Where a signal ends an evaluation at once, on all ranks.

    Not where blocks are sharded: all ranks gather them in step, none may leave before the others; see `_leave_together`.
    """
    return contextlib.nullcontext() if _is_sharded(run) else stop.at_once(_stop_file(run))


def _stop_file(run: TrainingRun) -> Path:
    return run.folder / "stopping"


def _validation_scores(run: TrainingRun, step: int, ranks: Ranks) -> dict[str, float]:
    """On the first rank, which puts the answers of all together; nothing is left on disk."""
    scores, home = {}, run.folder / "validation" / f"step_{step:08d}"
    together = ranks.world_size > 1
    identity = model_identity(run.model, run.frozen, _fingerprint(run)) if together else ""
    for task in run.validation:
        size = run.config.evaluation.batch_size
        asked: dict[str, Any] = {"batch_size": size, "model_fingerprint": identity, "ranks": ranks}
        if not ranks.is_first:
            answer_share(run.model, task, run.read_image, folder=home / task.card.name, **asked)
            continue
        folder = home / task.card.name if together else None
        result = run_task(run.model, task, run.read_image, folder=folder, show_progress=False, **asked)
        if result.value is not None:  # answers that only a leaderboard has
            scores[task.card.name] = result.value
        shown = tracked_samples(result, run.config.logger.samples)
        run.logger.log_samples(f"validation_samples/{task.card.name}", shown, step)
    if together and ranks.is_first:
        # A network file system keeps what another rank has not closed yet, and there may be no task.
        shutil.rmtree(home.parent, ignore_errors=True)
    return scores


def finish(run: TrainingRun, stop: StopRequest) -> None:
    """Draw the curves, evaluate what was learned, and name what the run wrote.

    Raises:
        Stopped: this process, or another that has a part in it, was told to stop.
        UserError: a dataset of the suite could not be evaluated; the others' results are written.
    """
    with _sharing(run, stop) as ranks, _stoppable(run, stop):
        failed = _finish(run, ranks)
    refuse_failed(failed, run.folder / _EVALUATION, "the same command with resume=auto")


def _finish(run: TrainingRun, ranks: Ranks) -> list[NotEvaluated]:
    run.metrics.close()
    if run.ranks.is_first:
        draw_curves(run.folder / "metrics.jsonl", run.folder / "curves.png", run.config.name)
    newest = checkpoint_folders(run.folder / "checkpoints")[:1]
    failed = _evaluate(run, newest[0], ranks) if newest and run.final else []
    run.logger.finish()
    if not newest or not newest[0].is_dir():
        raise UserError(f"{run.folder} was deleted while the run was writing to it; start again")
    for path in (*(run.folder / name for name in ("config.yaml", "metrics.jsonl", "curves.png")), *newest):
        run.console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return failed


def _evaluate(run: TrainingRun, checkpoint: Path, ranks: Ranks) -> list[NotEvaluated]:
    """Score what was learned; to the first rank, the datasets that failed."""
    folder = run.folder / _EVALUATION
    with tempfile.TemporaryDirectory() as elsewhere, _to_evaluate(run):
        if _is_sharded(run) and run.ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)  # what it keeps would leave this rank less to do than the others
        if run.ranks.is_first:
            forget_given_up(folder)
        run.ranks.gather(None)  # none answers before that
        weights: dict[str, Any] = {"frozen": run.frozen, "trained": _fingerprint(run)}
        results, failed = evaluate_tasks(
            run.model,
            run.final,
            run.read_image,
            shards=run.shards,
            folder=Path(elsewhere) if _is_sharded(run) and not run.ranks.is_first else folder,
            batch_size=run.config.evaluation.batch_size,
            blind=run.config.evaluation.blind_baseline,
            ranks=ranks,
            go_on=not _is_sharded(run),
            **weights,
        )
        if not run.ranks.is_first:
            return []
        finish_evaluation(
            run.model,
            results,
            folder,
            title=f"{run.config.name}: what was learned{NOTE if run.config.data.synthetic else ''}",
            checkpoint=str(checkpoint),
            step=total_steps(run.phases),
            parts=frozen_parts(run.config.vision, run.config.llm),
            **weights,
            standing=Standing(run.start, untrained=run.start.untrained(run.model.full_parts)),
            examples=run.config.evaluation.examples,
            console=run.console,
            not_evaluated=[*run.absent, *failed],
        )
    log_scores(run.logger, results, None, samples=run.config.logger.samples)
    return failed


def _fingerprint(run: TrainingRun) -> str:
    """Of what trains; all ranks call this. Where parts are sharded only the first has the whole, and it alone needs it."""
    keep = run.ranks.is_first or not _is_sharded(run)
    return fingerprint_tensors(whole_tensors(run.model.held_state(), keep=keep))


@contextlib.contextmanager
def _sharing(run: TrainingRun, stop: StopRequest) -> Iterator[Ranks]:
    """Who answers which share. Sharded blocks are gathered by all ranks in step, so all of them answer everything.

    It stands around `_stoppable`: that tells the others of a signal before this says that a rank has left.
    """
    if _is_sharded(run):
        yield Ranks(poll_stop=partial(_leave_together, run.ranks, stop))
        return
    with watched(run.folder, dataclasses.replace(run.ranks, poll_stop=stop.poll_stop)) as ranks:
        yield ranks


def _leave_together(ranks: Ranks, stop: StopRequest) -> None:
    """Raise `Stopped` on all ranks once one of them was told to stop; all call this at the same place."""
    if received := max(ranks.gather(stop.received or 0)):
        stop.stop_signal = received
        raise Stopped


def _is_sharded(run: TrainingRun) -> bool:
    return is_sharded(run.config.parallel.kind, run.ranks.world_size)


@contextlib.contextmanager
def _to_evaluate(run: TrainingRun) -> Iterator[None]:
    """The averaged weights in place, and no block compiled: with a cache each layer would be compiled by itself."""
    with contextlib.ExitStack() as stack:
        if run.config.parallel.compile:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if average := run.optimisation.average:
            stack.callback(forget_gathered, run.model)  # after the weights are back
            stack.enter_context(average.in_place())
            forget_gathered(run.model)
        yield
