"""The package without its repository: a wheel is built, installed elsewhere and trains there."""

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.kit.runs import REPOSITORY, SECONDS, World, read_lines

FOLDERS = ("instructblip", "configs", "datasets")
TWO_STEPS = ("~recipe.phases", "recipe.phases={short: {steps: 2, batch_size: 2, learning_rate: 1e-3}}")
TEST_TOOLS = {"pytest", "pytest-cov", "pytest-xdist", "datasets", "import-linter", "ruff", "mypy"}


def _call(*command: str | Path, cwd: Path) -> str:
    """Run a command that does not see the repository, and return what it printed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools writes beside the sources."""
    source = tmp_path_factory.mktemp("wheel") / "source"
    source.mkdir()
    for folder in FOLDERS:
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (
        *REPOSITORY.glob("requirements*.txt"),
        *map(REPOSITORY.joinpath, ("setup.py", "pyproject.toml", "README.md", "LICENSE")),
    ):
        shutil.copy(file, source)
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    _call(sys.executable, "-m", "pip", "wheel", source, *offline, "--wheel-dir", source.parent, cwd=source.parent)
    (built,) = source.parent.glob("instructblip-*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in FOLDERS:
        files = [path for path in (REPOSITORY / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        inside = "" if folder == "instructblip" else "instructblip/"
        assert len(files) > 40
        assert {inside + path.relative_to(REPOSITORY).as_posix() for path in files} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"instructblip"}


@pytest.mark.slow
def test_lmms_eval_finds_its_model_in_the_wheel(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "[lmms_eval.models]\ninstructblip = instructblip.harness:registration\n" in archive.read(name).decode()


@pytest.mark.slow
def test_test_tools_are_an_extra(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    required = [Requirement(line) for line in lines]
    needed = {item.name: item for item in required if item.marker is None}
    assert all(needed["torch"].specifier.contains(version) for version in ("2.11.0", "2.13.0"))
    assert {item.name for item in required if str(item.marker) == 'extra == "test"'} >= TEST_TOOLS
    assert not TEST_TOOLS & needed.keys()


@pytest.mark.slow
def test_an_installed_package_trains_elsewhere(wheel: Path, world: World, tmp_path: Path) -> None:
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(environment, with_pip=False)
    python = environment / "bin/python"
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))  # installed already, here
    install = ("install", "--no-deps", "--no-index", "--quiet", wheel)
    _call(sys.executable, "-m", "pip", "--python", python, *install, cwd=elsewhere)
    found = _call(python, "-c", "import instructblip; print(instructblip.__file__)", cwd=elsewhere)
    assert Path(found.strip()).is_relative_to(packages)

    short = (*TWO_STEPS, "recipe.final_samples=1", "recipe.validation_samples=1", "name=elsewhere")
    with world.here():
        _call(environment / "bin/instructblip-train", *world.train, *short, cwd=elsewhere)
    losses = [
        line["loss"] for line in read_lines(elsewhere / "outputs/train/elsewhere/metrics.jsonl") if "loss" in line
    ]
    assert len(losses) == 2
    assert {path.name for path in elsewhere.iterdir()} == {"outputs"}
    assert {path.name for path in (environment / "bin").glob("instructblip-*")} == {
        f"instructblip-{command}" for command in ("train", "evaluate", "prepare")
    }
