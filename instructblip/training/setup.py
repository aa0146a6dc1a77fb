"""What the steps of a run share, put together from its configuration: data, model, optimiser, tasks, files."""

import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from instructblip.config.schema import TrainConfig
from instructblip.config.validate import to_dict
from instructblip.data.batching import Batching, Length
from instructblip.data.feature_cache import FeatureCache, ReadImage, cached_images, feature_cache
from instructblip.data.lost import LostSamples
from instructblip.data.mixture import Mixture
from instructblip.data.mixture_dataset import MixtureDataset, Texts, TrainingSet
from instructblip.data.stream_dataset import Readers, StreamDataset
from instructblip.data.streaming import StreamSet
from instructblip.distributed import Ranks, choose_device
from instructblip.evaluation.protocol import Task, make_task, make_validation_task, mode_in_training, refuse_unable
from instructblip.evaluation.results_file import NotEvaluated
from instructblip.evaluation.runner import read_pixels
from instructblip.evaluation.suite import check_writes
from instructblip.fetch.parts import cache_folder
from instructblip.files import exclusive, write_atomically
from instructblip.models.base import Model
from instructblip.models.blip import BLIP, BLIPVQA, BLIPCaption, BLIPRetrieval
from instructblip.models.blip2 import BLIP2
from instructblip.models.empty import empty_modules
from instructblip.models.facts import skills_of
from instructblip.models.fp8 import check_device
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llava import LLaVA
from instructblip.models.vision import ChannelNorm
from instructblip.objectives import ObjectiveSettings, make_objectives
from instructblip.objectives.language_modeling import Answering
from instructblip.tracking import Logger, Loggers, make_loggers
from instructblip.training.datasets import (
    Inputs,
    data_fingerprints,
    make_images,
    make_mixture,
    open_sets,
)
from instructblip.training.layout import PRECISIONS, is_sharded
from instructblip.training.metrics_log import BestStep, MetricsLog
from instructblip.training.optim import WeightAverage, layer_decay, make_adamw
from instructblip.training.parallel import StepContext, parallelize
from instructblip.training.plan.blip_flops import TextParts, blip_shape
from instructblip.training.plan.connector import connector_shape
from instructblip.training.plan.flops import ModelShape, adapter_shares, device_peak, model_shape
from instructblip.training.plan.parts import adapters_of
from instructblip.training.run_cards import RunCards, find_cards
from instructblip.training.schedule import Phase
from instructblip.training.skipped import SkippedSteps
from instructblip.training.start import begin_run
from instructblip.training.streams import open_streams
from instructblip.training.writer import CheckpointWriter
from instructblip.weights.checkpoint import LoadedCheckpoint, load_checkpoint, newest_whole
from instructblip.weights.init_from import VISION_NORM, Begun, differing_parts
from instructblip.weights.init_sources import save_text_branch
from instructblip.weights.load import (
    frozen_fingerprints,
    held_by,
    other_frozen,
    restore_model,
    tokenizer_fingerprints,
)
from instructblip.weights.modules import vision_encoder
from instructblip.weights.parts import build_model, model_class
from instructblip.weights.start import Start

_CALIBRATION_IMAGES = 256
_RUN_ID = re.compile(r"[0-9a-f]{8}")


@dataclass(frozen=True)
class Optimisation:
    """What follows the weights of a run.

    Attributes:
        context: how steps are carried out.
        optimizer: of what trains.
        names: of its parameters. Of what trains only: a hold on frozen weights would keep them whole beside their shards.
        average: moving average of what trains, or None.
    """

    context: StepContext
    optimizer: torch.optim.Optimizer
    names: dict[Tensor, str]
    average: WeightAverage | None


@dataclass
class TrainingRun:
    """Everything the steps of one run share; `optimisation` from when the weights lie where they stay."""

    config: TrainConfig
    folder: Path
    shards: Path
    console: Console
    ranks: Ranks
    model: Model
    phases: list[Phase]
    mixture: Mixture
    dataset: MixtureDataset | StreamDataset
    lost: LostSamples
    validation: list[Task]
    final: list[Task]
    absent: list[NotEvaluated]
    read_image: ReadImage
    start: Start
    frozen: dict[str, str]
    inputs: Inputs
    shape: ModelShape
    peak_flops: float  # of all processes' devices together
    metrics: MetricsLog
    best: BestStep
    skipped: SkippedSteps
    logger: Logger
    writer: CheckpointWriter
    optimisation: Optimisation = field(init=False)


