"""Where the runs of a study are carried out: processes of this machine, or jobs of a cluster through submitit."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Protocol

from instructblip.config.entry import require_slurm
from instructblip.errors import UserError
from instructblip.study.carrying import Job, carry_out

_PATIENCE = 60.0  # seconds that a run has to write a checkpoint when it is told to stop
_EXECUTORS = {"SlurmLauncher": "slurm", "LocalLauncher": "local"}
# Of a launcher's settings, those that submitit knows for every cluster; others are of one.
_GENERAL = (
    "timeout_min",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "mem_gb",
    "nodes",
    "name",
    "stderr_to_stdout",
)


class Started(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """Its exit status; None while it goes on."""

    def stop(self) -> None:
        """Ask it to end, with a checkpoint where it has time for one."""


class Place(Protocol):
    """What starts runs."""

    def start(self, job: Job) -> Started:
        """Start a run; it goes on by itself."""


class Processes:
    """Processes of this machine, forked from a server that has imported everything once: each starts in a moment."""

    def __init__(self, threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the server, before it imports torch
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([carry_out.__module__])

    def start(self, job: Job) -> Started:
        """Start a run."""
        process = self._context.Process(target=_in_process, args=(job,), name=job.run.label)
        process.start()
        return _StartedProcess(process)


class _StartedProcess:
    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process

    def poll(self) -> int | None:
        return self._process.exitcode

    def stop(self) -> None:
        self._process.terminate()
        self._process.join(_PATIENCE)
        self._process.kill()


def _in_process(job: Job) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    sys.exit(carry_out(job))


def _end_with(sentinel: int) -> None:
    """Tell this process to stop, as a cluster would, once the study's own has ended, however that did."""
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


class Cluster:
    """Jobs of a cluster, as Hydra's launcher for it would submit them.

    Args:
        settings: of `hydra/launcher`.
        folder: of submitit's logs.
        threads: of each run; None: on another machine as many as the job is given there, here as the job says.

    Raises:
        UserError: submitit is not installed, the launcher is none of it, or no SLURM takes jobs here.
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path, threads: int | None = None) -> None:
        name = str(settings["_target_"]).rpartition(".")[2]
        if name not in _EXECUTORS:
            raise UserError(f"runs of a study are started by hydra/launcher=slurm, or here without one, not by {name}")
        try:
            import submitit
        except ImportError:
            raise UserError("hydra/launcher=slurm needs submitit; pip install -r requirements-slurm.txt") from None
        cluster = _EXECUTORS[name]
        if cluster == "slurm":
            require_slurm()
        self._threads, self._elsewhere = threads, cluster != "local"
        given = {key: value for key, value in settings.items() if key not in ("_target_", "submitit_folder")}
        once = {f"{cluster}_{key}": given.pop(key) for key in ("max_num_timeout",) if key in given}
        self._executor = submitit.AutoExecutor(folder=str(folder / "%j"), cluster=cluster, **once)
        self._executor.update_parameters(
            **{key if key in _GENERAL else f"{cluster}_{key}": value for key, value in given.items()}
        )

    def start(self, job: Job) -> Started:
        """Submit a run, which takes the device and cores that the cluster gives it: those of this machine are others."""
        threads = self._threads if self._elsewhere else job.threads
        return _StartedJob(self._executor.submit(carry_out, replace(job, device=None, threads=threads)))


class _StartedJob:
    def __init__(self, job: Any) -> None:
        self._job = job

    def poll(self) -> int | None:
        if not self._job.done():
            return None
        if self._job.exception() is not None:  # it was killed, or never began
            return 1
        return int(self._job.result())

    def stop(self) -> None:
        self._job.cancel()


def choose_place(launcher: Mapping[str, Any], folder: Path, threads: int, *, wanted: int | None = None) -> Place:
    """Processes of this machine, or the cluster of a chosen `hydra/launcher`.

    Args:
        launcher, folder: as of `Cluster`.
        threads: of each run here.
        wanted: what was asked for; None: nothing.
    """
    own = str(launcher.get("_target_", "BasicLauncher")).rpartition(".")[2] == "BasicLauncher"
    return Processes(threads) if own else Cluster(launcher, folder, wanted)
