"""A run that is killed, told to stop, or finds a damaged checkpoint goes on as if nothing had happened, bit for bit."""

import os
import random
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from instructblip.training import checkpoint as checkpoint_module
from instructblip.training.checkpoint import checkpoint_folders
from tests.runs import FINAL_SAMPLES, STEPS, World, read_lines, run, scores, start

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


def test_five_kills_leave_no_trace(world: World, finished_run: Path, tmp_path: Path) -> None:
    arguments = overrides(world, tmp_path)
    metrics = tmp_path / "demo/metrics.jsonl"
    kills = sorted(random.Random(2305).sample(range(1, STEPS - 1), 5))
    for step in kills:
        command = start(world, "train.py", *arguments, "resume=auto", cwd=tmp_path)
        command.wait_for_lines(metrics, step)
        os.kill(command.process.pid or 0, signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
        assert step <= len(read_whole_lines(metrics)) < STEPS
    printed = run(world, "train.py", *arguments, "resume=auto", cwd=tmp_path)
    assert "continuing" in printed
    assert_same_run(tmp_path / "demo", finished_run)


def read_whole_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def die_in_the_third_save() -> None:
    """Kill this process when half of the third checkpoint's weights are written."""
    saves = 0
    save_file = checkpoint_module.save_file

    def dying(tensors: dict[str, torch.Tensor], path: Path) -> None:
        nonlocal saves
        saves += path.name == checkpoint_module.MODEL_FILE
        save_file(tensors, path)
        if saves == 3:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint_module.save_file = dying  # type: ignore[assignment]


def test_a_kill_in_the_middle_of_a_save_is_cleaned_up(world: World, finished_run: Path, tmp_path: Path) -> None:
    arguments = overrides(world, tmp_path)
    command = start(world, "train.py", *arguments, cwd=tmp_path, before=die_in_the_third_save)
    assert command.wait() == -signal.SIGKILL
    folder = tmp_path / "demo/checkpoints"
    assert len(list(folder.glob("step_00000012.*.partial"))) == 1
    assert [path.name for path in checkpoint_folders(folder)] == ["step_00000008", "step_00000004"]
    printed = run(world, "train.py", *arguments, "resume=auto", cwd=tmp_path)
    assert "after step 8" in printed
    assert_same_run(tmp_path / "demo", finished_run)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


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


def test_a_finished_run_resumed_only_repeats_what_it_wrote(world: World, finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "demo")
    before = (tmp_path / "demo/metrics.jsonl").read_bytes()
    run(world, "train.py", *overrides(world, tmp_path), "resume=auto", cwd=tmp_path)
    assert (tmp_path / "demo/metrics.jsonl").read_bytes() == before
    assert_same_run(tmp_path / "demo", finished_run)


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
    printed = run(
        world, "train.py", *arguments, "resume=auto", f"recipe.final_samples={FINAL_SAMPLES - 1}", cwd=tmp_path
    )
    assert scores(tmp_path / "demo/evaluation")["easy_vqa_shape"]["count"] == FINAL_SAMPLES - 1