def set_up(
    config: TrainConfig, folder: Path, ranks: Ranks, console: Console, checkpoint: LoadedCheckpoint | None = None
) -> tuple[TrainingRun, LoadedCheckpoint | None]:
    """Fetch, prepare and build everything, with the weights of a checkpoint where the run goes on from one.

    Of the run's folder nothing is written but trackers' files and a text branch that is kept for others.

    Returns:
        The run, and the checkpoint whose weights it has: the given one, or one before it with the same frozen weights.

    Raises:
        UserError: data, parts or weights to start from are missing and cannot be fetched, or do not fit together.
    """
    cards = find_cards(config, console)
    validation, final = _tasks(config, cards)
    model, begun, checkpoint, frozen = _weights(config, folder, ranks, console, checkpoint)
    check_writes(model, [*validation, *final])  # the first of them is run hours later
    _place(model, choose_device(config.device), without_llm=is_sharded(config.parallel.kind, ranks.world_size))
    sets, dataset, cache = _training_data(config, cards, model, ranks, [*validation, *final])
    if isinstance(model.vision_norm, ChannelNorm) and VISION_NORM in begun.start.new and not checkpoint:
        _calibrate(model, model.vision_norm, dataset)
    frozen |= frozen_fingerprints(model, model.PARTS.keys() - frozen.keys())
    _say(differing_parts(begun, frozen), console)
    inputs = {**data_fingerprints(sets, validation, cards.shards), "tokenizers": tokenizer_fingerprints(model)}
    run = TrainingRun(
        config=config,
        folder=folder,
        shards=cards.shards,
        console=console,
        ranks=ranks,
        model=model,
        phases=make_phases(config, model.sample_length(), packs=model.packs()),
        mixture=dataset.mixture,
        dataset=dataset,
        lost=LostSamples(
            fraction=config.data.tolerance.fraction,
            samples=config.data.tolerance.samples,
            say=lambda line: _say([line], console),
        ),
        validation=validation,
        final=final,
        absent=cards.absent,
        read_image=read_pixels(model.vision.image_size) if cache is None else cache.tokens,
        start=begun.start,
        frozen=frozen,
        inputs=inputs,
        shape=_shape(config, model),
        peak_flops=ranks.world_size * _peak_flops(config, model, ranks),
        metrics=MetricsLog(folder / "metrics.jsonl"),
        best=BestStep(cards.best_by, [task.card.name for task in validation if not task.metric.higher_is_better]),
        skipped=SkippedSteps(config.recipe.non_finite_limit),
        logger=_loggers(config, folder, checkpoint) if ranks.is_first else Loggers(),
        writer=CheckpointWriter(folder / "checkpoints", config.recipe.keep_checkpoints),
    )
    return run, checkpoint


def _training_data(
    config: TrainConfig, cards: RunCards, model: Model, ranks: Ranks, tasks: Sequence[Task]
) -> tuple[Sequence[TrainingSet] | Sequence[StreamSet], MixtureDataset | StreamDataset, FeatureCache | None]:
    """What a run reads: by index, perhaps with its images encoded once, or as a stream."""
    phases, named = config.recipe.phases.values(), config.mixture.templates
    texts = Texts(
        config.data.text_processor,
        config.reads_prefixes(),
        any(phase.objectives.get(Answering.name) for phase in phases),
        config.data.prompt_processor,
    )
    if config.data.stream:
        streams = open_streams(cards.trained, cards.shards, cards.foreign, named)
        mixture = make_mixture(config.mixture, streams, phases, seed=config.seed)
        images = make_images(config.data, model.vision.image_size, None)
        readers = Readers(ranks.rank, ranks.world_size, config.data.workers)
        return streams, StreamDataset(mixture, streams, images, texts, readers), None
    sets = open_sets(cards.trained, cards.shards, named)
    mixture = make_mixture(config.mixture, sets, phases, seed=config.seed)
    cache = _feature_cache(config, model, sets, tasks)
    return sets, MixtureDataset(mixture, sets, make_images(config.data, model.vision.image_size, cache), texts), cache


def _tasks(config: TrainConfig, cards: RunCards) -> tuple[list[Task], list[Task]]:
    """What is asked on the way, and at the end.

    Raises:
        UserError: something that cannot be asked of the model.
    """
    samples, final_samples = config.recipe.validation_samples, config.recipe.final_samples
    validation = [make_validation_task(card, cards.shards, samples=samples) for card in cards.watched]
    final = [make_task(card, cards.shards, samples=final_samples, mode=mode_in_training(card)) for card in cards.scored]
    refuse_unable([*validation, *final], skills_of(model_class(config).SKILLS, config), config.said())
    return validation, final


