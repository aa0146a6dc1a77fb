"""Where a run's metrics go besides its own `metrics.jsonl`: nowhere, to Weights & Biases, to TensorBoard, to MLflow, or to
several."""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from instructblip.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

Started = TypeVar("Started")

_EVENTS = "events.out.tfevents."  # begins the name of an event file
_CONFIG = "config"  # name of the text that TensorBoard has of a run's settings
_MLFLOW_TAG = "instructblip_folder"  # of a run there: by it a run that goes on is found
_MLFLOW_METRICS, _MLFLOW_PARAMS, _MLFLOW_TEXT = (
    1000,
    100,
    500,
)  # what its servers take at once: numbers, settings, characters


@dataclass(frozen=True)
class TrackedSample:
    """A picture, and what was asked of it, answered, and right, one a line."""

    picture: "Image"
    text: str


class Logger(Protocol):
    """Receives metrics of a run."""

    def log(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Record numbers at a step, None: after all before; nested dicts become names joined with "/"."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int | None) -> None:
        """Record a table, likewise."""

    def log_samples(self, name: str, samples: Iterable[TrackedSample], step: int | None) -> None:
        """Record pictures with their answers, likewise."""

    def finish(self) -> None:
        """Write out everything; nothing may be logged afterwards."""


class Loggers:
    """All loggers of a run, by name; of none it keeps nothing. One that fails is named in one line and gets no more."""

    def __init__(self, loggers: Mapping[str, Logger] | None = None) -> None:
        self._loggers = dict(loggers or {})

    def log(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Record numbers."""
        self._each(lambda one: one.log(metrics, step))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int | None) -> None:
        """Record a table."""
        self._each(lambda one: one.log_table(name, columns, rows, step))

    def log_samples(self, name: str, samples: Iterable[TrackedSample], step: int | None) -> None:
        """Record pictures with their answers, which are only made where a logger takes them."""
        if self._loggers and (made := list(samples)):
            self._each(lambda one: one.log_samples(name, made, step))

    def finish(self) -> None:
        """Write out everything."""
        self._each(lambda one: one.finish())

    def _each(self, call: Callable[[Logger], None]) -> None:
        for kind, one in list(self._loggers.items()):
            try:
                call(one)
            except Exception as error:  # each tracker raises errors of its own, with no class in common
                reason = _reason(error)
                logger.warning("logger=%s failed (%s); the run goes on without it, metrics.jsonl has all", kind, reason)
                del self._loggers[kind]
                with contextlib.suppress(Exception):  # what it may still hold open
                    one.finish()


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run when it starts.

    Attributes:
        mode: "offline" keeps everything below `folder` and touches no network; "online" also sends it.
        project, name: what the run is filed under.
        folder: the run's output folder.
        config: the run's settings, stored with it.
        run_id: the name under which an online tracker goes on with the run if it has it; None: a new one.
        first_step: the first that is logged; what an earlier process of the run logged from there on is made anew.
    """

    mode: str
    project: str
    name: str
    folder: Path
    config: Mapping[str, Any]
    run_id: str | None
    first_step: int


class WandbLogger:
    """A Weights & Biases run; offline ones are kept in `<folder>/wandb/` for a later `wandb sync`."""

    def __init__(self, run: TrackedRun) -> None:
        folder, online = run.folder, run.mode == "online"
        wandb = _wandb(folder)
        self._teardown, self._table, self._image = wandb.teardown, wandb.Table, wandb.Image
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=run.project,
                name=run.name,
                dir=str(folder),
                config=dict(run.config),
                mode="online" if online else "offline",
                id=run.run_id,
                resume="allow" if run.run_id is not None and online else None,  # nothing to look up offline
                reinit="create_new",
                settings=wandb.Settings(silent=True, console="off", x_disable_meta=True),
            )
        except wandb.errors.Error as error:
            raise _no_wandb(error) from None

    @staticmethod
    def check(run: TrackedRun) -> None:
        """Refuse what start would: without the package, or online without a login.

        Raises:
            UserError: says what to do.
        """
        wandb = _wandb(run.folder)
        _check_place(run.folder / "wandb")
        if run.mode == "online":
            try:
                wandb.login(verify=True)
            except wandb.errors.Error as error:
                raise _no_wandb(error) from None

    def log(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Record numbers; what comes at an earlier step than one that wandb has, after a restart, it drops."""
        self._run.log(flatten(metrics), step=step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int | None) -> None:
        """Record a table, likewise."""
        table = self._table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
        self._run.log({name: table}, step=step)

    def log_samples(self, name: str, samples: Iterable[TrackedSample], step: int | None) -> None:
        """Record pictures, likewise, with their texts for captions."""
        self._run.log({name: [self._image(item.picture, caption=item.text) for item in samples]}, step=step)

    def finish(self) -> None:
        """Write out, and when online send, what is left. Ends any other wandb run of this process too.

        wandb 0.31 may come back from a run's `finish` before an offline journal is written (seen in 4 of 40 runs on a
        loaded machine, its file still an empty header); `teardown` waits until the process that writes it has ended.
        """
        self._run.finish()
        self._teardown()


class TensorBoardLogger:
    """Event files in `<folder>/tensorboard/`, for `tensorboard --logdir`; what comes after all steps, in `evaluation` there.

    They are written at once, by no thread: a killed run loses nothing, a full disk is known at the call that met it.
    """

    def __init__(self, run: TrackedRun) -> None:
        home = run.folder / "tensorboard"
        self._steps = _EventFile(home, run.first_step)
        self._after = _EventFile(home / "evaluation", 0)
        self._last = max(0, run.first_step - 1)
        settings = json.dumps(run.config, indent=2, ensure_ascii=False, default=str)
        self._steps.add_text(_CONFIG, "\n".join(f"    {line}" for line in settings.splitlines()), run.first_step)

    @staticmethod
    def check(run: TrackedRun) -> None:
        """Refuse what start would: without the package."""
        _EventFile(run.folder / "tensorboard", 0)
        _check_place(run.folder / "tensorboard")

    def log(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Record numbers; texts and what is not known are left to metrics.jsonl."""
        file, place = self._at(step)
        numbers = {name: value for name, value in flatten(metrics).items() if isinstance(value, int | float)}
        numbers.pop("step", None)
        file.add_scalars({name: float(value) for name, value in numbers.items()}, place)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int | None) -> None:
        """Record a table as a text in Markdown."""
        file, place = self._at(step)
        file.add_text(name, _markdown(columns, rows), place)

    def log_samples(self, name: str, samples: Iterable[TrackedSample], step: int | None) -> None:
        """Record pictures, and beside each, under the same name, its text."""
        file, place = self._at(step)
        for number, item in enumerate(samples):
            file.add_image(f"{name}/{number}", item.picture, place)
            file.add_text(f"{name}/{number}", item.text.replace("\n", "  \n"), place)

    def finish(self) -> None:
        """Close the files."""
        self._steps.close()
        self._after.close()

    def _at(self, step: int | None) -> "tuple[_EventFile, int]":
        """The file of a step, and the number that it is written under."""
        if step is None:
            return self._after, self._last
        self._last = step
        return self._steps, step


