"""Loggers: off by default, Weights & Biases offline, and what the user hears when it cannot start."""

import builtins
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instructblip.errors import UserError
from instructblip.tracking import flatten, make_logger
from instructblip.training.setup import _tracked_as


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a logger puts into the environment ends with its test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def make(kind: str, folder: Path, mode: Any = "offline", run_id: str | None = None) -> Any:
    settings = {"lr": 1e-4, "a": {"b": 1}}
    return make_logger(kind, mode=mode, project="tests", name="tiny", folder=folder, config=settings, run_id=run_id)


def test_none_keeps_nothing(tmp_path: Path) -> None:
    logger = make("none", tmp_path)
    logger.log({"loss": 1.0}, step=1)
    logger.finish()
    assert list(tmp_path.iterdir()) == []
    assert "wandb" not in type(logger).__module__


def test_missing_wandb_says_how_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary_import = builtins.__import__

    def without_wandb(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "wandb":
            raise ImportError(name)
        return ordinary_import(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_wandb)
    with pytest.raises(UserError, match="pip install wandb") as error:
        make("wandb", tmp_path)
    assert "\n" not in str(error.value)


def test_nested_metrics_get_joined_names() -> None:
    assert flatten({"loss": 1, "by": {"a": 2, "deep": {"b": 3}}}) == {"loss": 1, "by/a": 2, "by/deep/b": 3}


def test_wandb_offline_writes_only_below_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    elsewhere = tmp_path / "working_directory"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    folder = tmp_path / "run"
    logger = make("wandb", folder, run_id="0a1b2c3d")
    logger.log({"loss": 1.25, "loss_by_dataset": {"shape": 0.5}}, step=1)
    logger.log({"loss": 1.0}, step=2)
    logger.log_table("scores", ["dataset", "value"], [["gqa", 49.25], ["vsr", None]], step=2)
    logger.finish()
    (journal,) = folder.glob("wandb/offline-run-*-0a1b2c3d/*.wandb")
    content = journal.read_bytes()
    assert b"1.25" in content
    assert b"loss_by_dataset/shape" in content
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/scores_*.table.json")
    assert json.loads(table.read_text()) == {
        "columns": ["dataset", "value"],
        "data": [["gqa", 49.25], ["vsr", None]],
    }
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(("mode", "resume"), [("online", "allow"), ("offline", None)])
def test_wandb_is_asked_to_go_on_with_the_run_of_that_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, resume: str | None
) -> None:
    wandb = pytest.importorskip("wandb")
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **options: asked.append(options))
    make("wandb", tmp_path, mode, "0a1b2c3d")
    make("wandb", tmp_path, mode)
    assert [(options["id"], options["resume"]) for options in asked] == [("0a1b2c3d", resume), (None, None)]


def test_a_run_keeps_its_id_over_restarts_until_it_begins_anew(tmp_path: Path) -> None:
    first = _tracked_as(tmp_path, goes_on=False)
    assert re.fullmatch("[0-9a-f]{8}", first)
    assert [_tracked_as(tmp_path, goes_on=True) for _ in range(3)] == [first] * 3
    second = _tracked_as(tmp_path, goes_on=False)
    assert second != first
    assert _tracked_as(tmp_path, goes_on=True) == second
    for damaged in (b"", b"\0" * 8, b"../../etc", b"\xff\xfe"):
        (tmp_path / "wandb/run_id").write_bytes(damaged)
        third = _tracked_as(tmp_path, goes_on=True)
        assert re.fullmatch("[0-9a-f]{8}", third)
        assert _tracked_as(tmp_path, goes_on=True) == third
