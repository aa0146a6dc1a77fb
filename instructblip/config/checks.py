"""What well-typed settings must keep among each other: one verdict for every command, before anything is loaded."""

from typing import Any

from instructblip.config.schema import (
    DataConfig,
    EvaluateConfig,
    InspectConfig,
    MixtureConfig,
    PhaseConfig,
    PrepareConfig,
    QFormerConfig,
    TrainConfig,
)
from instructblip.config.validate import nearest
from instructblip.errors import UserError


def check(config: Any) -> None:
    """Refuse a validated configuration whose settings do not go together.

    Raises:
        UserError: names the keys, and what to set.
    """
    if isinstance(config, TrainConfig):
        _check_training(config)
    elif isinstance(config, EvaluateConfig):
        _check_evaluation(config)
    elif isinstance(config, PrepareConfig):
        _check_preparation(config)
    elif isinstance(config, InspectConfig):
        _check_inspection(config)


def check_search(config: Any, direction: str) -> None:
    """Refuse a search over settings that give no score.

    Raises:
        UserError: says what has one.
    """
    if not isinstance(config, TrainConfig):
        raise UserError("a search needs a score of each job, which train.py alone gives; sweep instead: -m KEY=A,B")
    if not config.suite.held_in:
        raise UserError("a search compares runs by their validation; name a dataset in suite.held_in")
    if direction != "maximize":
        raise UserError(
            f"a validation score is the better the higher it is, and hydra.sweeper.direction={direction} looks for the "
            "lowest; use hydra/sweeper=search, or set hydra.sweeper.direction=maximize"
        )


def check_batches(phases: dict[str, PhaseConfig], world_size: int) -> None:
    """Refuse a number of processes that a global batch does not divide among.

    Raises:
        UserError: names the phase.
    """
    for name, phase in phases.items():
        if phase.batch_size % world_size:
            raise UserError(
                f"recipe.phases.{name}.batch_size={phase.batch_size} does not divide among {world_size} processes; "
                "start another number of them"
            )


def _check_training(config: TrainConfig) -> None:
    recipe = config.recipe
    for name, phase in recipe.phases.items():
        _check_phase(f"recipe.phases.{name}", phase, config)
    _check_data(config.data)
    _check_mixture(config.mixture)
    for name, phase in recipe.phases.items():
        _check_groups(f"recipe.phases.{name} has", config.mixture, phase.batch_size, phase.micro_batch_size)
    _check_qformer(config.qformer)
    if recipe.keep_best is not None and recipe.keep_best not in ("mean", *config.suite.held_in):
        near = nearest(recipe.keep_best, ["mean", *config.suite.held_in])
        raise UserError(f"recipe.keep_best={recipe.keep_best} is no dataset of suite.held_in, nor mean{near}")
    _check_trained(config)
    if config.parallel.kind == "fsdp" and config.llm.quantization is not None:
        raise UserError(
            f"parallel=fsdp shards parameters, and the weights of an {config.llm.quantization} LLM are none; "
            "use parallel=ddp, or leave llm.quantization out"
        )


def _check_trained(config: TrainConfig) -> None:
    if not config.train.parts():
        raise UserError("train has no part that is full, so nothing would be learned; set train.qformer=full")
    if config.train.vision == "full" and config.data.cache_features:
        raise UserError(
            "data.cache_features=true keeps what a frozen vision encoder gives, and train.vision=full trains it; "
            "set data.cache_features=false"
        )
    if config.train.llm == "full" and config.llm.quantization is not None:
        raise UserError(
            f"train.llm=full trains weights, and those of an {config.llm.quantization} LLM are rounded; "
            "leave llm.quantization out"
        )


def _check_phase(key: str, phase: PhaseConfig, config: TrainConfig) -> None:
    if phase.batching == "fixed" and phase.micro_batch_tokens is not None:
        raise UserError(f"{key}.micro_batch_tokens limits no fixed batches; set {key}.batching=bucketed or packed")
    if phase.batching == "packed" and config.llm.kind != "decoder":
        raise UserError(
            f"{key}.batching=packed needs a decoder-only LLM, llm={config.llm.name} is none; set it to bucketed"
        )


def _check_mixture(config: MixtureConfig) -> None:
    if (config.temperature is not None) != (config.weights == "temperature"):
        raise UserError(
            f"mixture.weights={config.weights} {'takes no' if config.temperature else 'needs a'} mixture.temperature; "
            "set the two together, as mixture.weights=temperature mixture.temperature=2"
        )


def _check_groups(what_has: str, config: MixtureConfig, batch_size: int, micro_batch_size: int | None) -> None:
    """A micro-batch that comes from one dataset is a group of the mixture's draws: groups fill the batch."""
    if config.per == "batch" and batch_size % (micro_batch_size or batch_size):
        raise UserError(
            f"mixture.per=batch needs whole micro-batches, but {what_has} a batch_size of {batch_size} "
            f"and a micro_batch_size of {micro_batch_size}; change one of them"
        )


def _check_data(config: DataConfig) -> None:
    if config.cache_features and config.transform != "resize_square":
        drawn = "is not what it keeps" if config.transform == "center_crop" else "draws another view each time"
        raise UserError(
            f"data.cache_features=true keeps the tokens of squashed images, but data.transform={config.transform} {drawn}; "
            "set data.transform=resize_square, or data.cache_features=false"
        )


def _check_qformer(config: QFormerConfig) -> None:
    if config.query_init == "cls" and config.init != "bert":
        raise UserError(f"qformer.query_init=cls needs BERT's embeddings, which init={config.init} has not; use normal")


def _check_evaluation(config: EvaluateConfig) -> None:
    if not (*config.suite.held_in, *config.suite.held_out):
        raise UserError("there is nothing to evaluate; name a dataset in suite.held_in or suite.held_out")


def _check_preparation(config: PrepareConfig) -> None:
    tasks = [name for name in ("check", "show", "audit") if getattr(config, name) is not None]
    if len(tasks) > 1:
        raise UserError(f"{tasks[0]}= and {tasks[1]}= are different tasks; give one of them")


def _check_inspection(config: InspectConfig) -> None:
    _check_data(config.data)
    if config.data.cache_features:
        raise UserError("data.cache_features=true leaves nothing to decode; inspect with data.cache_features=false")
    _check_mixture(config.mixture)
    _check_groups("there is", config.mixture, config.batch_size, config.micro_batch_size)