class _EventFile:
    """One of TensorBoard's event files, begun with its first event; steps from `first` on in earlier files count no more."""

    def __init__(self, folder: Path, first: int) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.summary.writer.record_writer import RecordWriter
            from torch.utils.tensorboard import summary
        except ImportError:
            raise UserError(
                "logger=tensorboard needs the package tensorboard; pip install -r requirements-trackers.txt, or choose "
                "another logger"
            ) from None
        self._event, self._summary, self._records = Event, summary, RecordWriter
        self._begin = (
            Event(step=first, file_version="brain.Event:2"),
            Event(step=first, session_log=SessionLog(status=SessionLog.START)),
        )
        self._folder = folder
        self._writer: Any = None

    def add_scalars(self, numbers: Mapping[str, float], step: int) -> None:
        self._add(step, [self._summary.scalar(name, value) for name, value in numbers.items() if math.isfinite(value)])

    def add_text(self, name: str, text: str, step: int) -> None:
        self._add(step, [self._summary.text(name, text)])

    def add_image(self, name: str, picture: "Image", step: int) -> None:
        import numpy

        self._add(step, [self._summary.image(name, numpy.asarray(picture.convert("RGB")), dataformats="HWC")])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _number(self) -> int:
        """Of a file behind all that are there, wherever the clock was put: readers take them in the order of their names."""
        numbers = [path.name.removeprefix(_EVENTS) for path in self._folder.glob(f"{_EVENTS}*")]
        return max([time.time_ns(), *(int(number) + 1 for number in numbers if number.isdecimal())])

    def _add(self, step: int, summaries: Sequence[Any]) -> None:
        now = time.time()
        events = [self._event(step=step, wall_time=now, summary=summary) for summary in summaries]
        if self._writer is None and events:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = self._records(open(self._folder / f"{_EVENTS}{self._number():019d}", "xb"))
            for event in self._begin:
                event.wall_time = now
            events = [*self._begin, *events]
        for event in events:
            self._writer.write(event.SerializeToString())
        if events:
            self._writer.flush()


