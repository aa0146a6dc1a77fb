"""What a run shows of itself: the metrics file, its curves, its speed, and the progress bar."""

import contextlib
import errno
import io
import json
import math
import os
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from instructblip.errors import UserError
from instructblip.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Entry = dict[str, Any]
_BLOCK = 1 << 16  # bytes; of a metrics file that are read at once
# Of an entry, what its curves show; the rest, most of it sample ids, would fill the memory.
_DRAWN = ("step", "loss", "loss_by_dataset", "validation", "lr", "samples_per_second")


class MetricsLog:
    """A file of JSON objects, one a line, each with a whole number "step". Safe against a kill at any moment.

    A line is handed to the operating system before `append` returns; a half-written last line, left by a kill, is never
    read and is removed before the next line is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one line. Numbers that are not finite become null, since JSON has no word for them.

        Raises:
            ValueError: `entry` has no whole number "step".
            UserError: the disk is full; the file is left as it was.
        """
        if not isinstance(entry.get("step"), int):
            raise ValueError(f'a metrics entry needs a whole number "step", got {entry.get("step")!r}')
        line = json.dumps(_finite(entry), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        file = self._file or self._open()
        start = file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):  # an unbuffered write may take only part
                written += file.write(line[written:])
        except OSError as error:
            file.truncate(start)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"disk full while writing {self.path}; free some space and resume the run") from None
            raise

    def read(self) -> Iterator[Entry]:
        """All whole entries, one by one, in the order of the file; none where there is no file.

        Raises:
            UserError: a line before the last is not JSON; names file and line.
        """
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                entry = _entry(line)
                if entry is None:
                    raise UserError(f"{self.path} line {number} is not a metrics entry; remove that line to go on")
                yield entry

    def truncate_after(self, step: int) -> None:
        """Forget every entry of a later step than `step`, so that a resumed run writes each step once.

        Steps never fall from line to line, so only what is forgotten is read, from the end.
        """
        self.close()

        def stays(line: bytes) -> bool:
            entry = _entry(line)
            return entry is not None and entry["step"] <= step

        self._cut_after_last(stays)

    def close(self) -> None:
        """Close the file; `append` opens it again."""
        if self._file:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._cut_after_last(lambda line: True)
        self._file = open(self.path, "ab", buffering=0)
        return self._file

    def _cut_after_last(self, stays: Callable[[bytes], bool]) -> None:
        """Cut the file after its last whole line of which `stays` holds."""
        if not self.path.exists():
            return
        with open(self.path, "r+b") as file:
            size = end = file.seek(0, os.SEEK_END)
            for line in _lines_from_the_end(file):
                if line.endswith(b"\n") and stays(line):
                    break
                end -= len(line)
            if end < size:
                file.truncate(end)
                os.fsync(file.fileno())


