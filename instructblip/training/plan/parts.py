"""A run's plan from its configuration: the parts in their sizes, laid out as the run would lay them."""

import math

from instructblip.config.checks import check_batches
from instructblip.config.schema import TrainConfig
from instructblip.models.adapters import Adapter
from instructblip.training.layout import PRECISIONS, check_layout
from instructblip.training.plan.blip_memory import plan_blip
from instructblip.training.plan.connector import plan_connector
from instructblip.training.plan.flops import GPUS, SampleLengths
from instructblip.training.plan.memory import Plan, PlanLayout, plan_run, planned_phases
from instructblip.weights.modules import (
    adapt_without_weights,
    blip_without_weights,
    connector_without_weights,
    parts_without_weights,
)


def make_plan(config: TrainConfig) -> Plan:
    """What the run needs on the GPUs that are planned with; nothing is opened or loaded.

    Raises:
        UserError: GPUs that the run cannot be laid over, or a part whose YAML states no sizes.
    """
    check_layout(config.parallel.kind, config.parallel.shard_size, gpus := _planned_gpus(config))
    check_batches(config.recipe.phases, gpus)
    llm = config.llm
    layout = PlanLayout(
        gpu=GPUS[config.plan_gpu],
        gpus=gpus,
        mfu=config.plan_mfu,
        kind=config.parallel.kind,
        shard_size=config.parallel.shard_size,
        activation_checkpointing=config.parallel.activation_checkpointing,
        autocast=PRECISIONS[config.recipe.precision] is not None,
        average=config.recipe.average_decay is not None,
        quantization=None if llm is None else llm.quantization,
        cached=config.data.cache_features,
        longest=_longest_sample(config),
        trained=frozenset(config.train.parts(config)),
    )
    phases, adapters = planned_phases(config.recipe.phases), adapters_of(config)
    outlined = not adapters  # which go into modules that were built
    if config.text is not None:
        adapt_without_weights(blip := blip_without_weights(config, outlined=outlined), adapters)
        return plan_blip(blip, phases, layout, prompt=config.model.prompt)
    if not config.has_qformer():
        adapt_without_weights(connected := connector_without_weights(config, outlined=outlined), adapters)
        return plan_connector(connected, phases, layout)
    adapt_without_weights(parts := parts_without_weights(config, outlined=outlined), adapters)
    return plan_run(parts, phases, layout)


def _longest_sample(config: TrainConfig) -> SampleLengths:
    if config.llm is not None:
        return SampleLengths(config.llm.max_prompt_tokens, config.llm.max_target_tokens)
    longest = config.model.max_text_tokens
    # As many answers as people were asked, of four tokens each.
    return SampleLengths(longest, 40) if config.model.kind == "blip_vqa" else SampleLengths(0, longest)


def _planned_gpus(config: TrainConfig) -> int:
    if config.plan_gpus is not None:
        return config.plan_gpus
    sizes = [phase.batch_size for phase in config.recipe.phases.values()]
    return 1 if config.parallel.kind == "single" else math.gcd(16, *sizes)


def adapters_of(config: TrainConfig) -> dict[str, Adapter]:
    """Of the parts that train by adapters, as configured."""
    given = {part: getattr(config.train.lora, part) for part in config.train.adapted(config)}
    return {part: Adapter(own.rank, own.alpha, own.dropout, tuple(own.targets)) for part, own in given.items()}
