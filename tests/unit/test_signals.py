"""The first request to stop is remembered, the second interrupt acts at once, and the old handlers come back."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from instructblip import interrupts
from instructblip.training.signals import Stopped, StopRequest

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.mark.parametrize("number", ALL)
def test_a_signal_is_remembered_and_gives_the_exit_code(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number
    assert stop.exit_code == 128 + number


def test_a_second_interrupt_acts_at_once() -> None:
    with StopRequest() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)


def test_the_signals_of_one_ctrl_c_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal sends it to all processes, and torchrun passes its own on to its workers."""
    clock = [100.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: clock[0])
    with StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            clock[0] += 0.5
        assert stop.received == signal.SIGINT
        clock[0] += 2.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


class _Interrupted:
    """Gets a signal in its `__del__`, where Python would print what is raised, and forget it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)
        time.sleep(0)  # a place where Python calls the handler


@pytest.mark.parametrize("number", ALL)
def test_a_stop_that_is_raised_in_vain_is_raised_again(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with StopRequest() as stop:
        with pytest.raises(Stopped), stop.at_once():
            _Interrupted(number)
            time.sleep(5)
        assert stop.exit_code == 128 + number
    assert "Traceback" not in capfd.readouterr().err


def test_a_stop_that_comes_too_late_is_remembered() -> None:
    with StopRequest() as stop:
        with stop.at_once():
            _Interrupted(signal.SIGUSR1)
        time.sleep(0.2)
        assert stop.received == signal.SIGUSR1


@pytest.fixture
def own_interrupts() -> Iterator[None]:
    """What a command sets for the rest of its process ends with its test."""
    handler, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
    yield
    signal.signal(signal.SIGINT, handler)
    sys.unraisablehook = hook


def test_a_command_is_interrupted_once(
    own_interrupts: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    interrupts.raise_once()
    clock = [100.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: clock[0])
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    clock[0] += 2.5
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    clock[0] += 2.5
    with pytest.raises(KeyboardInterrupt):
        _Interrupted(signal.SIGINT)
        time.sleep(5)
    assert "Traceback" not in capfd.readouterr().err


def test_an_ignored_interrupt_stays_ignored(own_interrupts: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupts.raise_once()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_ctrl_c_during_the_imports_needs_no_traceback() -> None:
    root = Path(__file__).parents[2]
    for script in ("train.py", "evaluate.py", "prepare.py"):
        lines = (root / script).read_text().splitlines()
        first = next(number for number, line in enumerate(lines) if line.startswith("from instructblip"))
        code = "\n".join(lines[:first]) + "\nimport os\nos.kill(os.getpid(), signal.SIGINT)\nimport time\ntime.sleep(5)"
        code = f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"
        done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (-signal.SIGINT, ""), script


def test_a_second_request_of_another_kind_waits_too() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGINT  # the first one names the exit code


def test_handlers_are_restored_whatever_happens() -> None:
    before = [signal.getsignal(number) for number in ALL]
    with pytest.raises(RuntimeError), StopRequest():
        assert all(signal.getsignal(number) != handler for number, handler in zip(ALL, before, strict=True))
        raise RuntimeError
    assert [signal.getsignal(number) for number in ALL] == before


def test_without_a_signal_nothing_is_received() -> None:
    with StopRequest() as stop:
        pass
    assert stop.received is None
