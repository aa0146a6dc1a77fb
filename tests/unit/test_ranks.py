"""Who a process is, by the variables that torchrun sets: all of them, none, or one line that says what is wrong."""

import pytest
import torch

from instructblip.distributed import ALONE, Ranks, start_ranks
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
