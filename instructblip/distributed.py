"""The ranks of a run or an evaluation: which of them this process is, and how all of them agree.

torchrun starts one process a GPU and says who is who in the environment; without it there is one process. What the ranks
of a training run tell each other beside gradients is small JSON over gloo, every rank at the same place of the program.
"""

import contextlib
import itertools
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from instructblip.errors import UserError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # that torchrun sets for each process
_groups = itertools.count()  # numbers those that this process joins, one after the other, where nothing else does

# Of a sweep's jobs: without torchrun the first rank's process serves the others, between them too.
_stores: list[dist.Store] = []


def _on() -> None:
    """Nothing makes this process give up."""


Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """One process among those of a run or of an evaluation.

    Attributes:
        rank: its number over all nodes.
        world_size: how many there are.
        local_rank: its number on this node, and that of its GPU.
        timeout: seconds after which a rank that does not answer ends the others.
        poll_stop: called between batches and while this process waits for the others; may raise to give up.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    timeout: float = 600.0
    poll_stop: Callable[[], None] = _on

    @classmethod
    def from_environment(cls, timeout: float = 600.0) -> Self:
        """Who this process is, by the variables that torchrun sets; alone without them.

        Raises:
            UserError: some of them are missing, or they contradict each other.
        """
        found = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        if not found:
            return cls(timeout=timeout)
        if found.get("WORLD_SIZE") == "1":  # what starts one container a node leaves the others out, and may
            found = {"RANK": "0", "LOCAL_RANK": "0"} | found
        try:
            rank, world_size, local_rank = (int(found[name]) for name in _VARIABLES)
        except (KeyError, ValueError):
            rank, world_size, local_rank = -1, 0, -1
        if not 0 <= rank < world_size or not 0 <= local_rank < world_size:
            says = ", ".join(f"{name}={found[name]}" if name in found else f"no {name}" for name in _VARIABLES)
            raise UserError(
                f"the environment says {says}, which is no rank of a group; start with torchrun, or unset them"
            )
        return cls(rank, world_size, local_rank, timeout)

    @property
    def is_first(self) -> bool:
        """Whether this process scores, prints and writes for all."""
        return self.rank == 0

    def device(self, wanted: str) -> str:
        """The device for this process, where a configuration says `auto` or `cuda`: the GPU of its number.

        Raises:
            UserError: this node has fewer GPUs than processes.
        """
        if self.world_size == 1 or wanted not in ("auto", "cuda") or not torch.cuda.is_available():
            return wanted
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {self.local_rank} has no GPU, this node has {torch.cuda.device_count()}; "
                "give torchrun --nproc_per_node=NUMBER_OF_GPUS"
            )
        return f"cuda:{self.local_rank}"

    def share(self, chunks: Sequence[Item]) -> Sequence[Item]:
        """This rank's part of the work: every `world_size`-th piece. All pieces are somebody's, none is two ranks'."""
        return chunks[self.rank :: self.world_size]

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

    def gather_rows(self, own: Tensor) -> Tensor:
        """The rows of all ranks, in the order of the ranks; gradients flow back to every rank's own rows.

        Args:
            own: (B, ...), the same shape on all ranks.
        """
        if self.world_size == 1:
            return own
        gathered: Tensor = _GatherRows.apply(own, self.rank, self.world_size)
        return gathered

    def any(self, own: Tensor) -> Tensor:
        """The largest of all ranks' scalars, on their devices; the host does not wait for a GPU's."""
        if self.world_size > 1:
            dist.all_reduce(own, dist.ReduceOp.MAX)
        return own

    def take_rows(self, own: Tensor, rows: Sequence[int]) -> Tensor:
        """Rows of all ranks, numbered as in `gather_rows`, of which this rank holds no more than it takes; no gradient.

        Args:
            own: (B, ...), the same shape and type on all ranks.
            rows: wanted here, in any order, each as often as it is wanted.
        """
        if self.world_size == 1:
            return own[list(rows)]
        wanted_by_rank = self.gather(list(rows))
        first, last = self.rank * len(own), (self.rank + 1) * len(own)
        sent = [[row - first for row in wanted if first <= row < last] for wanted in wanted_by_rank]
        owners = [row // len(own) for row in rows]
        # As bytes: gloo does not exchange every type.
        parcels = own[[row for parcel in sent for row in parcel]].contiguous().view(torch.uint8)
        found = parcels.new_empty(len(rows), *parcels.shape[1:])
        with self.watched():
            counts = [owners.count(rank) for rank in range(self.world_size)]
            dist.all_to_all_single(found, parcels, counts, [len(parcel) for parcel in sent])
        order = sorted(range(len(rows)), key=owners.__getitem__)  # stable: rank by rank, as they were asked for
        places = torch.empty(len(rows), dtype=torch.int64)
        places[order] = torch.arange(len(rows))
        return found.view(own.dtype)[places]

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


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, rank: int, world_size: int) -> Tensor:
        ctx.rows = slice(rank * len(own), (rank + 1) * len(own))
        parts = [torch.empty_like(own) for _ in range(world_size)]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        whole = gradients[0].contiguous().clone()
        dist.all_reduce(whole)  # each rank's loss has read the rows of every other
        return whole[ctx.rows], None, None


