"""What happens in the process of one run of a study: train.py's or evaluate.py's work, and what it took."""

import contextlib
import datetime
import os
import platform
import resource
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open

from instructblip.config.schema import EvaluateConfig, TrainConfig
from instructblip.distributed import choose_device
from instructblip.errors import UserError
from instructblip.evaluation.results_file import RESULTS
from instructblip.evaluation.run import evaluate
from instructblip.files import (
    checksum_holds,
    errors_for_users,
    exclusive,
    read_json,
    sha256_file,
    with_checksum,
    write_json,
)
from instructblip.study.plan import StudyRun
from instructblip.training.metrics_log import MetricsLog
from instructblip.training.run import train
from instructblip.weights.checkpoint import checkpoint_folders

LOG, MEASURED = "log.txt", "measured.json"
_STATE = "state.json"
_ATTEMPTS = "attempts.json"
_USER_ERROR, _FAILED, _INTERRUPTED = 2, 1, 130
_WIDTH = 120  # of a log's lines


@dataclass(frozen=True)
class Job:
    """A run, and how it is carried out: threads of the processor, and the device where another than its own is meant.

    Without a number of threads it takes a thread for each core that its process may use.
    """

    run: StudyRun
    threads: int | None
    device: str | None = None


def results_of(run: StudyRun) -> Path | None:
    """The folder of a run's scores; None where it has none."""
    if isinstance(run.config, EvaluateConfig):
        return run.folder
    suite = run.config.suite
    return run.folder / "evaluation" if (*suite.held_in, *suite.held_out) else None


def measured_of(run: StudyRun) -> Mapping[str, Any] | None:
    """What a run that has ended took; None of any other, and of one whose results are not those that it ended with."""
    path, results = run.folder / MEASURED, results_of(run)
    if not path.is_file():
        return None
    try:
        found = read_json(path)
    except UserError:
        return None
    if not isinstance(found, dict) or not checksum_holds(found) or found["identity"] != run.identity:
        return None
    if results is not None and not (results / RESULTS).is_file():
        return None
    scored = None if results is None else sha256_file(results / RESULTS)
    return found if scored == found["results_sha256"] else None


def carry_out(job: Job) -> int:
    """Do a run, or the rest of it; return its exit status. What it prints goes to `log.txt` in its folder.

    Of several processes that want the same run one does it, and the others find it done.
    """
    log = job.run.folder / LOG
    try:
        with errors_for_users(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            with _logged(log):
                return _status(job)
    except UserError as error:  # there is no room for it in the log
        print(f"error: {error}", file=sys.stderr, flush=True)
        return _USER_ERROR


def _status(job: Job) -> int:
    run = job.run
    try:
        lock = run.folder.parent / ".locks" / f"{run.folder.name}.lock"
        with exclusive(lock, f"doing {run.label}"):
            return 0 if measured_of(run) is not None else _carry_out(job)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return _USER_ERROR
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception:
        traceback.print_exc()
        return _FAILED


def _carry_out(job: Job) -> int:
    run, config = job.run, job.run.config
    attempts = _attempt(run.folder / _ATTEMPTS)
    torch.set_num_threads(threads := job.threads or len(os.sched_getaffinity(0)))
    began, spent = time.monotonic(), _cpu_seconds()
    console = Console(width=_WIDTH)
    if job.device is not None:
        config = replace(config, device=job.device)
    if isinstance(config, TrainConfig):
        if status := train(config, console).status:
            return status
    else:
        # What is there was never vouched for, or is of a folder that was moved. Its answers are kept, by their content.
        (run.folder / RESULTS).unlink(missing_ok=True)
        evaluate(config, console)
    device, results = choose_device(config.device), results_of(run)
    measured: dict[str, Any] = {
        "identity": run.identity,
        "results_sha256": None if results is None else sha256_file(results / RESULTS),
        "command": run.command,
        "ended": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "attempts": attempts,
        "cpu_seconds": round(_cpu_seconds() - spent, 1),
        "gpu_seconds": round(time.monotonic() - began, 1) if device.type == "cuda" else None,
        "threads": threads,
        "machine": machine(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    write_json(run.folder / MEASURED, with_checksum(measured | _trained(run)))
    return 0


def _attempt(path: Path) -> int:
    """Count how often the run was begun: what an attempt spent that was killed is not known."""
    try:
        before = int(read_json(path)["begun"])
    except (UserError, KeyError, TypeError, ValueError):
        before = 0
    write_json(path, {"begun": before + 1})
    return before + 1


def _trained(run: StudyRun) -> dict[str, Any]:
    """How much was trained, on how much, and on which splits; nothing of an evaluation."""
    if isinstance(run.config, EvaluateConfig):
        return {}
    entries = list(MetricsLog(run.folder / "metrics.jsonl").read())
    (newest, *_) = checkpoint_folders(run.folder / "checkpoints")
    with safe_open(newest / "model.safetensors", framework="pt") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118  no dict
    return {
        "steps": len(entries),
        "samples": sum(len(entry["sample_ids"]) for entry in entries),
        "tokens": sum(entry["tokens"] for entry in entries),
        "parameters": sum(torch.Size(shape).numel() for shape in shapes),
        "splits": splits_of(newest),
    }


def splits_of(checkpoint: Path) -> dict[str, str]:
    """The fingerprint of each split that a checkpoint was trained on."""
    return dict(read_json(checkpoint / _STATE)["inputs"]["splits"])


def _cpu_seconds() -> float:
    """Of this process, all its threads, and the data workers that have ended."""
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in (own, others))


def machine(device: torch.device) -> str:
    """The GPU, or the number and kind of the processor's cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Whatever is printed inside, by libraries too, goes to the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(number) for number in (1, 2)]
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:  # a file's name may be no text
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:  # before the rest is written, for which there may be no room
            for number, copy in zip((1, 2), before, strict=True):
                os.dup2(copy, number)
                os.close(copy)
