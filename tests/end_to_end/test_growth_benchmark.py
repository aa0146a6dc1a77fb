"""The benchmark of what grows drives the run's own functions; it must still fit them."""

import json
import subprocess
import sys

import pytest

from tests.kit.runs import REPOSITORY, SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["steps=100", "questions=100", "records=2000"])
def test_what_grows_is_measured(variant: str) -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks/growth.py"), "--variant", variant]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures
    assert all(isinstance(value, float) for value in figures.values())
