"""The progress bar of every command: what, how much, how fast, how long still."""

from collections.abc import Iterator
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
