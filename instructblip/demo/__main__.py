"""The command; see the package. What asks models is imported once a configuration is right: help needs no model."""

from rich.console import Console

from instructblip.config.entry import main
from instructblip.config.schema import DemoConfig


def _demo(config: DemoConfig, console: Console) -> None:
    from instructblip.demo.command import demo

    demo(config, console)


if __name__ == "__main__":
    main("demo", DemoConfig, _demo)
