"""Checkpoints written while training goes on: tensors are copied at once, a thread puts them on disk.

A checkpoint appears whole or not at all, and no older one is deleted before it has, so a run that is killed at any moment of
a save goes on from the one before.
"""

import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from instructblip.errors import UserError
from instructblip.models.adapters import Adapter
from instructblip.weights.checkpoint import save_checkpoint


class CheckpointWriter:
    """Writes one checkpoint at a time into a run's `checkpoints` folder.

    Args:
        folder: where; the run's, above it, is there.
        keep: how many of the newest whole ones stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        *,
        model: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        state: dict[str, Any],
        average: dict[str, Tensor] | None = None,
        adapters: Mapping[str, Adapter] = MappingProxyType({}),
        spare: Collection[int] = (),
    ) -> None:
        """Copy everything and begin to write it; `save_checkpoint` says what the arguments are.

        Raises:
            UserError: the disk was full at the save before, see `problem`.
        """
        self.wait()
        tensors = {"model": _copies(model), "optimizer": _copies(optimizer)}
        averages = None if average is None else _copies(average)

        def write() -> None:
            try:
                if not self.folder.parent.is_dir():  # and stays away: nobody wants it back
                    raise UserError(f"{self.folder.parent} was deleted while the run was writing to it; start again")
                save_checkpoint(
                    self.folder,
                    step=step,
                    **tensors,
                    average=averages,
                    adapters=adapters,
                    state=state,
                    keep=self.keep,
                    spare=spare,
                )
            except BaseException as error:  # raised again where somebody listens
                self._error = error

        self._thread = threading.Thread(target=write, name=f"checkpoint of step {step}")
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the last save has ended badly, so far as one can tell without waiting."""
        return self._error is not None and not (self._thread and self._thread.is_alive())

    def problem(self) -> UserError | None:
        """Wait for the save under way; return what it failed of if the user can mend that (a full disk), and forget it."""
        try:
            self.wait()
        except UserError as error:
            return error
        return None

    def settle(self) -> None:
        """Return when the save under way is done, however it ends."""
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> None:
        """Return when the save under way is done.

        Raises:
            UserError: the disk is full or fails, or the run's folder is gone; older checkpoints are whole.
        """
        self.settle()
        self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty_like(value, device="cpu").copy_(value.detach()) for name, value in tensors.items()}
