"""metrics.jsonl: one JSON object a step, whole after a kill at any moment."""

import contextlib
import io
import json
import logging
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from instructblip.errors import UserError
from instructblip.files import errors_for_users

logger = logging.getLogger(__name__)

Entry = dict[str, Any]
_BLOCK = 1 << 16  # bytes; of a metrics file that are read at once


class MetricsLog:
    """A file of JSON objects, one a line, each with a whole number "step". Safe against a kill at any moment.

    A line is handed to the operating system before `append` returns; a half-written last line, left by a kill, is never
    read and is removed before the next line is written. A line that the disk has damaged is said and left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one line. Numbers that are not finite become null, since JSON has no word for them.

        Raises:
            ValueError: `entry` has no whole number "step".
            UserError: the disk is full or fails, and the file is left as it was; or it is not there any more.
        """
        if not isinstance(entry.get("step"), int):
            raise ValueError(f'a metrics entry needs a whole number "step", got {entry.get("step")!r}')
        line = json.dumps(finite(entry), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with errors_for_users(self.path):
            file = self._file or self._open()
            self._check_place(file)
            start = file.seek(0, os.SEEK_END)
            try:
                written = 0
                while written < len(line):  # an unbuffered write may take only part
                    written += file.write(line[written:])
            except OSError:
                with contextlib.suppress(OSError):  # where not even that can be done, half a line is never read
                    file.truncate(start)
                raise

    def read(self) -> Iterator[Entry]:
        """All whole entries, one by one, in the order of the file; none where there is no file. Damaged lines are named."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                entry = _entry(line)
                if entry is None:
                    logger.warning("%s line %d is damaged and left out", self.path, number)
                else:
                    yield entry

    def truncate_after(self, step: int) -> None:
        """Forget every entry of a later step than `step`, so that a resumed run writes each step once.

        Steps never fall from line to line, so only what is forgotten is read, from the end.
        """
        self.close()

        def stays(line: bytes) -> bool:
            entry = _entry(line)
            return entry is not None and entry["step"] <= step

        with errors_for_users(self.path):
            self._cut_after_last(stays)

    def close(self) -> None:
        """Close the file; `append` opens it again."""
        if self._file:
            self._file.close()
            self._file = None

    def _check_place(self, file: BinaryIO) -> None:
        """Refuse to write to a file that has lost its name: nobody would find what is written there."""
        try:
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            same = False
        if not same:
            raise UserError(
                f"{self.path} was deleted or moved while the run was writing to it; put its folder back and go on with "
                "resume=auto, or start again"
            )

    def _open(self) -> BinaryIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._cut_after_last(lambda line: True)
        self._file = open(self.path, "ab", buffering=0)
        return self._file

    def _cut_after_last(self, stays: Callable[[bytes], bool]) -> None:
        """Cut the file after its last whole line of which `stays` holds."""
        if not self.path.exists():
            return
        with open(self.path, "r+b") as file:
            size = end = file.seek(0, os.SEEK_END)
            for line in _lines_from_the_end(file):
                if line.endswith(b"\n") and stays(line):
                    break
                end -= len(line)
            if end < size:
                file.truncate(end)
                os.fsync(file.fileno())


def _lines_from_the_end(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file with their ends, last first, of which only so much is read as is asked for."""
    start, rest = file.seek(0, os.SEEK_END), b""
    while start > 0:
        size = min(_BLOCK, start)
        start -= size
        file.seek(start)
        rest, *lines = io.BytesIO(file.read(size) + rest).readlines()
        yield from reversed(lines)
    if rest:
        yield rest


def _entry(line: bytes) -> Entry | None:
    """What a line of a metrics file says; None where it is no entry. Zeros before it were a line once."""
    try:
        entry: Entry = json.loads(line.lstrip(b"\0"))
        entry["step"] + 0
    except (ValueError, KeyError, TypeError):
        return None
    return entry


class BestStep:
    """The step with the best validation so far, the first of equals; None before the first validation.

    It is kept from entry to entry: to look for it among all of them would make every step dearer than the one before.

    Args:
        of: whose scores are compared: a dataset's by name, or `mean`, over all that a validation has; None: nothing is.
        smaller: datasets of which a smaller score is the better one, which counts as its negative.
    """

    def __init__(self, of: str | None, smaller: Collection[str] = ()) -> None:
        self._of, self._smaller = of, frozenset(smaller)
        self._value = -math.inf
        self._newest: float | None = None
        self.step: int | None = None

    @property
    def score(self) -> float | None:
        """What the run has reached: the best validation, or the mean of the newest where none is compared."""
        if self._of is None:
            return self._newest
        return None if self.step is None else self._value

    def see(self, entry: Mapping[str, Any]) -> None:
        """Take a finished step's entry into account."""
        scores: Mapping[str, float | None] = entry.get("validation") or {}
        if not scores:
            return
        chosen = scores if self._of in (None, "mean") else {self._of: scores.get(self._of)}
        values = [-value if value is not None and name in self._smaller else value for name, value in chosen.items()]
        known = [value for value in values if value is not None and math.isfinite(value)]
        self._newest = sum(known) / len(known) if len(known) == len(values) else None
        if self._of is not None and self._newest is not None and self._newest > self._value:
            self.step, self._value = entry["step"], self._newest

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps, as plain JSON; None where nothing is compared."""
        if self._of is None:
            return None
        return {"of": self._of, "step": self.step, "value": None if self.step is None else self._value}

    def restore(self, state: Mapping[str, Any] | None) -> bool:
        """Go on from a checkpoint's `state`; False where it has none, or one of other scores."""
        if state is None or state["of"] != self._of:
            return self._of is None
        if state["step"] is not None:
            self.step, self._value = state["step"], state["value"]
        return True


def finite(value: Any) -> Any:
    """The same with null for every number that is not finite: JSON has no word for them."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
