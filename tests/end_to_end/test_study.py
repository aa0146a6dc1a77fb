"""Studies from end to end: runs, reports, kills, failures, changed files, real processes."""

import copy
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from instructblip.config.schema import CONFIGS, StudyCommandConfig
from instructblip.errors import UserError
from instructblip.evaluation.results_file import RESULTS, read_run
from instructblip.evaluation.statistics import spread
from instructblip.files import CHECKSUM, sha256_file, with_checksum, write_json
from instructblip.study import carrying
from instructblip.study.carrying import MEASURED, Job, carry_out, measured_of
from instructblip.study.command import study
from instructblip.study.places import Cluster, Processes, choose_place
from instructblip.study.plan import StudyRun, plan_study
from tests.kit.runs import SECONDS, World, one_thread
from tests.kit.studies import STUDY, Here, compose_once, reports, shipped_study, study_config, study_here

pytestmark = pytest.mark.slow

SMALL = {**STUDY, "conditions": {name: STUDY["conditions"][name] for name in ("alone", "by mean")}, "stages": {}}


@pytest.fixture(autouse=True)
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compose_once(monkeypatch)


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that was never interrupted; not to be changed by a test."""
    output = tmp_path_factory.mktemp("whole")
    assert study_here(world, study_config(world, output)) == 0
    return output


def _tables(folder: Path) -> str:
    """The report up to the costs, which are measured."""
    return (folder / "study.md").read_text(encoding="utf-8").partition("What it took:")[0]


def test_the_report_says_what_the_runs_say(world: World, whole: Path) -> None:
    plan = plan_study(study_config(world, whole))
    found = json.loads((whole / "tiny/study.json").read_text())
    scores = {(item["condition"], item["dataset"]): item for item in found["scores"]}
    for (condition, seed), identity in plan.scored.items():
        run = plan.runs[identity]
        results = read_run(run.folder)
        for dataset in STUDY["datasets"]:
            assert scores[condition, dataset]["by_seed"][str(seed)] == results.scores[dataset].value
            assert scores[condition, dataset]["count"] == 6
    for item in found["differences"]:
        own, reference = (scores[name, item["dataset"]]["by_seed"] for name in (item["condition"], "alone"))
        by_seed = {seed: own[seed] - reference[seed] for seed in own}
        assert item["by_seed"] == by_seed
        assert item["over_seeds"] == vars(spread(list(by_seed.values())))
        assert item["by_sample"]["difference"] == pytest.approx(sum(by_seed.values()) / 2)
    text = (whole / "tiny/study.md").read_text(encoding="utf-8")
    assert text.startswith("## tiny: `python -m instructblip.study study=tiny`\n\nDoes a stage before help?\n")
    assert (
        "| dataset | condition | seeds 1, 2 | mean ± SD [95%] | chance | images withheld | majority per question |"
        in text
    )
    assert "| by mean, evaluates alone |" in text
    assert "| staged | aligned | 3 | 12 |" in text
    assert (whole / "tiny/study.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_again_trains_nothing_and_writes_the_same(world: World, whole: Path) -> None:
    before, place = reports(whole / "tiny"), Here()
    assert study_here(world, study_config(world, whole), place) == 0
    assert place.started == []
    assert reports(whole / "tiny") == before


def _without(world: World, whole: Path, output: Path, *labels: str) -> StudyCommandConfig:
    """The whole study in another folder, where these runs were never begun."""
    shutil.copytree(whole, output, dirs_exist_ok=True)
    config = study_config(world, output)
    for run in plan_study(config).runs.values():
        if run.label in labels:
            shutil.rmtree(run.folder)
    return config


def _run(config: StudyCommandConfig, label: str) -> StudyRun:
    return next(run for run in plan_study(config).runs.values() if run.label == label)


def test_a_study_that_was_killed_goes_on_to_the_same_table(world: World, whole: Path, tmp_path: Path) -> None:
    config = _without(world, whole, tmp_path, "alone, seed 1")
    run = _run(config, "alone, seed 1")
    # As the study's own process would start it, and as `kill -9` ends it, in the middle of training.
    with world.here():
        process = multiprocessing.get_context("forkserver").Process(
            target=_slowly, args=(Job(run, 1), world.environment), daemon=True
        )
        process.start()
    _wait_for(run.folder / "checkpoints/step_00000002")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(SECONDS)
    assert measured_of(run) is None
    place = Here()
    assert study_here(world, config, place) == 0
    assert place.started == [run.label]
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert "continuing " in (run.folder / "log.txt").read_text()
    _assert_same(tmp_path, whole)
    text = (tmp_path / "tiny/study.md").read_text(encoding="utf-8")
    assert "CPU† |" in text and "A run of these was interrupted" in text


def _assert_same(output: Path, whole: Path) -> None:
    """Every byte but of the costs, which are measured."""
    names = ("study.json", "study.png")
    assert reports(output / "tiny", names) == reports(whole / "tiny", names)
    assert _tables(output / "tiny") == _tables(whole / "tiny")


def _slowly(job: Job, environment: dict[str, str]) -> None:
    """In a process of its own: hold on before the last step."""
    import instructblip.training.run as training

    os.environ.update(environment)
    entry = training.log_entry

    def hold(step: int, *arguments: Any) -> dict[str, Any]:
        if step == 2:
            time.sleep(SECONDS)
        return entry(step, *arguments)

    training.log_entry = hold  # type: ignore[attr-defined]
    carry_out(job)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


def test_a_run_that_fails_is_named_and_the_others_go_on(world: World, whole: Path, tmp_path: Path) -> None:
    config = _without(world, whole, tmp_path, "aligned, seed 1", "staged, seed 1", "by mean, seed 2")
    place = Here(statuses={"aligned, seed 1": 1})
    with (tmp_path / "said.txt").open("w") as file:
        assert study_here(world, config, place, Console(file=file, width=500)) == 1
    said = (tmp_path / "said.txt").read_text()
    assert "8 runs, 5 of them done already" in said
    assert "aligned, seed 1 failed: it wrote nothing (exit status 1; " in said
    assert "staged, seed 1 is left out: the run that it starts from failed" in said
    assert place.started == ["aligned, seed 1", "by mean, seed 2"]
    text = (tmp_path / "tiny/study.md").read_text(encoding="utf-8")
    assert "**Not in the tables, since it failed: staged, seed 1.**" in text
    # Once it is mended, the same command does what is missing, and the table is that of a study where nothing failed.
    again = Here()
    assert study_here(world, config, again) == 0
    assert again.started == ["aligned, seed 1", "staged, seed 1"]
    _assert_same(tmp_path, whole)


def test_a_users_mistake_in_a_run_is_one_line(world: World, tmp_path: Path) -> None:
    nowhere = [f"data.shards={tmp_path / 'nowhere'}", "data.sources.easy_vqa.path=/nowhere"]
    config = study_config(world, tmp_path, {**SMALL, "seeds": [1]}, train=nowhere)
    with pytest.raises(UserError, match="no run of study=tiny has ended, so there is nothing to compare"):
        study_here(world, config)
    lines = (_run(config, "alone, seed 1").folder / "log.txt").read_text().splitlines()
    assert lines[-1].startswith("error: ") and "/nowhere" in lines[-1]


def test_a_changed_file_makes_the_affected_runs_anew(world: World, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    values = copy.deepcopy(STUDY)
    values["conditions"]["by mean"]["evaluate"] = ["normalize=mean", "include_eos=false"]
    place = Here()
    assert study_here(world, study_config(world, tmp_path, values), place) == 0
    assert place.started == ["by mean, seed 1", "by mean, seed 2"]
    # What was there stays: the file as it was finds its runs again.
    assert study_here(world, study_config(world, tmp_path), place) == 0
    assert len(place.started) == 2
    _assert_same(tmp_path, whole)


def test_results_that_were_edited_are_made_anew(world: World, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    config = study_config(world, tmp_path)
    results = _run(config, "by mean, seed 1").folder / "results.json"
    results.write_text(results.read_text().replace('"value": ', '"value": 1'))
    (_run(config, "by mean, seed 2").folder / MEASURED).write_text("{")
    place = Here()
    assert study_here(world, config, place) == 0
    assert place.started == ["by mean, seed 1", "by mean, seed 2"]
    _assert_same(tmp_path, whole)


def test_runs_side_by_side_in_processes_give_the_same(world: World, whole: Path, tmp_path: Path) -> None:
    forkserver.ensure_running()  # with what the kit preloads
    config = _without(world, whole, tmp_path, "alone, seed 1", "aligned, seed 1", "staged, seed 1", "by mean, seed 1")
    config = replace(config, jobs=2)
    with world.here(), one_thread():
        assert study(config, Console(quiet=True), Processes(threads=1)) == 0
    _assert_same(tmp_path, whole)


def test_a_name_that_is_no_text_ends_no_run(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(study_config(world, tmp_path), "alone, seed 1")
    monkeypatch.setattr(carrying, "_carry_out", lambda job: print("left out:", os.fsdecode(b"caf\xe9.png")) or 0)
    assert carry_out(Job(run, 1)) == 0
    assert (run.folder / "log.txt").read_text() == "left out: caf\\udce9.png\n"


def test_a_log_that_cannot_be_written_is_said_on_the_terminal(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = _run(study_config(world, tmp_path), "alone, seed 1")
    run.folder.mkdir(parents=True)
    (run.folder / "log.txt").symlink_to("/dev/full")  # what is written there finds no room
    (run.folder.parent / ".locks").write_text("no folder")  # so that there is something to write
    assert carry_out(Job(run, 1)) == 2
    assert capfd.readouterr().err == (
        f"error: disk full while writing {run.folder / 'log.txt'}; free some space and run the same command again\n"
    )


def test_checkpoints_may_be_deleted_once_a_run_has_ended(world: World, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for checkpoints in tmp_path.glob("runs/*/checkpoints"):
        shutil.rmtree(checkpoints)
    place = Here()
    assert (study_here(world, study_config(world, tmp_path), place), place.started) == (0, [])
    _assert_same(tmp_path, whole)


@pytest.mark.parametrize("name", ["alone, seed 2", "aligned, seed 2"])
def test_runs_that_learned_from_other_data_are_not_compared(
    name: str, world: World, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    config = study_config(world, tmp_path)
    path = _run(config, name).folder / MEASURED
    values = json.loads(path.read_text())
    values["splits"]["easy_vqa/train"] = "another"
    del values[CHECKSUM]
    write_json(path, with_checksum(values))
    with pytest.raises(UserError, match="were trained on two versions of easy_vqa/train; delete those of"):
        study_here(world, config)


def test_runs_that_were_asked_other_versions_of_the_questions_are_not_compared(
    world: World, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    config = study_config(world, tmp_path)
    folder = _run(config, "by mean, seed 2").folder
    results, measured = (json.loads((folder / name).read_text()) for name in (RESULTS, MEASURED))
    results["datasets"]["easy_vqa_shape"]["protocol"]["samples_sha256"] = "another"
    write_json(folder / RESULTS, results)
    del measured[CHECKSUM]
    write_json(folder / MEASURED, with_checksum(measured | {"results_sha256": sha256_file(folder / RESULTS)}))
    with pytest.raises(
        UserError, match=r"easy_vqa_shape: .* were asked about other samples, or other versions of them"
    ):
        study_here(world, config)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "study").glob("*.yaml")))
def test_a_shipped_study_goes_from_photos_to_its_table(name: str, world: World, tmp_path: Path) -> None:
    config = shipped_study(name, world, tmp_path)
    assert study_here(world, config) == 0
    text = (tmp_path / "out" / name / "study.md").read_text(encoding="utf-8")
    assert text.startswith(f"## {name}: `python -m instructblip.study study={name} form=short`")
    found = json.loads((tmp_path / "out" / name / "study.json").read_text())
    cells = {(item["condition"], item["dataset"]) for item in found["scores"]}
    assert cells == {(condition, dataset) for condition in config.study.conditions for dataset in config.study.datasets}
    assert all(len(item["by_seed"]) == 2 for item in (*found["scores"], *found["differences"]))


@pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="submitit is not installed (requirements-slurm.txt)"
)
def test_jobs_of_a_cluster_give_the_same(world: World, whole: Path, tmp_path: Path) -> None:
    """submitit runs jobs on this machine as it does on SLURM: pickled, in new processes."""
    config = _without(world, whole, tmp_path, "alone, seed 1", "by mean, seed 1")
    settings = {"_target_": "a.LocalLauncher", "submitit_folder": "unused", "timeout_min": 5, "cpus_per_task": 1}
    with world.here(), one_thread():
        assert study(config, Console(quiet=True), Cluster(settings, tmp_path / "submitit")) == 0
    _assert_same(tmp_path, whole)


@pytest.mark.parametrize(("name", "wanted", "threads"), [("Slurm", None, None), ("Slurm", 4, 4), ("Local", None, 32)])
def test_a_job_of_a_cluster_is_given_neither_device_nor_cores_of_this_machine(
    name: str, wanted: int | None, threads: int | None, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node that submits may have more of them than a job gets."""
    submitted = list[Job]()
    executor = SimpleNamespace(
        submit=lambda _, job: submitted.append(job), update_parameters=lambda **parameters: parameters
    )
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=lambda **_: executor))
    monkeypatch.setattr(shutil, "which", lambda command: f"/usr/bin/{command}")
    job = Job(_run(study_config(world, tmp_path), "alone, seed 1"), 32, "cuda:3")
    choose_place({"_target_": f"a.{name}Launcher"}, tmp_path, 32, wanted=wanted).start(job)
    assert submitted == [replace(job, device=None, threads=threads)]


def test_slurms_absence_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace())
    monkeypatch.setattr(shutil, "which", lambda command: None)
    with pytest.raises(UserError, match=r"^hydra/launcher=slurm submits jobs to SLURM, whose srun is not on this"):
        choose_place({"_target_": "a.SlurmLauncher"}, tmp_path, threads=1)


def test_a_launcher_that_is_no_clusters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="are started by hydra/launcher=slurm, or here without one, not by JoblibLauncher"
    ):
        choose_place({"_target_": "hydra_plugins.JoblibLauncher"}, tmp_path, threads=1)
