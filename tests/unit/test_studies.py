"""The studies that are shipped: each composes, and train.py and evaluate.py take what its conditions set."""

import pytest

from instructblip.config.entry import compose_config
from instructblip.config.schema import CONFIGS, StudyCommandConfig, StudyForm, TrainConfig
from instructblip.study.plan import StudyPlan, plan_study

STUDIES = sorted(path.stem for path in (CONFIGS / "study").glob("*.yaml"))


def _planned(name: str, form: StudyForm = "reduced") -> tuple[StudyCommandConfig, StudyPlan]:
    config = compose_config("study", StudyCommandConfig, [f"study={name}", f"form={form}"])
    return config, plan_study(config)


def test_each_question_and_each_demo_has_a_study() -> None:
    asked = {"alignment", "connectors", "images", "instruction_aware", "int8", "lora", "queries", "ranking", "sampling"}
    assert asked | {"demo", "photos"} == set(STUDIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_its_runs_are_what_train_and_evaluate_take(name: str) -> None:
    config, plan = _planned(name)
    study = config.study
    assert (study.name, study.seeds, study.question[-1]) == (name, [1, 2, 3, 4, 5], "?")
    assert {"reduced", "short", "full"} == study.forms.keys()
    # Conditions differ, and every score that is compared is one that each of them has.
    for seed in study.seeds:
        assert len({plan.scored[condition, seed] for condition in study.conditions}) == len(study.conditions)
    for identity in plan.scored.values():
        suite = plan.runs[identity].config.suite
        assert set(study.datasets) <= {*suite.held_in, *suite.held_out}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["short", "full"])
@pytest.mark.parametrize("name", STUDIES)
def test_its_other_forms_are_taken_too(name: str, form: StudyForm) -> None:
    _, plan = _planned(name, form)
    steps = [
        phase.steps
        for run in plan.runs.values()
        if isinstance(run.config, TrainConfig)
        for phase in run.config.recipe.phases.values()
    ]
    assert (max(steps) <= 4) == (form == "short")


@pytest.mark.slow
def test_studies_share_the_run_that_is_their_reference() -> None:
    shared = [_planned(name)[1].scored for name in ("queries", "int8", "ranking")]
    assert len({next(iter(scored.values())) for scored in shared}) == 1
