"""Several ranks end together: told to stop, or when one of them dies or falls silent; another number of them goes on."""

import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from instructblip.evaluation import runner
from instructblip.weights.checkpoint import checkpoint_folders
from tests.kit.runs import STEPS as ALL_STEPS
from tests.kit.runs import World, read_lines, run, scores, signal_in_evaluation, start_ranks

pytestmark = pytest.mark.slow

STEPS = 24
RECIPE = (
    "~recipe.phases",
    f"recipe.phases={{instruction: {{steps: {STEPS}, batch_size: 4, learning_rate: 1e-4}}}}",
    "recipe.checkpoint_every=4",
    "recipe.validate_every=50",
    "suite.held_in=[]",
    "suite.held_out=[]",
    "qformer.dropout=0",  # its masks are drawn by rank
    "parallel.timeout=3",
)


def overrides(world: World, output: Path) -> list[str]:
    return [*world.train, *RECIPE, f"output={output}"]


def test_all_stop_at_one_step_and_one_goes_on_alone(world: World, tmp_path: Path) -> None:
    """Only rank 1 is told; the run goes on with one process and gives the samples and losses of one process."""
    arguments = overrides(world, tmp_path)
    commands = start_ranks(world, "train.py", *arguments, cwd=tmp_path)
    commands[0].wait_for_lines(tmp_path / "demo/metrics.jsonl", 6)
    commands[1].process.terminate()
    codes = [command.wait() for command in commands]
    assert codes == [128 + signal.SIGTERM] * 2, commands[0].output + commands[1].output
    steps = len(read_lines(tmp_path / "demo/metrics.jsonl"))
    assert checkpoint_folders(tmp_path / "demo/checkpoints")[0].name == f"step_{steps:08d}"
    assert steps < STEPS
    run(world, "train.py", *arguments, "resume=auto", cwd=tmp_path)
    run(world, "train.py", *overrides(world, tmp_path / "alone"), cwd=tmp_path)
    found, expected = (read_lines(folder / "demo/metrics.jsonl") for folder in (tmp_path, tmp_path / "alone"))
    assert [line["sample_ids"] for line in found] == [line["sample_ids"] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=1e-5)


def signal_to_the_second(number: int) -> None:
    """Rank 1 gets SIGTERM when it is to answer its n-th question; both have some in every dataset."""
    runner._BATCHES_PER_CHUNK = 1
    if os.environ["RANK"] == "1":
        signal_in_evaluation(number, signal.SIGTERM)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(("number", "step"), [(2, 10), (29, ALL_STEPS)], ids=["validating", "evaluating"])
def test_all_stop_when_one_is_told_in_an_evaluation(
    world: World, tmp_path: Path, kind: str, number: int, step: int
) -> None:
    if kind == "ddp":
        number = (number + 1) // 2  # rank 1 answers half of the questions
    arguments = [*world.train, f"parallel={kind}", "parallel.timeout=30", f"output={tmp_path}"]
    arguments.append("evaluation.batch_size=1")
    before = partial(signal_to_the_second, number)
    began = time.monotonic()
    commands = start_ranks(world, "train.py", *arguments, cwd=tmp_path, before=before)
    codes = [command.wait() for command in commands]
    assert codes == [128 + signal.SIGTERM] * 2, commands[0].output + commands[1].output
    assert time.monotonic() - began < 60
    assert f"stopped at step {step}" in commands[0].output.splitlines()[-1]
    assert checkpoint_folders(tmp_path / "demo/checkpoints")[0].name == f"step_{step:08d}"
    run(world, "train.py", *arguments, "resume=auto", cwd=tmp_path)
    assert [line["step"] for line in read_lines(tmp_path / "demo/metrics.jsonl")] == list(range(1, ALL_STEPS + 1))
    assert len(scores(tmp_path / "demo/evaluation")) > 0
    assert not (tmp_path / "demo/stopping").exists()


def die_validating() -> None:
    """Rank 1 dies when it is to answer its second question; the bound is parallel.timeout."""
    runner._BATCHES_PER_CHUNK = 1
    if os.environ["RANK"] == "1":
        signal_in_evaluation(2, signal.SIGKILL)


def test_a_rank_that_dies_while_validating_ends_the_others_within_the_bound(world: World, tmp_path: Path) -> None:
    arguments = [*world.train, "parallel.timeout=3", f"output={tmp_path}", "evaluation.batch_size=1"]
    commands = start_ranks(world, "train.py", *arguments, cwd=tmp_path, before=die_validating)
    assert commands[1].wait() == -signal.SIGKILL, commands[1].output
    began = time.monotonic()
    assert commands[0].wait() == 2, commands[0].output
    assert time.monotonic() - began < 3 + 7  # the bound, and the end of the process on a loaded machine
    last = commands[0].output.splitlines()[-1]
    assert re.match("error: rank (1 of the evaluation gave no sign of life for 3 s|0 lost the others)", last), last
    assert checkpoint_folders(tmp_path / "demo/checkpoints")[0].name == "step_00000008"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "silent"])
def test_a_lost_rank_ends_the_others_within_the_bound(world: World, tmp_path: Path, number: int) -> None:
    commands = start_ranks(world, "train.py", *overrides(world, tmp_path), cwd=tmp_path)
    commands[0].wait_for_lines(tmp_path / "demo/metrics.jsonl", 5)
    began = time.monotonic()
    os.kill(commands[1].process.pid or 0, number)
    try:
        assert commands[0].wait() == 2, commands[0].output
        assert time.monotonic() - began < 3 + 7  # the bound, and the end of the process on a loaded machine
    finally:
        commands[1].process.kill()  # which does nothing to a dead one
        commands[1].wait()
    assert "rank 0 lost the others" in commands[0].output.splitlines()[-1]
    assert checkpoint_folders(tmp_path / "demo/checkpoints")
