"""train.py's work: set up, steps, checkpoints, validation, final evaluation. Nothing below reads the configuration."""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from instructblip.config import entry
from instructblip.config.checks import check_batches
from instructblip.config.entry import Outcome
from instructblip.config.schema import TrainConfig
from instructblip.config.validate import differences, read_config, to_dict, to_yaml, unknown_key, valid_keys
from instructblip.data.batching import Batch
from instructblip.data.loader import LoadedStep, load_batches
from instructblip.data.lost import LostSample
from instructblip.distributed import Ranks, choose_device, start_ranks, whole_tensors
from instructblip.errors import UserError
from instructblip.files import write_atomically
from instructblip.models.fingerprint import fingerprint_tensors
from instructblip.progress import TrainingProgress, training_progress
from instructblip.training.checks import check_objectives
from instructblip.training.loop import StepResult, log_entry, run_steps, traced_steps, what_is_not_finite
from instructblip.training.plan.tables import plan_summary, plan_table, shares_planned, shares_realised
from instructblip.training.schedule import StepPosition, locate, rank_positions, step_batching, total_steps
from instructblip.training.setup import TrainingRun, make_optimisation, make_plan, set_up
from instructblip.training.signals import Stopped, StopRequest
from instructblip.training.timer import StepTimer, peak_memory
from instructblip.training.validation import clear_stop_file, finish, run_validation
from instructblip.weights.checkpoint import (
    LoadedCheckpoint,
    checkpoint_folders,
    load_checkpoint,
    newest_whole,
    optimizer_tensors,
    remove_unfinished,
    restore_optimizer,
)
from instructblip.weights.load import check_frozen, restore_trainable

_SAVE_FAILED = 255  # instead of a signal's number: rank 0 could not write a checkpoint
# Settings that a resumed run may change: they decide how a run is carried out, not what it computes.
_FREE_ON_RESUME = (
    "resume",
    "resume_allow",
    "device",
    "output",
    "logger",
    "parallel",
    "evaluation",
    "profile_step",
    "plan",
    "plan_gpu",
    "plan_gpus",
    "plan_mfu",
    "llm.sizes",
    "qformer.sizes",
    "data.workers",
    "data.tolerance",
    "data.remote_cache_bytes",
    "recipe.keep_checkpoints",
    "recipe.keep_best",
    "recipe.full_disk",
    "recipe.final_samples",
)
# How a batch is cut, where the loss is a mean over all of it.
_FREE_IN_PHASES = ("batching", "micro_batch_size", "micro_batch_tokens")


def main() -> None:
    """The command: `train.py` and `instructblip-train`."""
    entry.main("train", TrainConfig, train)


def train(config: TrainConfig, console: Console) -> Outcome:
    """Run train.py with a validated configuration; the exit status is 0, or 128 + signal when told to stop.

    The score is the run's best validation where recipe.keep_best says of what, else the mean of its last one.

    With `plan` only what the run would need is printed, by the first of torchrun's processes; 1 when it does not fit.

    Raises:
        UserError: anything the user can mend: configuration, missing parts or data, another run in the folder, disk full.
    """
    check_objectives(config.recipe)
    if config.plan:
        return Outcome(_print_plan(config, console))
    device = choose_device(config.device)
    with StopRequest() as stop, start_ranks(device, config.parallel.timeout) as ranks:
        check_batches(config.recipe.phases, ranks.world_size)
        with _silent(ranks):
            return _train(config, ranks, stop, console if ranks.is_first else Console(quiet=True))


def _print_plan(config: TrainConfig, console: Console) -> int:
    plan = make_plan(config)
    if Ranks.from_environment().is_first:
        console.print(plan_table(plan, config.name))
        for line in plan_summary(plan):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0 if plan.fits else 1


@contextlib.contextmanager
def _silent(ranks: Ranks) -> Iterator[None]:
    """Ranks other than the first print errors only."""
    if ranks.is_first:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _train(config: TrainConfig, ranks: Ranks, stop: StopRequest, console: Console) -> Outcome:
    folder = Path(config.output) / config.name
    try:
        with stop.at_once():
            checkpoint = _find_checkpoint(config, folder, ranks, console)
            if checkpoint:
                _check_unchanged(config, folder, console)
            run = set_up(config, folder, ranks, console)
    except Stopped:
        console.print("stopped before the first step; run the same command again to begin", soft_wrap=True)
        return Outcome(stop.exit_code)
    start = _restore(run, checkpoint) if checkpoint else 0
    clear_stop_file(run)
    _check_equal(run)
    run.optimisation = make_optimisation(run, partial(_stop_signal, run, stop))
    if checkpoint:
        _restore_optimisation(run, checkpoint)
    unvalidated = checkpoint.state.get("unvalidated") if checkpoint else None
    if ranks.is_first:
        write_atomically(folder / "config.yaml", to_yaml(config))
        run.metrics.truncate_after(start if unvalidated is None else start - 1)  # whose line is to be written anew
    console.print(shares_planned(run.mixture, run.phases))
    done = _train_steps(run, start, stop, unvalidated)
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
        _find_best(run, total_steps(run.phases))
        return run.ranks.gather(run.best.score)[0]
    return run.best.score


def _stopped(run: TrainingRun, stop: StopRequest, done: int) -> Outcome:
    run.writer.wait()
    run.metrics.close()
    run.logger.finish()
    run.console.print(f"stopped at step {done}; run the same command with resume=auto to go on", soft_wrap=True)
    return Outcome(stop.exit_code)


# --- resuming --------------------------------------------------------------------------------------------------------


