"""The demo's parts aligned by BLIP-2's two stages, then tuned: the experiments, and the study that compares their runs."""

import sys
from pathlib import Path

import pytest
from rich.console import Console

from instructblip.config.schema import TrainConfig
from instructblip.data.cards import load_card
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.training.planned import print_plan
from instructblip.training.run import train
from instructblip.weights.checkpoint import load_checkpoint, newest_whole
from tests.kit.own_data import write_own_data
from tests.kit.runs import REPOSITORY, World, compose, one_thread, read_lines

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import align_study
from align_study import DATASETS, RUNS, Found, Study, tables

STAGES = ("align_demo_stage1", "align_demo_stage2", "align_demo")
STEPS = {"stage1": 2, "stage2": 2, "cosine": 2, "tuned": 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_planned_and_names_the_one_before(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = compose("train", TrainConfig, [f"experiment={name}", "plan=true"])
    assert print_plan(config, Console()) == 0
    assert "It fits" in capsys.readouterr().out
    before = dict(zip(STAGES[1:], STAGES, strict=False)).get(name)
    assert config.init_from == ([] if before is None else [f"outputs/train/{before}"])


@pytest.mark.slow
def test_photos_of_ones_own_take_the_pictures_place(world: World, tmp_path: Path) -> None:
    card = write_own_data(tmp_path, task="captioning", columns={"captions": "answer"})
    prepare_dataset(load_card(card), tmp_path, tmp_path / "shards", progress=False)
    parts = [text for text in world.train if text.startswith(("vision.", "qformer."))]
    own = ["mixture=own", f"mixture.datasets=[{{name: {card}}}]", "mixture.templates=caption_alone", "suite=none"]
    place = [f"data.shards={tmp_path / 'shards'}", f"output={tmp_path / 'out'}", "recipe.phases.align.steps=2"]
    config = compose("train", TrainConfig, ["experiment=align_demo_stage1", *own, *place, *parts])
    with world.here(), one_thread():
        assert train(config, Console(quiet=True)).status == 0
    lines = read_lines(tmp_path / "out/align_demo_stage1/metrics.jsonl")
    assert {name.partition("/")[0] for line in lines for name in line["sample_ids"]} == {"mine"}


@pytest.fixture(scope="module")
def study(world: World, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """One seed of all runs, two steps each, on tiny parts."""
    parts = [text for text in world.train if text.startswith(("vision.", "qformer.", "llm.", "data."))]
    study = Study(tmp_path_factory.mktemp("study"), steps=STEPS, samples=3, parts=parts)
    with world.here(), one_thread():
        for name in RUNS:
            study.do(name, 1)
    return study


@pytest.mark.slow
def test_runs_start_from_the_one_that_they_follow(study: Study) -> None:
    for name, run in RUNS.items():
        checkpoint, _ = newest_whole(study.folder / f"{name.replace(' ', '_')}_1" / "checkpoints")
        assert checkpoint is not None
        start = load_checkpoint(checkpoint).state["start"]
        assert [found["name"] for found in start["weights"]] == ([] if run.after is None else [f"{run.after}_1"])


@pytest.mark.slow
def test_all_are_tuned_alike_and_asked_alike(study: Study) -> None:
    found = study.measured()
    tuned = [found[name, 1] for name in RUNS if name.startswith(align_study.TUNED)]
    assert [(entry["steps"], entry["batch"], set(entry["scores"])) for entry in tuned] == [(2, 8, set(DATASETS))] * 4
    assert found["stage1", 1]["scores"].keys() == {"caption", "itc", "itm"}
    assert found["stage2", 1]["scores"].keys() == {"caption"}
    assert all(entry["cpu_seconds"] > 0 for entry in found.values())
    assert [table.row_count for table in tables(Found(found, [1]))] == [5, 16]


def test_spread_and_intervals_are_over_seeds() -> None:
    # t = 4.303 with two degrees of freedom, s = 10
    assert align_study.summary([80.0, 90.0, 100.0]) == "90.0 ± 10.0 [65.2, 114.8]"
    assert align_study.summary([80.0]) == "80.0"
