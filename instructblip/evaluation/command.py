"""The command evaluate.py. What evaluates is imported once a configuration is right: help and mistakes need no model."""

from rich.console import Console

from instructblip.config import entry
from instructblip.config.schema import EvaluateConfig
from instructblip.startup import without_collection


def main() -> None:
    """The command: `evaluate.py` and `instructblip-evaluate`."""
    entry.main("evaluate", EvaluateConfig, _evaluate)


def _evaluate(config: EvaluateConfig, console: Console) -> None:
    with without_collection():
        from instructblip.evaluation.run import evaluate

    evaluate(config, console)
