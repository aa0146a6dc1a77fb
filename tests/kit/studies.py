"""Small studies on the tiny world, their runs in this process or in real ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from instructblip.config.checks import check
from instructblip.config.schema import StudyCommandConfig
from instructblip.config.validate import build
from instructblip.study.carrying import Job, carry_out
from instructblip.study.command import study
from tests.kit.runs import World, one_thread

# Two conditions that train, from a stage or by themselves, and one that evaluates another's run; three steps each.
STUDY: dict[str, Any] = {
    "name": "tiny",
    "question": "Does a stage before help?",
    "train": ["experiment=demo", "recipe.validate_every=100", "recipe.checkpoint_every=2"],
    "evaluate": ["suite=demo", "samples=6", "blind_baseline=true"],
    "stages": {"aligned": {"train": ["~recipe.phases.instruction", "recipe.phases.alignment.steps=3"]}},
    "conditions": {
        "alone": {"train": ["~recipe.phases.alignment", "recipe.phases.instruction.steps=3"]},
        "staged": {
            "train": ["~recipe.phases.alignment", "recipe.phases.instruction.steps=3"],
            "starts_from": "aligned",
        },
        "by mean": {"evaluates": "alone", "evaluate": ["normalize=mean", "include_eos=true"]},
    },
    "seeds": [1, 2],
    "datasets": ["easy_vqa_shape", "easy_vqa_statements"],
}
_SMALL = (
    "recipe.final_samples=6",
    "recipe.validation_samples=1",
    "recipe.phases.alignment.batch_size=4",
    "recipe.phases.instruction.batch_size=4",
)


def study_config(world: World, output: Path, values: dict[str, Any] = STUDY, **given: Any) -> StudyCommandConfig:
    """A study of the tiny world, checked as the command checks it."""
    own = [item for item in world.train if "recipe." not in item]
    # What a run has no phase for is left out by the study's own `~`, so these come before it.
    study = {**values, "train": [*values["train"], *_SMALL, *own], "evaluate": [*values["evaluate"], *world.evaluate]}
    config: StudyCommandConfig = build(
        StudyCommandConfig, {"study": study, "name": study["name"], "output": str(output), "threads": 1, **given}
    )
    check(config)
    return config


@dataclass
class Here:
    """Runs in this process, one after the other.

    Attributes:
        started: labels of those that were.
        statuses: label -> the exit status that a run pretends to end with, in place of being done.
    """

    started: list[str] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)

    def start(self, job: Job) -> "Done":
        """Do a run."""
        self.started.append(job.run.label)
        if job.run.label in self.statuses:
            return Done(self.statuses[job.run.label])
        return Done(carry_out(job))


@dataclass(frozen=True)
class Done:
    """A run that has ended."""

    status: int

    def poll(self) -> int:
        """Its status."""
        return self.status

    def stop(self) -> None:
        """There is nothing left to stop."""


def study_here(
    world: World, config: StudyCommandConfig, place: Here | None = None, console: Console | None = None
) -> int:
    """Do a study in this process; return its exit status."""
    with world.here(), one_thread():
        return study(config, console or Console(quiet=True), place or Here())


def reports(folder: Path, names: Sequence[str] = ("study.md", "study.json", "study.png")) -> list[bytes]:
    """What a study has written."""
    return [(folder / name).read_bytes() for name in names]
