"""The metrics file under kills and full disks, rates, the progress display, and the curves."""

import io
import json
import math
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from instructblip.errors import UserError
from instructblip.progress import training_progress
from instructblip.training import metrics_log
from instructblip.training.curves import DrawnPhase, draw_curves, phases_of, smoothed
from instructblip.training.metrics_log import BestStep, MetricsLog
from instructblip.training.timer import StepTimer


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def filled(path: Path, steps: range) -> MetricsLog:
    log = MetricsLog(path)
    for step in steps:
        log.append({"step": step, "loss": 1.0 / step})
    return log


def test_every_line_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    assert list(log.read()) == []
    log.append({"step": 1, "loss": 0.1 + 0.2})
    log.append({"step": 1, "validation": {"formes colorées": 50.0}})
    lines = log.path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == list(log.read())
    assert next(log.read())["loss"] == 0.1 + 0.2  # exact
    assert "colorées" in lines[1]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.append({"step": 1, "loss": math.nan, "loss_by_dataset": {"a": math.inf, "b": 1.5}})
    assert list(log.read()) == [{"step": 1, "loss": None, "loss_by_dataset": {"a": None, "b": 1.5}}]


def test_an_entry_without_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step"):
        MetricsLog(tmp_path / "m.jsonl").append({"loss": 1.0})


def test_a_resumed_log_equals_one_never_killed(tmp_path: Path) -> None:
    whole = filled(tmp_path / "whole.jsonl", range(1, 10))
    killed = filled(tmp_path / "killed.jsonl", range(1, 8))
    killed.close()
    with open(killed.path, "ab") as file:
        file.write(b'{"step": 8, "lo')
    resumed = MetricsLog(killed.path)
    assert [entry["step"] for entry in resumed.read()] == list(range(1, 8))
    resumed.truncate_after(5)
    assert [entry["step"] for entry in resumed.read()] == [1, 2, 3, 4, 5]
    for step in range(6, 10):
        resumed.append({"step": step, "loss": 1.0 / step})
    assert resumed.path.read_bytes() == whole.path.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.jsonl", "killed.jsonl"}


