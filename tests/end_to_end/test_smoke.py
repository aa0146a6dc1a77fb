"""experiment=smoke: made-up files of all 26 datasets, trained on together and evaluated, by the commands a user types."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from instructblip.config.schema import EvaluateConfig, TrainConfig
from instructblip.data.cards import load_card
from instructblip.training.run import train
from tests.kit.all_datasets import OTHER_WAYS, OTHERS, official_cards
from tests.kit.runs import World, compose, evaluate_here, one_thread, read_lines

PAPER = [card for card in official_cards() if card.source not in OTHERS and card.name not in OTHER_WAYS]
PAPER_HELD_IN = {card.name for card in PAPER if card.role == "held-in"}
PAPER_HELD_OUT = {card.name for card in PAPER if card.role == "held-out"}


def _tiny(world: World) -> list[str]:
    """The world's parts, without its data and recipe."""
    return [item for item in world.train if item.split(".")[0] in ("vision", "qformer", "llm")]


@pytest.fixture(scope="module")
def smoke(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The run's folder, the prepared data, and what was printed."""
    folder, console = tmp_path_factory.mktemp("smoke"), Console(file=io.StringIO(), width=200)
    overrides = ["experiment=smoke", f"data.shards={folder / 'data'}", f"output={folder / 'train'}", *_tiny(world)]
    with world.here(), one_thread():
        assert train(compose("train", TrainConfig, overrides), console).status == 0
    printed: str = console.file.getvalue()
    return folder / "train/smoke", folder / "data", printed


@pytest.mark.slow
def test_all_held_in_datasets_train_together(smoke: tuple[Path, Path, str]) -> None:
    run, _, printed = smoke
    steps = read_lines(run / "metrics.jsonl")
    assert [entry["step"] for entry in steps] == list(range(1, 51))
    drawn = {sample.split("/")[0] for entry in steps for sample in entry["sample_ids"]}
    assert len(PAPER_HELD_IN) == 13
    assert drawn == {*PAPER_HELD_IN, "aokvqa_multiple_choice"}
    assert "expected" not in printed  # the numbers of the official files
    assert "no score on them means anything" in printed and "scores mean nothing" in printed


@pytest.mark.slow
def test_held_in_sets_are_scored_on_the_way_and_at_the_end(smoke: tuple[Path, Path, str]) -> None:
    run, _, _ = smoke
    suite = compose("train", TrainConfig, ["experiment=smoke"]).suite
    validation = [entry["validation"] for entry in read_lines(run / "metrics.jsonl") if "validation" in entry]
    assert [set(scores) for scores in validation] == 2 * [set(suite.held_in)]  # half-way and after the last step
    results = json.loads((run / "evaluation/results.json").read_text())["datasets"]
    assert {name: entry["count"] for name, entry in results.items()} == dict.fromkeys(suite.held_in, 1)


@pytest.mark.slow
def test_all_held_out_datasets_are_evaluated(
    world: World, smoke: tuple[Path, Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, shards, _ = smoke
    options = ("suite=held_out", "data=synthetic", f"data.shards={shards}", "batch_size=8", "examples=2")
    results = json.loads((evaluate_here(world, run, tmp_path, *options) / "results.json").read_text())["datasets"]
    assert set(results) == PAPER_HELD_OUT and len(results) == 13
    assert all(entry["count"] > 0 and entry["failed"] == [] for entry in results.values())
    rules = {name: load_card(name).evaluation for name in results}
    assert {entry["metric"] for entry in results.values()} == {rule.metric for rule in rules.values() if rule}
    assert "scores mean nothing" in (tmp_path / "held_out/report.html").read_text()
    assert caplog.messages == []  # no warning that made-up files have not the counts of the official ones


@pytest.mark.slow
def test_any_parts_may_be_tried() -> None:
    config = compose(
        "train", TrainConfig, ["experiment=smoke", "llm=flan_t5_base", "qformer=blip2", "vision=eva_vit_g"]
    )
    assert (config.llm.name, config.qformer.name, config.data.synthetic) == ("flan_t5_base", "blip2", True)
    assert compose("evaluate", EvaluateConfig, ["checkpoint=x", "data=synthetic"]).data.shards == config.data.shards
