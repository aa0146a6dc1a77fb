"""A trace of a few steps on demand: what the processor and the GPU did when, for chrome://tracing or Perfetto."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

TRACED_STEPS = 5


@contextlib.contextmanager
def traced_steps(first: int | None, folder: Path, say: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
    """Give a function to call after each step with the number of steps done; it begins and ends the trace.

    Args:
        first: the `TRACED_STEPS` steps after this one are traced; None traces nothing.
        folder: gets trace.json.gz.
        say: prints a line.
    """
    recorder: profile | None = None

    def end() -> None:
        nonlocal recorder
        if recorder is not None:
            recorder.stop()
            recorder.export_chrome_trace(str(folder / "trace.json.gz"))
            say(f"wrote {folder / 'trace.json.gz'}")
            recorder = None

    def after(done: int) -> None:
        nonlocal recorder
        if first is not None and done == first + TRACED_STEPS:
            end()
        elif done == first:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            recorder = profile(activities=[ProfilerActivity.CPU, *cuda])
            recorder.start()

    try:
        yield after
    finally:
        end()
