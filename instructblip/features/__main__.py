"""The command; see the package. What computes is imported once a configuration is right: help and mistakes need no model."""

from rich.console import Console

from instructblip.config.entry import main
from instructblip.config.schema import FeaturesConfig


def _features(config: FeaturesConfig, console: Console) -> None:
    from instructblip.features.rows import features

    features(config, console)


if __name__ == "__main__":
    main("features", FeaturesConfig, _features)
