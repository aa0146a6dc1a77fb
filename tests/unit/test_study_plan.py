"""A study's file becomes runs: which there are, in which order, in which folders, and what is refused."""

import copy
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from instructblip.config.entry import compose_config, merged
from instructblip.config.schema import CONFIGS, EvaluateConfig, StudyCommandConfig, TrainConfig
from instructblip.errors import UserError
from instructblip.study import plan as module
from instructblip.study.plan import StudyPlan, StudyRun, plan_study
from tests.kit.runs import REPOSITORY, World
from tests.kit.studies import STUDY, compose_once, study_config


@pytest.fixture(autouse=True)
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compose_once(monkeypatch)


def _plan(world: World, output: Path, values: dict[str, Any] = STUDY, **given: Any) -> StudyPlan:
    return plan_study(study_config(world, output, values, **given))


def _changed(*path: str, to: Any) -> dict[str, Any]:
    """The study of the kit with another value at one place."""
    values = copy.deepcopy(STUDY)
    section = values
    for step in path[:-1]:
        section = section[step]
    section[path[-1]] = to
    return values


def _run(plan: StudyPlan, condition: str, seed: int) -> StudyRun:
    return plan.runs[plan.scored[condition, seed]]


@pytest.mark.slow
def test_runs_come_after_those_that_they_need(world: World, tmp_path: Path) -> None:
    plan = _plan(world, tmp_path)
    labels = [run.label for run in plan.runs.values()]
    each = ("alone", "aligned", "staged", "by mean")
    assert labels == [f"{name}, seed {seed}" for seed in (1, 2) for name in each]
    before: set[str] = set()
    for run in plan.runs.values():
        assert run.after is None or run.after in before
        before.add(run.identity)


@pytest.mark.slow
def test_a_run_starts_from_the_stage_of_its_seed(world: World, tmp_path: Path) -> None:
    plan = _plan(world, tmp_path)
    for seed in (1, 2):
        staged, stage = _run(plan, "staged", seed), plan.runs[plan.stages["aligned", seed]]
        assert isinstance(staged.config, TrainConfig) and isinstance(stage.config, TrainConfig)
        assert staged.config.init_from == [str(stage.folder)]
        assert (staged.config.seed, stage.config.seed) == (seed, seed)
        assert (stage.config.suite.held_in, list(stage.config.recipe.phases)) == ([], ["alignment"])
        asked = _run(plan, "by mean", seed)
        assert isinstance(asked.config, EvaluateConfig)
        assert asked.config.checkpoint == str(_run(plan, "alone", seed).folder)
        assert (asked.config.normalize, asked.config.include_eos, asked.config.samples) == ("mean", True, 6)


@pytest.mark.slow
def test_a_run_may_keep_the_encoder_that_the_stage_before_it_has_trained(world: World, tmp_path: Path) -> None:
    drawn = [*STUDY["conditions"]["staged"]["train"], "vision.init=scratch"]
    staged = _run(_plan(world, tmp_path, _changed("conditions", "staged", "train", to=drawn)), "staged", 1).config
    assert isinstance(staged, TrainConfig) and (staged.vision.init, staged.train.vision) == ("scratch", "frozen")
    with pytest.raises(UserError, match=r"alone of study=tiny: vision.init=scratch draws the vision encoder"):
        _plan(world, tmp_path, _changed("conditions", "alone", "train", to=drawn))


@pytest.mark.slow
def test_a_change_concerns_the_runs_that_read_it_and_those_after_them(world: World, tmp_path: Path) -> None:
    before = _plan(world, tmp_path).runs.keys()
    stage = [*STUDY["stages"]["aligned"]["train"], "recipe.phases.alignment.learning_rate=1e-4"]
    after = _plan(world, tmp_path, _changed("stages", "aligned", "train", to=stage)).runs
    assert [run.label for run in after.values() if run.identity not in before] == [
        f"{name}, seed {seed}" for seed in (1, 2) for name in ("aligned", "staged")
    ]
    asked = _plan(world, tmp_path, _changed("conditions", "by mean", "evaluate", to=["normalize=mean"])).runs
    assert [run.label for run in asked.values() if run.identity not in before] == ["by mean, seed 1", "by mean, seed 2"]


