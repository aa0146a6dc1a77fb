"""Hydra callbacks, named by their dotted place on a command line."""

from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class PrintScore(Callback):
    """Print what each job returns to its sweeper."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        print(f"score: {job_return.return_value!r}")
