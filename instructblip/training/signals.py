"""Notice a request to stop, and act on it between two steps, or at once where nothing would be lost."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Self

from instructblip.files import write_atomically

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """Ends what `StopRequest.at_once` surrounds; no `except Exception` on the way holds it up."""


class StopRequest:
    """Remember the first stop signal; a second SIGINT interrupts at once.

    Used as a context manager around a run: the training loop asks `received` after each step, and what can be repeated
    without loss (preparation, evaluation) stands inside `at_once`.

    Attributes:
        received: the signal that this process got.
        agreed: the one that all processes of the run know of and act on. A signal that came after they last spoke to each
            other waits for the next time: a process that acted on it alone would leave the others waiting.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.agreed: int | None = None
        self._at_once = False
        self._notice_board: Path | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def at_once(self, notice_board: Path | None = None) -> Iterator[None]:
        """Raise `Stopped` inside, as soon as a signal comes; before, if one has come already.

        Args:
            notice_board: a file that is not there yet. Processes that do not speak to each other meanwhile tell each
                other of a signal by it: who gets one writes it, the others see it when they call `look`.
        """
        self._at_once, self._notice_board = True, notice_board
        try:
            if self.received is not None:
                raise Stopped
            yield
        except Stopped:
            if notice_board is not None and self.received is not None:
                write_atomically(notice_board, str(self.received))
            raise
        finally:
            self._at_once, self._notice_board = False, None

    def look(self) -> None:
        """Raise `Stopped` where the notice board says that another process was told to stop."""
        if self._notice_board is not None and self._notice_board.exists():
            self._at_once = False
            self.agreed = int(self._notice_board.read_text())
            raise Stopped

    @property
    def exit_code(self) -> int:
        """128 + signal number, as a shell reports a process that a signal ended."""
        return 128 + (self.agreed or self.received or 0)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number
        if self._at_once:
            self._at_once = False
            raise Stopped