def _lines_from_the_end(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file with their ends, last first, of which only so much is read as is asked for."""
    start, rest = file.seek(0, os.SEEK_END), b""
    while start > 0:
        size = min(_BLOCK, start)
        start -= size
        file.seek(start)
        rest, *lines = io.BytesIO(file.read(size) + rest).readlines()
        yield from reversed(lines)
    if rest:
        yield rest


def _entry(line: bytes) -> Entry | None:
    """What a line of a metrics file says; None where it is no entry."""
    try:
        entry: Entry = json.loads(line)
        entry["step"] + 0
    except (ValueError, KeyError, TypeError):
        return None
    return entry


class BestStep:
    """The step with the best validation so far, the first of equals; None before the first validation.

    It is kept from entry to entry: to look for it among all of them would make every step dearer than the one before.

    Args:
        of: whose scores are compared: a dataset's by name, or `mean`, over all that a validation has; None: nothing is.
    """

    def __init__(self, of: str | None) -> None:
        self._of = of
        self._value = -math.inf
        self.step: int | None = None

    def see(self, entry: Mapping[str, Any]) -> None:
        """Take a finished step's entry into account."""
        scores: Mapping[str, float | None] = entry.get("validation") or {}
        if not scores or self._of is None:
            return
        values = list(scores.values()) if self._of == "mean" else [scores.get(self._of)]
        known = [value for value in values if value is not None and math.isfinite(value)]
        if len(known) == len(values) and (mean := sum(known) / len(known)) > self._value:
            self.step, self._value = entry["step"], mean

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps, as plain JSON; None where nothing is compared."""
        if self._of is None:
            return None
        return {"of": self._of, "step": self.step, "value": None if self.step is None else self._value}

    def restore(self, state: Mapping[str, Any] | None) -> bool:
        """Go on from a checkpoint's `state`; False where it has none, or one of other scores."""
        if state is None or state["of"] != self._of:
            return self._of is None
        if state["step"] is not None:
            self.step, self._value = state["step"], state["value"]
        return True


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class StepTimer:
    """Samples, tokens and FLOPs per second, and the share of time spent waiting for data, over the last `window` steps.

        timer.start()
        for ...:
            with timer.waiting():
                batch = next(batches)
            ...
            timer.step(samples=len(batch))

    `start` again after a pause (validation, a checkpoint) keeps that pause out of the rates. On a GPU one step's time
    is the host's, which runs ahead of the device; over a window the two agree.
    """

    def __init__(self, window: int = 50, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        # seconds, waited, samples, tokens, FLOPs
        self._steps: deque[tuple[float, float, int, int, float]] = deque(maxlen=window)
        self._waited = 0.0
        self.start()

    def start(self) -> None:
        """Begin a step now."""
        self._mark = self._clock()
        self._waited = 0.0

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
        self._steps.append((self._clock() - self._mark, self._waited, samples, tokens, flops))
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


class TrainingProgress:
    """The running display that `training_progress` opens."""

    def __init__(
        self,
        description: str,
        total_steps: int,
        first_step: int,
        console: Console,
        seconds_between_lines: float,
        clock: Callable[[], float],
    ) -> None:
        self._description, self._total, self._first = description, total_steps, first_step
        self._console, self._pause, self._clock = console, seconds_between_lines, clock
        self._begin = self._printed = clock()
        self.bar: Progress | None = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
                expand=True,
            )
            self._task = self.bar.add_task(description, total=total_steps, completed=first_step, figures="")

    def update(self, step: int, loss: float, samples_per_second: float) -> None:
        """Show that `step` optimiser steps are done."""
        figures = f"loss {loss:.4f}  {samples_per_second:.1f} samples/s"
        if self.bar:
            self.bar.update(self._task, completed=step, figures=figures)
            return
        now = self._clock()
        if now - self._printed >= self._pause or step == self._total:
            self._printed = now
            done = max(step - self._first, 1)
            elapsed = now - self._begin
            left = elapsed / done * (self._total - step)
            self.say(
                f"{self._description} {step}/{self._total}  {figures}  {_clock_time(elapsed)} elapsed  "
                f"{_clock_time(left)} left"
            )

    def say(self, line: str) -> None:
        """Print a line of text: above the bar, or in its turn in a log."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def training_progress(
    description: str,
    total_steps: int,
    *,
    first_step: int = 0,
    enabled: bool = True,
    seconds_between_lines: float = 30.0,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[TrainingProgress]:
    """A progress bar with loss, samples/s, elapsed and remaining time; in a batch job's log, a plain line now and then.

    Args:
        description: the words before the bar.
        total_steps: optimiser steps of the whole run.
        first_step: steps already done when resuming; they do not count towards the rate.
        enabled: False on all ranks but the first: nothing is shown.
        seconds_between_lines: where the output is no terminal, at most one line in this time, and one at the last step.
        console, clock: for tests.
    """
    shown = (console or Console()) if enabled else Console(quiet=True, force_terminal=False)
    progress = TrainingProgress(description, total_steps, first_step, shown, seconds_between_lines, clock)
    with progress.bar or contextlib.nullcontext():
        yield progress


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def draw_curves(metrics_path: Path, out_path: Path, title: str) -> None:
    """Draw a run's `metrics.jsonl` as one PNG picture: losses, validation, learning rate, speed.

    Reads from each entry, where present: "loss", "loss_by_dataset" {name: loss}, "lr", "samples_per_second", and
    "validation" {name: accuracy, 0 to 100}. What was never recorded is named as such in its panel.

    Raises:
        UserError: a corrupt metrics file, or the picture cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import and needed once a run

    entries = [{key: entry[key] for key in _DRAWN if key in entry} for entry in MetricsLog(metrics_path).read()]
    figure = Figure(figsize=(13, 7), dpi=110, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    grid = figure.add_gridspec(2, 6, height_ratios=(3, 2))
    _draw_loss(figure.add_subplot(grid[0, :2]), entries)
    _draw_by_dataset(figure.add_subplot(grid[0, 2:4]), entries, "loss_by_dataset", "Loss by dataset", smooth=True)
    _draw_by_dataset(figure.add_subplot(grid[0, 4:]), entries, "validation", "Validation accuracy (%)", smooth=False)
    _draw_single(figure.add_subplot(grid[1, :3]), entries, "lr", "Learning rate")
    _draw_single(figure.add_subplot(grid[1, 3:]), entries, "samples_per_second", "Samples per second")
    with atomic_path(out_path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})  # the same numbers give the same bytes


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average over about `span` values, bias corrected at the start as in Adam (arXiv 1412.6980)."""
    decay, total, weight, result = 1 - 2 / (span + 1), 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        result.append(total / weight)
    return result


def _series(entries: list[Entry], key: str) -> tuple[list[int], list[float]]:
    pairs = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _span(count: int) -> float:
    return max(5.0, count / 25)


def _draw_loss(axes: "Axes", entries: list[Entry]) -> None:
    steps, losses = _series(entries, "loss")
    axes.plot(steps, losses, color="#8fa8c4", linewidth=0.7, alpha=0.6)
    axes.plot(steps, smoothed(losses, _span(len(losses))), color="#1f4e79", linewidth=1.8)
    _finish(axes, "Training loss (nats per answer token)", bool(steps))
    if losses:
        ordered = sorted(losses)
        axes.set_ylim(min(0.0, ordered[0]), 1.05 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))])


def _draw_by_dataset(axes: "Axes", entries: list[Entry], key: str, title: str, smooth: bool) -> None:
    from matplotlib import colormaps

    rows = [entry for entry in entries if entry.get(key)]
    names = sorted({name for row in rows for name in row[key]})
    colors = colormaps["tab10" if len(names) <= 10 else "tab20"]
    marker = None if smooth else "o"
    for number, name in enumerate(names):
        steps, values = _series([{"step": row["step"], name: row[key].get(name)} for row in rows], name)
        values = smoothed(values, _span(len(values))) if smooth else values
        color = colors(number % colors.N)
        axes.plot(steps, values, color=color, linewidth=1.5, marker=marker, markersize=4, label=name)
    _finish(axes, title, bool(names))
    axes.set_ylim(0, None if smooth else 102)
    if names:
        axes.legend(fontsize=7.5, frameon=False, ncols=1 + len(names) // 9, loc="best")


def _draw_single(axes: "Axes", entries: list[Entry], key: str, title: str) -> None:
    steps, values = _series(entries, key)
    axes.plot(steps, values, color="#1f4e79", linewidth=1.4)
    _finish(axes, title, bool(steps))
    axes.set_ylim(bottom=0)


def _finish(axes: "Axes", title: str, has_data: bool) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=8.5)
    axes.tick_params(labelsize=8.5)
    axes.grid(True, color="#e4e4e0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    axes.set_xlim(left=0)
    if not has_data:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color="#777777")
