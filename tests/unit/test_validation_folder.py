"""The answers that ranks share in a validation lie in a folder of the run, which goes away again as far as it can."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from instructblip.distributed import Ranks
from instructblip.training import validation


@pytest.mark.parametrize("kept", [None, "validation/step_00000004/gqa/.nfs0001"])
def test_a_folder_that_cannot_be_removed_ends_no_run(
    kept: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system keeps a file that another rank has open; and of no task there is no folder at all."""

    def refused(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    if kept is not None:
        (tmp_path / kept).parent.mkdir(parents=True)
        (tmp_path / kept).write_text("{}")
    monkeypatch.setattr(os, "rmdir", refused)
    monkeypatch.setattr(validation, "_fingerprint", lambda run: "")
    monkeypatch.setattr(validation, "model_identity", lambda *weights: "")
    run: Any = SimpleNamespace(folder=tmp_path, validation=[], model=None, frozen={})
    assert validation._validation_scores(run, 4, Ranks(0, 2)) == {}
