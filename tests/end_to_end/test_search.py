"""Searches: each job of train.py has a score, and Optuna, where it is installed, goes by them and names the best."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from instructblip.config.checks import check_search
from instructblip.config.entry import compose_config
from instructblip.config.schema import EvaluateConfig, TrainConfig
from instructblip.errors import UserError
from tests.kit.runs import World, read_lines, run

HAS_SWEEPER = importlib.util.find_spec("optuna") is not None
needs_sweeper = pytest.mark.skipif(not HAS_SWEEPER, reason="Hydra's sweeper is not installed (requirements-search.txt)")
SHORT = (
    "recipe.phases.alignment.steps=1",
    "recipe.phases.instruction.steps=2",
    "recipe.phases.instruction.batch_size=2",
    "recipe.final_samples=1",
    "recipe.validation_samples=3",
    "suite.held_in=[easy_vqa_shape,easy_vqa_color]",
    "suite.held_out=[]",
    "evaluation.blind_baseline=false",
)
RATES = "recipe.phases.instruction.learning_rate=1e-3,1e-5"


def _train(world: World, *arguments: str) -> list[str]:
    parts = [argument for argument in world.train if "recipe." not in argument]
    return ["-m", *parts, *SHORT, *arguments]


def _validated(run_folder: Path) -> float:
    """The mean over datasets of a run's last validation, which is after its last step."""
    last = read_lines(run_folder / "metrics.jsonl")[-1]
    assert last["step"] == 3
    return sum(last["validation"].values()) / 2


@pytest.mark.slow
def test_each_job_of_a_sweep_returns_its_score(world: World, tmp_path: Path) -> None:
    seen = "+hydra.callbacks.seen._target_=tests.kit.callbacks.PrintScore"
    printed = run(world, "train.py", *_train(world, RATES, seen), cwd=tmp_path)
    runs = [tmp_path / f"outputs/train/demo-learning_rate_{rate}" for rate in ("0.001", "1e-05")]
    for folder in runs:
        assert f"score: {_validated(folder)!r}" in printed


@pytest.mark.slow
@needs_sweeper
def test_a_search_of_four_trials_names_its_best(world: World, tmp_path: Path) -> None:
    arguments = _train(world, "hydra/sweeper=search", "hydra.sweeper.n_trials=4", RATES)
    printed = run(world, "train.py", *arguments, cwd=tmp_path)
    runs = {path: _validated(path) for path in (tmp_path / "outputs/train").glob("demo-*")}
    assert len(runs) == 2  # so that some trials ask for what was tried already
    (results,) = tmp_path.glob("outputs/train/sweeps/*/optimization_results.yaml")
    found = yaml.safe_load(results.read_text())
    assert found["best_value"] == max(runs.values())
    (rate,) = found["best_params"].values()
    assert runs[tmp_path / f"outputs/train/demo-learning_rate_{rate}"] == found["best_value"]
    assert f"best: {found['best_value']:.4g} with recipe.phases.instruction.learning_rate={rate}" in printed
    assert f"wrote {results.relative_to(tmp_path)}" in printed


@pytest.mark.slow
@needs_sweeper
def test_failed_trials_are_said_and_a_search_of_nothing_else_is_one_line(world: World, tmp_path: Path) -> None:
    arguments = _train(world, "hydra/sweeper=search", "hydra.sweeper.n_trials=3", "qformer.layers=98,99")
    printed = run(world, "train.py", *arguments, cwd=tmp_path, status=2)
    for number in (0, 1):
        assert f"Failed experiment: job {number} (qformer.layers=9" in printed
    assert printed.splitlines()[-1].startswith("error: no trial of 3 has a score; job 2 (qformer.layers=9")
    assert "Traceback" not in printed


@pytest.mark.skipif(HAS_SWEEPER, reason="the sweeper is installed")
def test_a_search_without_its_sweeper_is_one_line(world: World, tmp_path: Path) -> None:
    printed = run(world, "train.py", *_train(world, "hydra/sweeper=search", RATES), cwd=tmp_path, status=2)
    assert printed == (
        "error: hydra/sweeper=search needs Hydra's sweeper for it; pip install -r requirements-search.txt\n"
    )


def test_what_has_no_score_or_would_find_the_worst_is_not_searched() -> None:
    with pytest.raises(UserError, match=r"a search needs a score of each job, which train\.py alone gives"):
        check_search(compose_config("evaluate", EvaluateConfig, ["checkpoint=x"]), "maximize")
    with pytest.raises(UserError, match=r"name a dataset in suite\.held_in"):
        check_search(compose_config("train", TrainConfig, ["suite.held_in=[]"]), "maximize")
    with pytest.raises(
        UserError, match=r"hydra\.sweeper\.direction=minimize looks for the lowest; use hydra/sweeper=search"
    ):
        check_search(compose_config("train", TrainConfig, []), "minimize")
