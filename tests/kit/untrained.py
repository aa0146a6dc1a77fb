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
