"""Files of requirements that are installed together, as `.ci/run` does, ask for versions that exist together."""

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
INSTALLED = [f"requirements{part}.txt" for part in ("", "-search", "-quantization", "-slurm")]


def requirements(file: Path) -> Iterator[tuple[str, Requirement]]:
    """What a file asks for, and the files that it names, each with its place."""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if asked := line.split("#")[0].strip():
            if asked.startswith("-r "):
                yield from requirements(file.parent / asked.removeprefix("-r "))
            else:
                yield f"{file.name}:{number}", Requirement(asked)


def not_met(asked: list[tuple[str, Requirement]]) -> list[str]:
    """Those that the installed version of the package is none of; what is not installed is left out."""
    found = []
    for place, requirement in asked:
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{place}: {requirement} and {installed}")
    return found


def test_the_script_of_the_ci_installs_these_together() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    (line,) = re.findall(r"^pip install .*(?:-r \S+)+.*-r \S+.*$", script, re.MULTILINE)
    assert re.findall(r"-r (\S+)", line) == INSTALLED


def test_what_is_installed_together_goes_together() -> None:
    asked = [entry for file in INSTALLED for entry in requirements(ROOT / file)]
    assert len(asked) > 30
    assert not_met(asked) == []


def test_two_files_that_contradict_each_other_are_found(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("pytest>=1\n-r other.txt\n")
    (tmp_path / "other.txt").write_text("pytest<1  # no such\nnot-installed-here>=3\n")
    asked = list(requirements(tmp_path / "one.txt"))
    assert not_met(asked) == [f"other.txt:1: pytest<1 and {pytest.__version__}"]
