"""The benchmarks that README.md and docs/ name run; a file of its own, since they take as long as all else together."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.test_readme import BENCHMARKS, commands
from tests.kit.runs import REPOSITORY, SECONDS, World


@pytest.mark.slow
@pytest.mark.parametrize("line", commands(BENCHMARKS))
def test_a_benchmark_runs(line: str, world: World, tmp_path: Path) -> None:
    """Each variant once; its figures say nothing here."""
    _, script, *arguments = shlex.split(line)
    has_tiny = script.endswith(("train_step.py", "retrieval.py"))
    small = ["--tiny"] if has_tiny else ["--fast", "--parts", *world.train]
    options = ["--threads", "1", *small]
    command = [sys.executable, str(REPOSITORY / script), *arguments, *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert "times faster" in done.stdout
    assert list(tmp_path.iterdir()) == []
