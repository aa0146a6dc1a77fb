"""From a study's file to its runs: what is trained and evaluated, in which order, and in which folder."""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from instructblip.config.entry import compose_config, merged
from instructblip.config.folders import further_option
from instructblip.config.schema import (
    EvaluateConfig,
    StudyCommandConfig,
    StudyConditionConfig,
    StudyConfig,
    StudyFormConfig,
    StudyStageConfig,
    TrainConfig,
)
from instructblip.config.validate import nearest, to_dict
from instructblip.data.cards import load_cards
from instructblip.data.templates import load_templates
from instructblip.errors import UserError
from instructblip.training.checks import check_objectives

# Settings that decide how a run is carried out, not what it computes. Those of data say where files lie; what is in them is
# compared once the runs are there (findings.py).
_FREE_DATA = ("data.shards", "data.sources", "data.workers", "data.remote_cache_bytes")
_WHERE_DATA_LIE = ("data.shards=", "data.sources.")  # of a training, asked by its evaluations too
_FREE_TRAIN = (
    *_FREE_DATA,
    "name",
    "output",
    "device",
    "init_from",  # the run that it names has an identity of its own
    "init_sha256",
    "resume",
    "resume_allow",
    "profile_step",
    "plan",
    "plan_gpu",
    "plan_gpus",
    "plan_mfu",
    "logger",
    "parallel",
    "evaluation.batch_size",
    "evaluation.examples",
    "recipe.keep_checkpoints",
    "recipe.full_disk",
)
_FREE_EVALUATE = (*_FREE_DATA, "name", "output", "device", "checkpoint", "logger", "batch_size", "examples")
# What a study sets itself, and what says it there.
_SET_EVALUATE = {
    "checkpoint": "name the condition in evaluates",
    "name": "leave it out",
    "output": "give output= of the study",
}
_SET_TRAIN = {
    "seed": "list it in seeds",
    "name": "leave it out",
    "output": "give output= of the study",
    "plan": "give plan=true of the study",
    **dict.fromkeys(("resume", "resume_allow"), "leave it out: its runs are resumed"),
}
_DIGITS = 12  # of an identity, in the name of a folder
RUNS = "runs"  # folder of the runs of all studies


@dataclass(frozen=True)
class StudyRun:
    """One run: a training, or an evaluation of one.

    Attributes:
        label: `sqrt, seed 1`; of a run that several conditions share, the first's.
        identity: SHA-256 of all that decides its result.
        folder: of its files.
        config: what train.py or evaluate.py is given.
        after: the identity of the run that must have ended before.
        command: what would start it by hand.
    """

    label: str
    identity: str
    folder: Path
    config: TrainConfig | EvaluateConfig
    after: str | None
    command: str


@dataclass(frozen=True)
class StudyPlan:
    """What a study consists of.

    Attributes:
        runs: identity -> run, each after the one that it needs.
        scored: (condition, seed) -> the identity of the run whose scores are its.
        trained: the same -> the identity of the run that was trained.
        stages: (stage, seed) -> identity.
        seeds: in their order.
    """

    runs: Mapping[str, StudyRun]
    scored: Mapping[tuple[str, int], str]
    trained: Mapping[tuple[str, int], str]
    stages: Mapping[tuple[str, int], str]
    seeds: Sequence[int]


def plan_study(config: StudyCommandConfig) -> StudyPlan:
    """All runs of a study; nothing is opened but cards and configurations.

    Raises:
        UserError: overrides that train.py or evaluate.py would refuse; names the condition.
    """
    planner = _Planner(config)
    for seed in planner.seeds:
        for name in config.study.conditions:
            planner.add(name, seed)
    _check_scored(config.study, [planner.runs[identity].config for identity in dict.fromkeys(planner.scored.values())])
    return StudyPlan(planner.runs, planner.scored, planner.trained, planner.stages, planner.seeds)


