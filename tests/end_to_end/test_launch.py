"""The launch scripts are valid, and torchrun's restarts go on from the newest checkpoint when a process is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kit.runs import REPOSITORY, World, read_lines

SCRIPTS = sorted((REPOSITORY / "launch").iterdir())
SECONDS = 180
RECIPE = (
    "~recipe.phases",
    "recipe.phases={instruction: {steps: 60, batch_size: 4, learning_rate: 1e-4}}",
    "recipe.checkpoint_every=5",
    "recipe.validate_every=500",
    "suite.held_in=[]",
    "suite.held_out=[]",
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_valid_and_can_be_run(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    assert len(SCRIPTS) == 3


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_run_goes_on(world: World, tmp_path: Path) -> None:
    environment = os.environ | world.environment | {"PROCESSES": "2", "RESTARTS": "1", "OMP_NUM_THREADS": "1"}
    environment["TORCHRUN"] = str(Path(sys.executable).with_name("torchrun"))
    arguments = [*world.train, *RECIPE, "device=cpu", f"output={tmp_path}"]
    log, metrics = tmp_path / "log", tmp_path / "demo/metrics.jsonl"
    with open(log, "wb") as file:
        launched = subprocess.Popen(
            [str(REPOSITORY / "launch/one_node.sh"), *arguments],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + SECONDS
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 7:
            assert launched.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert launched.wait(SECONDS) == 0, log.read_text()
    finally:
        if launched.poll() is None:
            os.killpg(launched.pid, signal.SIGKILL)
            launched.wait()
    assert "continuing" in log.read_text()
    assert [line["step"] for line in read_lines(metrics)] == list(range(1, 61))