def make_optimisation(run: TrainingRun, stop_signal: Callable[[], int]) -> Optimisation:
    """Lay the model, its weights in place, over the processes, and make what follows its weights.

    Args:
        stop_signal: number of the signal that asked this process to stop, else 0.
    """
    model, recipe, parallel = run.model, run.config.recipe, run.config.parallel
    if parallel.packed_attention == "by_length" and model.packs():  # without, samples are bucketed, see make_phases
        model.attend_by_length()
    wrapped = parallelize(
        model,
        run.ranks,
        kind=parallel.kind,
        shard_size=parallel.shard_size,
        activation_checkpointing=parallel.activation_checkpointing,
        compile_blocks=parallel.compile,
        some_unused=not all(model.uses_every_weight(phase.outputs) for phase in run.phases),
    )
    context = StepContext(
        ranks=run.ranks,
        wrapped=wrapped,
        autocast=PRECISIONS[recipe.precision],
        micro_batch_means=recipe.loss_mean == "micro_batch",
        equal_passes=is_sharded(parallel.kind, run.ranks.world_size),
        skip_non_finite=recipe.non_finite == "skip",
        stop_signal=stop_signal,
    )
    return Optimisation(
        context=context,
        optimizer=make_adamw(
            model.named_parameters(),
            weight_decay=recipe.weight_decay,
            betas=recipe.betas,
            part_of=model.part_of,
            layer_scales=layer_decay(model, run.config.train.layer_decay),
        ),
        names={parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad},
        average=None if recipe.average_decay is None else WeightAverage(model, recipe.average_decay),
    )


class _Weights(NamedTuple):
    """The model on the CPU with its weights, where they come from, and fingerprints of what no checkpoint holds."""

    model: Model
    begun: Begun
    checkpoint: LoadedCheckpoint | None
    frozen: dict[str, str]


def _weights(
    config: TrainConfig, folder: Path, ranks: Ranks, console: Console, checkpoint: LoadedCheckpoint | None
) -> _Weights:
    """Build the model, with a checkpoint's weights or those that the run starts from."""
    model = build_model(config, trained=config.train.parts(config), adapters=adapters_of(config))
    if checkpoint:
        frozen = frozen_fingerprints(model, model.PARTS.keys() - model.held_parts - held_by(model, checkpoint))
        checkpoint = _with_same_frozen(model, frozen, checkpoint, folder, ranks, console)
        return _Weights(model, Begun(restore_model(model, checkpoint, frozen)), checkpoint, frozen)
    begun = begin_run(model, config)
    _say(begun.lines, console)
    if begun.text_branch and ranks.is_first:
        save_text_branch(folder, begun.text_branch)
    return _Weights(model, begun, None, {})


def _with_same_frozen(
    model: Model,
    frozen: Mapping[str, str],
    checkpoint: LoadedCheckpoint,
    folder: Path,
    ranks: Ranks,
    console: Console,
) -> LoadedCheckpoint:
    """The newest checkpoint that was trained beside the model's frozen weights; the given one where there is none."""
    held = model.held_parts | held_by(model, checkpoint)

    def other(state: Mapping[str, Any]) -> str | None:
        part = other_frozen(frozen, state["frozen"], held)
        return part and f"was trained with another frozen {part}"

    found, complaints = str(checkpoint.path), list[str]()
    if ranks.is_first and other(checkpoint.state):
        older, complaints = newest_whole(folder / "checkpoints", other)
        found, complaints = (found, []) if older is None else (str(older), complaints)
    found = ranks.gather(found)[0]
    _say(complaints, console)
    return checkpoint if Path(found) == checkpoint.path else load_checkpoint(Path(found))


def _say(lines: Sequence[str], console: Console) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _place(model: Model, device: torch.device, *, without_llm: bool) -> None:
    """Move a built model to its device; where its language model is to be sharded that goes there block by block, later."""
    check_device(model, device)
    left = set(model.PARTS.get("llm", ())) if without_llm else set()
    for name, part in model.named_children():
        if name not in left:
            part.to(device)
    for parameter in model.parameters(recurse=False):
        parameter.data = parameter.data.to(device)


def _feature_cache(
    config: TrainConfig, model: Model, sets: Sequence[TrainingSet], tasks: Sequence[Task]
) -> FeatureCache | None:
    """The image tokens of all that a run reads, encoded once; None where they are not kept."""
    if not config.data.cache_features:
        return None
    shards = {shard.tar_sha256: shard for item in sets for shard in item.split.shards}
    shards |= {sample.shard.tar_sha256: sample.shard for task in tasks for sample in task.samples}
    cache = feature_cache(model, cache_folder() / "features")
    with exclusive(cache.folder / "lock", "encoding images"):  # one rank does, for all on its node
        cached_images(model, cache, list(shards.values()), "encoding images once")
    return cache


