"""The processes of a run: which of them this is, and how all of them agree.

torchrun starts one process a GPU and says who is who in the environment; without it a run is one process. What processes
tell each other beside gradients is small JSON over gloo, every rank at the same place of the program.
"""

import contextlib
import json
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from instructblip.errors import UserError


@dataclass(frozen=True)
class Processes:
    """One process among those of a run.

    Attributes:
        rank: its number over all nodes.
        local_rank: its number on this node, and that of its GPU.
        world_size: how many there are.
        timeout: seconds after which a rank that does not answer ends the others.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    timeout: float = 600.0

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every rank, in the order of the ranks; every rank calls this at the same place.

        Raises:
            UserError: a rank died, or did not answer within `timeout`.
        """
        if self.world_size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with self.watched():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
            dist.all_gather(sizes, torch.tensor([len(own)]))
            rows = [torch.empty(int(max(sizes)), dtype=torch.uint8) for _ in sizes]
            dist.all_gather(rows, torch.cat([own, own.new_zeros(len(rows[0]) - len(own))]))
        return [json.loads(bytes(row[: int(size)].tolist())) for row, size in zip(rows, sizes, strict=True)]

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Turn what gloo and NCCL say of a lost rank into one line.

        Raises:
            UserError: a rank died, or did not answer within `timeout`.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or not _is_lost_rank(error):
                raise
            raise UserError(
                f"rank {self.rank} lost the others: one of them died, or did not answer for {self.timeout:g} s "
                f"({str(error).splitlines()[0]}); look at what it said last, and go on with resume=auto"
            ) from None


def _is_lost_rank(error: RuntimeError) -> bool:
    text = str(error)
    signs = (
        "gloo",
        "NCCL",
        "Connection closed",
        "Connection reset",
        "Timed out waiting",
        "Broken pipe",
        "wait timeout",
    )
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


@contextlib.contextmanager
def start_processes(device: torch.device, timeout: float) -> Iterator[Processes]:
    """Join the processes that torchrun started, or be alone without it.

    Args:
        device: type of the devices that train; a GPU's number is the local rank.
        timeout: seconds that a rank may be silent before the others end.

    Raises:
        UserError: more processes than GPUs on this node, or the processes do not find each other.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Processes(timeout=timeout)
        return
    processes = Processes(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), world_size, timeout)
    if device.type == "cuda":
        if processes.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {processes.local_rank} has no GPU, this node has {torch.cuda.device_count()}; "
                "give torchrun --nproc_per_node=NUMBER_OF_GPUS"
            )
        torch.cuda.set_device(processes.local_rank)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with processes.watched():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield processes
    except BaseException:
        # Exchanges that wait for a lost rank must not keep this one from its end: the kernel sees to that.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(timeout))
        raise
    finally:
        dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name} is none; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}, but there is no GPU that this torch can use; use device=cpu or device=auto")
    return device


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
        poll_stop: called between batches and while this process waits for the others; may raise to give up.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    poll_stop: Callable[[], None] = _on

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