def whole_tensors(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Named tensors with the sharded ones put together, one after the other, on the CPU. Every rank calls this.

    Args:
        keep: whether this rank wants the result; without, it only gives its shards and gets an empty dict.
    """
    from torch.distributed.tensor import DTensor

    whole = {}
    for name, tensor in tensors.items():
        value = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = value
    return whole


def placed_like(whole: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, on the device of another one and sharded as that is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(other, DTensor):
        return whole.to(other.device)
    place = whole.to(other.device_mesh.device_type)
    return distribute_tensor(place, other.device_mesh, other.placements, src_data_rank=None)


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
def start_ranks(device: torch.device, timeout: float, *, job: int | None = None) -> Iterator[Ranks]:
    """Join the processes that torchrun started, or be alone without it.

    Args:
        device: type of the devices that train; a GPU's number is the local rank.
        timeout: seconds that a rank may be silent before the others end.
        job: its number in a sweep, of which a rank may have passed over others: they failed there before it met anybody.

    Raises:
        UserError: half an environment, more processes than GPUs on this node, or the processes do not find each other.
    """
    ranks = Ranks.from_environment(timeout)
    if ranks.world_size == 1:
        yield ranks
        return
    if device.type == "cuda":
        if device.index is not None:
            raise UserError(
                f"device={device} is one GPU, and there are {ranks.world_size} processes; use device=cuda, of which each "
                "takes its own"
            )
        torch.cuda.set_device(ranks.device("cuda"))
    signal.alarm(0)  # that of a sweep's job before, which failed
    with ranks.watched():
        try:
            _meet(job, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout))
        except ValueError as error:  # MASTER_ADDR or MASTER_PORT is missing, or no number
            raise UserError(f"the ranks cannot meet: {error}; start them with torchrun") from None
    try:
        yield ranks
    except BaseException:
        # Exchanges that wait for a lost rank must not keep this one from its end: the kernel sees to that.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(timeout))
        raise
    finally:
        dist.destroy_process_group()


def _meet(job: int | None, backend: str, timeout: timedelta) -> None:
    """Join the other ranks, under names of this group alone.

    A job of a sweep is a group, and torchrun's store outlives them all: a rank that comes first would find there the
    addresses that the others had in the group before.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    if job is not None:
        _await_job(job, store, rank, world_size, timeout)
    own = dist.PrefixStore(f"group_{next(_groups)}" if job is None else f"job_{job}", store)
    # All are here before torch begins the group: one that it gave up would put the names in its next group out of step.
    own.set(f"rank_{rank}", "")
    own.wait([f"rank_{other}" for other in range(world_size)], timeout)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world_size, timeout=timeout)


def _await_job(job: int, store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> None:
    """Wait until all ranks are at a sweep's job; those that are behind may first have to give an earlier one up.

    Raises:
        UserError: a rank is at a later one, and comes to this one no more: to wait for it would keep both apart for good.
    """
    _stores[:] = [store]
    store.set(f"job_of_{rank}", str(job))
    pause, end = 0.01, time.monotonic() + 2 * timeout.total_seconds()
    while True:
        at = [int(number) for number in store.multi_get([f"job_of_{other}" for other in range(world_size)])]
        if max(at) > job:
            raise UserError(f"rank {at.index(max(at))} has failed in this job, and said why; the others leave it too")
        if min(at) == job:
            return
        if time.monotonic() > end:
            raise dist.DistStoreError(f"wait timeout, rank {at.index(min(at))} is still at job {min(at)}")
        time.sleep(pause)
        pause = min(1.0, 2 * pause)


def choose_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name} is none; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}, but there is no GPU that this torch can use; use device=cpu or device=auto")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(
            f"device={name}, but the last GPU here is cuda:{torch.cuda.device_count() - 1}; give its number or a lower one, "
            "or device=auto"
        )
    if device.type not in ("cpu", "cuda") and not _holds_numbers(device):
        raise UserError(f"device={name}, but this torch finds no such device; use device=cpu or device=auto")
    return device


def _holds_numbers(device: torch.device) -> bool:
    """Whether there is such a device: torch knows the names of many, and `meta`, which holds nothing."""
    try:
        return bool(torch.ones(1, device=device).cpu() == 1)
    except Exception:  # each kind's own: an assertion, a module or a kernel that is missing
        return False


# How long the first process waits without any new answer from the others before it gives them up, seconds. Longer than any
# one batch takes; a process that torchrun started and that died ends all others at once anyway.
SILENCE_SECONDS = 1800.0

ALONE = Ranks()
