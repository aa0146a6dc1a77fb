"""What the steps of a run share, put together from its configuration: data, model, optimiser, tasks, files."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from instructblip.config.checks import check_batches
from instructblip.config.schema import TrainConfig
from instructblip.config.validate import to_dict
from instructblip.data.batching import Batching, Length
from instructblip.data.cards import load_card
from instructblip.data.feature_cache import FeatureCache, ReadImage, cached_images, feature_cache
from instructblip.data.lost import LostSamples
from instructblip.data.mixture import Mixture
from instructblip.data.mixture_dataset import MixtureDataset, TrainingSet
from instructblip.data.prepare.command import shards_folder
from instructblip.distributed import Ranks, choose_device
from instructblip.evaluation.protocol import Task, make_task, make_validation_task
from instructblip.evaluation.runner import read_pixels
from instructblip.evaluation.suite import check_writes
from instructblip.fetch.parts import cache_folder
from instructblip.files import exclusive
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.vision import ChannelNorm
from instructblip.objectives import make_objectives
from instructblip.tracking import Logger, make_logger
from instructblip.training.datasets import make_images, make_mixture, mixture_cards, open_sets
from instructblip.training.metrics_log import BestStep, MetricsLog
from instructblip.training.optim import WeightAverage, make_adamw
from instructblip.training.parallel import PRECISIONS, StepContext, check_layout, is_sharded, parallelize
from instructblip.training.plan.flops import GPUS, ModelShape, device_peak, model_shape
from instructblip.training.plan.memory import Plan, PlanLayout, plan_run, planned_phases
from instructblip.training.schedule import Phase
from instructblip.training.writer import CheckpointWriter
from instructblip.weights.load import frozen_fingerprints
from instructblip.weights.modules import parts_without_weights, vision_encoder
from instructblip.weights.parts import build_model

_CALIBRATION_IMAGES = 256


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
    model: InstructBLIP
    phases: list[Phase]
    mixture: Mixture
    dataset: MixtureDataset
    lost: LostSamples
    validation: list[Task]
    final: list[Task]
    read_image: ReadImage
    frozen: dict[str, str]
    shape: ModelShape
    peak_flops: float  # of all processes' devices together
    metrics: MetricsLog
    best: BestStep
    logger: Logger
    writer: CheckpointWriter
    optimisation: Optimisation = field(init=False)


def make_plan(config: TrainConfig) -> Plan:
    """What the run needs on the GPUs that are planned with; nothing is opened or loaded.

    Raises:
        UserError: GPUs that the run cannot be laid over, or a part whose YAML states no sizes.
    """
    check_layout(config.parallel.kind, config.parallel.shard_size, gpus := _planned_gpus(config))
    check_batches(config.recipe.phases, gpus)
    layout = PlanLayout(
        gpu=GPUS[config.plan_gpu],
        gpus=gpus,
        mfu=config.plan_mfu,
        kind=config.parallel.kind,
        shard_size=config.parallel.shard_size,
        activation_checkpointing=config.parallel.activation_checkpointing,
        autocast=PRECISIONS[config.recipe.precision] is not None,
        average=config.recipe.average_decay is not None,
        quantization=config.llm.quantization,
        cached=config.data.cache_features,
        longest=(config.llm.max_prompt_tokens, config.llm.max_target_tokens),
        trained=frozenset(config.train.parts()),
    )
    return plan_run(parts_without_weights(config), planned_phases(config.recipe.phases), layout)


def _planned_gpus(config: TrainConfig) -> int:
    if config.plan_gpus is not None:
        return config.plan_gpus
    sizes = [phase.batch_size for phase in config.recipe.phases.values()]
    return 1 if config.parallel.kind == "single" else math.gcd(16, *sizes)


def set_up(config: TrainConfig, folder: Path, ranks: Ranks, console: Console) -> TrainingRun:
    """Fetch, prepare and build everything; nothing of the run's folder but wandb's is written.

    Raises:
        UserError: data or parts are missing and cannot be fetched, or do not fit together.
    """
    cards = mixture_cards(config.mixture)
    held_in = [load_card(name) for name in config.suite.held_in]
    held_out = [load_card(name) for name in config.suite.held_out]
    shards = shards_folder([*cards, *held_in, *held_out], config.data, console)
    model = build_model(config.vision, config.qformer, config.llm, seed=config.seed, trained=config.train.parts())
    _place(model, choose_device(config.device), without_llm=is_sharded(config.parallel.kind, ranks.world_size))
    sets = open_sets(cards, shards)
    mixture = make_mixture(config.mixture, sets, config.recipe.phases.values(), seed=config.seed)
    validation = [make_validation_task(card, shards, samples=config.recipe.validation_samples) for card in held_in]
    final = [make_task(card, shards, samples=config.recipe.final_samples) for card in (*held_in, *held_out)]
    check_writes(model, [*validation, *final])  # the first of them is run hours later
    cache = _feature_cache(config, model, sets, [*validation, *final])
    dataset = MixtureDataset(mixture, sets, make_images(config.data, model.vision.image_size, cache))
    if isinstance(model.vision_norm, ChannelNorm):
        _calibrate(model, model.vision_norm, dataset)
    return TrainingRun(
        config=config,
        folder=folder,
        shards=shards,
        console=console,
        ranks=ranks,
        model=model,
        phases=make_phases(config, model.sample_length(), packs=model.packs()),
        mixture=mixture,
        dataset=dataset,
        lost=LostSamples(
            fraction=config.data.tolerance.fraction,
            samples=config.data.tolerance.samples,
            say=partial(console.print, markup=False, highlight=False, soft_wrap=True),
        ),
        validation=validation,
        final=final,
        read_image=read_pixels(model.vision.image_size) if cache is None else cache.tokens,
        frozen=frozen_fingerprints(model),
        shape=_shape(config, model),
        peak_flops=ranks.world_size * _peak_flops(config, model, ranks),
        metrics=MetricsLog(folder / "metrics.jsonl"),
        best=BestStep(config.recipe.keep_best),
        logger=make_logger(
            config.logger.kind if ranks.is_first else "none",
            mode=config.logger.mode,
            project=config.logger.project,
            name=config.name,
            folder=folder,
            config=to_dict(config),
        ),
        writer=CheckpointWriter(folder / "checkpoints", config.recipe.keep_checkpoints),
    )


def make_optimisation(run: TrainingRun, stop_signal: Callable[[], int]) -> Optimisation:
    """Lay the model, its weights in place, over the processes, and make what follows its weights.

    Args:
        stop_signal: number of the signal that asked this process to stop, else 0.
    """
    model, recipe, parallel = run.model, run.config.recipe, run.config.parallel
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
        equal_passes=is_sharded(parallel.kind, run.ranks.world_size),
        skip_non_finite=recipe.non_finite == "skip",
        stop_signal=stop_signal,
    )
    return Optimisation(
        context=context,
        optimizer=make_adamw(
            model.named_parameters(), weight_decay=recipe.weight_decay, betas=recipe.betas, part_of=model.part_of
        ),
        names={parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad},
        average=None if recipe.average_decay is None else WeightAverage(model, recipe.average_decay),
    )


def _place(model: InstructBLIP, device: torch.device, *, without_llm: bool) -> None:
    """Move a built model to its device; where its language model is to be sharded that goes there block by block, later."""
    for part in model.children():
        if part is not model.llm or not without_llm:
            part.to(device)


def _feature_cache(
    config: TrainConfig, model: InstructBLIP, sets: Sequence[TrainingSet], tasks: Sequence[Task]
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


def _calibrate(model: InstructBLIP, norm: ChannelNorm, dataset: MixtureDataset) -> None:
    """Measure the channel statistics on the images of the run's first draws, whatever rank asks."""
    images = torch.stack([dataset[position][1] for position in range(_CALIBRATION_IMAGES)])
    norm.calibrate(model.image_tokens(images).flatten(0, 1))


def _shape(config: TrainConfig, model: InstructBLIP) -> ModelShape:
    with torch.device("meta"):
        vision = vision_encoder(config.vision)
    return model_shape(vision, model.qformer, model.projection, model.llm.model, model.trained_parts)


def _peak_flops(config: TrainConfig, model: InstructBLIP, ranks: Ranks) -> float:
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
            objectives=make_objectives(phase.objectives),
            plateau_steps=phase.plateau_steps,
            part_rates=dict(config.train.learning_rates.items()),
        )
        for name, phase in config.recipe.phases.items()
    ]
