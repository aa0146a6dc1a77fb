"""Carry out the runs of a study: each after the one that it needs, so many at a time, and all that can be done."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console

from instructblip.progress import progress_bar
from instructblip.study.carrying import LOG, Job, measured_of
from instructblip.study.places import Place, Started
from instructblip.study.plan import StudyRun

_PAUSE = 0.2  # seconds between two looks
_LONGEST = 300  # characters of a failure


@dataclass
class _Running:
    run: StudyRun
    started: Started
    slot: int


def run_all(
    runs: Mapping[str, StudyRun],
    place: Place,
    *,
    jobs: int,
    make_job: Callable[[StudyRun, int], Job],
    console: Console,
) -> dict[str, str]:
    """Carry out what is not done yet.

    Args:
        runs: by identity, each after the one that it needs.
        place: starts them.
        jobs: so many at a time.
        make_job: of a run and the number of its slot, 0 to jobs - 1.
        console: gets a line for each run, and the bar.

    Returns:
        identity -> why it failed, of those that did and of those that need them.
    """
    waiting = [run for run in runs.values() if measured_of(run) is None]
    console.print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them done already", highlight=False, soft_wrap=True)
    failed: dict[str, str] = {}
    running: list[_Running] = []
    with progress_bar("runs", show=bool(waiting), console=console) as progress:
        task = progress.add_task("runs", total=len(waiting))

        def say(line: str) -> None:
            progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

        try:
            while waiting or running:
                for item in [item for item in running if item.started.poll() is not None]:
                    running.remove(item)
                    _end(item, failed, say)
                    progress.advance(task)
                for run in _pass_over(waiting, failed, say):
                    waiting.remove(run)
                    progress.advance(task)
                busy = {item.run.identity for item in running}
                begun = {run.identity for run in waiting} | busy
                ready = [run for run in waiting if run.after not in begun]
                for run in ready[: jobs - len(running)]:
                    slot = min(set(range(jobs)) - {item.slot for item in running})
                    running.append(_Running(run, place.start(make_job(run, slot)), slot))
                    waiting.remove(run)
                progress.update(task, description=", ".join(item.run.label for item in running) or "runs")
                time.sleep(_PAUSE if running else 0)
        finally:
            for item in running:
                item.started.stop()
    return failed


def _end(item: _Running, failed: dict[str, str], say: Callable[[str], None]) -> None:
    run, status = item.run, item.started.poll()
    measured = measured_of(run)
    if status == 0 and measured is not None:
        on_gpu = measured["gpu_seconds"] is not None
        seconds = measured["gpu_seconds" if on_gpu else "cpu_seconds"]
        say(f"{run.label}: done in {seconds:.0f} seconds of the {'GPU' if on_gpu else 'CPU'}")
        return
    failed[run.identity] = _reason(run, status)
    say(f"{run.label} failed: {failed[run.identity]}")


def _pass_over(waiting: list[StudyRun], failed: dict[str, str], say: Callable[[str], None]) -> list[StudyRun]:
    """Those that need a run that failed."""
    found = [run for run in waiting if run.after in failed]
    for run in found:
        failed[run.identity] = "the run that it starts from failed"
        say(f"{run.label} is left out: {failed[run.identity]}")
    return found


def _reason(run: StudyRun, status: int | None) -> str:
    """The last line that a run wrote, and where the others are."""
    path = run.folder / LOG
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
    ended = f"exit status {status}" if status is None or status >= 0 else f"killed by signal {-status}"
    return f"{last.removeprefix('error: ')[:_LONGEST]} ({ended}; {path})"
