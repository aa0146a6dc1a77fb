"""How fast a run is, and how much memory it takes."""

import contextlib
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch


class StepTimer:
    """Samples, tokens and FLOPs per second, and the share of time spent waiting for data, over the last `window` steps.

        timer.start()
        for ...:
            with timer.waiting():
                batch = next(batches)
            ...
            timer.step(samples=len(batch))

    Rates are ratios of sums. (torchmetrics' `RunningMean` folds its window anew at each reading: 9 ms of a CPU for these
    five at each step, where this takes 0.02.)

    `start` again after a pause (validation, a checkpoint) keeps that pause out of the rates. On a GPU one step's time
    is the host's, which runs ahead of the device; over a window the two agree.
    """

    def __init__(self, window: int = 50, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        # seconds, waited, samples, tokens, FLOPs
        self._steps: deque[tuple[float, float, int, int, float]] = deque(maxlen=window)
        self._waited = 0.0
        self._shares: list[tuple[float, float]] = []
        self.start()

    def start(self) -> None:
        """Begin a step now."""
        self._mark = self._clock()
        self._waited = 0.0

    def together(self, count: int) -> None:
        """The next `count` calls of `step` share evenly what has passed: steps whose results are read together."""
        share = (self._clock() - self._mark) / count, self._waited / count
        self._shares = [share] * count

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        begin = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - begin

    def step(self, samples: int, tokens: int = 0, flops: float = 0.0) -> None:
        """End a step that trained on so many samples and tokens with so much work, and begin the next."""
        seconds, waited = self._shares.pop() if self._shares else (self._clock() - self._mark, self._waited)
        self._steps.append((seconds, waited, samples, tokens, flops))
        self.start()

    @property
    def samples_per_second(self) -> float:
        """Samples per second; 0 before the first step."""
        return self._per_second(2)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second; 0 before the first step."""
        return self._per_second(3)

    @property
    def flops_per_second(self) -> float:
        """FLOPs per second; 0 before the first step."""
        return self._per_second(4)

    @property
    def data_wait_fraction(self) -> float:
        """Share of the time, 0 to 1, that went into waiting for data; 0 before the first step."""
        return self._per_second(1)

    def _per_second(self, column: int) -> float:
        seconds = sum(step[0] for step in self._steps)
        return sum(step[column] for step in self._steps) / seconds if seconds > 0 else 0.0


def peak_memory(device: torch.device) -> int:
    """The most memory that this process has held, bytes: the GPU's that tensors are on, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
