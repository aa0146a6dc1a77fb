"""Evaluation on several GPUs or nodes: each process answers its share, the first puts the answers together.

Started by torchrun (or anything that sets RANK, WORLD_SIZE and LOCAL_RANK). The processes do not talk to each other: what
they share is the journals in the output folder, which must be on a file system that all of them see.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from instructblip.errors import UserError

# How long the first process waits without any new answer from the others before it gives them up, seconds. Longer than any
# one batch takes; a process that torchrun started and that died ends all others at once anyway.
SILENCE_SECONDS = 1800.0

Item = TypeVar("Item")


def _on() -> None:
    """Nothing makes this process give up."""


@dataclass(frozen=True)
class Worker:
    """One of the processes of an evaluation.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
        local_rank: its number on its node, which is that of its GPU.
        look: called between batches and while this process waits for the others; may raise to give up.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    look: Callable[[], None] = _on

    @property
    def is_first(self) -> bool:
        """Whether this process scores, writes results and prints."""
        return self.rank == 0

    def device(self, wanted: str) -> str:
        """The device for this process, where a configuration says `auto` or `cuda`: the GPU of its number."""
        if self.count == 1 or wanted not in ("auto", "cuda") or not torch.cuda.is_available():
            return wanted
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {self.local_rank} of this node has no GPU, there are {torch.cuda.device_count()}; "
                "give torchrun --nproc_per_node=NUMBER_OF_GPUS"
            )
        return f"cuda:{self.local_rank}"

    def share(self, chunks: Sequence[Item]) -> Sequence[Item]:
        """This process's part of the work: every `count`-th piece. All pieces are somebody's, none is two processes'."""
        return chunks[self.rank :: self.count]


ALONE = Worker()


def this_worker() -> Worker:
    """Who this process is, by torchrun's environment variables; alone without them.

    Raises:
        UserError: they contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "WORLD_SIZE" not in os.environ:
        return ALONE
    try:
        rank, count, local_rank = (int(os.environ[name]) for name in names)
    except (KeyError, ValueError):
        rank, count, local_rank = -1, 0, -1
    if not 0 <= rank < count or local_rank < 0:
        found = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
        raise UserError(
            f"the environment says {found}, which is no process of a group; start with torchrun, or unset them"
        )
    return Worker(rank, count, local_rank)
