"""The command train.py. What trains is imported once a configuration is right: help and mistakes need no model."""

from rich.console import Console

from instructblip.config import entry
from instructblip.config.entry import Outcome
from instructblip.config.schema import TrainConfig


def main() -> None:
    """The command: `train.py` and `instructblip-train`."""
    entry.main("train", TrainConfig, _train)


def _train(config: TrainConfig, console: Console) -> Outcome:
    from instructblip.training.run import train

    return train(config, console)
