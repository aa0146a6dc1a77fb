"""Seconds of the processor that commands take before any work, against `python -c "import torch"`.

    python benchmarks/starts.py

Each command is a process of its own, all in turns. Seconds of the processor, not of the clock: other processes slow the
clock more. A plan lays out the modules of its model, without memory, and so imports PyTorch.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from measure import provenance
from rich.console import Console
from rich.table import Table

from instructblip.config.schema import CONFIGS

ROOT = CONFIGS.parent
REPORT = "instructblip.evaluation.report"
MODULE = (  # as `python -m` runs it from the repository
    f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[1:] = ['--help']; "
    f"runpy.run_module('{REPORT}.{{name}}', run_name='__main__')"
)
BASELINE = 'python -c "import torch"'
COMMANDS = {
    BASELINE: ("-c", "import torch"),
    "python train.py --help": (str(ROOT / "train.py"), "--help"),
    "python train.py wrong=1": (str(ROOT / "train.py"), "wrong=1"),
    "python evaluate.py --help": (str(ROOT / "evaluate.py"), "--help"),
    "python prepare.py --help": (str(ROOT / "prepare.py"), "--help"),
    "python prepare.py dataset=wrong": (str(ROOT / "prepare.py"), "dataset=wrong"),
    "python train.py plan=true": (str(ROOT / "train.py"), "plan=true", "experiment=paper_vicuna_7b"),
    **{f"python -m {REPORT}.{name} --help": ("-c", MODULE.format(name=name)) for name in ("compare", "table")},
}


def seconds(arguments: Sequence[str], folder: str) -> float:
    """Of the processor, of a process and all that it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--rounds", type=int, default=5, help="processes for each command, after one that is not counted"
    )
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds + 1):
            for name, command in COMMANDS.items():
                took = seconds(command, folder)
                found[name] += [took] if number else []  # the first has files read and modules compiled
    table = Table(title="Starts", title_justify="left")
    for heading in ("command", "processor, s", "times torch's", "min-max"):
        table.add_column(heading, justify="left" if heading == "command" else "right")
    for name, values in found.items():
        ratios = [value / torch for value, torch in zip(values, found[BASELINE], strict=True)]
        shown = (f"{statistics.median(values):.2f}", f"{statistics.median(ratios):.2f}")
        table.add_row(name, *shown, f"{min(ratios):.2f}-{max(ratios):.2f}")
    console = Console(width=120)
    console.print(table)
    console.print(provenance(f"{arguments.rounds} rounds"), highlight=False)


if __name__ == "__main__":
    main()