@pytest.mark.slow
def test_how_a_run_is_carried_out_makes_no_other_run(world: World, tmp_path: Path) -> None:
    plan = _plan(world, tmp_path)
    otherwise = ["data.workers=2", "evaluation.examples=3", "recipe.keep_checkpoints=1", "device=cpu", "plan_gpu=h100"]
    other = _plan(world, tmp_path / "elsewhere", train=otherwise, name="another")
    assert plan.runs.keys() == other.runs.keys()
    assert {run.folder.name for run in plan.runs.values()} == {run.folder.name for run in other.runs.values()}


@pytest.mark.slow
def test_an_evaluation_has_its_data_where_its_training_has_them(world: World, tmp_path: Path) -> None:
    config = study_config(world, tmp_path, train=["data.shards=/of/all", "data.sources.easy_vqa.path=/raw"])
    config.study.evaluate = list(STUDY["evaluate"])
    asked = _run(plan_study(config), "by mean", 1).config
    assert isinstance(asked, EvaluateConfig)
    assert (asked.data.shards, asked.data.sources["easy_vqa"].path) == ("/of/all", "/raw")
    config.evaluate = ["data.shards=/of/evaluations"]
    assert _run(plan_study(config), "by mean", 1).config.data.shards == "/of/evaluations"


@pytest.mark.slow
def test_two_conditions_that_are_alike_have_one_run(world: World, tmp_path: Path) -> None:
    values = _changed("conditions", "again", to={"train": STUDY["conditions"]["alone"]["train"]})
    plan = _plan(world, tmp_path, values)
    assert plan.scored["again", 2] == plan.scored["alone", 2]
    assert len(plan.runs) == len(_plan(world, tmp_path).runs)


