"""The progress bar of every command: what, how much, how fast, how long still."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
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
