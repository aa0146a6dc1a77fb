"""The progress bar of every command: what, how much, how fast, how long still."""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"- {self.unit}/s" if speed is None else f"{speed:,.0f} {self.unit}/s")


def progress_bar(unit: str, *, show: bool = True, console: Console | None = None) -> Progress:
    """A bar over things counted in `unit` (a plural), with rate and time left; invisible when `show` is false."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
    return Progress(*columns, disable=not show, console=console)


@contextmanager
def bytes_bar(description: str, total: int | None, *, show: bool = True) -> Iterator[tuple[Progress, TaskID]]:
    """A bar over bytes, without an end where `total` is None; full when the block ends without an exception."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, disable=not show) as bar:
        task = bar.add_task(description, total=total)
        yield bar, task
        done = bar.tasks[0].total or bar.tasks[0].completed
        bar.update(task, total=done, completed=done)


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
