"""Whole runs of BLIP: killed ones go on bit for bit with their momentum copies and queue, and others start from them."""

import math
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import instructblip
from instructblip.errors import UserError
from instructblip.files import read_json
from instructblip.models.blip import BLIPPretrain
from instructblip.training import loop, run
from instructblip.weights.blip import save_blip
from tests.kit.blip_training import momentum_of
from tests.kit.runs import BLIP_RUNS, World, evaluate_here, read_lines, run_ranks, start, train_here
from tests.kit.runs import run as run_command

pytestmark = pytest.mark.slow

STEPS, BATCH, QUEUE = 12, 8, 20
EXACT = ("step", "loss", "loss_by_objective", "loss_by_dataset", "lr", "grad_norm", "sample_ids", "validation")


def world_of(world: World, experiment: str, *overrides: str) -> World:
    train = (f"experiment={experiment}", *world.train, *BLIP_RUNS[experiment], *overrides)
    return World(world.folder, train, world.evaluate)


def trained(world: World, output: Path, experiment: str = "blip_pretrain", *overrides: str) -> Path:
    return train_here(world_of(world, experiment, *overrides), output)


@pytest.fixture(scope="module")
def finished(blip_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(blip_world, tmp_path_factory.mktemp("finished"))


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [{key: line.get(key) for key in EXACT} for line in read_lines(folder / "metrics.jsonl")]


def last(folder: Path, name: str = "model", step: int = STEPS) -> dict[str, Tensor]:
    return load_file(folder / f"checkpoints/step_{step:08d}/{name}.safetensors")


def test_a_run_logs_each_objective_and_its_checkpoint_holds_copies_and_queue(finished: Path) -> None:
    lines = read_lines(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(
        line["loss_by_objective"].keys() == {"pair_distillation", "pair_matching", "captioning"} for line in lines
    )
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert all(0 <= line["validation"]["coco_retrieval"] <= 100 for line in lines if "validation" in line)
    held = last(finished)
    assert int(held["momentum.pointer"]) == STEPS * BATCH % QUEUE
    assert not bool((held["momentum.image_id_queue"] == -100).any())
    moved = [name for name in held if name.startswith("momentum.vision.backbone.")]
    assert moved and all(not torch.equal(held[name], held[name.removeprefix("momentum.")]) for name in moved[:4])


def test_copies_that_follow_are_no_frozen_part_of_what_is_evaluated(
    blip_world: World, finished: Path, tmp_path: Path
) -> None:
    """They move while the run goes: a fingerprint of theirs would make another model of each resumed run."""
    assert read_json(finished / f"checkpoints/step_{STEPS:08d}/state.json")["frozen"] == {}
    suite = ("suite=own", "suite.held_in=[coco_retrieval]", "blind_baseline=true")
    folder = evaluate_here(blip_world, finished, tmp_path, *suite)
    ours, runs = (read_json(place / "results.json") for place in (folder, finished / "evaluation"))
    assert ours["model"]["sha256"] == runs["model"]["sha256"]
    assert ours["datasets"]["coco_retrieval"]["value"] == runs["datasets"]["coco_retrieval"]["value"]


class Killed(BaseException):
    """Nothing catches it: a run ends where it stands, as if it were killed."""


def kill_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int) -> None:
    """End the run in the n-th call of a function, after it has done its work."""
    inner, calls = getattr(module, name), 0

    def ending(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        result = inner(*arguments, **options)
        if calls == call:
            raise Killed
        return result

    monkeypatch.setattr(module, name, ending)


# After what a run may end: the copies have moved, gradients are there, the queue is filled, a checkpoint is being written.
MOMENTS: list[tuple[Any, str]] = [(loop, "follow"), (loop, "backward"), (loop, "remember"), (run, "_save")]


def test_ten_kills_leave_no_trace(blip_world: World, finished: Path, tmp_path: Path) -> None:
    """Same samples, negatives, losses, scores, weights, copies, queue and pointer."""
    stream, folder = random.Random(5), tmp_path / "blip_pretrain"
    for number in range(10):
        module, name = MOMENTS[number % len(MOMENTS)]
        resume = ("resume=auto",) if folder.exists() else ()
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, module, name, 1 if name == "_save" else stream.randint(1, 3))
            with pytest.raises(Killed):
                trained(blip_world, tmp_path, "blip_pretrain", *resume)
    trained(blip_world, tmp_path, "blip_pretrain", "resume=auto")
    assert_same_run(folder, finished)


def test_ten_real_kills_leave_no_trace(blip_world: World, finished: Path, tmp_path: Path) -> None:
    """Of processes, wherever they are when metrics.jsonl has so many lines."""
    folder, train = tmp_path / "blip_pretrain", world_of(blip_world, "blip_pretrain", f"output={tmp_path}").train
    for lines in sorted(random.Random(6).choices(range(1, STEPS - 1), k=10)):
        command = start(blip_world, "train.py", *train, "resume=auto", cwd=tmp_path)
        command.wait_for_lines(folder / "metrics.jsonl", lines)
        os.kill(command.process.pid or 0, signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL, command.output
    run_command(blip_world, "train.py", *train, "resume=auto", cwd=tmp_path)
    assert_same_run(folder, finished)


def assert_same_run(found: Path, expected: Path) -> None:
    assert metrics_of(found) == metrics_of(expected)
    for name in ("model", "optimizer"):
        tensors, others = last(found, name), last(expected, name)
        assert tensors.keys() == others.keys()
        assert [key for key, tensor in tensors.items() if not torch.equal(tensor, others[key])] == []


def test_two_ranks_and_other_micro_batches_are_like_one_process(blip_world: World, tmp_path: Path) -> None:
    steady = (
        "text.dropout=0",
        "vision.options.drop_path_rate=0",
        "recipe.phases.pretrain.steps=2",
        "suite=none",
        "suite.held_in=[]",
    )
    alone = trained(blip_world, tmp_path / "alone", "blip_pretrain", *steady)
    options = [*blip_world.train, *BLIP_RUNS["blip_pretrain"], *steady, f"output={tmp_path}/two"]
    other = ("recipe.phases.pretrain.micro_batch_size=1", "parallel=fsdp")
    run_ranks(blip_world, "train.py", "experiment=blip_pretrain", *options, *other, cwd=tmp_path)
    folder = tmp_path / "two/blip_pretrain"
    lines, others = read_lines(folder / "metrics.jsonl"), read_lines(alone / "metrics.jsonl")
    for line, expected in zip(lines, others, strict=True):
        assert line["sample_ids"] == expected["sample_ids"]
        assert line["loss_by_objective"] == pytest.approx(expected["loss_by_objective"], rel=2e-5)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    held, expected_held = last(folder, step=2), last(alone, step=2)
    for name, tensor in held.items():
        if name.startswith("momentum."):
            torch.testing.assert_close(tensor, expected_held[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def pth(blip_world: World, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run as a file of LAVIS."""
    with blip_world.here():
        model = instructblip.load(finished, device="cpu")
    assert isinstance(model, BLIPPretrain)
    assert int(momentum_of(model).pointer) == STEPS * BATCH % QUEUE
    path = tmp_path_factory.mktemp("lavis") / "pretrained.pth"
    save_blip(model, path)
    return path


def test_a_file_with_copies_and_queue_goes_on_as_the_run_it_is_of(
    blip_world: World, finished: Path, pth: Path, tmp_path: Path
) -> None:
    """Pre-training again from the file and from the run: bit for bit the same, the queue filled from where it stood."""
    short = ("recipe.phases.pretrain.steps=3", "suite=none", "suite.held_in=[]")
    ours = trained(blip_world, tmp_path / "run", "blip_pretrain", *short, f"init_from={finished}")
    theirs = trained(blip_world, tmp_path / "file", "blip_pretrain", *short, f"init_from={pth}")
    assert metrics_of(theirs) == metrics_of(ours)
    found, expected = last(theirs, step=3), last(ours, step=3)
    assert int(found["momentum.pointer"]) == (STEPS * BATCH + 3 * BATCH) % QUEUE
    differ = {name for name, tensor in found.items() if not torch.equal(tensor, expected[name])}
    assert differ <= {"momentum.image_id_queue"}  # which LAVIS's pre-training does not have


# experiment -> what it is validated by
FINETUNED = {
    "blip_retrieval_coco": "coco_retrieval",
    "blip_caption_coco": "coco_caption_blip",
    "blip_vqa": "easy_vqa_color",
}


@pytest.mark.parametrize("experiment", FINETUNED)
def test_what_was_pre_trained_is_fine_tuned(
    experiment: str, blip_world: World, world: World, finished: Path, tmp_path: Path
) -> None:
    """It goes on from there: after three steps each weight of the vision encoder is near where it was, and another."""
    shards = (f"data.shards={world.shards}",) if experiment == "blip_vqa" else ()
    folder = trained(blip_world, tmp_path, experiment, *shards, f"init_from={finished}")
    held, before = last(folder, step=3), last(finished)
    name = "vision.backbone.blocks.0.mlp.fc1.weight"
    assert 0 < float((held[name] - before[name]).abs().max()) < 0.02
    assert any(key.startswith("momentum.") for key in held) == (experiment == "blip_retrieval_coco")
    lines = read_lines(folder / "metrics.jsonl")
    assert len(lines) == 3 and all(math.isfinite(line["loss"]) and line["mfu"] > 0 for line in lines)
    assert lines[-1]["validation"].keys() == {FINETUNED[experiment]}


MISTAKES = {
    "recipe.phases.pretrain.negatives_among=3": "negatives_among=3 does not cut recipe.phases.pretrain.batch_size=8 into",
    "recipe.phases.pretrain.negatives_among=1": "negatives_among=1 does not cut",
    "recipe.phases.pretrain.gather=detached": "gather=detached is of objectives over the whole batch, and there are none",
    "recipe.phases.pretrain.objectives={pair_distillation: 0.0, pair_matching: 0.0}": "soft_targets_ramp is of ob",
    "recipe.phases.pretrain.plateau_decay=0.9": "plateau_decay is from plateau to plateau; set recipe.phases.pretrain",
    "recipe.phases.pretrain.objectives={answering: 1.0, alignment: 1.0}": "alignment needs embedding_length, which model=bl",
    "recipe.phases.pretrain.objectives={pair_matching: 1.0, matching: 1.0}": "and matching draw the wrong pairs in diff",
    "model.queue_size=null": "model.queue_size=null leaves pair_distillation nothing to compare with",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_are_one_line(blip_world: World, tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match=MISTAKES[override]) as error:
        trained(blip_world, tmp_path, "blip_pretrain", override)
    assert "\n" not in str(error.value)
