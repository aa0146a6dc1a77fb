"""Checkpoints: trainable weights, optimiser state and the step; safetensors and JSON, written beside and renamed.

The step number is all a resumed run needs besides weights: data order and random streams are functions of it. What it
stands on and does not hold (frozen weights, prepared splits, templates, tokenizers) it names by fingerprints, which are
checked when the run goes on. state.json has the hash of every other file and a checksum of its own.
"""

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from instructblip.distributed import placed_like
from instructblip.errors import UserError
from instructblip.files import (
    checksum_holds,
    read_json,
    sha256_file,
    sync,
    sync_all,
    with_checksum,
    write_problem,
)
from instructblip.models.adapters import Adapter
from instructblip.weights.peft_format import peft_folders

FORMAT = 2  # 1 had no checksum of its state, and named no data
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
AVERAGE_FILE = "average.safetensors"
STATE_FILE = "state.json"
ADAPTERS_FOLDER = "adapters"
_PREFIX = "step_"


class LoadedCheckpoint(NamedTuple):
    """What a checkpoint folder held."""

    path: Path
    step: int
    model: dict[str, Tensor]
    state: dict[str, Any]
    average: dict[str, Tensor] | None = None  # moving average of `model`, where the run keeps one

    def averaged(self) -> "LoadedCheckpoint":
        """With the average in place of the weights, as the run evaluates itself. A run that is resumed goes on from both."""
        return self if self.average is None else self._replace(model=self.average)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimiser's state as flat tensors named `<parameter>|<key>`."""
    return {
        f"{names[parameter]}|{key}": value.detach()
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], path: Path) -> None:
    """Put saved state back. Weights that never had a gradient have none: no objective reached them.

    Raises:
        UserError: the file is missing or belongs to other parameters.
    """
    tensors = _load_tensors(path / OPTIMIZER_FILE)
    saved, known = {key.rpartition("|")[0] for key in tensors}, set(names.values())
    if not saved & known or saved - known:
        other = min(saved - known, default="none")
        raise UserError(f"{path} has the optimiser state of other parameters ({other}); it is of another model")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            prefix = f"{names[parameter]}|"
            values = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if not values:
                continue
            # The number of steps, too, is where fused AdamW reads it: beside its parameter.
            optimizer.state[parameter] = {
                key: placed_like(value, parameter) if value.ndim else value.to(parameter.device)
                for key, value in values.items()
            }


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
    average: dict[str, Tensor] | None = None,
    adapters: Mapping[str, Adapter] = MappingProxyType({}),
    spare: Collection[int] = (),
) -> Path:
    """Write `folder/step_XXXXXXXX`, whole or not at all, then delete all but the newest `keep` whole ones.

    It is on the disk before it has its name, and that is on the disk before any other loses its own.

    Args:
        step: number of optimiser steps taken.
        model, optimizer: named tensors.
        state: JSON values stored beside them (fingerprints, versions, metrics).
        keep: checkpoints that are broken do not count; those older than the last that is kept go too.
        average: moving average of `model`.
        adapters: of a model's parts; their tensors, averaged ones where there are some, are written in peft's format, too.
        spare: steps whose checkpoints stay, however old.

    Raises:
        UserError: the disk is full or fails; older checkpoints stay as they are.
    """
    target = folder / f"{_PREFIX}{step:08d}"
    partial = folder / f"{target.name}.{os.getpid()}.partial"
    try:
        folder.mkdir(exist_ok=True)  # not its parents: a run's folder that was deleted stays away
        partial.mkdir()
        files = {}
        for name, tensors in {MODEL_FILE: model, OPTIMIZER_FILE: optimizer, AVERAGE_FILE: average}.items():
            if tensors is None:
                continue
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, partial / name)
            files[name] = _written(partial / name)
        if adapters:
            state = {**state, "adapters": {part: adapter.to_json() for part, adapter in adapters.items()}}
            files |= _write_adapters(partial, adapters, model if average is None else average)
        content = with_checksum({"format": FORMAT, "step": step, "files": files, **state})
        text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
        (partial / STATE_FILE).write_text(text + "\n", encoding="utf-8")
        sync_all(partial)
        if target.exists():  # broken, or of a run that fell back behind it
            shutil.rmtree(target)
        os.replace(partial, target)
        sync(folder)
    except (OSError, SafetensorError) as error:
        if (problem := write_problem(error, target)) is None:
            raise
        raise UserError(
            f"{problem.what}; older checkpoints are whole: {problem.mend} and go on with resume=auto"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _delete_old(folder, keep, [folder / f"{_PREFIX}{kept:08d}" for kept in (step, *spare)])
    return target


def _written(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_file(file)}


def _write_adapters(
    folder: Path, adapters: Mapping[str, Adapter], model: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    paths = [
        path
        for name, found in peft_folders(adapters, model).items()
        for path in found.write(folder / ADAPTERS_FOLDER / name)
    ]
    return {path.relative_to(folder).as_posix(): _written(path) for path in paths}


def _delete_old(folder: Path, keep: int, spare: Sequence[Path]) -> None:
    whole = 0
    for path in checkpoint_folders(folder):
        if whole >= keep and path not in spare:
            shutil.rmtree(path)
        elif path == spare[0] or _problem(path) is None:
            whole += 1


def checkpoint_folders(folder: Path) -> list[Path]:
    """Checkpoints of a run, newest first; unfinished ones are not among them."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir() and _is_step(path.name)]
    return sorted(found, key=lambda path: _step_of(path.name), reverse=True)


def remove_unfinished(folder: Path) -> None:
    """Delete what a process killed in the middle of a save left behind; no other process may be saving there."""
    for partial in folder.glob(f"{_PREFIX}*.partial"):
        shutil.rmtree(partial)


def newest_whole(
    folder: Path, unfit: Callable[[Mapping[str, Any]], str | None] = lambda state: None
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files match their recorded hashes, and a line for each one passed over.

    Args:
        folder: `checkpoints` of a run.
        unfit: what speaks against one with that state (`has ...`), or None.
    """
    complaints: list[str] = []
    for path in checkpoint_folders(folder):
        if problem := _problem(path):
            complaints.append(f"{path} is broken ({problem}) and passed over")
        elif reason := unfit(read_json(path / STATE_FILE)):
            complaints.append(f"{path} {reason} and is passed over")
        else:
            return path, complaints
    return None, complaints


def load_checkpoint(path: Path) -> LoadedCheckpoint:
    """Read a checkpoint's trainable weights and state.

    Raises:
        UserError: no checkpoint there, or a broken one.
    """
    if not (path / STATE_FILE).is_file():
        raise UserError(f"there is no checkpoint at {path}; give a run folder or one of its checkpoints/step_XXXXXXXX")
    problem = _problem(path)
    if problem is not None:
        raise UserError(f"checkpoint {path} is broken ({problem}); use an older one of the same run")
    state = read_json(path / STATE_FILE)
    average = _load_tensors(path / AVERAGE_FILE) if AVERAGE_FILE in state["files"] else None
    return LoadedCheckpoint(path, int(state["step"]), _load_tensors(path / MODEL_FILE), state, average)


def _problem(path: Path) -> str | None:
    """Why a checkpoint folder is not as it was written, or None."""
    try:
        state = read_json(path / STATE_FILE)
        return _state_problem(state, path.name) or _files_problem(state["files"], path)
    except UserError as error:
        return str(error)
    except OSError as error:  # the disk has lost a part of it
        return f"it cannot be read: {error.strerror}"


def _state_problem(state: Any, name: str) -> str | None:
    if not isinstance(state, dict) or not {"format", "step", "files"} <= state.keys():
        return f"{STATE_FILE} does not say what it holds"
    if state["format"] != FORMAT:
        return f"format {state['format']}, this code reads {FORMAT}"
    if not checksum_holds(state):
        return f"{STATE_FILE} does not match its own checksum"
    if _is_step(name) and state["step"] != _step_of(name):
        return f"{STATE_FILE} is of step {state['step']}"
    return None


def _files_problem(files: Mapping[str, Mapping[str, Any]], path: Path) -> str | None:
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"] or sha256_file(file) != expected["sha256"]:
            return f"{name} does not match its recorded hash"
    return None


def _is_step(name: str) -> bool:
    return name.startswith(_PREFIX) and name.removeprefix(_PREFIX).isdecimal()


def _step_of(name: str) -> int:
    return int(name.removeprefix(_PREFIX))


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); use an older checkpoint of the same run") from None
