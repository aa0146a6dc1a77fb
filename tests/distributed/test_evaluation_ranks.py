"""Evaluation by several processes: the same files as one writes, whoever is killed on the way."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from instructblip.errors import UserError
from instructblip.evaluation import heartbeat, journal, runner
from tests.kit.runs import Command, World, evaluate_here, predictions, run, start

OVERRIDES = ("samples=10", "batch_size=1")


@pytest.fixture(scope="module")
def alone(world: World, untrained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an evaluation by one process."""
    return evaluate_here(world, untrained_run, tmp_path_factory.mktemp("alone"), *OVERRIDES)


def be_rank(rank: int, count: int, and_then: Callable[[], None] | None = None) -> None:
    """Give this process the environment that torchrun gives."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    if and_then is not None:
        and_then()


def watch_closely() -> None:
    """Find out within two seconds that another rank is lost."""
    heartbeat.BEAT_SECONDS, heartbeat.LOST_SECONDS = 0.1, 2.0


def die_at_the_third_answer() -> None:
    """Kill this process in the midst of a line."""
    watch_closely()
    append, batches = journal._append, 0

    def dying(path: Path, lines: list[str]) -> None:
        nonlocal batches
        batches += 1
        append(path, lines)
        if batches == 3:
            wait_for_the_first(path.parents[1])
            os.truncate(path, path.stat().st_size - 20)
            os.kill(os.getpid(), signal.SIGKILL)

    journal._append = dying  # type: ignore[assignment]


def wait_for_the_first(folder: Path) -> None:
    """Until the first rank watches this one: it takes what was there before for that of an evaluation that was killed."""
    end = time.monotonic() + 60
    while not (folder / ".rank-0").exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(5 * heartbeat.BEAT_SECONDS)


def arguments(world: World, checkpoint: Path, output: Path) -> list[str]:
    return [*world.evaluate, f"checkpoint={checkpoint}", f"output={output}", *OVERRIDES]


def start_ranks(
    world: World, checkpoint: Path, output: Path, befores: Sequence[Callable[[], None] | None]
) -> list[Command]:
    """Start an evaluation on as many ranks, which meet in its folder alone, each after what is to be done before."""
    return [
        start(
            world,
            "evaluate.py",
            *arguments(world, checkpoint, output),
            cwd=output / f"rank{rank}",
            before=partial(be_rank, rank, len(befores), before),
        )
        for rank, before in enumerate(befores)
    ]


def evaluate_with(world: World, checkpoint: Path, output: Path, count: int) -> Path:
    commands = start_ranks(world, checkpoint, output, [None] * count)
    for command in commands:
        assert command.wait() == 0, command.output
    return output / "demo"


def results(folder: Path) -> dict[str, Any]:
    """results.json without the time it was written at."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    del found["created"]
    return found


def assert_same(found: Path, expected: Path) -> None:
    assert results(found) == results(expected)
    assert predictions(found) == predictions(expected)
    for path in expected.rglob("predictions.jsonl"):
        assert (found / path.relative_to(expected)).read_bytes() == path.read_bytes()
    assert not [*found.rglob("journal-*"), *found.rglob(".rank-*")]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_processes_gives_the_same_files(
    world: World, untrained_run: Path, alone: Path, tmp_path: Path, count: int
) -> None:
    assert_same(evaluate_with(world, untrained_run, tmp_path, count), alone)


@pytest.mark.slow
def test_a_lost_process_is_named_and_another_number_of_them_goes_on(
    world: World, untrained_run: Path, alone: Path, tmp_path: Path
) -> None:
    commands = start_ranks(world, untrained_run, tmp_path, [watch_closely, die_at_the_third_answer])
    assert commands[1].wait() == -signal.SIGKILL
    assert commands[0].wait() == 2  # as no torchrun ends it
    line = "error: rank 1 of the evaluation gave no sign of life for 2 s: it died, was stopped, "
    assert commands[0].output.splitlines()[-1].startswith(line)
    assert not (tmp_path / "demo/results.json").exists()
    assert list((tmp_path / "demo").rglob("journal-1.jsonl"))
    shutil.copytree(tmp_path / "demo", tmp_path / "copy/demo")
    assert_same(evaluate_with(world, untrained_run, tmp_path, 3), alone)
    run(world, "evaluate.py", *arguments(world, untrained_run, tmp_path / "copy"), cwd=tmp_path / "one")
    assert_same(tmp_path / "copy/demo", alone)


def fail_at_colours() -> None:
    """Make this process fail at every question of one dataset."""
    ask = runner._ask

    def failing(model: Any, task: Any, *rest: Any) -> Any:
        if task.card.name == "easy_vqa_color":
            raise UserError("the GPU of this process is on fire")
        return ask(model, task, *rest)

    runner._ask = failing


@pytest.mark.slow
def test_what_one_process_cannot_answer_does_not_lose_the_other_datasets(
    world: World, untrained_run: Path, alone: Path, tmp_path: Path
) -> None:
    commands = start_ranks(world, untrained_run, tmp_path, [None, fail_at_colours])
    assert [command.wait() for command in commands] == [2, 0]  # torchrun would end the first with another's 2
    assert "easy_vqa_color could not be evaluated, as said above" in commands[0].output
    found, expected = results(tmp_path / "demo"), results(alone)
    reason = "the GPU of this process is on fire"
    assert found["not_evaluated"] == {"easy_vqa_color": {"why": "failed", "reason": reason}}
    del expected["datasets"]["easy_vqa_color"]
    assert found["datasets"] == expected["datasets"]
    assert_same(evaluate_with(world, untrained_run, tmp_path, 2), alone)
