"""The benchmark of vocabularies finds the same ten best both ways, with a run's checkpoint and its prepared questions."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.runs import REPOSITORY, SECONDS, World


@pytest.mark.slow
def test_vocabularies_are_measured(untrained_run: Path, world: World) -> None:
    shards = next(line.partition("=")[2] for line in world.train if line.startswith("data.shards="))
    command = [sys.executable, str(REPOSITORY / "benchmarks/vocabulary.py"), "--checkpoint", str(untrained_run)]
    options = ["--shards", shards, "--sizes", "30", "60", "--questions", "2", "--rounds", "1", "--threads", "1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=5 * SECONDS)
    assert done.returncode == 0, done.stderr
    assert "the same ten best in every case" in done.stdout
