"""train.py's work: data, model, loop, checkpoints, validation, final evaluation. Nothing below reads the configuration."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from instructblip.build import build_model, check_frozen, choose_device, frozen_fingerprints, restore_trainable
from instructblip.config import (
    LLMConfig,
    PhaseConfig,
    TrainConfig,
    check_at_least,
    differences,
    read_config,
    to_dict,
    to_yaml,
)
from instructblip.data.batching import BATCHINGS, Batch, Batching, Length
from instructblip.data.cards import Card, load_card
from instructblip.data.loader import MixtureDataset, TrainingSet, load_batches
from instructblip.data.mixture import Mixture, MixtureEntry, share_table
from instructblip.data.shards import open_split
from instructblip.data.templates import load_templates
from instructblip.errors import UserError
from instructblip.evaluation.protocol import Task, make_task
from instructblip.evaluation.runner import ReadImage, read_pixels, run_task
from instructblip.evaluation.suite import cached_images, evaluate_tasks, feature_cache, finish_evaluation
from instructblip.files import write_atomically
from instructblip.model.instructblip import InstructBLIP
from instructblip.model.vision import ChannelNorm
from instructblip.prepared import ensure_prepared
from instructblip.training.checkpoint import (
    LoadedCheckpoint,
    checkpoint_folders,
    load_checkpoint,
    newest_whole,
    optimizer_tensors,
    remove_unfinished,
    restore_optimizer,
    save_checkpoint,
)
from instructblip.training.loggers import Logger, make_logger
from instructblip.training.loop import (
    Phase,
    Place,
    StepResult,
    log_entry,
    rank_positions,
    run_steps,
    step_batching,
    total_steps,
)
from instructblip.training.meters import MetricsLog, StepTimer, TrainingProgress, draw_curves, training_progress
from instructblip.training.optim import make_adamw
from instructblip.training.signals import StopRequest
from instructblip.weights.assets import cache_folder

_CALIBRATION_IMAGES = 256
_EVALUATION_BATCH = 32
# Settings that a resumed run may change: they decide how a run is carried out, not what it computes.
_FREE_ON_RESUME = (
    "resume",
    "device",
    "output",
    "logger",
    "data.workers",
    "recipe.keep_checkpoints",
    "recipe.final_samples",
)


@dataclass
class TrainingRun:
    """Everything the steps of one run share."""

    config: TrainConfig
    folder: Path
    console: Console
    model: InstructBLIP
    optimizer: torch.optim.Optimizer
    names: dict[Tensor, str]
    phases: list[Phase]
    mixture: Mixture
    dataset: MixtureDataset
    validation: list[Task]
    final: list[Task]
    read_image: ReadImage
    frozen: dict[str, str]
    metrics: MetricsLog
    logger: Logger


def train(config: TrainConfig, console: Console) -> int:
    """Run train.py with a validated configuration; return the exit status (0, or 128 + signal when told to stop).

    Raises:
        UserError: anything the user can mend: configuration, missing parts or data, another run in the folder, disk full.
    """
    _check_numbers(config)
    folder = Path(config.output) / config.name
    checkpoint = _find_checkpoint(config, folder, console)
    if checkpoint:
        _check_unchanged(config, folder)
    run = _set_up(config, folder, console)
    write_atomically(folder / "config.yaml", to_yaml(config))
    start = _restore(run, checkpoint) if checkpoint else 0
    run.metrics.truncate_after(start)
    console.print(_share_table(run.mixture, run.phases))
    with StopRequest() as stop:
        done = _train_steps(run, start, stop)
    if done < total_steps(run.phases):
        run.logger.finish()
        console.print(f"stopped at step {done}; run the same command with resume=auto to go on", soft_wrap=True)
        return stop.exit_code
    console.print(_realised_table(run))
    _finish(run)
    return 0


def _check_numbers(config: TrainConfig) -> None:
    recipe = config.recipe
    counts: dict[str, int | None] = {
        "recipe.checkpoint_every": recipe.checkpoint_every,
        "recipe.keep_checkpoints": recipe.keep_checkpoints,
        "recipe.validate_every": recipe.validate_every,
        "recipe.validation_samples": recipe.validation_samples,
        "recipe.final_samples": recipe.final_samples,
    }
    for number, phase in enumerate(recipe.phases):
        for name in ("steps", "batch_size", "micro_batch_size", "micro_batch_tokens"):
            counts[f"recipe.phases.{number}.{name}"] = getattr(phase, name)
        _check_batching(f"recipe.phases.{number}", phase, config.llm)
    check_at_least(1, counts)
    check_at_least(0, {"data.workers": config.data.workers})
    if not recipe.phases:
        raise UserError("recipe.phases is empty; give at least one phase")
    if len(recipe.betas) != 2 or not all(0 <= beta < 1 for beta in recipe.betas):
        raise UserError(f"recipe.betas={recipe.betas} must be two numbers from 0 to below 1, such as [0.9, 0.999]")


def _check_batching(key: str, phase: PhaseConfig, llm: LLMConfig) -> None:
    if phase.batching not in BATCHINGS:
        raise UserError(f"{key}.batching={phase.batching} is none of {', '.join(BATCHINGS)}")
    if phase.batching == "fixed" and phase.micro_batch_tokens is not None:
        raise UserError(f"{key}.micro_batch_tokens limits no fixed batches; set {key}.batching=bucketed or packed")
    if phase.batching == "packed" and llm.kind != "decoder":
        raise UserError(f"{key}.batching=packed needs a decoder-only LLM, llm={llm.name} is none; set it to bucketed")
    if phase.batching == "packed" and not phase.through_llm:
        raise UserError(f"{key}.batching=packed packs rows of the LLM, which the phase leaves out; set it to fixed")


def _find_checkpoint(config: TrainConfig, folder: Path, console: Console) -> LoadedCheckpoint | None:
    if config.resume not in (None, "auto"):
        raise UserError(f"resume={config.resume} is not known; use resume=auto, or leave it out for a new run")
    existing = checkpoint_folders(folder / "checkpoints")
    if config.resume is None and existing:
        raise UserError(
            f"{folder} already holds a run (newest checkpoint {existing[0].name}); "
            "continue it with resume=auto, or choose another name="
        )
    remove_unfinished(folder / "checkpoints")
    if config.resume is None:
        return None
    newest, complaints = newest_whole(folder / "checkpoints")
    for line in complaints:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if newest is None:
        console.print(f"{folder} has no whole checkpoint yet; starting from the beginning", soft_wrap=True)
        return None
    return load_checkpoint(newest)


def _check_unchanged(config: TrainConfig, folder: Path) -> None:
    begun = read_config(folder / "config.yaml", TrainConfig)
    changed = differences(to_dict(begun), to_dict(config), ignore=_FREE_ON_RESUME)
    if changed:
        raise UserError(
            f"{folder} was begun with another configuration ({'; '.join(changed)}); "
            "undo the change, or choose another name= for a new run"
        )


def _set_up(config: TrainConfig, folder: Path, console: Console) -> TrainingRun:
    shards = Path(config.data.shards)
    cards = {entry.name: load_card(entry.name) for entry in config.mixture.datasets}
    held_in = [load_card(name) for name in config.suite.held_in]
    held_out = [load_card(name) for name in config.suite.held_out]
    for card in cards.values():
        if card.role == "held-out":
            raise UserError(f"mixture {config.mixture.name} trains on {card.name}, which is held out; remove it")
    ensure_prepared([*cards.values(), *held_in, *held_out], shards, config.data.sources, console)
    model = build_model(config.vision, config.qformer, config.llm, seed=config.seed).to(choose_device(config.device))
    sets = [_training_set(card, shards) for card in cards.values()]
    mixture = _make_mixture(config, sets)
    validation = [
        make_task(card, shards, split="validation", samples=config.recipe.validation_samples) for card in held_in
    ]
    final = [make_task(card, shards, samples=config.recipe.final_samples) for card in (*held_in, *held_out)]
    read_image = _images(config, model, sets, [*validation, *final])
    dataset = MixtureDataset(mixture, sets, read_image)
    if isinstance(model.vision_norm, ChannelNorm):
        _calibrate(model, model.vision_norm, dataset)
    return TrainingRun(
        config=config,
        folder=folder,
        console=console,
        model=model,
        optimizer=make_adamw(
            model.named_parameters(),
            weight_decay=config.recipe.weight_decay,
            betas=config.recipe.betas,
        ),
        names={parameter: name for name, parameter in model.named_parameters()},
        phases=_phases(config, model.sample_length()),
        mixture=mixture,
        dataset=dataset,
        validation=validation,
        final=final,
        read_image=read_image,
        frozen=frozen_fingerprints(model),
        metrics=MetricsLog(folder / "metrics.jsonl"),
        logger=make_logger(
            config.logger.kind,
            mode=config.logger.mode,
            project=config.logger.project,
            name=config.name,
            folder=folder,
            config=to_dict(config),
        ),
    )


def _training_set(card: Card, shards: Path) -> TrainingSet:
    if card.templates is None:
        raise UserError(f"card {card.name} names no templates and cannot be trained on")
    split = open_split(shards / card.source / "train")
    return TrainingSet(card.name, split, split.records(card.kinds), load_templates(card.templates))


def _make_mixture(config: TrainConfig, sets: Sequence[TrainingSet]) -> Mixture:
    multipliers = {entry.name: entry.multiplier for entry in config.mixture.datasets}
    entries = [MixtureEntry(item.name, len(item.locations), multipliers[item.name]) for item in sets]
    try:
        return Mixture(entries, weighting=config.mixture.weights, seed=config.seed)
    except ValueError as error:
        raise UserError(f"mixture {config.mixture.name}: {error}") from None


def _images(config: TrainConfig, model: InstructBLIP, sets: Sequence[TrainingSet], tasks: Sequence[Task]) -> ReadImage:
    if not config.data.cache_features:
        return read_pixels(model.vision.image_size)
    shards = {shard.tar_sha256: shard for item in sets for shard in item.split.shards}
    shards |= {sample.shard.tar_sha256: sample.shard for task in tasks for sample in task.samples}
    cache = feature_cache(model, cache_folder() / "features")
    return cached_images(model, cache, list(shards.values()), "encoding images once")


def _calibrate(model: InstructBLIP, norm: ChannelNorm, dataset: MixtureDataset) -> None:
    """Measure the channel statistics on the images of the run's first draws, whatever rank asks."""
    images = torch.stack([dataset[position][1] for position in range(_CALIBRATION_IMAGES)])
    norm.calibrate(model.image_tokens(images).flatten(0, 1))


