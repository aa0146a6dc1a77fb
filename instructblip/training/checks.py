"""Settings that no run can have are refused before anything is loaded."""

import math

from instructblip.config.schema import LLMConfig, PhaseConfig, TrainConfig
from instructblip.config.validate import check_at_least
from instructblip.data.batching import BATCHINGS
from instructblip.errors import UserError
from instructblip.training.datasets import check_data
from instructblip.training.parallel import PRECISIONS


def check_numbers(config: TrainConfig) -> None:
    """Refuse settings that no run can have, before anything is loaded.

    Raises:
        UserError: names the key.
    """
    check_data(config.data)
    recipe = config.recipe
    counts: dict[str, int | None] = {
        "recipe.checkpoint_every": recipe.checkpoint_every,
        "recipe.keep_checkpoints": recipe.keep_checkpoints,
        "recipe.validate_every": recipe.validate_every,
        "recipe.validation_samples": recipe.validation_samples,
        "recipe.final_samples": recipe.final_samples,
        "parallel.shard_size": config.parallel.shard_size,
    }
    for number, phase in enumerate(recipe.phases):
        for name in ("steps", "batch_size", "micro_batch_size", "micro_batch_tokens", "plateau_steps"):
            counts[f"recipe.phases.{number}.{name}"] = getattr(phase, name)
        _check_batching(f"recipe.phases.{number}", phase, config.llm)
    check_at_least(1, counts)
    check_at_least(0, {"data.workers": config.data.workers, "profile_step": config.profile_step})
    _check_rates(config)
    _check_sharding(config)
    if not recipe.phases:
        raise UserError("recipe.phases is empty; give at least one phase")
    if len(recipe.betas) != 2 or not all(0 <= beta < 1 for beta in recipe.betas):
        raise UserError(f"recipe.betas={recipe.betas} must be two numbers from 0 to below 1, such as [0.9, 0.999]")
    if recipe.average_decay is not None and not 0 <= recipe.average_decay < 1:
        raise UserError(f"recipe.average_decay={recipe.average_decay} must be from 0 to below 1, such as 0.999")
    if recipe.keep_best not in (None, "mean", *config.suite.held_in):
        raise UserError(
            f"recipe.keep_best={recipe.keep_best} is no dataset of suite.held_in; name one of them, or mean"
        )
    choices = {
        "recipe.precision": (recipe.precision, PRECISIONS),
        "recipe.non_finite": (recipe.non_finite, ("stop", "skip")),
        "recipe.full_disk": (recipe.full_disk, ("stop", "continue")),
    }
    for key, (value, known) in choices.items():
        if value not in known:
            raise UserError(f"{key}={value} is none of {', '.join(known)}")


def _check_rates(config: TrainConfig) -> None:
    positive = {"recipe.clip_norm": config.recipe.clip_norm, "parallel.timeout": config.parallel.timeout}
    not_negative: dict[str, float] = {"recipe.weight_decay": config.recipe.weight_decay}
    for number, phase in enumerate(config.recipe.phases):
        key = f"recipe.phases.{number}"
        positive |= {f"{key}.learning_rate": phase.learning_rate, f"{key}.new_parts_scale": phase.new_parts_scale}
        for name in ("warmup_steps", "warmup_learning_rate", "final_learning_rate"):
            not_negative[f"{key}.{name}"] = getattr(phase, name)
    for key, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{key}={value} must be above 0")
    for key, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{key}={value} must not be below 0")


def _check_sharding(config: TrainConfig) -> None:
    if config.parallel.kind == "fsdp" and config.llm.quantization is not None:
        raise UserError(
            f"parallel=fsdp shards parameters, and the weights of an {config.llm.quantization} LLM are none; "
            "use parallel=ddp, or leave llm.quantization out"
        )


def _check_batching(key: str, phase: PhaseConfig, llm: LLMConfig) -> None:
    if phase.batching not in BATCHINGS:
        raise UserError(f"{key}.batching={phase.batching} is none of {', '.join(BATCHINGS)}")
    if phase.batching == "fixed" and phase.micro_batch_tokens is not None:
        raise UserError(f"{key}.micro_batch_tokens limits no fixed batches; set {key}.batching=bucketed or packed")
    if phase.batching == "packed" and llm.kind != "decoder":
        raise UserError(f"{key}.batching=packed needs a decoder-only LLM, llm={llm.name} is none; set it to bucketed")
    if phase.batching == "packed" and not phase.through_llm:
        raise UserError(f"{key}.batching=packed packs rows of the LLM, which the phase leaves out; set it to fixed")


def check_batches(config: TrainConfig, world_size: int) -> None:
    """Refuse a number of processes that a global batch does not divide among.

    Raises:
        UserError: names the phase.
    """
    for number, phase in enumerate(config.recipe.phases):
        if phase.batch_size % world_size:
            raise UserError(
                f"recipe.phases.{number}.batch_size={phase.batch_size} does not divide among {world_size} processes; "
                "start another number of them"
            )
