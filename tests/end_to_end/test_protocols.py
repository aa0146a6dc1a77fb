"""All 13 held-out and all held-in protocols through evaluate.py's own path, from prepared hand-made datasets."""

import json
from pathlib import Path
from typing import Any

import pytest

from instructblip.config.schema import CONFIGS, EvaluateConfig
from instructblip.data.cards import load_card
from tests.kit.runs import World, compose, evaluate_here, read_lines

SUITES = ("held_out", "held_in")


def stored(folder: Path) -> dict[str, Any]:
    """results.json without the time it was written at."""
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    del results["created"]
    return results


@pytest.fixture(scope="module")
def twice(
    world: World, untrained_run: Path, all_datasets: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """Each suite evaluated into two folders."""
    shards = f"data.shards={all_datasets / 'shards'}"
    found = {}
    for suite in SUITES:
        folders = [tmp_path_factory.mktemp(f"{suite}_{number}") for number in (1, 2)]
        options = (shards, f"suite={suite}", "batch_size=2", "examples=2")
        first, second = (evaluate_here(world, untrained_run, folder, *options) for folder in folders)
        found[suite] = (first, second)
    return found


def names(suite: str) -> list[str]:
    config = compose("evaluate", EvaluateConfig, ["checkpoint=x", f"suite={suite}"])
    return [*config.suite.held_in, *config.suite.held_out]


def test_the_suites_are_the_papers() -> None:
    assert {path.stem for path in (CONFIGS / "suite").glob("*.yaml")} >= {"demo", *SUITES}
    assert len(set(names("held_out"))) == 13
    assert all(load_card(name).role == "held-out" for name in names("held_out"))
    wanted = ["coco_caption", "textcaps", "vqav2", "okvqa", "aokvqa", "aokvqa_multiple_choice", "ocr_vqa"]
    assert names("held_in") == wanted


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_every_protocol_runs_and_twice_gives_the_same(twice: dict[str, tuple[Path, Path]], suite: str) -> None:
    first, second = twice[suite]
    results = stored(first)
    assert results == stored(second)
    assert list(results["datasets"]) == sorted(names(suite))
    for name, entry in results["datasets"].items():
        card = load_card(name)
        assert card.evaluation is not None
        lines = read_lines(first / name / "predictions.jsonl")
        assert (first / name / "predictions.jsonl").read_bytes() == (second / name / "predictions.jsonl").read_bytes()
        assert entry["count"] == sum(line["score"] is not None for line in lines) > 0
        assert entry["metric"] == card.evaluation.metric
        assert entry["protocol"]["preset"] == "paper"
        assert entry["protocol"]["split"] == card.evaluation.split
        if entry["low"] is None:  # resampling shows no spread, and the scale's end is no bound
            assert entry["metric"] == "cider" or entry["count"] == 1
        else:
            assert entry["low"] <= entry["value"] <= entry["high"] and entry["low"] < entry["high"]
        assert entry["failed"] == []


@pytest.mark.slow
def test_videos_are_shown_with_their_frames_and_pictures_alone(twice: dict[str, tuple[Path, Path]]) -> None:
    frames = {name: entry["protocol"]["frames"] for name, entry in stored(twice["held_out"][0])["datasets"].items()}
    assert {name for name, count in frames.items() if count == 4} == {"msvd_qa", "msrvtt_qa", "ivqa"}
    assert set(frames.values()) == {1, 4}


@pytest.mark.slow
def test_vocabularies_come_from_the_train_split(twice: dict[str, tuple[Path, Path]]) -> None:
    entry = stored(twice["held_out"][0])["datasets"]["msvd_qa"]["protocol"]
    assert (entry["candidates_from"], entry["candidates"]) == ("train_answers", [])
    assert entry["vocabulary_size"] > 1 and len(entry["vocabulary_sha256"]) == 64


@pytest.mark.slow
def test_the_released_code_is_another_protocol(
    world: World, untrained_run: Path, all_datasets: Path, twice: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    chosen = "suite.held_in=[okvqa]", "suite.held_out=[nocaps,msvd_qa,vsr,gqa]"
    folder = evaluate_here(
        world, untrained_run, tmp_path, f"data.shards={all_datasets / 'shards'}", "preset=lavis", *chosen
    )
    ours = {name: entry["protocol"] for name, entry in stored(folder)["datasets"].items()}
    assert {entry["preset"] for entry in ours.values()} == {"lavis"}
    assert ours["nocaps"]["prompt"] == "A short image caption."
    assert (ours["nocaps"]["repetition_penalty"], ours["nocaps"]["length_penalty"]) == (1.5, 1.0)
    assert (ours["okvqa"]["prompt"], ours["okvqa"]["metric"]) == ("{question}", "vqa_accuracy_lavis")
    assert (ours["okvqa"]["length_penalty"], ours["okvqa"]["transform"]) == (0.0, "center_crop")
    assert (ours["msvd_qa"]["mode"], ours["msvd_qa"]["max_new_tokens"]) == ("generate", 29)
    assert (ours["vsr"]["include_eos"], ours["vsr"]["aggregate"]) == (False, "max")
    paper = {name: entry["protocol"] for suite in SUITES for name, entry in stored(twice[suite][0])["datasets"].items()}
    assert all(paper[name]["sha256"] != entry["sha256"] for name, entry in ours.items())
    assert (paper["vsr"]["include_eos"], paper["vsr"]["aggregate"]) == (True, "sum")
