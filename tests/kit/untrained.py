"""A run that was never trained: a checkpoint whose parts are all random, ready in a moment."""

from pathlib import Path

from instructblip.config.schema import ModelConfig, TrainConfig
from instructblip.weights.native import save_native
from instructblip.weights.parts import build_model
from tests.kit.runs import World, compose


def write_untrained_run(world: World, folder: Path) -> Path:
    """Write a run whose model was never trained: all its parts are random. Return its folder."""
    config = compose("train", TrainConfig, [*world.train, "vision.norm=layer"])
    with world.here():
        model = build_model(config)
        parts = ModelConfig(seed=config.seed, vision=config.vision, qformer=config.qformer, llm=config.llm)
        save_native(model, parts, folder)
    return folder


def write_untrained_stage1(world: World, folder: Path) -> Path:
    """The same of BLIP-2's first stage."""
    parts = [override for override in world.train if not override.startswith("llm")]
    overrides = ["model=blip2_stage1", "~llm", "qformer.extra_tokens=['[DEC]']", *parts, "vision.norm=layer"]
    config = compose("train", TrainConfig, overrides)
    with world.here():
        model = build_model(config)
        described = ModelConfig(
            seed=config.seed, model=config.model, vision=config.vision, qformer=config.qformer, llm=None
        )
        save_native(model, described, folder)
    return folder
