"""The first request to stop is remembered, the second interrupt acts at once, and the old handlers come back."""

import os
import signal

import pytest

from instructblip.training.signals import StopRequest

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
