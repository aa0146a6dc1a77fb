"""Sweeps: jobs one after the other in folders of their own, errors in one line, SLURM's launcher where it is installed."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hydra
import pytest

from instructblip.config.schema import CONFIGS
from instructblip.errors import UserError
from instructblip.evaluation.report.compare import compare_runs
from instructblip.evaluation.report.table import score_table
from instructblip.evaluation.results_file import read_run
from tests.kit.runs import REPOSITORY, World, evaluate_here, run, scores

HAS_LAUNCHER = importlib.util.find_spec("submitit") is not None
SUITE = "suite.held_in=[easy_vqa_shape]", "suite.held_out=[]"


@pytest.fixture
def arguments(world: World, finished_run: Path) -> list[str]:
    return [*world.evaluate, *SUITE, f"checkpoint={finished_run}", "batch_size=4", "examples=2"]


@pytest.mark.slow
def test_jobs_run_one_after_the_other_and_keep_apart(
    world: World, finished_run: Path, arguments: list[str], tmp_path: Path
) -> None:
    printed = run(world, "evaluate.py", "-m", *arguments, "samples=4,6", "withhold_images=true,false", cwd=tmp_path)
    output = tmp_path / "outputs/evaluate"
    names = {f"demo-samples_{n}-withhold_images_{shown}" for n in (4, 6) for shown in (True, False)}
    assert {path.name for path in output.iterdir()} == names | {"sweeps"}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["outputs"]
    for name in names:
        assert f"wrote outputs/evaluate/{name}/results.json" in printed
    for number in (4, 6):
        found = scores(output / f"demo-samples_{number}-withhold_images_False")
        assert found["easy_vqa_shape"]["count"] == number
    alone = evaluate_here(world, finished_run, tmp_path / "alone", *SUITE, "samples=6", "batch_size=4")
    assert scores(output / "demo-samples_6-withhold_images_False") == scores(alone)
    blind = json.loads((output / "demo-samples_6-withhold_images_True/results.json").read_text())
    assert blind["datasets"]["easy_vqa_shape"]["protocol"]["images"] == "withheld"
    # What evaluate.py writes is what compare and table read.
    shown, again = (read_run(folder) for folder in (output / "demo-samples_6-withhold_images_False", alone))
    (compared,) = compare_runs(shown, again)
    assert (compared.count, compared.paired.difference, compared.paired.p) == (6, 0.0, 1.0)
    with pytest.raises(UserError, match=r"differ in images \('shown' and 'withheld'\)"):
        compare_runs(shown, read_run(output / "demo-samples_6-withhold_images_True"))
    table = score_table([shown, read_run(output / "demo-samples_4-withhold_images_True")])
    assert [row.cells["easy_vqa_shape"].symbols for row in table.rows] == ["*", "*‡"]
    (recorded,) = output.glob("sweeps/*/multirun.yaml")
    assert "samples=4,6" in recorded.read_text()


@pytest.mark.slow
def test_a_failing_job_is_one_line_and_the_others_run(world: World, arguments: list[str], tmp_path: Path) -> None:
    printed = run(
        world,
        "evaluate.py",
        "--multirun",
        *arguments,
        "samples=2",
        "split=nowhere,test",
        "name=mine",
        cwd=tmp_path,
        status=2,
    )
    errors = [line for line in printed.splitlines() if "error" in line.lower()]
    assert len(errors) == 1
    assert errors[0].startswith("error: job 0 (split=nowhere): ")
    assert "Traceback" not in printed
    assert {path.name for path in (tmp_path / "outputs/evaluate").iterdir()} == {"mine-split_test", "sweeps"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["llm=vicuna_7b,vicuna_7"], "there is no llm=vicuna_7; did you mean vicuna_7b? configs/llm has: "),
        (["batch_sise=1,2"], "unknown key batch_sise; did you mean batch_size?"),
        (["samples=1,2", "suite=demmo"], "there is no suite=demmo; did you mean demo? "),
        (["samples=1,[2"], "samples=1,[2 cannot be understood; "),
        (
            ["data.workers=0,1", "data={cache_features: false}"],
            "data.workers is swept, and data={...} would set it again in each job; give the other keys of data one by one",
        ),
        pytest.param(
            ["hydra/launcher=slurm", "samples=1,2"],
            "hydra/launcher=slurm needs Hydra's launcher for it; pip install -r requirements-slurm.txt",
            marks=pytest.mark.skipif(HAS_LAUNCHER, reason="the launcher is installed"),
        ),
        pytest.param(
            ["hydra/launcher=slurm", "samples=1,2"],
            "hydra/launcher=slurm submits jobs to SLURM, whose srun is not on this machine's PATH; ",
            marks=pytest.mark.skipif(not HAS_LAUNCHER or bool(shutil.which("srun")), reason="no launcher, or a SLURM"),
        ),
    ],
)
def test_what_cannot_be_composed_is_one_line_in_a_sweep_too(
    world: World, tmp_path: Path, overrides: list[str], expected: str
) -> None:
    printed = run(world, "evaluate.py", "-m", "checkpoint=x", *overrides, cwd=tmp_path, status=2)
    assert printed.startswith(f"error: {expected}")
    assert printed.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["evaluate.py.log"]


def test_swept_values_without_the_flag_are_told_about_it(world: World, tmp_path: Path) -> None:
    printed = run(world, "evaluate.py", "checkpoint=x", "samples=1,2", cwd=tmp_path, status=2)
    assert printed.startswith("error: samples=1,2 are several values; give -m to run one job for each, ")
    assert printed.count("\n") == 1


@pytest.mark.skipif(not HAS_LAUNCHER, reason="hydra-submitit-launcher is not installed (requirements-slurm.txt)")
def test_the_slurm_configuration_composes() -> None:
    overrides = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "checkpoint=x"]
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        launcher = hydra.compose("evaluate", overrides=overrides, return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.partition, launcher.gpus_per_node, launcher.tasks_per_node) == ("gpu", 1, 1)


@pytest.mark.skipif(not HAS_LAUNCHER, reason="hydra-submitit-launcher is not installed (requirements-slurm.txt)")
def test_jobs_in_processes_of_the_launcher(world: World, arguments: list[str], tmp_path: Path) -> None:
    """submitit runs jobs on this machine as it does on SLURM: pickled, in new processes."""
    environment = {**os.environ, **world.environment, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(REPOSITORY / "evaluate.py"), "-m", "hydra/launcher=submitit_local"]
    done = subprocess.run(
        [*command, *arguments, "samples=2,3"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for number in (2, 3):
        assert scores(tmp_path / f"outputs/evaluate/demo-samples_{number}")["easy_vqa_shape"]["count"] == number