@pytest.mark.slow
def test_a_card_that_changed_makes_other_runs(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _plan(world, tmp_path).runs.keys()
    load = module.load_cards

    def with_another_prompt(names: list[str]) -> list[Any]:
        cards = load(names)
        return [
            replace(card, evaluation=replace(card.evaluation, prompt="What? {question}"))
            if card.name == "easy_vqa_shape"
            else card
            for card in cards
        ]

    monkeypatch.setattr(module, "load_cards", with_another_prompt)
    after = _plan(world, tmp_path).runs
    # All but the stages, which are asked nothing, and are started from as they were.
    assert {run.label.partition(",")[0] for key, run in after.items() if key not in before} == {
        "alone",
        "staged",
        "by mean",
    }


@pytest.mark.slow
def test_forms_change_length_and_number(world: World, tmp_path: Path) -> None:
    values = copy.deepcopy(STUDY) | {"forms": {"short": {"train": ["recipe.clip_norm=2.0"], "seeds": 1}}}
    values["conditions"]["staged"]["forms"] = {"short": ["recipe.phases.instruction.steps=1"]}
    plan = _plan(world, tmp_path, values, form="short")
    assert plan.seeds == [1]
    steps = {
        name: _run(plan, name, 1).config.recipe.phases["instruction"].steps  # type: ignore[union-attr]
        for name in ("alone", "staged")
    }
    assert steps == {"alone": 3, "staged": 1}
    assert all(run.config.recipe.clip_norm == 2.0 for run in plan.runs.values() if isinstance(run.config, TrainConfig))
    assert _plan(world, tmp_path, values, form="short", seeds=[7, 8]).seeds == [7, 8]
    with pytest.raises(UserError, match="study=tiny says nothing of form=full; its forms: short"):
        _plan(world, tmp_path, values, form="full")


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        (("conditions", "staged", "starts_from"), "aligend", "study.conditions.staged.starts_from=aligend is none of"),
        (
            ("conditions", "by mean", "evaluates"),
            "staged2",
            "evaluates=staged2 is no condition that trains; did you mean",
        ),
        (
            ("conditions", "by mean", "train"),
            ["seed=1"],
            "evaluates the run of alone; leave its train, starts_from and",
        ),
        (("conditions", "staged", "evaluate"), ["samples=3"], "is of a condition that trains nothing; set"),
        (("stages", "aligned", "starts_from"), "staged", "starts from .*, in a circle; change one starts_from"),
        (("stages", "alone"), {}, "study.stages and study.conditions both have alone; give one of them another name"),
        (("conditions", "staged", "starts_from"), "by mean", "starts from by mean, which trains nothing; name alone"),
        (("seeds",), [1, 1], r"seeds \[1, 1\] of the study must differ"),
        (("conditions",), {"alone": {}}, "conditions"),
        (("conditions", "staged", "train"), ["recipe.stepps=3"], "staged of study=tiny: unknown key recipe.stepps"),
        (
            ("conditions", "staged", "train"),
            ["llm=vicuna"],
            "staged of study=tiny: there is no llm=vicuna; did you mean",
        ),
        (
            ("conditions", "by mean", "evaluate"),
            ["normalize=max"],
            "by mean of study=tiny: normalize=max is none of sum, mean",
        ),
        (
            ("conditions", "staged", "train"),
            ["recipe.clip_norm=1,2"],
            "staged of study=tiny: recipe.clip_norm=1,2 are several values; give one",
        ),
        (("conditions", "staged", "train"), ["seed=7"], "staged of .* seed=7: the study sets seed .* list it in seeds"),
        (("conditions", "staged", "train"), ["plan=true"], "plan=true: the study sets plan of its runs itself"),
        (("conditions", "by mean", "evaluate"), ["checkpoint=a"], "checkpoint=a: .* name the condition in evaluates"),
        (("seeds",), [1, -1], r"study\.seeds.*-1"),
        (("datasets",), ["easy_vqa_shap"], "easy_vqa_shap is in no suite of study=tiny; did you mean 'easy_vqa_shape'"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_line(
    path: tuple[str, ...], to: Any, message: str, world: World, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        _plan(world, tmp_path, _changed(*path, to=to))
    assert "\n" not in str(error.value)


def test_later_overrides_take_the_place_of_earlier_ones() -> None:
    given = [
        "experiment=demo",
        "seed=1",
        "~recipe.phases",
        "recipe.phases={a: {steps: 1}}",
        "seed=2",
        "experiment=smoke",
    ]
    assert merged(given) == ["~recipe.phases", "recipe.phases={a: {steps: 1}}", "seed=2", "experiment=smoke"]


@pytest.mark.slow
def test_a_study_of_another_folder_knows_the_files_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "my files"
    for group, name, text in (
        (
            "study",
            "mine",
            "name: mine\nquestion: Mine?\ntrain: [experiment=demo, llm=own]\nseeds: [1]\n"
            "conditions: {a: {}, b: {train: [recipe.clip_norm=2, \"llm.prompt_suffix=' a'\"]}}\n"
            "datasets: [easy_vqa_shape]\n",
        ),
        ("llm", "own", (CONFIGS / "llm/smollm2_135m.yaml").read_text()),
    ):
        (folder / group).mkdir(parents=True)
        (folder / group / f"{name}.yaml").write_text(text)
    command = [sys.executable, "-m", "instructblip.study", "-cd", str(folder), "study=mine", "plan=true"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.strip() for line in done.stdout.splitlines() if "train.py" in line]
    given = ["experiment=demo", "llm=own", "recipe.clip_norm=2", "llm.prompt_suffix=' a'", "seed=1"]
    assert shlex.split(lines[1]) == ["python", "train.py", "-cd", str(folder), *given]  # as a shell takes it


def test_a_study_has_to_be_named() -> None:
    with pytest.raises(UserError, match=r"^give study=NAME; configs/study has: .*sampling"):
        compose_config("study", StudyCommandConfig, [])