def _find_checkpoint(config: TrainConfig, folder: Path, ranks: Ranks, console: Console) -> LoadedCheckpoint | None:
    """The checkpoint that the run goes on from, which the first rank chooses for all."""
    existing = checkpoint_folders(folder / "checkpoints")
    if config.resume is None and existing:
        raise UserError(
            f"{folder} already holds a run (newest checkpoint {existing[0].name}); "
            "continue it with resume=auto, or choose another name="
        )
    chosen = None
    if ranks.is_first:
        remove_unfinished(folder / "checkpoints")
        if config.resume is not None:
            newest, complaints = newest_whole(folder / "checkpoints")
            for line in complaints:
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            chosen = None if newest is None else str(newest)
    chosen = ranks.gather(chosen)[0]
    if chosen is not None:
        return load_checkpoint(Path(chosen))
    if config.resume is not None:
        console.print(f"{folder} has no whole checkpoint yet; starting from the beginning", soft_wrap=True)
    return None


def _check_unchanged(config: TrainConfig, folder: Path, console: Console) -> None:
    for key in config.resume_allow:
        if key not in (known := valid_keys(TrainConfig)):
            raise UserError(f"resume_allow: {unknown_key(key, known)}")
    begun = read_config(folder / "config.yaml", TrainConfig)
    cut = _FREE_IN_PHASES if config.recipe.loss_mean == "global" else ()
    free = (*_FREE_ON_RESUME, *(f"recipe.phases.{name}.{key}" for name in config.recipe.phases for key in cut))
    old, new = to_dict(begun), to_dict(config)
    refused = differences(old, new, ignore=(*free, *config.resume_allow))
    orders = [", ".join(recipe["phases"]) for recipe in (old["recipe"], new["recipe"])]
    if orders[0] != orders[1] and sorted(old["recipe"]["phases"]) == sorted(new["recipe"]["phases"]):
        refused.append(f"order of recipe.phases: {orders[0]} -> {orders[1]}")
    if refused:
        raise UserError(
            f"{folder} was begun with another configuration ({'; '.join(refused)}); undo the change, "
            "choose another name= for a new run, or allow it by name: resume_allow=[KEY]"
        )
    for line in differences(old, new, ignore=free):
        console.print(f"changed on resuming: {line}", markup=False, highlight=False, soft_wrap=True)


def _restore(run: TrainingRun, checkpoint: LoadedCheckpoint) -> int:
    check_frozen(run.model, checkpoint.state["frozen"], checkpoint.path)
    run.lost.restore(checkpoint.state["lost"])
    restore_trainable(run.model, checkpoint.model, checkpoint.path)
    if not run.best.restore(checkpoint.state.get("best")):
        _find_best(run, checkpoint.step)
    run.console.print(f"continuing {checkpoint.path} after step {checkpoint.step}", highlight=False, soft_wrap=True)
    return checkpoint.step


def _restore_optimisation(run: TrainingRun, checkpoint: LoadedCheckpoint) -> None:
    optimisation = run.optimisation
    restore_optimizer(optimisation.optimizer, optimisation.names, checkpoint.path)
    if optimisation.average:
        optimisation.average.restore(checkpoint.average or checkpoint.model)


def _find_best(run: TrainingRun, last: int) -> None:
    """Look for the best step up to the last that counts, where no checkpoint kept which it is."""
    if run.ranks.is_first:
        for entry in run.metrics.read():
            if entry["step"] <= last:
                run.best.see(entry)
    run.best.restore(run.ranks.gather(run.best.state())[0])


def _check_equal(run: TrainingRun) -> None:
    """Every rank starts from the same weights: other files, or another library, on one node would go unnoticed."""
    own = {"trained weights": fingerprint_tensors(run.model.held_state()), **run.frozen}
    for rank, other in enumerate(run.ranks.gather(own)):
        for part, value in own.items():
            if other[part] != value:
                raise UserError(
                    f"rank {rank} has other {part} than rank {run.ranks.rank}; give all nodes the same files"
                )


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
    )
    timer = StepTimer()
    with (
        training_progress(f"training {run.config.name}", steps, first_step=start, console=run.console) as progress,
        traced_steps(run.config.profile_step if run.ranks.is_first else None, run.folder, progress.say) as trace,
    ):

        def after_step(step: int, place: StepPosition, rate: float, result: StepResult) -> bool:
            done = step + 1
            if optimisation.average and not result.skipped:
                optimisation.average.update()
            if result.skipped:
                progress.say(f"step {done} is skipped: {what_is_not_finite(result)}")
            timer.step(result.samples, result.tokens, run.shape.total(result.work, runs_llm=place.phase.trains_answers))
            entry = log_entry(step, place, rate, result, _measures(timer, run))
            stop.stop_signal = result.stop_signal or None
            trace(done)
            # Alignment does not teach the LLM's layers to listen: its answers would say nothing yet.
            says_something = bool(run.validation and place.phase.trains_answers)
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
            _counted(run, _timed(batches, timer)),
            start_step=start,
            seed=run.config.seed,
            clip_norm=recipe.clip_norm,
            after_step=after_step,
            context=optimisation.context,
        )
    run.writer.wait()
    # None goes on while the first rank still writes: a launcher may end all processes with the first that ends.
    run.ranks.gather(None)
    return done


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
    for step, batches, lost in steps:
        of_ranks = run.ranks.gather(lost)
        if any(of_ranks):
            place = locate(run.phases, step)
            drawn = run.mixture.counts(place.position + place.phase.batch_size).tolist()
            names = [entry.name for entry in run.mixture.entries]
            run.lost.add([LostSample(*one) for rank in of_ranks for one in rank], dict(zip(names, drawn, strict=True)))
        yield step, batches


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
        state={"frozen": run.frozen, "seed": run.config.seed, "lost": run.lost.state(), "best": run.best.state()}
        | ({"unvalidated": unvalidated} if unvalidated else {}),
        spare=[] if run.best.step is None else [run.best.step],
    )
