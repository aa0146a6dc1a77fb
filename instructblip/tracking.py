"""Where a run's metrics go besides its own `metrics.jsonl`: nowhere, or to Weights & Biases."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from instructblip.errors import UserError


class Logger(Protocol):
    """Receives metrics of a run."""

    def log(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Record numbers at a step, None: after all before; nested dicts become names joined with "/"."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int | None) -> None:
        """Record a table, likewise."""

    def finish(self) -> None:
        """Write out everything; nothing may be logged afterwards."""


class NoLogger:
    """Takes everything and keeps nothing."""

    def log(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Nothing to do."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int | None) -> None:
        """Nothing to do."""

    def finish(self) -> None:
        """Nothing to do."""


class WandbLogger:
    """A Weights & Biases run; offline ones are kept in `<folder>/wandb/` for a later `wandb sync`."""

    def __init__(
        self, mode: str, project: str, name: str, folder: Path, config: Mapping[str, Any], run_id: str | None
    ) -> None:
        _keep_below(folder)
        try:
            import wandb
        except ImportError:
            raise UserError("logger=wandb needs the package wandb; pip install wandb, or choose logger=none") from None
        self._teardown, self._table = wandb.teardown, wandb.Table
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                dir=str(folder),
                config=dict(config),
                mode="online" if mode == "online" else "offline",
                id=run_id,
                resume="allow" if run_id is not None and mode == "online" else None,  # nothing to look up offline
                reinit="create_new",
                settings=wandb.Settings(silent=True, console="off", x_disable_meta=True),
            )
        except wandb.errors.Error as error:
            raise UserError(f"wandb could not start ({error}); run `wandb login`, or choose mode=offline") from None

    def log(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Record numbers; what comes at an earlier step than one that wandb has, after a restart, it drops."""
        self._run.log(flatten(metrics), step=step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int | None) -> None:
        """Record a table, likewise."""
        table = self._table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
        self._run.log({name: table}, step=step)

    def finish(self) -> None:
        """Write out, and when online send, what is left. Ends any other wandb run of this process too.

        wandb 0.31 may come back from a run's `finish` before an offline journal is written (seen in 4 of 40 runs on a
        loaded machine, its file still an empty header); `teardown` waits until the process that writes it has ended.
        """
        self._run.finish()
        self._teardown()


LOGGERS: dict[str, Callable[[str, str, str, Path, Mapping[str, Any], str | None], Logger]] = {
    "none": lambda mode, project, name, folder, config, run_id: NoLogger(),
    "wandb": WandbLogger,
}


def make_logger(
    kind: str,
    *,
    mode: str = "offline",
    project: str,
    name: str,
    folder: Path,
    config: Mapping[str, Any],
    run_id: str | None = None,
) -> Logger:
    """Start the logger called `kind` ("none" or "wandb").

    Args:
        kind: a key of `LOGGERS`.
        mode: "offline" keeps everything below `folder` and touches no network; "online" also sends it.
        project, name: what the run is filed under.
        folder: the run's output folder.
        config: the run's settings, stored with it.
        run_id: the tracker's own name for the run, under which it goes on if it has it; None: a new one.

    Raises:
        UserError: wandb not installed, or wandb refuses to start.
    """
    return LOGGERS[kind](mode, project, name, folder, config, run_id)


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"loss": {"a": 1}} -> {"loss/a": 1}, at any depth."""
    flat: dict[str, Any] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _keep_below(folder: Path) -> None:
    """Before wandb is imported: caches below the run's folder, no crash reports; what the user has set stays."""
    for variable in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        os.environ.setdefault(variable, str(folder / "wandb"))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
