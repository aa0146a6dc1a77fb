"""Notice a request to stop, and act on it between two steps, or at once where nothing would be lost."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Self

from instructblip.files import write_atomically
from instructblip.interrupts import Interrupts, send_soon, when_lost

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """Ends what `StopRequest.at_once` surrounds; no `except Exception` on the way holds it up."""


class StopRequest:
    """Remember the first stop signal; a second Ctrl-C interrupts at once.

    Used as a context manager around a run: the training loop asks `received` after each step, and what can be repeated
    without loss (preparation, evaluation) stands inside `at_once`.

    Attributes:
        received: the signal that this process got.
        stop_signal: the one that all processes of the run know of and act on. A signal that came after they last spoke to
            each other waits for the next time: a process that acted on it alone would leave the others waiting.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.stop_signal: int | None = None
        self._interrupts = Interrupts()
        self._at_once = False
        self._stop_file: Path | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._notice)
        self._previous_hook = when_lost(Stopped, self._again)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        sys.unraisablehook = self._previous_hook

    @contextlib.contextmanager
    def at_once(self, stop_file: Path | None = None) -> Iterator[None]:
        """Raise `Stopped` inside, as soon as a signal comes; before, if one has come already.

        Args:
            stop_file: a file that is not there yet. Processes that do not speak to each other meanwhile tell each
                other of a signal by it: who gets one writes it, the others see it when they call `poll_stop`.
        """
        self._at_once, self._stop_file = True, stop_file
        try:
            if self.received is not None:
                raise Stopped
            yield
        except Stopped:
            if stop_file is not None and self.received is not None:
                write_atomically(stop_file, str(self.received))
            raise
        finally:
            self._at_once, self._stop_file = False, None

    def poll_stop(self) -> None:
        """Raise `Stopped` where the stop file says that another process was told to stop."""
        if self._stop_file is not None and self._stop_file.exists():
            self._at_once = False
            self.stop_signal = int(self._stop_file.read_text())
            raise Stopped

    @property
    def exit_code(self) -> int:
        """128 + signal number, as a shell reports a process that a signal ended."""
        return 128 + (self.stop_signal or self.received or 0)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and not self._interrupts.is_new():
            return
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = self.received or number
        if self._at_once:
            self._at_once = False
            raise Stopped

    def _again(self) -> None:
        """`Stopped` was raised in vain: another signal is to raise it, if that is still inside of `at_once`."""
        self._at_once = True
        send_soon(signal.SIGTERM)
