"""The two main commands on tiny parts: what they leave, and that they agree with each other."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.kit.runs import (
    DATASETS,
    FINAL_SAMPLES,
    REPOSITORY,
    STEPS,
    World,
    evaluate_here,
    predictions,
    read_lines,
    run,
    scores,
    train_here,
)

CANDIDATES = 13
VERBALIZERS = 4


def python(world: World, script: str, arguments: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """An entry point in a fresh interpreter, as a user starts it."""
    environment = {**os.environ, **world.environment, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def listing(world: World) -> set[str]:
    """Every file that a command reads and must not add to: the world's, but for its cache, and the repository's code."""
    folders = [world.folder / name for name in ("parts", "raw", "shards")]
    folders += [REPOSITORY / name for name in ("configs", "datasets", "instructblip")]
    return {f"{folder}/{name}" for folder in folders for name in below(folder) if "__pycache__" not in name}


EVALUATION_FILES = {
    "results.json",
    "report.html",
    *(f"{name}/predictions.jsonl" for name in DATASETS),
}
RUN_FILES = {
    ".lock",
    "config.yaml",
    "metrics.jsonl",
    "curves.png",
    *(f"evaluation/{name}" for name in EVALUATION_FILES),
    *(f"evaluation/{name}/images_withheld/predictions.jsonl" for name in DATASETS),
    *(
        f"checkpoints/step_{step:08d}/{name}"
        for step in (20, STEPS)
        for name in ("model.safetensors", "optimizer.safetensors", "state.json")
    ),
}


@pytest.mark.slow
def test_the_two_commands_as_a_user_types_them(world: World, finished_run: Path, tmp_path: Path) -> None:
    before = listing(world)
    trained = python(world, "train.py", world.train, tmp_path)
    assert trained.returncode == 0, trained.stderr
    evaluated = python(
        world, "evaluate.py", [*world.evaluate, "checkpoint=outputs/train/demo", f"samples={FINAL_SAMPLES}"], tmp_path
    )
    assert evaluated.returncode == 0, evaluated.stderr

    train, evaluation = "outputs/train/demo", "outputs/evaluate/demo"
    expected = {f"{train}/{name}" for name in RUN_FILES}
    expected |= {f"{evaluation}/{name}" for name in (*EVALUATION_FILES, ".lock")}
    assert below(tmp_path) == expected  # and so nothing else where the commands were run
    assert listing(world) == before
    for output, folder, names in (
        (trained.stdout, train, ("config.yaml", "metrics.jsonl", "curves.png", "evaluation/report.html")),
        (evaluated.stdout, evaluation, ("results.json", "report.html", "easy_vqa_shape/predictions.jsonl")),
    ):
        for name in names:
            assert f"wrote {folder}/{name}" in output
    assert "Traceback" not in trained.stderr + evaluated.stderr

    assert (
        scores(tmp_path / evaluation) == scores(tmp_path / train / "evaluation") == scores(finished_run / "evaluation")
    )
    assert predictions(tmp_path / evaluation) == predictions(tmp_path / train / "evaluation")


def test_metrics_have_their_keys(finished_run: Path) -> None:
    lines = read_lines(finished_run / "metrics.jsonl")
    always = {"step", "phase", "loss", "loss_by_dataset", "lr", "grad_norm", "tokens", "sample_ids"}
    always |= {"samples_per_second", "tokens_per_second", "mfu", "data_wait_fraction", "padding_fraction", "memory"}
    for line in lines:
        due = line["step"] % 5 == 0 or line["step"] == lines[-1]["step"]
        validated = {"validation"} if due and line["phase"] == "instruction" else set()
        assert line.keys() == always | validated
        assert len(line["sample_ids"]) == 4
        assert {sample_id.split("/")[0] for sample_id in line["sample_ids"]} == line["loss_by_dataset"].keys()
        assert 0 <= line["data_wait_fraction"] <= 1
        assert 0 < line["mfu"] < 1
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["phase"] for line in lines] == ["alignment"] * 9 + ["instruction"] * 15
    assert lines[9]["validation"].keys() == {"easy_vqa_yes_no", "easy_vqa_shape", "easy_vqa_color"}


def test_curves_are_a_picture(finished_run: Path) -> None:
    with Image.open(finished_run / "curves.png") as picture:
        assert min(picture.size) > 400
        assert len(np.unique(np.array(picture.convert("L")))) > 20


def test_predictions_say_what_was_asked_and_answered(finished_run: Path) -> None:
    for name in DATASETS:
        for line in read_lines(finished_run / "evaluation" / name / "predictions.jsonl"):
            assert line.keys() == {
                "key",
                "id",
                "image",
                "prompt",
                "answers",
                "prediction",
                "score",
                "scores",
                "checksum",
            }
            assert line["id"].startswith(f"{name}/test-")
            assert line["score"] == 100.0 * (line["prediction"] in line["answers"])
            assert len(line["scores"]) == (VERBALIZERS if name == "easy_vqa_statements" else CANDIDATES)
            assert all(score < 0 for score in line["scores"])


@pytest.mark.parametrize("cache", ["true", "false"])
@pytest.mark.parametrize("batch_size", [1, 32])
def test_evaluate_agrees_with_the_runs_own_last_evaluation(
    world: World, finished_run: Path, tmp_path: Path, cache: str, batch_size: int
) -> None:
    found = evaluate_here(
        world,
        finished_run,
        tmp_path,
        f"samples={FINAL_SAMPLES}",
        f"data.cache_features={cache}",
        f"batch_size={batch_size}",
        "blind_baseline=true",
    )
    own = finished_run / "evaluation"
    models = [json.loads((folder / "results.json").read_text())["model"] for folder in (found, own)]
    assert models[0] == models[1]
    assert scores(found) == scores(own)
    assert predictions(found) == predictions(own)
    assert predictions(found, "images_withheld") == predictions(own, "images_withheld")
    for name in DATASETS:
        pairs = zip(*(read_lines(folder / name / "predictions.jsonl") for folder in (found, own)), strict=True)
        for ours, theirs in pairs:
            assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-4)


@pytest.mark.slow
def test_without_cache_and_prepared_shards_the_same_model_is_trained(
    world: World, finished_run: Path, tmp_path: Path
) -> None:
    options = ("data.cache_features=false", f"data.shards={tmp_path / 'shards'}")
    found = train_here(world, tmp_path / "outputs", *options)
    assert below(tmp_path / "shards") == below(world.shards)
    for ours, theirs in zip(
        read_lines(found / "metrics.jsonl"), read_lines(finished_run / "metrics.jsonl"), strict=True
    ):
        assert ours["sample_ids"] == theirs["sample_ids"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
    assert below(found) == RUN_FILES


@pytest.mark.slow
def test_all_questions_when_no_number_is_given(world: World, finished_run: Path, tmp_path: Path) -> None:
    found = evaluate_here(world, finished_run, tmp_path)
    assert {name: score["count"] for name, score in scores(found).items()} == {
        "easy_vqa_yes_no": 48,
        "easy_vqa_shape": 12,
        "easy_vqa_color": 12,
        "easy_vqa_statements": 48,
    }
    shown = {sample_id for sample_id, _, _ in predictions(found)["easy_vqa_shape"]}
    assert {sample_id for sample_id, _, _ in predictions(finished_run / "evaluation")["easy_vqa_shape"]} < shown


@pytest.mark.slow
def test_open_generation(world: World, finished_run: Path, tmp_path: Path) -> None:
    options = ("mode=generate", "samples=3", "suite.held_out=[]")
    folder = evaluate_here(world, finished_run, tmp_path / "together", *options)
    lines = read_lines(folder / "easy_vqa_color/predictions.jsonl")
    assert len(lines) == 3
    assert all(isinstance(line["prediction"], str) and line["scores"] == [] for line in lines)
    alone = evaluate_here(world, finished_run, tmp_path / "alone", *options, "batch_size=1")
    assert read_lines(alone / "easy_vqa_color/predictions.jsonl") == lines


@pytest.mark.slow
def test_withheld_images_are_not_looked_at(world: World, finished_run: Path, tmp_path: Path) -> None:
    samples = f"samples={FINAL_SAMPLES}"
    folder = evaluate_here(world, finished_run, tmp_path, samples, "withhold_images=true", "blind_baseline=true")
    assert not list(folder.rglob("images_withheld"))  # the evaluation itself is the blind one
    by_prompt: dict[str, set[str]] = {}
    for line in read_lines(folder / "easy_vqa_yes_no/predictions.jsonl"):
        by_prompt.setdefault(line["prompt"], set()).add(line["prediction"])
    assert all(len(found) == 1 for found in by_prompt.values())
    own = finished_run / "evaluation/easy_vqa_shape/images_withheld/predictions.jsonl"
    assert [line["prediction"] for line in read_lines(folder / "easy_vqa_shape/predictions.jsonl")] == [
        line["prediction"] for line in read_lines(own)
    ]


@pytest.mark.slow
def test_trackers_stay_below_the_output_folder(world: World, finished_run: Path, tmp_path: Path) -> None:
    both = "logger.kind=[wandb,tensorboard]"
    arguments = [*world.evaluate, f"checkpoint={finished_run}", "samples=2", both, "name=tracked"]
    run(world, "evaluate.py", *arguments, cwd=tmp_path)
    journals = list((tmp_path / "outputs/evaluate/tracked/wandb").glob("offline-run-*/*.wandb"))
    assert len(journals) == 1
    assert journals[0].stat().st_size > 1000
    assert len(list((tmp_path / "outputs/evaluate/tracked/tensorboard").glob("events.out.tfevents.*"))) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"outputs", "evaluate.py.log"}
    assert {path.name for path in (tmp_path / "outputs/evaluate").iterdir()} == {"tracked"}


@pytest.mark.slow
def test_the_ablations_are_other_models(world: World, finished_run: Path, tmp_path: Path) -> None:
    own = [line["loss"] for line in read_lines(finished_run / "metrics.jsonl")]
    few = "recipe.final_samples=3"
    unaware = train_here(world, tmp_path, "name=not_aware", "qformer.instruction_aware=false", few)
    assert [line["loss"] for line in read_lines(unaware / "metrics.jsonl")] != own
    assert scores(evaluate_here(world, unaware, tmp_path / "evaluate", "samples=3")) == scores(unaware / "evaluation")
    unbalanced = train_here(world, tmp_path, "name=unbalanced", "mixture.weights=proportional", few)
    drawn = [name for line in read_lines(unbalanced / "metrics.jsonl") for name in line["sample_ids"]]
    balanced = [name for line in read_lines(finished_run / "metrics.jsonl") for name in line["sample_ids"]]
    assert drawn != balanced  # by which shares, tests/unit/test_mixture.py shows


@pytest.mark.slow
def test_prepare_fetch_and_check(world: World, tmp_path: Path) -> None:
    arguments = ["dataset=easy_vqa", f"raw={world.raw}", "out=shards"]
    printed = run(world, "prepare.py", *arguments, cwd=tmp_path)
    assert "wrote shards/easy_vqa/test/manifest.json: 12 images, 132 records, 0 records lost" in printed
    assert below(tmp_path / "shards") == below(world.shards)
    for name in below(world.shards):
        assert (tmp_path / "shards" / name).read_bytes() == (world.shards / name).read_bytes()
    assert "all shards are whole" in run(world, "prepare.py", "check=shards", cwd=tmp_path)
    shard = tmp_path / "shards/easy_vqa/test/shard-000000.tar"
    os.truncate(shard, shard.stat().st_size - 512)
    assert str(shard.relative_to(tmp_path)) in run(world, "prepare.py", "check=shards", cwd=tmp_path, status=1)
