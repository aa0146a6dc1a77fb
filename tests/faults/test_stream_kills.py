"""Training on a stream is killed and goes on: with as many readers as if nothing had happened, with others by shard."""

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from instructblip.data.stream_dataset import Readers
from tests.kit.runs import SECONDS, Command, World, read_lines, start, start_ranks
from tests.kit.streams import foreign_set, read_steps, steps_of, stream_of, times, write_web_tars

STEPS = 15  # of four samples: the thirty records of the web twice
KILLED = 6


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five tars of six samples, and their card."""
    return write_web_tars(tmp_path_factory.mktemp("web"))


def _fork() -> None:
    """Let a process of the test's server start its data workers as one that a person starts does."""
    multiprocessing.set_start_method("fork", force=True)


# --- a process that reads and is killed ------------------------------------------------------------------------------


def _read_and_die(card: Path, out: Path, rank: int, world: int, workers: int) -> None:
    """Read step after step, and write after each what a checkpoint would keep, until this process kills itself."""
    _fork()
    stream = stream_of([foreign_set(card)], Readers(rank, world, workers))
    for step in steps_of(stream, 0, STEPS):
        ids = [name for batch in step.batches for name in batch.ids]
        kept = {"step": step.step, "ids": ids, "places": stream.places(step.step + 1)}
        with open(out / f"{rank}.jsonl", "a") as file:
            file.write(json.dumps(kept) + "\n")
        if step.step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2)])
def test_a_killed_reader_goes_on_at_its_shard_and_its_record(
    card: Path, tmp_path: Path, world: int, workers: int
) -> None:
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(target=_read_and_die, args=(card, tmp_path, rank, world, workers)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
        assert process.exitcode == -signal.SIGKILL
    lines = [read_lines(tmp_path / f"{rank}.jsonl") for rank in range(world)]
    sets, done = [foreign_set(card)], KILLED - 1  # the last line that counts; what was read behind it is read again
    begun = {step: [name for of_rank in lines for name in of_rank[step]["ids"]] for step in range(done)}
    state = json.loads(json.dumps(stream_of(sets, Readers(0, world, workers)).state([_places(r, done) for r in lines])))
    rest, _ = read_steps(sets, done, STEPS, world=world, workers=workers, state=state)
    assert begun | rest == read_steps(sets, 0, STEPS, world=world, workers=workers)[0]
    alone, _ = read_steps(sets, done, STEPS, state=state)
    assert times(begun | alone) == {2: 30}


def _places(lines: list[dict[str, Any]], done: int) -> Any:
    return lines[done - 1]["places"]


# --- whole runs ------------------------------------------------------------------------------------------------------


_PHASE = f"{{steps: {STEPS}, batch_size: 4, learning_rate: 1e-3, objectives: {{alignment: 1.0}}}}"


def _overrides(world: World, card: Path, output: Path, *, workers: int) -> list[str]:
    return [
        *world.train,
        "~recipe.phases",
        f"recipe.phases={{alignment: {_PHASE}}}",
        "recipe.checkpoint_every=2",
        f"mixture.datasets=[{{name: {card}}}]",
        "suite.held_in=[]",
        "suite.held_out=[]",
        "data.stream=true",
        "data.cache_features=false",
        "qformer.dropout=0",  # its masks are drawn by rank
        f"data.workers={workers}",
        f"output={output}",
    ]


def _start(world: World, arguments: list[str], cwd: Path, ranks: int) -> list[Command]:
    if ranks == 1:
        return [start(world, "train.py", *arguments, cwd=cwd, before=_fork)]
    return start_ranks(world, "train.py", *arguments, cwd=cwd, ranks=ranks, before=_fork)


def _train(world: World, arguments: list[str], cwd: Path, ranks: int) -> str:
    commands = _start(world, arguments, cwd, ranks)
    assert [command.wait() for command in commands] == [0] * ranks, commands[0].output
    return commands[0].output


def _kill(world: World, arguments: list[str], cwd: Path, ranks: int) -> None:
    commands = _start(world, arguments, cwd, ranks)
    commands[0].wait_for_lines(cwd / "demo/metrics.jsonl", KILLED)
    for command in commands:
        os.kill(command.process.pid or 0, signal.SIGKILL)
    assert [command.wait() for command in commands] == [-signal.SIGKILL] * ranks


def _lines(folder: Path) -> list[tuple[int, float, list[str]]]:
    return [(line["step"], line["loss"], line["sample_ids"]) for line in read_lines(folder / "demo/metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    world: World, card: Path, tmp_path: Path, ranks: int, workers: int
) -> None:
    _train(world, _overrides(world, card, tmp_path / "whole", workers=workers), tmp_path / "whole", ranks)
    expected = _lines(tmp_path / "whole")
    arguments = _overrides(world, card, tmp_path / "killed", workers=workers)
    _kill(world, arguments, tmp_path / "killed", ranks)
    assert len(_lines(tmp_path / "killed")) < STEPS
    _train(world, [*arguments, "resume=auto"], tmp_path / "killed", ranks)
    found = _lines(tmp_path / "killed")
    assert [(step, ids) for step, _, ids in found] == [(step, ids) for step, _, ids in expected]
    if ranks == 1:
        assert found == expected
    else:  # sums over ranks are rounded as they arrive
        assert [loss for _, loss, _ in found] == pytest.approx([loss for _, loss, _ in expected], abs=1e-5)


@pytest.mark.slow
def test_a_killed_run_of_two_ranks_goes_on_alone_with_each_sample_once_an_epoch(
    world: World, card: Path, tmp_path: Path
) -> None:
    arguments = _overrides(world, card, tmp_path, workers=2)
    _kill(world, arguments, tmp_path, 2)
    _train(world, [*arguments, "resume=auto", "data.workers=0"], tmp_path, 1)
    assert times({step: ids for step, _, ids in _lines(tmp_path)}) == {2: 30}


@pytest.mark.slow
def test_a_mixture_of_a_prepared_set_and_foreign_tars_streams_by_the_roots_of_their_sizes(
    world: World, card: Path, tmp_path: Path
) -> None:
    arguments = _overrides(world, card, tmp_path, workers=0)
    both = f"mixture.datasets=[{{name: easy_vqa_color}}, {{name: {card}}}]"
    printed = _train(world, [*arguments, both], tmp_path, 1)
    assert "44.32" in printed and "55.68" in printed  # roots of the 19 questions and the 30 texts
    ids = {step: names for step, _, names in _lines(tmp_path)}
    assert sum(map(len, ids.values())) == 60
    for dataset, records in (("easy_vqa_color", 19), ("web", 30)):
        counts = times(ids, dataset)
        assert sum(counts.values()) == records
        assert counts.keys() == {1, 2}