def test_a_half_written_line_is_removed_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2')
    MetricsLog(path).append({"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_truncating_an_open_log_and_a_missing_one(tmp_path: Path) -> None:
    log = filled(tmp_path / "m.jsonl", range(1, 4))
    log.truncate_after(0)
    log.append({"step": 1})
    assert list(log.read()) == [{"step": 1}]
    missing = MetricsLog(tmp_path / "none.jsonl")
    missing.truncate_after(3)
    assert not missing.path.exists()


def test_resuming_reads_what_is_forgotten_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines longer and shorter than what is read at once, and one that the disk has zeroed."""
    lines = [json.dumps({"step": step, "ids": ["x" * (step % 7)] * 40}).encode() + b"\n" for step in range(1, 101)]
    parsed: list[bytes] = []
    entry = metrics_log._entry
    monkeypatch.setattr(metrics_log, "_entry", lambda line: parsed.append(line) or entry(line))
    for block in (1, 64, 1 << 16):
        monkeypatch.setattr(metrics_log, "_BLOCK", block)
        path = tmp_path / f"{block}.jsonl"
        path.write_bytes(b"".join(lines) + b"\0" * 50 + b"\n" + b'{"step": 101')
        parsed.clear()
        MetricsLog(path).truncate_after(95)
        assert path.read_bytes() == b"".join(lines[:95])
        assert len(parsed) == 7


def test_the_best_step_is_the_first_of_equals() -> None:
    scores: list[dict[str, float | None]] = [{"a": 40.0, "b": 60.0}, {"a": 50.0, "b": 50.0}, {"a": 10.0, "b": 80.0}]
    for of, step in {"mean": 2, "a": 4, "b": 6, "c": None, None: None}.items():
        best, resumed = BestStep(of), BestStep(of)
        for number, validation in enumerate(scores, start=1):
            best.see({"step": 2 * number - 1})
            best.see({"step": 2 * number, "validation": validation})
        assert best.step == step
        assert resumed.restore(json.loads(json.dumps(best.state())))
        assert resumed.step == step
        for validation in ({}, {"a": None}, {"a": math.nan}, {"a": 50.0, "b": 50.0}):
            resumed.see({"step": 99, "validation": validation})
        assert resumed.step == step


def test_the_score_of_a_run_is_its_best_or_else_its_newest() -> None:
    validations: list[dict[str, float | None]] = [
        {"a": 40.0, "b": 60.0},
        {"a": 90.0, "b": 50.0},
        {"a": 10.0, "b": 80.0},
    ]
    for of, score in {"mean": 70.0, "b": 80.0, "c": None, None: 45.0}.items():
        best = BestStep(of)
        assert best.score is None
        for number, validation in enumerate(validations):
            best.see({"step": number, "validation": validation})
            best.see({"step": number + 1})
        assert best.score == score
        resumed = BestStep(of)
        resumed.restore(best.state())
        assert resumed.score == (score if of else None)
    for unknown in (math.nan, None):
        best = BestStep(None)
        best.see({"step": 1, "validation": {"a": 90.0, "b": unknown}})
        assert best.score is None


def test_of_a_metric_that_counts_mistakes_the_least_is_the_best() -> None:
    validations = [{"errors": 40.0, "a": 50.0}, {"errors": 5.0, "a": 40.0}, {"errors": 20.0, "a": 60.0}]
    for of, step, score in (("errors", 2, -5.0), ("mean", 3, 20.0), ("a", 3, 60.0), (None, None, 20.0)):
        best, resumed = (BestStep(of, ["errors"]) for _ in range(2))
        for number, validation in enumerate(validations, start=1):
            best.see({"step": number, "validation": validation})
        assert (best.step, best.score) == (step, score)
        resumed.restore(json.loads(json.dumps(best.state())))
        resumed.see({"step": 4, "validation": {"errors": 30.0, "a": 50.0}})
        assert resumed.step == step


def test_what_a_checkpoint_keeps_of_other_scores_is_no_best() -> None:
    best = BestStep("mean")
    best.see({"step": 3, "validation": {"a": 40.0}})
    for other in ("a", None):
        resumed = BestStep(other)
        assert resumed.restore(best.state()) is (other is None)
        assert resumed.restore(None) is (other is None)
        assert resumed.step is None


@pytest.mark.parametrize(
    "line", [b"not json\n", b'{"loss": 1}\n', b"[1]\n", b'{"step": "x"}\n', b"\xff\n", b"\0" * 12 + b"\n"]
)
def test_a_damaged_line_is_named_and_left_out(tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'{"step": 3}\n')
    assert list(MetricsLog(path).read()) == [{"step": 1}, {"step": 3}]
    assert [record.getMessage() for record in caplog.records] == [f"{path} line 2 is damaged and left out"]


@pytest.mark.slow
def test_zeros_in_place_of_a_line_and_its_end_cost_that_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    lines = [json.dumps({"step": step}).encode() + b"\n" for step in range(1, 7)]
    path.write_bytes(lines[0] + b"\0" * len(lines[1]) + b"".join(lines[2:]))
    log = MetricsLog(path)
    log.truncate_after(4)
    log.append({"step": 5})
    assert [entry["step"] for entry in log.read()] == [1, 3, 4, 5]
    draw_curves(path, tmp_path / "curves.png", "run")


def test_a_full_disk_is_one_clear_line_and_leaves_no_half_line(small_disk: Path) -> None:
    log = MetricsLog(small_disk / "m.jsonl")
    log.append({"step": 1})
    with pytest.raises(UserError, match=r"disk full while writing .*m\.jsonl"):
        log.append({"step": 2, "loss": "x" * 400_000})
    assert log.path.read_bytes() == b'{"step": 1}\n'
    log.append({"step": 2})
    assert [entry["step"] for entry in log.read()] == [1, 2]


def test_a_limit_on_the_size_of_files_is_one_clear_line_and_leaves_no_half_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.append({"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, limits[1]))
    try:
        with pytest.raises(UserError, match=r"m\.jsonl cannot be written \(File too large\)"):
            log.append({"step": 2, "loss": "x" * 40})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.path.read_bytes() == b'{"step": 1}\n'


def _deleted(path: Path) -> None:
    shutil.rmtree(path.parent)


def _moved(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))


def _replaced(path: Path) -> None:
    _moved(path)
    path.parent.mkdir()
    path.write_text("of another run\n")


@pytest.mark.parametrize("how", [_deleted, _moved, _replaced])
def test_a_file_that_lost_its_name_is_said_at_the_next_step(tmp_path: Path, how: Callable[[Path], None]) -> None:
    log = filled(tmp_path / "run/metrics.jsonl", range(1, 3))
    how(log.path)
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"run/metrics\.jsonl was deleted or moved while the run was writing to it"):
        log.append({"step": 3})
    assert sorted(tmp_path.rglob("*")) == there
    assert not log.path.exists() or log.path.read_text() == "of another run\n"


def test_work_is_a_rate_too() -> None:
    clock = Clock()
    timer = StepTimer(window=2, clock=clock)
    assert timer.flops_per_second == 0.0
    for seconds, flops in ((4.0, 9e9), (1.0, 2e9), (3.0, 6e9)):
        clock.now += seconds
        timer.step(samples=1, flops=flops)
    assert timer.flops_per_second == 2e9


def test_rates_cover_the_last_steps_and_leave_pauses_out() -> None:
    clock = Clock()
    timer = StepTimer(window=2, clock=clock)
    assert (timer.samples_per_second, timer.tokens_per_second, timer.data_wait_fraction) == (0.0, 0.0, 0.0)
    clock.now += 50.0  # a slow first step that leaves the window
    timer.step(samples=1)
    for _ in range(2):
        clock.now += 60.0  # validation
        timer.start()
        with timer.waiting():
            clock.now += 1.0
        clock.now += 3.0
        timer.step(samples=16, tokens=400)
    assert timer.samples_per_second == 4.0
    assert timer.tokens_per_second == 100.0
    assert timer.data_wait_fraction == 0.25


def test_waiting_is_counted_when_the_data_fails() -> None:
    clock = Clock()
    timer = StepTimer(clock=clock)
    with pytest.raises(KeyError), timer.waiting():
        clock.now += 2.0
        raise KeyError
    timer.step(samples=1)
    assert timer.data_wait_fraction == 1.0


def test_a_log_file_gets_a_plain_line_now_and_then() -> None:
    clock, text = Clock(), io.StringIO()
    console = Console(file=text, width=40)
    with training_progress(
        "train", 100, first_step=40, seconds_between_lines=30.0, console=console, clock=clock
    ) as progress:
        for step in range(41, 101):
            clock.now += 2.0
            progress.update(step, loss=0.5, samples_per_second=8.0)
        progress.say("[saved] step 100")
    lines = text.getvalue().splitlines()
    assert lines[0] == "train 55/100  loss 0.5000  8.0 samples/s  0:00:30 elapsed  0:01:30 left"
    assert [line.split()[1] for line in lines[:-1]] == ["55/100", "70/100", "85/100", "100/100"]
    assert lines[-1] == "[saved] step 100"


def test_a_terminal_gets_a_bar() -> None:
    text = io.StringIO()
    console = Console(file=text, width=110, force_terminal=True, color_system=None)
    with training_progress("train", 10, first_step=2, console=console) as progress:
        progress.update(7, loss=0.25, samples_per_second=3.5)
        progress.say("validation 80.0")
    output = text.getvalue()
    assert "7/10" in output
    assert "loss 0.2500  3.5 samples/s" in output
    assert "validation 80.0" in output


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with training_progress("train", 1, enabled=False, seconds_between_lines=0.0) as progress:
        progress.update(1, loss=1.0, samples_per_second=1.0)
        progress.say("done")
    assert capsys.readouterr().out == ""


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant() -> None:
    assert smoothed([3.0, 3.0, 3.0], 10) == pytest.approx([3.0, 3.0, 3.0])
    assert smoothed([0.0, 1.0], 3) == pytest.approx([0.0, 1 / 1.5])
    assert smoothed([], 3) == []


@pytest.mark.slow
def test_curves_are_one_picture_and_the_same_each_time(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 30):
        log.append({"step": step, "loss": 3.0 / step, "loss_by_dataset": {"step": 1.0, "b": 2.0 / step}, "lr": 1e-4})
    log.append({"step": 29, "loss": math.nan, "validation": {"a": 80.0, "b": None}})
    draw_curves(log.path, tmp_path / "one.png", "run")
    draw_curves(log.path, tmp_path / "two.png", "run")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_names_with_dollars_are_no_formulas(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step, phase in enumerate(["a $_$", "b $\\x$"], start=1):
        log.append({"step": step, "phase": phase, "loss": 1.0, "loss_by_dataset": {"c$_$": 1.0}})
    draw_curves(log.path, tmp_path / "curves.png", "run $_$")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_curves_of_a_run_without_steps_are_empty_panels(tmp_path: Path) -> None:
    draw_curves(tmp_path / "missing.jsonl", tmp_path / "curves.png", "run")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_curves_know_each_phase_and_which_was_validated() -> None:
    entries = [{"step": step, "phase": "alignment" if step < 4 else "instruction"} for step in range(1, 8)]
    entries[5]["validation"] = {"a": 50.0}
    assert phases_of(entries) == [DrawnPhase("alignment", 1, 3, False), DrawnPhase("instruction", 4, 7, True)]
    assert phases_of([{"step": 1, "loss": 2.0}]) == []


@pytest.mark.slow
def test_the_picture_names_the_phases_that_were_not_validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    saved = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **keys: (figures.append(self), saved(self, *args, **keys))
    )
    lines = [
        {"step": step, "phase": name, "loss": 1.0, "validation": {"a": 120.0} if step == 9 else None}
        for step, name in enumerate(["alignment"] * 5 + ["instruction"] * 5)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "run")
    loss, _, validation = figures[0].axes[:3]
    assert [text.get_text() for text in loss.texts] == ["alignment", "instruction"]
    assert [text.get_text() for text in validation.texts] == ["alignment: not validated", "instruction"]
    assert validation.get_ylim()[1] > 120  # CIDEr
