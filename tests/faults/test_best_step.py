"""`recipe.keep_best`: the best checkpoint stays, over kills as well, and a step costs the same after any number of them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from instructblip.training import run as run_module
from instructblip.weights.checkpoint import checkpoint_folders
from tests.kit.runs import World, start

STEPS = 12
SCORES = {2: 10.0, 4: 60.0, 6: 30.0, 8: 60.0, 10: 20.0, 12: 20.0}  # the best is step 4's, the first of equals
KILLED_AFTER = 9
OVERRIDES = (
    "~recipe.phases",
    f"recipe.phases={{instruction: {{steps: {STEPS}, batch_size: 2, learning_rate: 1e-4}}}}",
    "recipe.validate_every=2",
    "recipe.checkpoint_every=3",
    "recipe.keep_checkpoints=1",
    "suite.held_in=[easy_vqa_shape]",
    "suite.held_out=[]",
    "recipe.final_samples=1",
)
KEEP_BEST = "+recipe.keep_best=mean"
OPENED = "opened for reading: metrics.jsonl"


def validate_as_written_here() -> None:
    """Scores of a validation that costs nothing, and a line for every time that the metrics are opened to be read."""

    def opened(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith("metrics.jsonl") and "a" not in (arguments[1] or ""):
            print(OPENED)

    run_module.run_validation = lambda training, step, stop: {"easy_vqa_shape": SCORES[step]}
    sys.addaudithook(opened)


def saved(run_folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in checkpoint_folders(run_folder / "checkpoints")]


def train(world: World, output: Path, *more: str, killed: bool = False) -> str:
    arguments: Sequence[str] = [*world.train, *OVERRIDES, f"output={output}", *more]
    command = start(world, "train.py", *arguments, cwd=output, before=validate_as_written_here)
    if killed:
        command.wait_for_lines(output / "demo/metrics.jsonl", KILLED_AFTER)
        command.process.kill()
    assert (command.wait() == 0) is not killed, command.output
    return command.output


@pytest.mark.slow
def test_the_best_checkpoint_stays_and_metrics_are_not_read_again(world: World, tmp_path: Path) -> None:
    printed = train(world, tmp_path, KEEP_BEST)
    assert saved(tmp_path / "demo") == [STEPS, 4]
    assert printed.count(OPENED) == 1  # for the curves


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
def test_a_killed_run_knows_its_best_step(world: World, tmp_path: Path, kept: bool) -> None:
    """Where no checkpoint says which it was, the metrics do, once."""
    train(world, tmp_path, *([KEEP_BEST] if kept else []), killed=True)
    printed = train(world, tmp_path, KEEP_BEST, "resume=auto")
    # No other step is taken for the best after it; its own checkpoint is gone where nobody had asked for it.
    assert saved(tmp_path / "demo") == ([STEPS, 4] if kept else [STEPS])
    # From the end, before the first step and before the first line; whole, for the curves and to look for the best step.
    assert printed.count(OPENED) == (3 if kept else 4)