def _phases(config: TrainConfig, sample_length: Length) -> list[Phase]:
    return [
        Phase(
            name=phase.name,
            steps=phase.steps,
            batch_size=phase.batch_size,
            batching=Batching(
                kind=phase.batching,
                micro_batch_size=phase.micro_batch_size,
                micro_batch_tokens=phase.micro_batch_tokens,
                length=sample_length,
            ),
            learning_rate=phase.learning_rate,
            warmup_steps=phase.warmup_steps,
            warmup_learning_rate=phase.warmup_learning_rate,
            final_learning_rate=phase.final_learning_rate,
            new_parts_scale=phase.new_parts_scale,
            through_llm=phase.through_llm,
        )
        for phase in config.recipe.phases
    ]


def _restore(run: TrainingRun, checkpoint: LoadedCheckpoint) -> int:
    check_frozen(run.model, checkpoint.state["frozen"], checkpoint.path)
    restore_trainable(run.model, checkpoint.model, checkpoint.path)
    restore_optimizer(run.optimizer, run.names, checkpoint.path)
    run.console.print(f"continuing {checkpoint.path} after step {checkpoint.step}", highlight=False, soft_wrap=True)
    return checkpoint.step


def _train_steps(run: TrainingRun, start: int, stop: StopRequest) -> int:
    recipe, steps = run.config.recipe, total_steps(run.phases)
    batches = load_batches(
        run.dataset,
        rank_positions(run.phases, start),
        batching=partial(step_batching, run.phases),
        workers=run.config.data.workers,
    )
    timer = StepTimer()
    timer.start()
    with training_progress(f"training {run.config.name}", steps, first_step=start) as progress:

        def after_step(step: int, place: Place, rate: float, result: StepResult) -> bool:
            done = step + 1
            timer.step(result.samples, result.tokens)
            entry = log_entry(step, place, rate, result, _speed(timer))
            # Alignment does not teach the LLM's layers to listen: its answers would say nothing yet.
            if place.phase.through_llm and done % recipe.validate_every == 0 and done < steps:
                entry["validation"] = _validate(run, progress, done)
                timer.start()
            run.metrics.append(entry)
            run.logger.log({key: value for key, value in entry.items() if key != "sample_ids"}, done)
            progress.update(done, result.loss, timer.samples_per_second)
            stopping = stop.received is not None
            if done % recipe.checkpoint_every == 0 or done == steps or stopping:
                _save(run, done)
                timer.start()
            return stopping

        return run_steps(
            run.model,
            run.optimizer,
            run.phases,
            _timed(batches, timer),
            start_step=start,
            seed=run.config.seed,
            clip_norm=recipe.clip_norm,
            after_step=after_step,
        )


