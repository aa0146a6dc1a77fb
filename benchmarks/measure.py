"""What the benchmarks share: each variant in a process of its own, taken in turns, compared with a named baseline.

A benchmark calls `compare`. It runs its own script once a variant and round, so that peak memory belongs to one variant
and slow drifts of the machine fall on all of them alike, and prints one table with the command, the machine and the date.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import instructblip  # noqa: F401  declares what torchvision lacks on CPU, before anything imports it

Work = Callable[[], object]  # a float that it returns is printed, to show that the variants compute the same
Prepare = Callable[[Path, list[str]], Work]


def compare(
    variants: Mapping[str, Prepare],
    *,
    baseline: str,
    unit: str,
    per_run: int,
    what: str,
    description: str,
    setup: Callable[[Path, list[str]], None] = lambda folder, parts: None,
) -> None:
    """Time every variant against the baseline and print the table.

    Args:
        variants: name -> a function that prepares the variant's inputs and returns the work that is timed. It is given the
            common folder and the overrides that choose the parts.
        baseline: the variant that ratios are taken to.
        unit: what one piece of work is, such as `sample`.
        per_run: pieces of work in one run of the timed function.
        what: heading of the table.
        description: what is measured, printed under the table.
        setup: puts what the variants share into an empty folder, once.
    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--rounds", type=int, default=3, help="processes for each variant")
    parser.add_argument("--runs", type=int, default=3, help="timed runs in a process, after one that is not timed")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--parts", nargs="*", default=[], help="overrides of train.py that choose other parts")
    parser.add_argument("--fast", action="store_true", help="each variant once, all in this process, for a try")
    parser.add_argument("--variant", choices=list(variants), help="run one variant and print its figures as JSON")
    parser.add_argument("--folder", type=Path, help="what the variants share, for --variant")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.variant is not None:
        print(json.dumps(_measure(variants[arguments.variant], arguments.folder, arguments.parts, arguments.runs)))
        return
    with tempfile.TemporaryDirectory() as folder:
        setup(Path(folder), arguments.parts)
        if arguments.fast:
            measured = {name: _measure(work, Path(folder), arguments.parts, 1) for name, work in variants.items()}
            figures = {name: [values] for name, values in measured.items()}
        else:
            figures = in_turns(list(variants), arguments.rounds, "--folder", folder)
    _print(figures, baseline, unit, per_run, what, description, arguments.threads)


def in_turns(variants: Sequence[str], rounds: int, *arguments: str) -> dict[str, list[dict[str, float]]]:
    """Run this script once a variant and round with `--variant NAME`; return what each printed last, a JSON object.

    Raises:
        subprocess.CalledProcessError: a variant failed.
    """
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    console = Console(stderr=True)
    for number in range(rounds):
        for name in variants:
            console.print(f"round {number + 1} of {rounds}: {name}", highlight=False)
            command = [sys.executable, *sys.argv, *arguments, "--variant", name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            figures[name].append(json.loads(output.splitlines()[-1]))
    return figures


def _measure(prepare: Prepare, folder: Path, parts: list[str], runs: int) -> dict[str, float]:
    work = prepare(folder, parts)
    result = work()
    before, seconds = resident_bytes(), []
    peak = _Peak()
    with peak:
        for _ in range(runs):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {"seconds": statistics.median(seconds), "added": peak.bytes - before, "peak": whole}
    return figures | ({"result": result} if isinstance(result, float) else {})


class _Peak:
    """Largest resident memory while a block runs, sampled every 2 ms."""

    def __init__(self) -> None:
        self.bytes = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, resident_bytes())

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def resident_bytes() -> int:
    """Memory that this process holds, bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _print(
    figures: Mapping[str, Sequence[Mapping[str, float]]],
    baseline: str,
    unit: str,
    per_run: int,
    what: str,
    description: str,
    threads: int,
) -> None:
    def middle(name: str, figure: str) -> float:
        return statistics.median(values[figure] for values in figures[name])

    table = Table(title=what, title_justify="left")
    table.add_column("variant")
    headings = (f"ms a {unit}", "min-max", "times faster", "memory added, MB", "of baseline", "peak, MB", "of baseline")
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, values in figures.items():
        times = sorted(value["seconds"] / per_run * 1e3 for value in values)
        added, peak = middle(name, "added"), middle(name, "peak")
        table.add_row(
            name,
            f"{middle(name, 'seconds') / per_run * 1e3:.1f}",
            f"{times[0]:.1f}-{times[-1]:.1f}",
            f"{middle(baseline, 'seconds') / middle(name, 'seconds'):.2f}",
            f"{added / 1e6:.0f}",
            f"{added / max(middle(baseline, 'added'), 1):.2f}",
            f"{peak / 1e6:.0f}",
            f"{peak / middle(baseline, 'peak'):.2f}",
        )
    console = Console(width=140)
    console.print(table)
    console.print(f"Ratios are to: {baseline}. {description}", highlight=False)
    for name, values in figures.items():
        if "result" in values[0]:
            console.print(f"result of {name}: {values[0]['result']:.6f}", highlight=False)
    console.print(provenance(f"{threads} threads"), highlight=False)


def provenance(*details: str, packages: Sequence[str] = ("torch", "transformers"), place: str | None = None) -> str:
    """The line under every table: date, machine (or another place), details, versions, and the command."""
    versions = [f"{package} {version(package)}" for package in packages]
    facts = (str(datetime.date.today()), place or machine(), *details, f"Python {platform.python_version()}", *versions)
    return f"{', '.join(facts)}; command: python {' '.join(sys.argv)}"


def machine() -> str:
    """Number and kind of the processor's cores."""
    names = [
        line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "name" in line
    ]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"