class _Planner:
    def __init__(self, config: StudyCommandConfig) -> None:
        self.config, self.study = config, config.study
        self.form = self.study.forms.get(config.form)
        if self.form is None and config.form != "reduced":
            known = ", ".join(self.study.forms) or "none"
            raise UserError(f"study={self.study.name} says nothing of form={config.form}; its forms: {known}")
        count = None if self.form is None or config.seeds is not None else self.form.seeds
        self.seeds = (self.study.seeds if config.seeds is None else config.seeds)[:count]
        self.place = Path(config.output).expanduser() / RUNS
        self.runs: dict[str, StudyRun] = {}
        self.scored: dict[tuple[str, int], str] = {}
        self.trained: dict[tuple[str, int], str] = {}
        self.stages: dict[tuple[str, int], str] = {}
        self._composed: dict[str, _Composed] = {}

    def add(self, name: str, seed: int) -> str:
        """The identity of a condition's or a stage's run, which is planned where it is not yet."""
        stage = self.study.stages.get(name)
        if stage is not None:
            if (name, seed) not in self.stages:
                self.stages[name, seed] = self._training(name, stage, seed)
            return self.stages[name, seed]
        condition = self.study.conditions[name]
        if (name, seed) not in self.scored:
            if condition.evaluates is None:
                self.scored[name, seed] = self.trained[name, seed] = self._training(name, condition, seed)
            else:
                self.trained[name, seed] = self.add(condition.evaluates, seed)
                self.scored[name, seed] = self._evaluation(name, condition, seed)
        return self.scored[name, seed]

    def _training(self, name: str, run: StudyStageConfig, seed: int) -> str:
        after = None if run.starts_from is None else self.add(run.starts_from, seed)
        composed, texts, overrides = self._compose(name, run)
        assert isinstance(composed, TrainConfig)
        # The files say what a run starts from; experiments that name another are not asked.
        start = composed.init_from if after is None else [str(self.runs[after].folder)]
        identity = _identity(composed, _FREE_TRAIN, seed, [after, [] if after else start], texts)
        folder = self.place / f"{composed.name}-seed{seed}-{identity[:_DIGITS]}"
        config = replace(
            composed,
            seed=seed,
            init_from=start,
            resume="auto",
            resume_allow=["init_from", "data.sources"],  # where they lie
            name=folder.name,
            output=str(folder.parent),
        )
        given = [*overrides, f"seed={seed}", *([f"init_from={start[0]}"] if after else [])]
        return self._keep(name, seed, identity, folder, config, after, ["train.py", *given])

    def _evaluation(self, name: str, condition: StudyConditionConfig, seed: int) -> str:
        after = self.trained[name, seed]
        composed, texts, overrides = self._compose(name, condition)
        assert isinstance(composed, EvaluateConfig)
        identity = _identity(composed, _FREE_EVALUATE, None, [after], texts)
        folder = self.place / f"{composed.name}-evaluated-{identity[:_DIGITS]}"
        checkpoint = str(self.runs[after].folder)
        config = replace(composed, checkpoint=checkpoint, name=folder.name, output=str(folder.parent))
        given = ["evaluate.py", f"checkpoint={checkpoint}", *overrides]
        return self._keep(name, seed, identity, folder, config, after, given)

    def _keep(
        self,
        name: str,
        seed: int,
        identity: str,
        folder: Path,
        config: TrainConfig | EvaluateConfig,
        after: str | None,
        command: Sequence[str],
    ) -> str:
        if identity not in self.runs:  # else another condition has the same
            line = shlex.join(["python", command[0], *further_option(), *command[1:]])
            run = StudyRun(f"{name}, seed {seed}", identity, folder, config, after, line)
            self.runs[identity] = run
        return identity

    def _compose(self, name: str, run: StudyStageConfig) -> "_Composed":
        if name not in self._composed:
            try:
                self._composed[name] = self._composed_anew(name, run)
            except UserError as error:
                raise UserError(f"{name} of study={self.study.name}: {error}") from None
        return self._composed[name]

    def _composed_anew(self, name: str, run: StudyStageConfig) -> "_Composed":
        form, own = self.form or StudyFormConfig(), run.forms.get(self.config.form, [])
        if isinstance(run, StudyConditionConfig) and run.evaluates is not None:
            trained = self._compose(run.evaluates, self.study.conditions[run.evaluates])
            lies = [override for override in trained.overrides if override.lstrip("+").startswith(_WHERE_DATA_LIE)]
            overrides = merged([*lies, *self.study.evaluate, *form.evaluate, *run.evaluate, *self.config.evaluate])
            _refuse_set(overrides, _SET_EVALUATE)
            evaluated = compose_config("evaluate", EvaluateConfig, [*overrides, "checkpoint=''"])
            return _Composed(evaluated, _asked([*evaluated.suite.held_in, *evaluated.suite.held_out]), overrides)
        unscored = ["suite=none"] if name in self.study.stages else []
        overrides = merged([*self.study.train, *form.train, *run.train, *own, *unscored, *self.config.train])
        _refuse_set(overrides, _SET_TRAIN)
        started = [] if run.starts_from is None else ["init_from=''"]  # by the stage's run, which has no folder yet
        composed = compose_config("train", TrainConfig, [*overrides, *started])
        check_objectives(composed)
        return _Composed(composed, _texts(composed), overrides)


