"""No garbage is looked for while a command starts, and it is again once it runs."""

import gc
import sys

import pytest
from rich.console import Console

from instructblip.config import entry
from instructblip.config.entry import main
from instructblip.config.schema import PrepareConfig
from instructblip.startup import without_collection


def test_collection_comes_back_as_it_was() -> None:
    with without_collection():
        assert not gc.isenabled()
        with without_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyboardInterrupt), without_collection():
        raise KeyboardInterrupt
    assert gc.isenabled()


def test_a_command_composes_without_it_and_runs_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    composing = entry.check_overrides

    def composed(*given: object) -> object:
        seen.append(gc.isenabled())
        return composing(*given)  # type: ignore[arg-type]

    def task(config: PrepareConfig, console: Console) -> int:
        seen.append(gc.isenabled())
        return 0

    monkeypatch.setattr(entry, "check_overrides", composed)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "dataset=easy_vqa"])
    main("prepare", PrepareConfig, task)
    assert seen == [False, True]