def _timed(batches: Iterator[tuple[int, list[Batch]]], timer: StepTimer) -> Iterator[tuple[int, list[Batch]]]:
    while True:
        with timer.waiting():
            item = next(batches, None)
        if item is None:
            return
        yield item


def _speed(timer: StepTimer) -> dict[str, float]:
    return {
        "samples_per_second": timer.samples_per_second,
        "tokens_per_second": timer.tokens_per_second,
        "data_wait_fraction": timer.data_wait_fraction,
    }


def _validate(run: TrainingRun, progress: TrainingProgress, step: int) -> dict[str, float]:
    scores = {}
    for task in run.validation:
        result = run_task(run.model, task, run.read_image, batch_size=_EVALUATION_BATCH, show_progress=False)
        scores[task.card.name] = result.value
    shown = ", ".join(f"{name} {value:.1f}" for name, value in scores.items())
    progress.say(f"step {step}: validation accuracy {shown}")
    return scores


def _save(run: TrainingRun, step: int) -> None:
    save_checkpoint(
        run.folder / "checkpoints",
        step=step,
        model=run.model.trainable_state(),
        optimizer=optimizer_tensors(run.optimizer, run.names),
        state={"frozen": run.frozen, "seed": run.config.seed},
        keep=run.config.recipe.keep_checkpoints,
    )


