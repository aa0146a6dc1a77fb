"""Small studies on the tiny world, their runs in this process or in real ones."""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from instructblip.config.checks import check
from instructblip.config.entry import compose_config
from instructblip.config.schema import StudyCommandConfig, StudyConditionConfig
from instructblip.config.validate import build
from instructblip.study import plan
from instructblip.study.carrying import Job, carry_out
from instructblip.study.command import study
from tests.kit.runs import World, one_thread

CLOTHES = ("dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt")
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


def compose_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose each configuration once a session, for plans that are made again and again: Hydra takes most of their time."""
    monkeypatch.setattr(plan, "compose_config", _compose)


def _compose(name: str, schema: Any, overrides: Sequence[str]) -> Any:
    return copy.deepcopy(_composed(name, schema, tuple(overrides)))


@functools.cache
def _composed(name: str, schema: Any, overrides: tuple[str, ...]) -> Any:
    return compose_config(name, schema, list(overrides))


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


def write_clothes(folder: Path) -> Path:
    """Photos of clothes as the raw folder of clothing_small has them: a colour for each class, two of each a split."""
    for split in ("train", "validation", "test"):
        for number, name in enumerate(CLOTHES):
            (folder / split / name).mkdir(parents=True)
            for shade in range(2):
                colour = (25 * number, 255 - 25 * number, 60 * shade + len(split))
                Image.new("RGB", (40, 40), colour).save(folder / split / name / f"{shade}.jpg")
    return folder


def shipped_study(name: str, world: World, folder: Path, *given: str) -> StudyCommandConfig:
    """A study of `configs/study` in its short form, on tiny parts; results lie in `folder`."""
    config = compose_config("study", StudyCommandConfig, [f"study={name}", "form=short", "threads=1", *given])
    raw = folder / "clothes"
    data = [
        f"data.shards={folder / 'shards'}",
        f"data.sources.easy_vqa.path={world.raw}",
        f"data.sources.clothing_small.path={raw if raw.exists() else write_clothes(raw)}",
    ]
    parts = [item for item in world.train if item.startswith(("vision.", "qformer.", "llm."))]
    for run in (*config.study.stages.values(), *config.study.conditions.values()):
        if not isinstance(run, StudyConditionConfig) or run.evaluates is None:
            has_llm = "experiment=align_demo_stage1" not in run.train
            # six layers have more parameters than the tiny Q-Former, whatever their feed-forwards' width
            depth = ["connector.depth=1"] if "connector=resampler" in run.train else []
            run.train = [*(item for item in parts if has_llm or not item.startswith("llm.")), *run.train, *depth]
    return replace(config, output=str(folder / "out"), train=[*config.train, *data], evaluate=[*config.evaluate, *data])


def study_here(
    world: World, config: StudyCommandConfig, place: Here | None = None, console: Console | None = None
) -> int:
    """Do a study in this process; return its exit status."""
    with world.here(), one_thread():
        return study(config, console or Console(quiet=True), place or Here())


def reports(folder: Path, names: Sequence[str] = ("study.md", "study.json", "study.png")) -> list[bytes]:
    """What a study has written."""
    return [(folder / name).read_bytes() for name in names]
