"""train.py's work: set up, steps, checkpoints, validation, final evaluation. Nothing below reads the configuration."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from instructblip.config.checks import check_batches
from instructblip.config.entry import Outcome, job_number
from instructblip.config.schema import TrainConfig
from instructblip.config.validate import to_yaml
from instructblip.data.batching import Batch
from instructblip.data.loader import LoadedStep, load_batches
from instructblip.data.lost import LostSample
from instructblip.data.stream_dataset import StreamDataset
from instructblip.distributed import Ranks, choose_device, start_ranks, whole_tensors
from instructblip.files import claimed_folder, write_atomically
from instructblip.progress import TrainingProgress, training_progress
from instructblip.training.ahead import Ahead
from instructblip.training.budget import matched
from instructblip.training.checks import check_objectives
from instructblip.training.loop import TRACED_STEPS, log_entry, run_steps, traced_steps
from instructblip.training.metrics_log import finite
from instructblip.training.reading import StepResult, what_is_not_finite
from instructblip.training.resume import (
    check_configuration,
    check_equal,
    find_best,
    find_checkpoint,
    restore,
    restore_optimisation,
)
from instructblip.training.run_cards import with_absolute_cards
from instructblip.training.schedule import StepPosition, locate, rank_positions, step_batching, total_steps
from instructblip.training.setup import TrainingRun, make_optimisation, set_up
from instructblip.training.shares import shares_planned, shares_realised
from instructblip.training.signals import Stopped, StopRequest
from instructblip.training.timer import StepTimer, peak_memory
from instructblip.training.validation import clear_stop_file, finish, run_validation
from instructblip.weights.checkpoint import optimizer_tensors

_OF_THE_TIMEOUT = 0.9  # that data workers have: then a rank names its own, before the others say that the rank is lost
_SAVE_FAILED = 255  # instead of a signal's number: rank 0 could not write a checkpoint


def train(config: TrainConfig, console: Console) -> Outcome:
    """Run train.py with a validated configuration; the exit status is 0, or 128 + signal when told to stop.

    The score is the run's best validation where recipe.keep_best says of what, else the mean of its last one.

    Raises:
        UserError: anything the user can mend: configuration, missing parts or data, another run in the folder, disk full.
    """
    check_objectives(config)
    config, said = matched(with_absolute_cards(config))
    device, folder = choose_device(config.device), Path(config.output) / config.name
    with StopRequest() as stop, start_ranks(device, config.parallel.timeout, job=job_number()) as ranks:
        check_batches(config.recipe.phases, ranks.world_size)
        with claimed_folder(folder, "run", locked=ranks.is_first), _silent(ranks):
            speaker = console if ranks.is_first else Console(quiet=True)
            for line in said:
                speaker.print(line, markup=False, highlight=False, soft_wrap=True)
            return _train(config, folder, ranks, stop, speaker)


@contextlib.contextmanager
def _silent(ranks: Ranks) -> Iterator[None]:
    """Ranks other than the first print errors only."""
    if ranks.is_first:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8", errors="replace") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _train(config: TrainConfig, folder: Path, ranks: Ranks, stop: StopRequest, console: Console) -> Outcome:
    try:
        with stop.at_once():
            checkpoint = find_checkpoint(config, folder, ranks, console)
            if checkpoint:
                check_configuration(config, folder, console)
            run, checkpoint = set_up(config, folder, ranks, console, checkpoint)
    except Stopped:
        console.print("stopped before the first step; run the same command again to begin", soft_wrap=True)
        return Outcome(stop.exit_code)
    start = restore(run, checkpoint) if checkpoint else 0
    clear_stop_file(run)
    check_equal(run)
    run.optimisation = make_optimisation(run, partial(_stop_signal, run, stop))
    if checkpoint:
        restore_optimisation(run, checkpoint)
    unvalidated = checkpoint.state.get("unvalidated") if checkpoint else None
    if ranks.is_first:
        started = replace(config, init_sha256=[weights["sha256"] for weights in run.start.weights])
        write_atomically(folder / "config.yaml", to_yaml(started))
        run.metrics.truncate_after(start if unvalidated is None else start - 1)  # whose line is to be written anew
    console.print(shares_planned(run.mixture, run.phases))
    try:
        done = _train_steps(run, start, stop, unvalidated)
    finally:
        run.writer.settle()  # before the folder is let go
    if done < total_steps(run.phases) or stop.stop_signal:
        return _stopped(run, stop, done)
    console.print(shares_realised(run.mixture, run.phases, run.lost.counts))
    try:
        finish(run, stop)
    except Stopped:
        return _stopped(run, stop, done)
    return Outcome(score=_score(run))


def _score(run: TrainingRun) -> float | None:
    """What the run has reached, the same on all ranks."""
    if run.validation and run.best.score is None:  # of a run that was resumed after its last validation
        find_best(run, total_steps(run.phases))
        return run.ranks.gather(run.best.score)[0]
    return run.best.score


def _stopped(run: TrainingRun, stop: StopRequest, done: int) -> Outcome:
    run.writer.wait()
    run.metrics.close()
    run.logger.finish()
    run.console.print(f"stopped at step {done}; run the same command with resume=auto to go on", soft_wrap=True)
    return Outcome(stop.exit_code)


# --- steps -----------------------------------------------------------------------------------------------------------


def _stop_signal(run: TrainingRun, stop: StopRequest) -> int:
    ends = run.writer.failed and run.config.recipe.full_disk == "stop"
    return _SAVE_FAILED if ends else stop.received or 0


def _train_steps(run: TrainingRun, start: int, stop: StopRequest, unvalidated: dict[str, Any] | None) -> int:
    recipe, steps, optimisation = run.config.recipe, total_steps(run.phases), run.optimisation
    batches = load_batches(
        run.dataset,
        rank_positions(run.phases, start, rank=run.ranks.rank, world_size=run.ranks.world_size),
        batching=partial(step_batching, run.phases),
        workers=run.config.data.workers,
        timeout=_OF_THE_TIMEOUT * run.config.parallel.timeout,
    )
    timer = StepTimer()
    with (
        training_progress(f"training {run.config.name}", steps, first_step=start, console=run.console) as progress,
        traced_steps(
            run.config.profile_step if run.ranks.is_first else None, run.folder, progress.say, done=start
        ) as trace,
    ):

        def after_step(step: int, place: StepPosition, rate: float, result: StepResult) -> bool:
            done = step + 1
            if optimisation.average and not result.skipped:
                optimisation.average.update()
            if result.skipped:
                progress.say(f"step {done} is skipped: {what_is_not_finite(result)}")
                run.skipped.add(done)
            timer.step(
                result.samples, result.tokens, run.shape.total(result.work, place.phase.outputs | place.phase.copied)
            )
            entry = log_entry(step, place, rate, result, _measures(timer, run))
            stop.stop_signal = result.stop_signal or None
            trace(done)
            says_something = bool(run.validation and place.phase.is_validated)
            due = says_something and (done % recipe.validate_every == 0 or done == steps)
            stopping = not _record(run, progress, entry, stop, due=due) or stop.stop_signal is not None
            progress.update(done, result.loss, timer.samples_per_second)
            if done % recipe.checkpoint_every == 0 or done == steps or stopping or run.best.step == done:
                _save(run, done, unvalidated=entry if due and "validation" not in entry else None)
            timer.start()
            return stopping

        if unvalidated is not None and not _record(run, progress, unvalidated, stop, due=True):
            return start
        timer.start()
        done = run_steps(
            run.model,
            optimisation.optimizer,
            run.phases,
            _counted(run, _with_images(run, _timed(batches, timer))),
            start_step=start,
            seed=run.config.seed,
            clip_norm=recipe.clip_norm,
            after_step=after_step,
            read_after=_Reading(run, timer),
            context=optimisation.context,
        )
    run.writer.wait()
    # None goes on while the first rank still writes: a launcher may end all processes with the first that ends.
    run.ranks.gather(None)
    return done


class _Reading:
    """After which steps results are read: every `parallel.read_every`, and before what needs to know them."""

    def __init__(self, run: TrainingRun, timer: StepTimer) -> None:
        recipe, config = run.config.recipe, run.config
        self._each = (
            config.parallel.read_every == 1 or run.optimisation.average is not None
        )  # which follows step by step
        self._multiples = (config.parallel.read_every, recipe.checkpoint_every, recipe.validate_every)
        traced = [] if config.profile_step is None else [config.profile_step, config.profile_step + TRACED_STEPS]
        self._marks = {*traced, total_steps(run.phases)}
        self._timer, self._unread = timer, 0

    def __call__(self, done: int) -> bool:
        self._unread += 1
        if not (self._each or done in self._marks or any(done % steps == 0 for steps in self._multiples)):
            return False
        self._timer.together(self._unread)
        self._unread = 0
        return True


def _record(
    run: TrainingRun, progress: TrainingProgress, entry: dict[str, Any], stop: StopRequest, *, due: bool
) -> bool:
    """Log a step, after its validation if that is due; False when a signal ended the validation: nothing is logged."""
    if due:
        scores = run_validation(run, entry["step"], stop)
        if scores is None:
            return False
        shown = ", ".join(f"{name} {value:.1f}" for name, value in scores.items())
        progress.say(f"step {entry['step']}: validation {shown}")
        entry["validation"] = scores
    run.best.see(entry)
    if run.ranks.is_first:
        run.metrics.append(entry)
        run.logger.log({key: value for key, value in entry.items() if key != "sample_ids"}, entry["step"])
    return True


def _counted(run: TrainingRun, steps: Iterator[LoadedStep]) -> Iterator[tuple[int, list[Batch]]]:
    """Count what each step has lost, over all ranks."""
    for step, batches, lost, places in steps:
        if isinstance(run.dataset, StreamDataset) and places is not None:
            run.dataset.read_ahead(step, places)
        of_ranks = run.ranks.gather(lost)
        if any(of_ranks):
            place = locate(run.phases, step)
            drawn = run.mixture.counts(place.position + place.phase.batch_size).tolist()
            names = [entry.name for entry in run.mixture.entries]
            run.lost.add([LostSample(*one) for rank in of_ranks for one in rank], dict(zip(names, drawn, strict=True)))
        yield step, batches


def _with_images(run: TrainingRun, steps: Iterator[LoadedStep]) -> Iterator[LoadedStep]:
    """Those of the next step in the making, where that is asked for."""
    kind = run.config.parallel.ahead
    if kind == "none":
        return steps
    return Ahead(run.model, run.optimisation.context, encodes=kind == "vision").steps(steps)


def _timed(batches: Iterator[LoadedStep], timer: StepTimer) -> Iterator[LoadedStep]:
    while True:
        with timer.waiting():
            item = next(batches, None)
        if item is None:
            return
        yield item


def _measures(timer: StepTimer, run: TrainingRun) -> dict[str, float]:
    return {
        "samples_per_second": timer.samples_per_second,
        "tokens_per_second": timer.tokens_per_second,
        "mfu": timer.flops_per_second / run.peak_flops,
        "data_wait_fraction": timer.data_wait_fraction,
        "memory": peak_memory(run.model.device),
    }


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _save(run: TrainingRun, step: int, *, unvalidated: dict[str, Any] | None) -> None:
    # By all ranks: shards are put together by all, and what one does alone with a model laid over all can part them.
    first, optimisation = run.ranks.is_first, run.optimisation
    trainable = run.model.held_state()
    model = whole_tensors(trainable, keep=first)
    optimizer = whole_tensors(optimizer_tensors(optimisation.optimizer, optimisation.names), keep=first)
    averaged = optimisation.average.state(trainable) if optimisation.average else None
    average = None if averaged is None else whole_tensors(averaged, keep=first)
    streamed = _streamed(run, step)
    if not first:
        return
    problem = run.writer.problem()
    if problem and run.config.recipe.full_disk == "stop":
        raise problem
    if problem:
        run.console.print(f"{problem}; training goes on without it", markup=False, soft_wrap=True)
    run.writer.save(
        step,
        model=model,
        optimizer=optimizer,
        average=average,
        adapters=run.model.adapters,
        state={
            "frozen": run.frozen,
            "inputs": run.inputs,
            "start": run.start.to_json(),
            "untrained": run.start.untrained(run.model.full_parts),
            "seed": run.config.seed,
            "lost": run.lost.state(),
            "skipped": run.skipped.state(),
            "best": run.best.state(),
        }
        | ({"unvalidated": finite(unvalidated)} if unvalidated else {})
        | streamed,
        spare=[] if run.best.step is None else [run.best.step],
    )


def _streamed(run: TrainingRun, step: int) -> dict[str, Any]:
    """How far all ranks' readers have come; nothing of a run that reads by index."""
    if not isinstance(run.dataset, StreamDataset):
        return {}
    return {"stream": run.dataset.state(run.ranks.gather(run.dataset.places(step)))}
