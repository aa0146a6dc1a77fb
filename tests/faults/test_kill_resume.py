"""A run that is killed, told to stop, or finds a damaged checkpoint goes on as if nothing had happened, bit for bit."""

import errno
import os
import random
import shutil
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from instructblip.training import setup as training_setup
from instructblip.weights import checkpoint as checkpoint_module
from instructblip.weights.checkpoint import checkpoint_folders, load_checkpoint, newest_whole
from tests.kit.runs import (
    FINAL_SAMPLES,
    STEPS,
    World,
    nothing,
    read_lines,
    run,
    scores,
    signal_in_evaluation,
    start,
)

# All of a metrics line that is no measure of time.
EXACT = ("step", "phase", "loss", "loss_by_dataset", "lr", "grad_norm", "tokens", "sample_ids", "validation")


def metrics_of(run_folder: Path) -> list[dict[str, Any]]:
    return [{key: line.get(key) for key in EXACT} for line in read_lines(run_folder / "metrics.jsonl")]


def assert_same_run(found: Path, expected: Path) -> None:
    """Same losses, sample ids and validation scores at every step; same weights, optimiser state and test scores."""
    assert metrics_of(found) == metrics_of(expected)
    assert [line["step"] for line in metrics_of(found)] == list(range(1, STEPS + 1))
    for name in ("model", "optimizer"):
        file = f"checkpoints/step_{STEPS:08d}/{name}.safetensors"
        assert_same_tensors(load_file(found / file), load_file(expected / file))
    assert scores(found / "evaluation") == scores(expected / "evaluation")
    leftovers = [str(path) for path in found.rglob("*.partial")]
    assert leftovers == []