class MLflowLogger:
    """A run of MLflow in `<folder>/mlflow/`, for `mlflow ui --backend-store-uri sqlite:///<folder>/mlflow/mlflow.db`.

    Online it goes to the server that MLFLOW_TRACKING_URI names. A run that goes on is the same one there. MLflow only adds,
    so what it already has of a step is not recorded again.
    """

    def __init__(self, run: TrackedRun) -> None:
        mlflow = _mlflow(run.mode)
        self._metric, self._param = mlflow.entities.Metric, mlflow.entities.Param
        home = run.folder.resolve() / "mlflow"
        online = run.mode == "online"
        if not online:
            home.mkdir(parents=True, exist_ok=True)
        self._client = mlflow.MlflowClient(None if online else f"sqlite:///{home / 'mlflow.db'}")
        self._id, self._had = self._begin(run, None if online else (home / "files").as_uri())
        self._last = run.first_step - 1

    @staticmethod
    def check(run: TrackedRun) -> None:
        """Refuse what start would: without the package, or online without a server that answers."""
        mlflow = _mlflow(run.mode)
        if run.mode == "online":
            mlflow.MlflowClient().get_experiment_by_name(run.project)
        else:
            _check_place(run.folder / "mlflow")

    def log(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Record numbers; texts and what is not known are left to metrics.jsonl."""
        numbers = {name: value for name, value in flatten(metrics).items() if isinstance(value, int | float)}
        numbers.pop("step", None)
        place, now = self._at(step), time.time_ns() // 1_000_000
        new = {
            name: value
            for name, value in numbers.items()
            if step is None or step > self._had.get(_mlflow_name(name), -1)
        }
        found = [self._metric(_mlflow_name(name), float(value), now, place) for name, value in new.items()]
        for start in range(0, len(found), _MLFLOW_METRICS):
            self._client.log_batch(self._id, metrics=found[start : start + _MLFLOW_METRICS])

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int | None) -> None:
        """Record a table as a text in Markdown."""
        self._client.log_text(self._id, _markdown(columns, rows), f"{name}/step_{self._at(step):08d}.md")

    def log_samples(self, name: str, samples: Iterable[TrackedSample], step: int | None) -> None:
        """Record pictures, and beside each its text."""
        for number, item in enumerate(samples):
            file = f"{name}/step_{self._at(step):08d}/{number:03d}"
            self._client.log_image(self._id, item.picture, artifact_file=f"{file}.png")
            self._client.log_text(self._id, item.text, f"{file}.txt")

    def finish(self) -> None:
        """Say that the run has ended."""
        self._client.set_terminated(self._id)

    def _begin(self, run: TrackedRun, files: str | None) -> tuple[str, dict[str, int]]:
        """The run's id, and the last step that it has of each number; its own earlier one where it goes on."""
        experiment = self._client.get_experiment_by_name(run.project)
        place = experiment.experiment_id if experiment else self._client.create_experiment(run.project, files)
        tag = {_MLFLOW_TAG: hashlib.sha256(os.fsencode(run.folder.resolve())).hexdigest()}  # free of quotes
        mine = f"tags.{_MLFLOW_TAG} = '{tag[_MLFLOW_TAG]}'"
        if run.first_step > 1 and (found := self._client.search_runs([place], mine, max_results=1)):
            self._client.update_run(found[0].info.run_id, status="RUNNING")
            return found[0].info.run_id, {entry.key: entry.step for entry in found[0].to_proto().data.metrics}
        begun = self._client.create_run(place, run_name=run.name, tags=tag).info.run_id
        self._client.log_dict(begun, dict(run.config), "config.json")
        settings = [
            self._param(_mlflow_name(name), str(value)[:_MLFLOW_TEXT]) for name, value in flatten(run.config).items()
        ]
        for start in range(0, len(settings), _MLFLOW_PARAMS):
            self._client.log_batch(begun, params=settings[start : start + _MLFLOW_PARAMS])
        return begun, {}

    def _at(self, step: int | None) -> int:
        """The number that something of a step is kept under; what comes after all steps under the last one's."""
        self._last = self._last if step is None else step
        return self._last


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w\-./ ]", "_", name)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [columns, ["---"] * len(columns), *(["" if cell is None else cell for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(map(_table_cell, row))} |" for row in cells)


