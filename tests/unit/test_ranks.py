"""Who a process is, by the variables that torchrun sets: all of them, none, or one line that says what is wrong."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

from instructblip.distributed import ALONE, Ranks, choose_device, start_ranks
from instructblip.errors import UserError

TORCHRUN = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}


def set_environment(patch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in (*TORCHRUN, "MASTER_ADDR", "MASTER_PORT"):
        patch.delenv(name, raising=False)
    for name, value in variables.items():
        patch.setenv(name, value)


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, {})
    assert Ranks.from_environment() == ALONE
    assert Ranks.from_environment(timeout=3.0).timeout == 3.0


def test_torchrun_says_who_a_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, TORCHRUN)
    assert Ranks.from_environment() == Ranks(rank=9, world_size=16, local_rank=1)


@pytest.mark.parametrize("more", [{}, {"RANK": "0"}, {"RANK": "0", "LOCAL_RANK": "0"}])
def test_a_world_of_one_needs_no_more(monkeypatch: pytest.MonkeyPatch, more: dict[str, str]) -> None:
    set_environment(monkeypatch, {"WORLD_SIZE": "1"} | more)
    assert Ranks.from_environment() == ALONE


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2"}, "no RANK, WORLD_SIZE=2, no LOCAL_RANK"),
        ({"RANK": "0"}, "RANK=0, no WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1, WORLD_SIZE=1"),
        (TORCHRUN | {"RANK": "16"}, "RANK=16, WORLD_SIZE=16"),
        (TORCHRUN | {"RANK": "-1"}, "RANK=-1"),
        (TORCHRUN | {"RANK": ""}, "RANK=, WORLD_SIZE=16"),
        (TORCHRUN | {"LOCAL_RANK": "x"}, "LOCAL_RANK=x"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
    ],
)
def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str) -> None:
    set_environment(monkeypatch, variables)
    with pytest.raises(UserError, match=f"the environment says .*{words}.*start with torchrun, or unset them"):
        Ranks.from_environment()


@pytest.mark.parametrize("more", [{}, {"MASTER_ADDR": "127.0.0.1"}, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}])
def test_ranks_that_are_not_told_where_to_meet_are_refused(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, str]
) -> None:
    set_environment(monkeypatch, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"} | more)
    with pytest.raises(UserError, match=r"the ranks cannot meet: .*start them with torchrun"):  # noqa: SIM117
        with start_ranks(torch.device("cpu"), timeout=1.0):
            pass


def test_every_piece_of_work_is_somebodys_and_nobody_elses() -> None:
    for count in (1, 2, 3, 7):
        shares = [Ranks(rank, count).share(range(10)) for rank in range(count)]
        assert sorted(piece for share in shares for piece in share) == list(range(10))


# --- a sweep under torchrun: one group after the other, over one store -------------------------------------------------


def _as_torchrun(rank: int, port: int) -> None:
    set_variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    os.environ.update(set_variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


def _jobs(rank: int, port: int, end: Connection) -> None:
    _as_torchrun(rank, port)
    found: list[Any] = []
    for job in range(3):
        time.sleep(0.5 * rank)  # the first rank comes where the other's last address still stands
        try:
            with start_ranks(torch.device("cpu"), timeout=20.0) as ranks:
                found.append([ranks.gather(10 * job + rank), signal.getitimer(signal.ITIMER_REAL)[0] > 0])
                if job == 1:
                    raise UserError("a job's mistake")
        except UserError as error:
            found.append(str(error))
    end.send(found)


def _by_two_ranks(work: Callable[[int, int, Connection], None]) -> list[list[Any]]:
    """What each has sent."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)  # torchrun's own process has it
    context = multiprocessing.get_context("forkserver")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    processes = [context.Process(target=work, args=(rank, store.port, end)) for rank, (_, end) in enumerate(pipes)]
    for process in processes:
        process.start()
    try:
        assert all(start.poll(60) for start, _ in pipes)
        return [start.recv() for start, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_ranks_meet_anew_for_each_job_of_a_sweep_and_none_is_ended_by_the_alarm_of_a_job_that_failed() -> None:
    for found in _by_two_ranks(_jobs):
        assert found == [[[0, 1], False], [[10, 11], False], "a job's mistake", [[20, 21], False]]


def _after_one_alone(rank: int, port: int, end: Connection) -> None:
    """The second rank fails in job 0 before it meets anybody: a file of its node is missing, say."""
    _as_torchrun(rank, port)
    found: list[Any] = []
    for job in range(rank, 3):
        try:
            with start_ranks(torch.device("cpu"), timeout=20.0, job=job) as ranks:
                found.append(ranks.gather(10 * job + rank))
        except UserError as error:
            found.append(str(error))
    end.send(found)


def test_ranks_meet_after_a_job_that_one_of_them_did_not_come_to() -> None:
    first, second = _by_two_ranks(_after_one_alone)
    assert first[0] == "rank 1 has failed in this job, and said why; the others leave it too"
    assert first[1:] == second == [[10, 11], [20, 21]]


def test_one_gpu_is_no_device_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, TORCHRUN)
    with pytest.raises(UserError, match=r"^device=cuda:0 is one GPU, and there are 16 processes; use device=cuda"):  # noqa: SIM117
        with start_ranks(torch.device("cuda:0"), timeout=1.0):
            pass


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match=r"^device=cuda:2, but the last GPU here is cuda:1; give its number or a lower"):
        choose_device("cuda:2")
    for name in ("mps", "xpu", "meta"):
        with pytest.raises(UserError, match=rf"^device={name}, but this torch finds no such device; use device=cpu or"):
            choose_device(name)