def _calibrate(model: Model, norm: ChannelNorm, dataset: MixtureDataset | StreamDataset) -> None:
    """Measure the channel statistics on the images of the run's first draws, whatever rank asks."""
    images = torch.stack([image for _, image in dataset.first(_CALIBRATION_IMAGES).items])
    norm.calibrate(model.image_tokens(images).flatten(0, 1))


def _loggers(config: TrainConfig, folder: Path, checkpoint: LoadedCheckpoint | None) -> Loggers:
    unvalidated = checkpoint is not None and checkpoint.state.get("unvalidated") is not None  # whose line is made anew
    return make_loggers(
        config.logger.kind,
        mode=config.logger.mode,
        project=config.logger.project,
        name=config.name,
        folder=folder,
        config=to_dict(config),
        run_id=_tracked_as(folder, goes_on=config.resume is not None) if "wandb" in config.logger.kind else None,
        first_step=1 if checkpoint is None else checkpoint.step + (0 if unvalidated else 1),
    )


def _tracked_as(folder: Path, *, goes_on: bool) -> str:
    """The tracker's id of the run, the same after each restart; a run that begins anew in the folder gets another."""
    place = folder / "wandb/run_id"
    if goes_on and place.is_file() and _RUN_ID.fullmatch(found := place.read_text(errors="replace").strip()):
        return found
    made = secrets.token_hex(4)
    write_atomically(place, f"{made}\n")
    return made


def _shape(config: TrainConfig, model: Model) -> ModelShape:
    with empty_modules():
        vision = vision_encoder(config.vision)
    shares = adapter_shares({part: model.part_modules(part) for part in model.adapters})
    if isinstance(model, BLIP):
        return blip_shape(vision, text_parts(model), model.trained_parts, shares)
    if isinstance(model, LLaVA):
        return connector_shape(vision, model.vision_norm, model.connector, model.llm.model, model.trained_parts, shares)
    assert isinstance(model, InstructBLIP | BLIP2)
    llm = model.llm.model if isinstance(model, InstructBLIP) else None
    heads = [part for part in model.part_modules("qformer") if part not in (model.qformer, model.vision_norm)]
    return model_shape(vision, model.qformer, nn.ModuleList(heads), llm, model.trained_parts, shares)


def text_parts(model: BLIP) -> TextParts:
    """The text part of a built BLIP, as its FLOPs follow from it."""
    if isinstance(model, BLIPCaption):
        return TextParts(None, model.text_decoder, nn.ModuleDict(), len(model.caption_start()))
    if isinstance(model, BLIPVQA):
        return TextParts(model.text_encoder, model.text_decoder, nn.ModuleDict())
    assert isinstance(model, BLIPRetrieval)
    encoder, names = model.text_encoder, ("vision_projection", "text_projection", "matching_head")
    heads = nn.ModuleDict({name: getattr(model, name) for name in names})
    return TextParts(encoder, encoder if encoder.lm_head is not None else None, heads)


def _peak_flops(config: TrainConfig, model: Model, ranks: Ranks) -> float:
    """The first rank's figure, which alone is read."""
    dtype = PRECISIONS[config.recipe.precision] or torch.float32
    return device_peak(model.device, dtype) if ranks.is_first else math.inf


def make_phases(config: TrainConfig, sample_length: Length, *, packs: bool) -> list[Phase]:
    """The phases as configured; samples of a model that cannot pack are bucketed, so that no pass holds more than it may."""
    return [
        Phase(
            name=name,
            steps=phase.steps,
            batch_size=phase.batch_size,
            batching=Batching(
                kind="bucketed" if phase.batching == "packed" and not packs else phase.batching,
                micro_batch_size=phase.micro_batch_size,
                micro_batch_tokens=phase.micro_batch_tokens,
                length=sample_length,
            ),
            learning_rate=phase.learning_rate,
            warmup_steps=phase.warmup_steps,
            warmup_learning_rate=phase.warmup_learning_rate,
            final_learning_rate=phase.final_learning_rate,
            new_parts_scale=phase.new_parts_scale,
            objectives=make_objectives(
                phase.objectives,
                ObjectiveSettings(phase.gather, phase.soft_targets, phase.soft_targets_ramp, phase.negatives_among),
            ),
            plateau_steps=phase.plateau_steps,
            plateau_decay=phase.plateau_decay,
            part_rates=dict(config.train.learning_rates.items()),
        )
        for name, phase in config.recipe.phases.items()
    ]