def _table_cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


LOGGERS: dict[str, Callable[[TrackedRun], Logger] | None] = {
    "none": None,
    "wandb": WandbLogger,
    "tensorboard": TensorBoardLogger,
    "mlflow": MLflowLogger,
}


def make_loggers(
    kinds: Sequence[str],
    *,
    mode: str = "offline",
    project: str,
    name: str,
    folder: Path,
    config: Mapping[str, Any],
    run_id: str | None = None,
    first_step: int = 0,
) -> Loggers:
    """Start the loggers of these kinds, keys of `LOGGERS`; the rest is told to each of them as a `TrackedRun`.

    Raises:
        UserError: a package is not installed, or a tracker cannot start.
    """
    run, started = TrackedRun(mode, project, name, folder, config, run_id, first_step), dict[str, Logger]()
    try:
        for kind in dict.fromkeys(kinds):
            if (start := LOGGERS[kind]) is not None:
                started[kind] = _started(kind, start, run)
    except BaseException:
        Loggers(started).finish()
        raise
    return Loggers(started)


def check_loggers(kinds: Sequence[str], *, mode: str, project: str, folder: Path) -> None:
    """Refuse at once what would only fail when the loggers start, for a command that starts them at its end.

    Raises:
        UserError: as `make_loggers`.
    """
    run = TrackedRun(mode, project, "", folder, {}, None, 0)
    for kind in dict.fromkeys(kinds):
        if (check := getattr(LOGGERS[kind], "check", None)) is not None:
            _started(kind, check, run)


def _started(kind: str, start: Callable[[TrackedRun], Started], run: TrackedRun) -> Started:
    try:
        return start(run)
    except UserError:
        raise
    except Exception as error:  # each tracker raises errors of its own, with no class in common
        raise UserError(
            f"logger={kind} could not start ({_reason(error)}); mend that, or choose another logger"
        ) from None


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"loss": {"a": 1}} -> {"loss/a": 1}, at any depth."""
    flat: dict[str, Any] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _wandb(folder: Path) -> Any:
    _keep_below(folder)
    try:
        import wandb
    except ImportError:
        raise UserError("logger=wandb needs the package wandb; pip install wandb, or choose logger=none") from None
    return wandb


def _no_wandb(error: Exception) -> UserError:
    return UserError(f"wandb could not start ({error}); run `wandb login`, or choose mode=offline")


def _mlflow(mode: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        import mlflow.entities
        import sqlalchemy  # noqa: F401  of the offline store, which mlflow-skinny imports late
    except ImportError:
        raise UserError(
            "logger=mlflow needs the package mlflow-skinny; pip install -r requirements-trackers.txt, or choose another "
            "logger"
        ) from None
    if mode == "online" and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError(
            "logger=mlflow with mode=online needs a server; set MLFLOW_TRACKING_URI, or choose mode=offline"
        )
    return mlflow


def _check_place(folder: Path) -> None:
    """Raise what making a folder would, and make none."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there} may not be written to")


def _keep_below(folder: Path) -> None:
    """Before wandb is imported: caches below the run's folder, no crash reports; what the user has set stays."""
    for variable in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        os.environ.setdefault(variable, str(folder / "wandb"))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