def assert_same_tensors(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


def overrides(world: World, output: Path) -> list[str]:
    return [*world.train, f"output={output}"]


def die_saving(step: int) -> None:
    """Kill this process when half of a step's checkpoint is written."""
    save_file = checkpoint_module.save_file

    def dying(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file(tensors, path)
        if f"step_{step:08d}" in str(path):
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint_module.save_file = dying  # type: ignore[assignment]


@pytest.mark.slow
def test_ten_kills_leave_no_trace(world: World, finished_run: Path, tmp_path: Path) -> None:
    """Four between steps, three while saving, three while validating or evaluating what was learned."""
    arguments, metrics = overrides(world, tmp_path), tmp_path / "demo/metrics.jsonl"
    chance = random.Random(2305)
    kills: dict[int, Callable[[], None] | None] = dict.fromkeys(chance.sample((2, 6, 7, 11, 13, 14, 18, 19, 22), 4))
    kills |= {step: partial(die_saving, step) for step in chance.sample((4, 8, 12, 16, 24), 3)}
    validated = chance.sample((10, 15, 20), 2)  # started a few steps before, it is the first validation of its process
    kills |= {step: partial(signal_in_evaluation, chance.choice((1, 2, 3)), signal.SIGKILL) for step in validated}
    kills[STEPS + 1] = partial(signal_in_evaluation, 3, signal.SIGKILL)
    assert len(kills) == 10
    for step, before in sorted(kills.items()):
        command = start(world, "train.py", *arguments, "resume=auto", cwd=tmp_path, before=before or nothing)
        if before is None:
            command.wait_for_lines(metrics, step)
            os.kill(command.process.pid or 0, signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL, f"step {step}:\n{command.output}"
        if isinstance(before, partial) and before.func is die_saving:
            assert list((tmp_path / "demo/checkpoints").glob(f"step_{step:08d}.*.partial"))
    printed = run(world, "train.py", *arguments, "resume=auto", cwd=tmp_path)
    assert "continuing" in printed
    assert_same_run(tmp_path / "demo", finished_run)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "damage"), [("model.safetensors", cut), ("optimizer.safetensors", flip_a_bit)])
def test_a_damaged_newest_checkpoint_is_passed_over(
    world: World, finished_run: Path, tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    shutil.copytree(finished_run, tmp_path / "demo", ignore=shutil.ignore_patterns("evaluation"))
    newest, older = checkpoint_folders(tmp_path / "demo/checkpoints")
    damage(newest / file)
    printed = run(world, "train.py", *overrides(world, tmp_path), "resume=auto", cwd=tmp_path)
    complaint = next(line for line in printed.splitlines() if "passed over" in line)
    assert str(newest) in complaint
    assert file in complaint
    assert f"continuing {older} after step 20" in printed
    assert_same_run(tmp_path / "demo", finished_run)


@pytest.mark.slow
def test_told_to_stop_it_saves_and_says_how_to_go_on(world: World, finished_run: Path, tmp_path: Path) -> None:
    arguments = overrides(world, tmp_path)
    command = start(world, "train.py", *arguments, cwd=tmp_path)
    command.wait_for_lines(tmp_path / "demo/metrics.jsonl", 6)
    command.process.terminate()
    assert command.wait() == 128 + signal.SIGTERM
    steps = len(metrics_of(tmp_path / "demo"))
    assert 6 <= steps < STEPS
    assert checkpoint_folders(tmp_path / "demo/checkpoints")[0].name == f"step_{steps:08d}"
    assert "resume=auto" in command.output.splitlines()[-1]
    run(world, "train.py", *arguments, "resume=auto", cwd=tmp_path)
    assert_same_run(tmp_path / "demo", finished_run)


def stop_while_building() -> None:
    """SIGTERM to this process while it builds the model."""
    build_model = training_setup.build_model

    def stopped(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return build_model(*arguments, **options)

    training_setup.build_model = stopped


def stop_while_saving() -> None:
    """SIGUSR1 to this process while it writes the checkpoint of step 8."""
    save_file = checkpoint_module.save_file

    def stopped(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "step_00000008" in str(path) and path.name == checkpoint_module.MODEL_FILE:
            os.kill(os.getpid(), signal.SIGUSR1)
        save_file(tensors, path)

    checkpoint_module.save_file = stopped  # type: ignore[assignment]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "number", "steps"),
    [
        (stop_while_building, signal.SIGTERM, range(0, 1)),
        (partial(signal_in_evaluation, 2, signal.SIGTERM), signal.SIGTERM, range(10, 11)),
        (stop_while_saving, signal.SIGUSR1, range(8, STEPS)),
        (partial(signal_in_evaluation, 12, signal.SIGINT), signal.SIGINT, range(STEPS, STEPS + 1)),
    ],
    ids=["building", "validating", "saving", "evaluating"],
)
def test_told_to_stop_at_any_time_it_leaves_a_checkpoint(
    world: World, finished_run: Path, tmp_path: Path, before: Callable[[], None], number: int, steps: range
) -> None:
    arguments = overrides(world, tmp_path)
    command = start(world, "train.py", *arguments, cwd=tmp_path, before=before)
    assert command.wait() == 128 + number, command.output
    found = checkpoint_folders(tmp_path / "demo/checkpoints")
    assert (load_checkpoint(found[0]).step if found else 0) in steps
    assert "stopped" in command.output.splitlines()[-1]
    run(world, "train.py", *arguments, "resume=auto", cwd=tmp_path)
    assert_same_run(tmp_path / "demo", finished_run)


def fill_the_disk() -> None:
    """The checkpoint of step 8 finds no space."""
    save_file = checkpoint_module.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "step_00000008" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    checkpoint_module.save_file = full  # type: ignore[assignment]


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_the_older_checkpoint(world: World, tmp_path: Path) -> None:
    command = start(world, "train.py", *overrides(world, tmp_path), cwd=tmp_path, before=fill_the_disk)
    assert command.wait() == 2, command.output
    last = command.output.splitlines()[-1]
    assert "disk full while writing" in last
    assert "resume=auto" in last
    assert newest_whole(tmp_path / "demo/checkpoints")[0] == tmp_path / "demo/checkpoints/step_00000004"


@pytest.mark.slow
def test_a_full_disk_is_said_and_training_goes_on_by_choice(world: World, finished_run: Path, tmp_path: Path) -> None:
    arguments = [*overrides(world, tmp_path), "+recipe.full_disk=continue"]
    command = start(world, "train.py", *arguments, cwd=tmp_path, before=fill_the_disk)
    assert command.wait() == 0, command.output
    assert "training goes on without it" in command.output
    assert_same_run(tmp_path / "demo", finished_run)


@pytest.mark.slow
def test_a_finished_run_resumed_only_repeats_what_it_wrote(world: World, finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "demo")
    before = (tmp_path / "demo/metrics.jsonl").read_bytes()
    run(world, "train.py", *overrides(world, tmp_path), "resume=auto", cwd=tmp_path)
    assert (tmp_path / "demo/metrics.jsonl").read_bytes() == before
    assert_same_run(tmp_path / "demo", finished_run)


@pytest.mark.slow
def test_a_run_is_neither_overwritten_nor_continued_as_another(
    world: World, finished_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_run, tmp_path / "demo", ignore=shutil.ignore_patterns("evaluation"))
    arguments = overrides(world, tmp_path)
    printed = run(world, "train.py", *arguments, cwd=tmp_path, status=2)
    assert printed.count("\n") == 1
    assert "already holds a run" in printed
    printed = run(world, "train.py", *arguments, "resume=auto", "seed=1", cwd=tmp_path, status=2)
    assert printed.count("\n") == 1
    assert "seed: 0 -> 1" in printed
    assert "resume_allow" in printed
    printed = run(world, "train.py", *arguments, "resume=auto", "resume_allow=[sed]", cwd=tmp_path, status=2)
    assert "did you mean seed?" in printed
    arguments += ["recipe.clip_norm=2", "resume_allow=[recipe.clip_norm]"]
    printed = run(
        world, "train.py", *arguments, "resume=auto", f"recipe.final_samples={FINAL_SAMPLES - 1}", cwd=tmp_path
    )
    assert scores(tmp_path / "demo/evaluation")["easy_vqa_shape"]["count"] == FINAL_SAMPLES - 1
    assert "changed on resuming: recipe.clip_norm: 1.0 -> 2.0" in printed
