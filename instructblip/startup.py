"""What commands do at their start: they start faster, and print whatever there is to print."""

import gc
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Within the block Python looks for no cycles of garbage.

    Imports and composed configurations make hundreds of thousands of objects that stay, among which it would look again and
    again: a fifth of a start's time.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def print_all_signs() -> None:
    """What the terminal's encoding lacks is printed as `\\u2800`, and ends nothing; standard error is so from the start.

    No encoding has the bytes of a file's name that is no text.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
