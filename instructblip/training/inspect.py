"""Look at a mixture before training on it: its shares, some of its samples, and how fast the loader alone is.

python -m instructblip.training.inspect mixture=held_in data.shards=/data/shards samples=8 workers=8
"""

from rich.console import Console

from instructblip.config.entry import main
from instructblip.config.schema import InspectConfig


def _inspect(config: InspectConfig, console: Console) -> None:
    from instructblip.training.inspection import inspect  # of which help and mistakes need nothing

    inspect(config, console)


if __name__ == "__main__":
    main("inspect", InspectConfig, _inspect)
