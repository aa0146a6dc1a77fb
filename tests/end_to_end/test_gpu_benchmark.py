"""benchmarks/gpu.sh in small: its rows, what becomes of those that fail, and what it may import where no network is."""

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.runs import REPOSITORY, SECONDS

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import gpu

# What is there, with all that it needs in turn; the rest comes with requirements-gpu.txt.
INSTALLED = ("torch", "torchvision", "transformers", "timm", "torchmetrics", "setuptools", "pip")
_HIDE = """
import importlib.machinery, sys
inner = importlib.machinery.PathFinder.find_spec
hidden = set({hidden})
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else inner(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""


def options(**changes: object) -> argparse.Namespace:
    sizes = {name: tiny for name, (_, tiny) in gpu._SIZES.items()}
    values = {"llm": "vicuna_7b", "device": "cpu", "tiny": True, "long": 0, "start_seconds": 60.0, "seconds": 60.0}
    return argparse.Namespace(**(sizes | values | changes))


def needed(names: Iterator[str]) -> set[str]:
    """The distributions, and those that they need without extras, as far as they are installed."""
    found: set[str] = set()
    waiting = [*names]
    while waiting:
        name = re.split(r"[^A-Za-z0-9_.-]", waiting.pop().strip())[0].lower().replace("_", "-")
        if not name or name in found:
            continue
        found.add(name)
        try:
            further = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [requirement for requirement in further if "extra ==" not in requirement]
    return found


def hidden_modules() -> list[str]:
    """Modules of every other distribution."""
    listed = (REPOSITORY / "requirements-gpu.txt").read_text().splitlines()
    own = [line.partition("==")[0] for line in listed if line and not line.startswith("#")]
    there = needed(iter([*INSTALLED, *own]))
    return sorted(
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if not any(name.lower().replace("_", "-") in there for name in distributions)
        and module not in sys.stdlib_module_names
        and module.isidentifier()
    )


@pytest.mark.slow
def test_it_runs_with_what_a_machine_without_network_has(tmp_path: Path) -> None:
    hidden = hidden_modules()
    assert {"wandb", "scipy", "matplotlib", "av", "ijson"} <= set(hidden)
    (tmp_path / "sitecustomize.py").write_text(_HIDE.format(hidden=hidden))
    rows = "transformers,by_length,bucketed,fp8,ranking"
    command = ["sh", str(REPOSITORY / "benchmarks/gpu.sh"), "--tiny", "--rows", rows, "--start-seconds", "300"]
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=5 * SECONDS, env=environment)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout, done.stdout
    lines = [line.split(" | ")[:2] for line in done.stdout.splitlines() if line.startswith("| ") and "row" not in line]
    names = {model: [name for of, name in lines if of == f"| {model}"] for model in gpu.MODELS}
    for model, found in names.items():
        assert found == [name for name in gpu.ROWS if name in rows.split(",") and model in gpu.ROWS[name].models]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["by_length", "overlapped", "fp8"])
def test_a_step_of_each_kind_begins_at_the_loss_of_the_plain_one(name: str) -> None:
    losses = [gpu.ROWS[row].measure(options())["note"].split(",")[0] for row in ("packed", name)]
    expected, found = (float(note.removeprefix("loss ")) for note in losses)
    assert found == pytest.approx(expected, abs=1e-2 if name == "fp8" else 1e-4)


# --- what becomes of rows that fail ----------------------------------------------------------------------------------

_WORKER = """
import json, sys, time
for name in sys.argv[1:]:
    if name == "ranking":
        sys.exit("CUDA error: an illegal memory access")
    if name == "generation":
        time.sleep(60)
    cells = {"error": "RuntimeError: no"} if name == "fp8" else dict.fromkeys(("seconds", "peak", "per second"), 1.0)
    print("a library's word")
    print(json.dumps({"row": name, "unit": "samples", "note": "fine", **cells}), flush=True)
"""


@pytest.mark.slow
def test_rows_go_on_after_one_that_fails_hangs_or_ends_its_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def popen(command: list[str], **streams: Any) -> subprocess.Popen[str]:
        asked = command[command.index("--rows") + 1].split(",")
        started.append(asked)
        return process([sys.executable, "-S", "-c", _WORKER, *asked], **streams)

    process = subprocess.Popen
    monkeypatch.setattr(gpu.subprocess, "Popen", popen)
    monkeypatch.setitem(gpu.ROWS, "generation", gpu.ROWS["generation"]._replace(seconds=2))
    rows = ["transformers", "fp8", "generation", "ranking", "float32"]
    start = time.monotonic()
    gpu.run_all(options(models=["vicuna_7b"], rows=rows))
    assert time.monotonic() - start < 20
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in printed if line.startswith("| vicuna_7b")] == rows
    assert [len(each) for each in started] == [5, 2, 1]  # each goes on behind the row that ended the one before
    said = dict(zip(rows, (line for line in printed if line.startswith("| vicuna")), strict=True))
    assert "failed: RuntimeError: no" in said["fp8"]
    assert "failed: ended after 2 s" in said["generation"]
    assert "failed: the process ended: CUDA error: an illegal memory access" in said["ranking"]
    assert "| 1.00 samples | 1.00 | 1000.0 | 0.0 | fine |" in said["transformers"]


def test_what_no_time_is_left_for_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.run_all(options(models=["flan_t5_xl"], rows=["packed", "generation"], seconds=0.0))
    assert "No time was left for flan_t5_xl: generation." in capsys.readouterr().out  # it packs nothing
