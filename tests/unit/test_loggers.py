"""Loggers: off by default, Weights & Biases offline, TensorBoard's files as its own reader has them, and their failures."""

import builtins
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from PIL import Image
from rich.console import Console

from instructblip import tracking
from instructblip.config.entry import compose_config
from instructblip.config.schema import EvaluateConfig
from instructblip.errors import UserError
from instructblip.evaluation.run import evaluate
from instructblip.tracking import Logger, Loggers, TrackedRun, TrackedSample, flatten, make_loggers
from instructblip.training import setup
from instructblip.training.setup import _tracked_as


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a logger puts into the environment ends with its test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def make(kind: str, folder: Path, mode: Any = "offline", run_id: str | None = None, first_step: int = 1) -> Loggers:
    return make_loggers(
        kind.split(),
        mode=mode,
        project="tests",
        name="tiny",
        folder=folder,
        config={"lr": 1e-4, "a": {"b": 1}},
        run_id=run_id,
        first_step=first_step,
    )


def picture(color: str, text: str) -> TrackedSample:
    return TrackedSample(Image.new("RGB", (5, 3), color), text)


def test_none_keeps_nothing(tmp_path: Path) -> None:
    logger = make("none", tmp_path)
    logger.log({"loss": 1.0}, step=1)
    logger.log_samples("pictures", (pytest.fail("nobody looks at them") for _ in range(1)), step=1)
    logger.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("wandb", "pip install wandb"),
        ("tensorboard", "pip install -r requirements-trackers.txt"),
        ("mlflow", "pip install -r requirements-trackers.txt"),
    ],
)
def test_a_missing_package_says_how_to_mend(
    kind: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary_import = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.split(".")[0] == kind:
            raise ImportError(name)
        return ordinary_import(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, kind, raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    for starts in (make, check):
        with pytest.raises(UserError, match=remedy) as error:
            starts(kind, tmp_path)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


class Failing:
    """A tracker whose connection goes at a step."""

    def __init__(self, at: int) -> None:
        self.at, self.steps, self.finished = at, list[int](), False

    def log(self, metrics: Any, step: int) -> None:
        if step == self.at:
            raise ConnectionError("the server\nis gone")
        self.steps.append(step)

    def finish(self) -> None:
        self.finished = True


def test_a_tracker_that_fails_is_named_once_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    broken, whole = Failing(2), Failing(0)
    loggers = Loggers(cast(dict[str, Logger], {"wandb": broken, "tensorboard": whole}))
    for step in (1, 2, 3):
        loggers.log({"loss": 1.0}, step)
    loggers.finish()
    assert (broken.steps, whole.steps) == ([1], [1, 2, 3])
    assert broken.finished
    assert whole.finished
    (line,) = caplog.messages
    assert line.startswith("logger=wandb failed (ConnectionError: the server is gone); the run goes on without it")


def test_a_tracker_that_cannot_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(run: TrackedRun) -> Logger:
        raise ConnectionError("no server\nanswers")

    monkeypatch.setitem(tracking.LOGGERS, "mlflow", unreachable)
    with pytest.raises(UserError) as error:
        make("mlflow", tmp_path)
    line = "logger=mlflow could not start (ConnectionError: no server answers); mend that, or choose another logger"
    assert str(error.value) == line


def test_one_that_cannot_start_closes_those_that_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = Failing(0)

    def unreachable(run: TrackedRun) -> Logger:
        raise UserError("no server answers")

    monkeypatch.setitem(tracking.LOGGERS, "tensorboard", lambda run: cast(Logger, begun))
    monkeypatch.setitem(tracking.LOGGERS, "mlflow", unreachable)
    with pytest.raises(UserError, match="no server answers"):
        make("tensorboard mlflow", tmp_path)
    assert begun.finished


def test_a_folder_that_is_none_stops_tensorboard_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("no folder")
    for starts in (make, check):
        with pytest.raises(UserError, match=r"^logger=tensorboard could not start \((FileExists|NotADirectory)Error: "):
            starts("tensorboard", tmp_path)


def check(kind: str, folder: Path, mode: str = "offline") -> None:
    tracking.check_loggers(kind.split(), mode=mode, project="tests", folder=folder)


def test_what_stops_a_start_is_known_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("mlflow")
    check("none wandb tensorboard mlflow", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="needs a server; set MLFLOW_TRACKING_URI"):
        check("mlflow", tmp_path, "online")

    def login(*, verify: bool) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "login", login)
    with pytest.raises(UserError, match=r"wandb could not start \(No API key configured\.\); run `wandb login`"):
        check("wandb", tmp_path, "online")


@pytest.mark.slow
def test_a_server_that_mlflow_cannot_use_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with pytest.raises(UserError, match=r"^logger=mlflow could not start \(\w+: .*nonsense"):
        make("mlflow", tmp_path, mode="online")


def test_an_evaluation_says_so_before_it_opens_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = ["checkpoint=nowhere", "suite=demo", f"output={tmp_path}", "logger=mlflow", "logger.mode=online"]
    with pytest.raises(UserError, match="needs a server; set MLFLOW_TRACKING_URI"):
        evaluate(compose_config("evaluate", EvaluateConfig, settings), Console(quiet=True))


def tensorboard(folder: Path) -> Any:
    """A folder of event files, as TensorBoard's own reader has it."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0}).Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = tensorboard(folder)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def texts(folder: Path) -> dict[str, list[str]]:
    events = tensorboard(folder)
    return {
        tag: [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }


def test_tensorboard_reads_scalars_scores_pictures_and_the_configuration(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logger = make("tensorboard", tmp_path)
    logger.log({"step": 1, "phase": "tuning", "loss": 1.25, "loss_by_dataset": {"shape": 0.5}, "lr": math.nan}, step=1)
    logger.log({"loss": 1.0, "validation": {"gqa": 49.25, "vsr": None}}, step=2)
    logger.log_samples("seen", [picture("red", "asked: what?\nanswered: a|b"), picture("blue", "asked: 2")], step=2)
    logger.log_table("scores", ["dataset", "value"], [["gqa", 49.256789], ["a|b", None]], None)
    logger.log({"evaluation": {"gqa": {"value": 49.5}}}, None)
    home = tmp_path / "tensorboard"  # whole before `finish`: a run may be killed
    assert scalars(home) == {
        "loss": [(1, 1.25), (2, 1.0)],
        "loss_by_dataset/shape": [(1, 0.5)],
        "validation/gqa": [(2, 49.25)],
    }
    seen = tensorboard(home)
    assert sorted(seen.Tags()["images"]) == ["seen/0", "seen/1"]
    (image,) = seen.Images("seen/1")
    assert Image.open(io.BytesIO(image.encoded_image_string)).getpixel((4, 2))[:3] == (0, 0, 255)  # type: ignore[index]
    written = texts(home)
    assert written["seen/0/text_summary"] == ["asked: what?  \nanswered: a|b"]
    assert json.loads(written["config/text_summary"][0]) == {"lr": 1e-4, "a": {"b": 1}}
    assert scalars(home / "evaluation") == {"evaluation/gqa/value": [(2, 49.5)]}
    (table,) = texts(home / "evaluation")["scores/text_summary"]
    assert table.splitlines() == ["| dataset | value |", "| --- | --- |", "| gqa | 49.26 |", "| a\\|b |  |"]
    logger.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]


def test_a_resumed_run_has_each_step_once_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for process, (first, last) in enumerate([(1, 5), (4, 6), (7, 6)]):  # killed after 5, with a checkpoint of 3; ended
        logger = make("tensorboard", tmp_path, first_step=first)
        for step in range(first, last + 1):
            logger.log({"loss": 10.0 * process + step}, step)
        if last == 6:
            logger.log({"evaluation": {"gqa": float(process)}}, None)
        if process:
            logger.finish()
    assert scalars(tmp_path / "tensorboard")["loss"] == [(1, 1), (2, 2), (3, 3), (4, 14), (5, 15), (6, 16)]
    assert scalars(tmp_path / "tensorboard/evaluation") == {"evaluation/gqa": [(6, 2.0)]}
    begun_anew = make("tensorboard", tmp_path)
    begun_anew.log({"loss": 0.5}, 1)
    assert scalars(tmp_path / "tensorboard")["loss"] == [(1, 0.5)]


def test_a_clock_that_was_put_back_leaves_a_resumed_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    for year, (first, last) in {2030: (1, 5), 1970: (4, 6), 2029: (7, 8)}.items():
        now = (year - 1970) * 31_536_000_000_000_000 + 1
        monkeypatch.setattr(time, "time_ns", partial(int, now))
        logger = make("tensorboard", tmp_path, first_step=first)
        for step in range(first, last + 1):
            logger.log({"loss": year + step}, step)
        logger.finish()
    found = scalars(tmp_path / "tensorboard")["loss"]
    assert found == [(1, 2031), (2, 2032), (3, 2033), (4, 1974), (5, 1975), (6, 1976), (7, 2036), (8, 2037)]


@pytest.mark.slow
def test_mlflow_has_numbers_scores_settings_and_pictures_and_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sqlalchemy")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "it's a run"
    for process, (first, last) in enumerate(
        [(1, 5), (4, 6)]
    ):  # killed after 5, before its validation; a checkpoint of 3
        logger = make("mlflow", folder, first_step=first)
        for step in range(first, last + 1):
            logger.log(
                {"step": step, "loss": 10.0 * process + step, "loss_by_dataset": {"a(b)": 0.5}, "phase": "x"}, step
            )
            if step == 5 and process:
                logger.log({"validation": {"gqa": 49.25, "vsr": None}}, step)
                logger.log_samples("seen", [picture("red", "asked: what?\nanswered: red")], step)
    logger.log_table("scores", ["dataset", "value"], [["gqa", 49.256789]], None)
    logger.log({"evaluation": {"gqa": {"value": 49.5}}}, None)
    logger.finish()
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow/mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    history = {
        name: [(at.step, at.value) for at in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    assert history.pop("loss") == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 16)]
    assert [step for step, _ in history.pop("loss_by_dataset/a_b_")] == [1, 2, 3, 4, 5, 6]
    assert history == {"validation/gqa": [(5, 49.25)], "evaluation/gqa/value": [(6, 49.5)]}
    assert (run.info.run_name, run.info.status, run.data.params) == ("tiny", "FINISHED", {"lr": "0.0001", "a/b": "1"})
    (files,) = folder.glob("mlflow/files/*/artifacts")
    assert json.loads((files / "config.json").read_text()) == {"lr": 1e-4, "a": {"b": 1}}
    assert (files / "seen/step_00000005/000.txt").read_text() == "asked: what?\nanswered: red"
    assert Image.open(files / "seen/step_00000005/000.png").convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert "| gqa | 49.26 |" in (files / "scores/step_00000006.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.slow
def test_mlflow_online_needs_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"^logger=mlflow with mode=online needs a server; set MLFLOW_TRACKING_URI, or"):
        make("mlflow", tmp_path, mode="online")


def test_a_full_disk_ends_tensorboard_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    logger = make("tensorboard", tmp_path)
    logger.log({"loss": 1.0}, 1)

    def full(self: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "flush", full)
    logger.log({"loss": 1.0}, 2)
    logger.log({"loss": 1.0}, 3)
    logger.finish()
    (line,) = caplog.messages
    assert "logger=tensorboard failed (OSError: [Errno 28] No space left on device)" in line


def test_nested_metrics_get_joined_names() -> None:
    assert flatten({"loss": 1, "by": {"a": 2, "deep": {"b": 3}}}) == {"loss": 1, "by/a": 2, "by/deep/b": 3}


@pytest.mark.slow
def test_both_trackers_offline_write_only_below_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    elsewhere = tmp_path / "working_directory"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    folder = tmp_path / "run"
    logger = make("wandb tensorboard", folder, run_id="0a1b2c3d")
    logger.log({"loss": 1.25, "loss_by_dataset": {"shape": 0.5}}, step=1)
    logger.log({"loss": 1.0}, step=2)
    logger.log_table("scores", ["dataset", "value"], [["gqa", 49.25], ["vsr", None]], step=2)
    logger.log_samples("seen", [picture("red", "asked: what?")], step=2)
    logger.finish()
    (image,) = folder.glob("wandb/offline-run-*/files/media/images/seen_*.png")
    assert Image.open(image).size == (5, 3)
    assert scalars(folder / "tensorboard")["loss"] == [(1, 1.25), (2, 1.0)]
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


@pytest.mark.parametrize(("step", "unvalidated", "first"), [(None, None, 1), (12, None, 13), (12, {"step": 12}, 12)])
def test_trackers_know_which_steps_of_a_resumed_run_are_logged_anew(
    step: int | None, unvalidated: Any, first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of metrics.jsonl: a step that a signal kept from its validation is among them."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(setup, "make_loggers", lambda kinds, **facts: told.append(facts))
    monkeypatch.setattr(setup, "to_dict", lambda config: {})
    logger = SimpleNamespace(kind=["wandb", "tensorboard"], mode="offline", project="p")
    config: Any = SimpleNamespace(logger=logger, name="n", resume=None if step is None else "auto")
    checkpoint: Any = None if step is None else SimpleNamespace(step=step, state={"unvalidated": unvalidated})
    setup._loggers(config, tmp_path, checkpoint)
    assert [facts["first_step"] for facts in told] == [first]
    assert re.fullmatch("[0-9a-f]{8}", told[0]["run_id"])
