"""The command train.py. Help and mistakes need no model, and a plan nothing that trains: each imports what it needs."""

from rich.console import Console

from instructblip.config import entry
from instructblip.config.entry import Outcome
from instructblip.config.schema import TrainConfig
from instructblip.startup import without_collection


def main() -> None:
    """The command: `train.py` and `instructblip-train`."""
    entry.main("train", TrainConfig, _train)


def _train(config: TrainConfig, console: Console) -> Outcome | int:
    if config.plan:
        with without_collection():
            from instructblip.training.planned import print_plan

            return print_plan(config, console)
    with without_collection():
        from instructblip.training.run import train

    return train(config, console)
