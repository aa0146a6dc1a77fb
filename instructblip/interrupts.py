"""Signals that raise an exception, in a process that gets them as they come.

A Ctrl-C may come twice at once: from the terminal, and from torchrun, which passes on what it gets. And what a handler
raises while Python runs a `__del__` or another callback is lost there: Python prints it as ignored and goes on.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

_ONE_SECONDS = 2.0  # that the signals of one Ctrl-C lie within
_SOON_SECONDS = 0.05

UnraisableHook = Callable[["sys.UnraisableHookArgs"], object]


class Interrupts:
    """Tells the second signal of a Ctrl-C from a second Ctrl-C."""

    def __init__(self) -> None:
        self._last: float | None = None

    def is_new(self) -> bool:
        """Called at each SIGINT: whether it is of another Ctrl-C than the one before."""
        now = time.monotonic()
        if self._last is not None and now - self._last < _ONE_SECONDS:
            return False
        self._last = now
        return True

    def forget(self) -> None:
        """The next is new whenever it comes."""
        self._last = None


def raise_once() -> None:
    """From now on a Ctrl-C raises one KeyboardInterrupt: a second would be raised while the first is being said.

    A process that was started with SIGINT ignored goes on to ignore it.
    """
    if signal.getsignal(signal.SIGINT) not in (signal.default_int_handler, signal.SIG_DFL):
        return
    interrupts = Interrupts()

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupts.is_new():
            raise KeyboardInterrupt

    def again() -> None:
        interrupts.forget()
        send_soon(signal.SIGINT)

    signal.signal(signal.SIGINT, handle)
    when_lost(KeyboardInterrupt, again)


def when_lost(kind: type[BaseException], again: Callable[[], None]) -> UnraisableHook:
    """Call `again` where an exception of that kind was raised in vain; return the hook from before."""
    before = sys.unraisablehook

    def hook(lost: "sys.UnraisableHookArgs") -> None:
        if isinstance(lost.exc_value, kind):
            again()
        else:
            before(lost)

    sys.unraisablehook = hook
    return before


def send_soon(number: int) -> None:
    """Send this process a signal, once the callback that runs now has ended."""
    threading.Timer(_SOON_SECONDS, os.kill, (os.getpid(), number)).start()
