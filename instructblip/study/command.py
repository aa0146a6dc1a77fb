"""The work of `python -m instructblip.study`."""

import os
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from instructblip.config.entry import launcher
from instructblip.config.schema import StudyCommandConfig
from instructblip.files import claimed_folder, write_atomically, write_json
from instructblip.study.carrying import Job, measured_of
from instructblip.study.findings import as_json, find
from instructblip.study.places import Place, choose_place
from instructblip.study.plan import RUNS, StudyPlan, StudyRun, plan_study
from instructblip.study.plot import draw
from instructblip.study.report import markdown
from instructblip.study.scheduling import run_all

REPORT, PLOT, FOUND = "study.md", "study.png", "study.json"
_FAILED = 1


def study(config: StudyCommandConfig, console: Console, place: Place | None = None) -> int:
    """Run what is left of a study, then write what all its runs say. The exit status is 1 where one failed.

    Args:
        config: the study and how it is carried out.
        console: gets what is said.
        place: where runs are carried out; None: as the command line says.

    Raises:
        UserError: overrides that a run would refuse, another process at work on the study, runs that cannot be compared.
    """
    plan = plan_study(config)
    folder = Path(config.output).expanduser() / config.name
    if config.plan:
        _say_plan(plan, console)
        return 0
    threads = config.threads or max(1, (os.cpu_count() or 1) // config.jobs)
    with claimed_folder(folder, "study"):
        logs = Path(config.output).expanduser() / RUNS / ".submitit"
        where = place or choose_place(launcher(), logs, threads, wanted=config.threads)
        make_job = partial(_job, threads=threads)
        failed = run_all(plan.runs, where, jobs=config.jobs, make_job=make_job, console=console)
        _write(config, plan, folder, console)
    for identity, reason in failed.items():
        console.print(f"failed: {plan.runs[identity].label}: {reason}", markup=False, highlight=False, soft_wrap=True)
    return _FAILED if failed else 0


def _write(config: StudyCommandConfig, plan: StudyPlan, folder: Path, console: Console) -> None:
    findings = find(config, plan)
    draw(findings, config.study.question, folder / PLOT)
    write_json(folder / FOUND, as_json(config, plan, findings))
    write_atomically(folder / REPORT, markdown(config, findings, PLOT))
    for name in (REPORT, PLOT, FOUND):
        console.print(f"wrote {folder / name}", markup=False, highlight=False, soft_wrap=True)


def _job(run: StudyRun, slot: int, *, threads: int) -> Job:
    """Of several GPUs each job at a time has its own."""
    gpus = torch.cuda.device_count()
    return Job(run, threads, f"cuda:{slot % gpus}" if gpus > 1 and run.config.device == "auto" else None)


def _say_plan(plan: StudyPlan, console: Console) -> None:
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    for run in plan.runs.values():
        say(f"{run.label}: {'done' if measured_of(run) is not None else 'to do'}, {run.folder}")
        say(f"  {run.command}")