def _finish(run: TrainingRun) -> None:
    run.metrics.close()
    draw_curves(run.folder / "metrics.jsonl", run.folder / "curves.png", run.config.name)
    results = evaluate_tasks(
        run.model,
        run.final,
        run.read_image,
        shards=Path(run.config.data.shards),
        folder=run.folder / "evaluation",
        batch_size=_EVALUATION_BATCH,
        blind=True,
    )
    newest = checkpoint_folders(run.folder / "checkpoints")[0]
    finish_evaluation(
        run.model,
        results,
        run.folder / "evaluation",
        title=f"{run.config.name}: what was learned",
        checkpoint=str(newest),
        step=total_steps(run.phases),
        examples=60,
        console=run.console,
    )
    scores = {item.result.task.card.name: item.result.value for item in results}
    run.logger.log({"test": scores}, total_steps(run.phases))
    run.logger.finish()
    for path in ("config.yaml", "metrics.jsonl", "curves.png"):
        run.console.print(f"wrote {run.folder / path}", highlight=False, soft_wrap=True)
    run.console.print(f"wrote {newest}", highlight=False, soft_wrap=True)


def _share_table(mixture: Mixture, phases: Sequence[Phase]) -> Table:
    samples = sum(phase.steps * phase.batch_size for phase in phases)
    table = Table(title=f"{samples:,} samples in {total_steps(phases):,} steps")
    table.add_column("dataset")
    for name in ("records", "multiplier", "share %", "samples", "epochs"):
        table.add_column(name, justify="right")
    for row in share_table(mixture, samples):
        table.add_row(
            str(row["dataset"]),
            f"{row['records']:,}",
            f"{row['multiplier']:g}",
            f"{100 * float(row['share']):.1f}",
            f"{float(row['samples']):,.0f}",
            f"{row['epochs']:.2f}",
        )
    return table


def _realised_table(run: TrainingRun) -> Table:
    samples = sum(phase.steps * phase.batch_size for phase in run.phases)
    drawn = np.bincount(
        [run.mixture.draw(position).dataset for position in range(samples)], minlength=len(run.mixture.entries)
    )
    table = Table(title="shares, planned and realised")
    table.add_column("dataset")
    for name in ("planned %", "realised %", "samples"):
        table.add_column(name, justify="right")
    for entry, share, count in zip(run.mixture.entries, run.mixture.shares, drawn, strict=True):
        table.add_row(entry.name, f"{100 * share:.2f}", f"{100 * count / samples:.2f}", f"{count:,}")
    return table