def _check_scored(study: StudyConfig, runs: Sequence[TrainConfig | EvaluateConfig]) -> None:
    """Before anything is trained: what is to be compared is asked of somebody."""
    asked = dict.fromkeys(name for run in runs for name in (*run.suite.held_in, *run.suite.held_out))
    names = [card.name for card in load_cards(list(asked))]
    if not names:
        raise UserError(f"no run of study={study.name} is asked anything, so there is nothing to compare; set suite=")
    if strays := [name for name in study.datasets if name not in names]:
        raise UserError(f"study.datasets: {strays[0]} is in no suite of study={study.name}{nearest(strays[0], names)}")


def _refuse_set(overrides: Sequence[str], own: Mapping[str, str]) -> None:
    """Refuse settings that a study gives each of its runs itself."""
    for item in overrides:
        key = item.partition("=")[0].lstrip("+~")
        if key in own:
            raise UserError(f"{item}: the study sets {key} of its runs itself; {own[key]}")


class _Composed(NamedTuple):
    """What a condition's runs have in common: all but the seed and where they lie."""

    config: TrainConfig | EvaluateConfig
    texts: Any  # what it reads of cards and template sets
    overrides: list[str]  # that make it


# --- identities ------------------------------------------------------------------------------------------------------


def _identity(config: Any, free: Collection[str], seed: int | None, after: Sequence[Any], texts: Any) -> str:
    values = _without(to_dict(config), free)
    content = {"config": values | ({} if seed is None else {"seed": seed}), "after": after, "texts": texts}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _without(values: Mapping[str, Any], free: Collection[str], prefix: str = "") -> dict[str, Any]:
    return {
        key: _without(value, free, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in values.items()
        if f"{prefix}{key}" not in free
    }


def _texts(config: TrainConfig) -> Any:
    names = [entry.name for entry in config.mixture.datasets]
    sets = [] if config.mixture.templates is None else [load_templates(config.mixture.templates)]
    trained = [
        [card.name, card.source, card.kinds, _as_dict(card.training), [] if sets else _as_dict(card.template_set())]
        for card in load_cards(names)
    ]
    return [trained, [_as_dict(item) for item in sets], _asked([*config.suite.held_in, *config.suite.held_out])]


def _asked(names: Sequence[str]) -> list[Any]:
    """What cards say of evaluation; not where their files are fetched from."""
    return [
        [card.name, card.source, card.kinds, None if card.evaluation is None else _as_dict(card.evaluation)]
        for card in load_cards(names)
    ]


def _as_dict(section: Any) -> dict[str, Any]:
    return dataclasses.asdict(section)
