"""Runs that differ by their seed alone: known by their configuration, shown as a group with mean and spread."""

import json
import statistics
from pathlib import Path

import pytest
import yaml

from instructblip.evaluation.report.table import as_csv, as_html, as_text, score_table
from instructblip.evaluation.results_file import read_run
from instructblip.evaluation.seeds import groups_of_seeds, training_of
from instructblip.files import write_json
from tests.kit.stored import entry, read_results, write_run

SCORES = {1: 86.0, 2: 89.5, 3: 83.5}


def checkpoint_of(folder: Path, **config: object) -> Path:
    """A run's folder as train.py leaves it; its checkpoint."""
    checkpoint = folder / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": folder.name, **config}), encoding="utf-8")
    return checkpoint


def evaluated(folder: Path, checkpoint: Path, value: float, **protocol: object) -> Path:
    write_run(folder, {"gqa": entry("gqa", value, **protocol)})
    results = read_results(folder)
    results["checkpoint"] |= training_of(str(checkpoint))
    write_json(folder / "results.json", results)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three seeds of one recipe, and one run of another."""
    recipe = {"recipe": {"steps": 10}}
    found = []
    for seed, value in SCORES.items():
        checkpoint = checkpoint_of(tmp_path / f"train{seed}", seed=seed, **recipe)
        found.append(evaluated(tmp_path / f"seed{seed}", checkpoint, value))
    other = checkpoint_of(tmp_path / "train_longer", seed=4, recipe={"steps": 20})
    return [*found, evaluated(tmp_path / "longer", other, 90.0)]


def test_the_recipe_is_all_that_decides_weights_but_the_seed(tmp_path: Path) -> None:
    first = training_of(str(checkpoint_of(tmp_path / "a", seed=1, output="x", plan_gpu="h100", recipe={"lr": 1})))
    again = training_of(str(checkpoint_of(tmp_path / "b", seed=2, output="y", plan_gpu="h200", recipe={"lr": 1})))
    other = training_of(str(checkpoint_of(tmp_path / "c", seed=2, recipe={"lr": 2})))
    assert (first["seed"], again["seed"]) == (1, 2)
    assert first["recipe_sha256"] == again["recipe_sha256"] != other["recipe_sha256"]
    assert training_of("Salesforce/instructblip-vicuna-7b") == {}
    assert training_of(str(tmp_path)) == {}


@pytest.mark.slow
def test_runs_that_differ_by_seed_stand_together_below_their_mean(runs: list[Path]) -> None:
    table = score_table([read_run(folder) for folder in (runs[0], runs[3], *runs[1:3])])
    own = [row for row in table.rows if not row.is_paper]
    assert [row.name for row in own] == ["mean of 3 seeds", "seed1", "seed2", "seed3", "longer"]
    cell = own[0].cells["gqa"]
    assert cell.value == pytest.approx(statistics.mean(SCORES.values()))
    assert cell.deviation == pytest.approx(statistics.stdev(SCORES.values()))
    assert "seed 2" in own[2].about
    text = as_text(table, 100)
    for shown in ("mean of 3 seeds", "86.3", "\u00b13.0", "the standard deviation between them"):
        assert shown in text
        assert shown in as_html(table)
    assert as_csv(table).splitlines()[0].endswith("gqa_marks,gqa_deviation")


def test_other_questions_and_a_second_run_of_a_seed_are_no_group(runs: list[Path], tmp_path: Path) -> None:
    first, again = tmp_path / "train1" / "checkpoints" / "step_00000010", tmp_path / "again"
    beams = evaluated(tmp_path / "beams", tmp_path / "train2" / "checkpoints" / "step_00000010", 80.0, sha256="cd")
    found = groups_of_seeds([read_run(place) for place in (runs[0], beams, evaluated(again, first, 86.0))])
    assert [len(group) for group in found] == [1, 1, 1]


def test_a_seed_without_the_rest_is_refused(runs: list[Path]) -> None:
    results = read_results(runs[0])
    del results["checkpoint"]["recipe_sha256"]
    (runs[0] / "results.json").write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(Exception, match=r"checkpoint\.seed is 1"):
        read_run(runs[0])
