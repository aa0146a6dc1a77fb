"""Read a run's steps: global positions in, micro-batches of plain tensors and strings out.

A step is decided by its positions alone (`training.schedule.rank_positions`); worker processes and prefetching never change
the sequence. A worker reads one rank's whole share of a step and cuts it into micro-batches (`batching.py`).
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from instructblip.data.batching import Batch, Batching
from instructblip.data.lost import LostSample
from instructblip.data.mixture_dataset import TrainingData
from instructblip.errors import UserError

_GRACE = 30  # seconds that a worker goes on after SIGTERM


class LoadedStep(NamedTuple):
    """One rank's share of a global step: its micro-batches, and the samples that could not be read and were replaced.

    `places` says, of a stream, how far its reader has come with this step.
    """

    step: int
    batches: list[Batch]
    lost: list[LostSample]
    places: tuple[tuple[int, int], ...] | None = None


class _Refused(NamedTuple):
    """A `UserError` in a worker. It is returned, since torch would wrap a raised one into a traceback."""

    line: str


class _Steps(Dataset[LoadedStep | _Refused]):
    """Random access by (step, positions)."""

    def __init__(self, dataset: TrainingData, batching: Callable[[int], Batching]) -> None:
        self.dataset = dataset
        self.batching = batching

    def __getitem__(self, share: tuple[int, list[int]]) -> LoadedStep | _Refused:
        step, positions = share
        try:
            read = self.dataset.read_share(step, positions)
            return LoadedStep(step, self.batching(step).split(read.items), read.lost, read.places)
        except UserError as error:
            return _Refused(str(error))


def load_batches(
    dataset: TrainingData,
    steps: Iterable[tuple[int, list[int]]],
    *,
    batching: Callable[[int], Batching],
    workers: int = 0,
    timeout: float = 600.0,
) -> Generator[LoadedStep, None, None]:
    """Read the positions of each step: (step, this rank's positions) in, its share out, in the same order.

    Closing the iterator, and any error, ends the worker processes.

    Args:
        batching: says how a step's samples are cut; goes to the workers.
        workers: processes that read ahead, each whole steps; the sequence does not depend on their number.
        timeout: seconds that a worker may take for a step.

    Raises:
        UserError: as the dataset's `read_share`, or a worker process was killed, or is silent for longer than `timeout`.
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
        while (item := _next(loaded, processes, timeout)) is not None:
            if isinstance(item, _Refused):
                raise UserError(item.line)
            yield item
    finally:
        for process in processes:  # workers only read, so killing them loses nothing
            process.kill()
            process.join()
        del loaded


def _start(loader: DataLoader[Any]) -> tuple[Iterator[Any], list[BaseProcess]]:
    """The loader's iterator and its worker processes.

    torch installs a SIGCHLD handler that raises when a worker dies, in the middle of whatever the main process does. The
    handler from before is put back; `_next` finds a dead worker instead, when the next step is asked for, after at most 5
    seconds.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    before, handler = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
    loaded = iter(loader)
    if main_thread:
        signal.signal(signal.SIGCHLD, handler)
    return loaded, [process for process in multiprocessing.active_children() if process not in before]


def _next(loaded: Iterator[Any], processes: Sequence[BaseProcess], timeout: float) -> LoadedStep | _Refused | None:
    try:
        with _bounded(timeout) if processes else contextlib.nullcontext():
            return next(loaded, None)
    except _Silent:
        raise UserError(
            f"the data workers gave nothing for {timeout:g} s: one was stopped, or what it reads does not come; look at "
            "the disk, or raise parallel.timeout, and go on with resume=auto"
        ) from None
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


class _Silent(BaseException):
    """Ends a wait for the workers. No `except Exception` of torch holds it up."""


@contextlib.contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Raise `_Silent` in a wait of the main thread that takes longer.

    torch's own timeout covers the wait for a message. What is in it, shared memory, is asked for from the worker, and one
    that is stopped never answers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise _Silent

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _as_it_is(value: Any) -> Any:
    return value


def _begin_worker(number: int) -> None:
    """Let a worker outlive the signals that end a run: the main process needs it until its own end."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers warns in forked processes otherwise
    for ignored in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))  # SIGALRM then ends the worker
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
