"""The command; see the package. What computes is imported once a configuration is right: help and mistakes need no model."""

from rich.console import Console

from instructblip.config.entry import main
from instructblip.config.schema import CapFiltConfig


def _capfilt(config: CapFiltConfig, console: Console) -> None:
    from instructblip.capfilt.command import capfilt

    capfilt(config, console)


if __name__ == "__main__":
    main("capfilt", CapFiltConfig, _capfilt)
