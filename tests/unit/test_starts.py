"""Commands that need no model start without the libraries that models are made of."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.own_data import write_own_data
from tests.kit.runs import REPOSITORY

HEAVY = frozenset(
    {"gradio", "torch", "torchvision", "transformers", "timm", "pandas", "matplotlib", "scipy", "sklearn", "datasets"}
)
# What a plan does without, too: torch's compiler and what that brings, sharded tensors, trackers, reports.
NOT_IN_A_PLAN = frozenset(
    {
        *("sympy", "wandb", "jinja2", "fsspec", "tokenizers", "torch._dynamo", "torch.distributed.tensor"),
        *(f"instructblip.{name}" for name in ("data.batching", "evaluation", "training.run", "weights.parts")),
    }
)
_WATCHED = """
import atexit, json, pathlib, runpy, sys
atexit.register(lambda: pathlib.Path(sys.argv[0]).with_name("imported.json").write_text(json.dumps(sorted(sys.modules))))
found, sys.argv[1:] = sys.argv[1], sys.argv[2:]
runpy.run_path(found, run_name="__main__")
"""


def imported(folder: Path, script: str, *arguments: str) -> tuple[int, set[str], str]:
    """The exit status of a command in a fresh Python, what it imported (packages, and all modules), and what it printed."""
    watched = folder / "watched.py"
    watched.write_text(_WATCHED, encoding="utf-8")
    command = [sys.executable, str(watched), str(REPOSITORY / script), *arguments]
    done = subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False
    )
    modules = json.loads((folder / "imported.json").read_text(encoding="utf-8"))
    return done.returncode, {*modules, *(name.partition(".")[0] for name in modules)}, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "argument", "status", "said"),
    [
        ("train.py", "--help", 0, "instruction-aware Q-Former"),
        ("evaluate.py", "wrong=1", 2, "unknown key wrong"),
        ("prepare.py", "wrong=1", 2, "unknown key wrong"),
        ("instructblip/demo/__main__.py", "--help", 0, "Powered by Hydra"),
    ],
)
def test_help_and_a_wrong_key_import_no_model(
    script: str, argument: str, status: int, said: str, tmp_path: Path
) -> None:
    found, packages, printed = imported(tmp_path, script, argument)
    assert (found, said in printed) == (status, True), printed
    assert "instructblip" in packages
    assert not packages & HEAVY


@pytest.mark.slow
@pytest.mark.parametrize("command", ["capfilt", "features", "study", "weights"])
def test_help_of_the_other_commands_imports_no_model(command: str, tmp_path: Path) -> None:
    status, packages, printed = imported(tmp_path, f"instructblip/{command}/__main__.py", "--help")
    assert (status, len(printed) > 500) == (0, True)
    assert not packages & HEAVY


@pytest.mark.slow
@pytest.mark.parametrize("command", ["compare", "table"])
def test_commands_that_read_results_import_no_model(command: str, tmp_path: Path) -> None:
    status, modules, printed = imported(tmp_path, f"instructblip/evaluation/report/{command}.py", "--help")
    assert (status, len(printed) > 500) == (0, True)
    assert not modules & (HEAVY - {"scipy"} | {"scipy.stats"})  # of which the outermost file is quick


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["demo", "paper_vicuna_7b", "align_demo_stage2", "blip_demo_vqa"])
def test_a_plan_imports_neither_what_builds_its_model_nor_what_trains_it(experiment: str, tmp_path: Path) -> None:
    status, modules, printed = imported(tmp_path, "train.py", "plan=true", f"experiment={experiment}")
    assert (status, "It fits" in printed) == (0, True), printed
    assert "instructblip.training.plan.memory" in modules
    assert not modules & ((HEAVY - {"torch"}) | NOT_IN_A_PLAN)


@pytest.mark.slow
def test_preparing_pictures_imports_no_model(tmp_path: Path) -> None:
    card = write_own_data(tmp_path / "data", count=2)
    settings = (f"dataset={card}", f"raw={card.parent}", f"out={tmp_path / 'shards'}", "workers=1")
    status, packages, printed = imported(tmp_path, "prepare.py", *settings)
    assert status == 0, printed
    assert list((tmp_path / "shards").rglob("*.tar"))
    assert "PIL" in packages
    assert not packages & (HEAVY - {"torch"})  # which webdataset's writer brings


@pytest.mark.slow
def test_the_benchmark_of_starts_prints_its_table() -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "starts.py"), "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "times torch's" in done.stdout
    assert "train.py plan=true" in done.stdout
