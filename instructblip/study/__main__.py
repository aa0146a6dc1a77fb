"""The command; see the package. What computes is imported once a configuration is right: help and mistakes need no model."""

from rich.console import Console

from instructblip.config.entry import main
from instructblip.config.schema import StudyCommandConfig


def _study(config: StudyCommandConfig, console: Console) -> int:
    from instructblip.study.command import study

    return study(config, console)


if __name__ == "__main__":
    main("study", StudyCommandConfig, _study)
