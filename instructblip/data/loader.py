"""From the plan to batches: global positions in, plain tensors and strings out.

What a step holds is decided by positions alone (`training.loop.rank_positions`); worker processes and prefetching never
change the sequence. A worker reads the whole share of one step and cuts it into micro-batches (`batching.py`).
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from instructblip.data.batching import Batch, Batching, Item
from instructblip.data.lost import LostSample
from instructblip.data.mixture_dataset import MixtureDataset
from instructblip.errors import UserError

_GRACE = 30  # seconds that a worker goes on after SIGTERM


class LoadedStep(NamedTuple):
    """One rank's share of a global step: its micro-batches, and the samples that others took the place of."""

    step: int
    batches: list[Batch]
    lost: list[LostSample]


class _Refused(NamedTuple):
    """What a worker gives in place of a step: torch would bury the one line of a `UserError` in a traceback."""

    line: str


class _Steps(Dataset[LoadedStep | _Refused]):
    """Random access by (step, positions)."""

    def __init__(self, dataset: MixtureDataset, batching: Callable[[int], Batching]) -> None:
        self.dataset = dataset
        self.batching = batching

    def __getitem__(self, share: tuple[int, list[int]]) -> LoadedStep | _Refused:
        step, positions = share
        items: list[Item] = []
        lost: list[LostSample] = []
        try:
            for position in positions:
                item, missed = self.dataset.read(position)
                items.append(item)
                lost += missed
            return LoadedStep(step, self.batching(step).split(items), lost)
        except UserError as error:
            return _Refused(str(error))


def load_batches(
    dataset: MixtureDataset,
    steps: Iterable[tuple[int, list[int]]],
    *,
    batching: Callable[[int], Batching],
    workers: int = 0,
) -> Generator[LoadedStep, None, None]:
    """Read the positions of each step: (step, this rank's positions) in, its share out, in the same order.

    Closing the iterator, and any error, ends the worker processes.

    Args:
        batching: says how a step's samples are cut; goes to the workers.
        workers: processes that read ahead, each whole steps; the sequence does not depend on their number.

    Raises:
        UserError: as `MixtureDataset.read`, or a worker process was killed.
    """
    loader = DataLoader(
        _Steps(dataset, batching),
        sampler=steps,
        batch_size=None,
        collate_fn=_as_it_is,  # torch would look for numbers to make tensors of
        num_workers=workers,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # else it would draw from the global stream
    )
    loaded, processes = _start(loader)
    try:
        while (item := _next(loaded, processes)) is not None:
            if isinstance(item, _Refused):
                raise UserError(item.line)
            yield item
    finally:
        for process in processes:  # they hold nothing that could be lost
            process.kill()
            process.join()
        del loaded


def _start(loader: DataLoader[Any]) -> tuple[Iterator[Any], list[BaseProcess]]:
    """The loader's iterator and its worker processes.

    torch reports a dead worker by an exception from a signal handler, in the middle of whatever the main process does then.
    Without that handler it is found when the next step is asked for, 5 seconds later at most.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    before, handler = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
    loaded = iter(loader)
    if main_thread:
        signal.signal(signal.SIGCHLD, handler)
    return loaded, [process for process in multiprocessing.active_children() if process not in before]


def _next(loaded: Iterator[Any], processes: Sequence[BaseProcess]) -> LoadedStep | _Refused | None:
    try:
        return next(loaded, None)
    except (RuntimeError, OSError, EOFError):
        for process in processes:
            process.join(timeout=0.1)  # one that broke off a transfer is ending
        ended = [process for process in processes if not process.is_alive()]
        if not ended:
            raise
        raise UserError(
            f"a data worker process was killed (exit code {ended[0].exitcode}); if memory ran out, lower data.workers, "
            "and go on with resume=auto"
        ) from None


def _as_it_is(value: Any) -> Any:
    return value


def _begin_worker(number: int) -> None:
    """The main process decides when a run ends: signals that reach all processes leave its workers time to the end."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers warns in forked processes otherwise
    for ignored in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))  # whose signal, SIGALRM, ends the worker
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
