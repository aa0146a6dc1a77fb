"""Signs of life among the processes of an evaluation, which share nothing but a folder.

Each rank renews a small file while it works, and looks at those of the others between batches and while it waits. One that
stays as it is for `LOST_SECONDS` is of a process that died or was stopped. Clocks of machines are not compared, and no lock
is relied on, so any file system that all ranks see will do.
"""

import contextlib
import dataclasses
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from instructblip.distributed import Ranks
from instructblip.errors import LostRankError

BEAT_SECONDS = 2.0
LOST_SECONDS = 30.0
_DONE, _FAILED = "done", "failed"
_AGAIN = "look at what it said last; run the same command again, it goes on where it stopped"


@contextlib.contextmanager
def watched(folder: Path, ranks: Ranks, what: str = "evaluation") -> Iterator[Ranks]:
    """Tell the other ranks that this one is at work; give its `Ranks`, whose `poll_stop` looks whether they are too.

    Where ranks have a shorter `timeout` than `LOST_SECONDS`, that is the bound.

    Args:
        folder: is there, and all ranks see it.
        ranks: one process alone watches nobody.
        what: they are the ranks of.

    Raises:
        LostRankError: at `poll_stop`, as `_Heartbeats.look`.
    """
    if ranks.world_size == 1:
        yield ranks
        _clear_up(folder)  # of several that were killed before
        return
    beats = _Heartbeats(folder, ranks, min(LOST_SECONDS, ranks.timeout), what)

    def poll() -> None:
        ranks.poll_stop()
        beats.look()

    with beats.going_on():
        yield dataclasses.replace(ranks, poll_stop=poll)


def _clear_up(folder: Path) -> None:
    for path in folder.glob(".rank-*"):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


class _Sign(NamedTuple):
    """What a rank's file said last, and since when; whether that was written after this rank began to look."""

    content: str
    since: float
    heard: bool

    @property
    def name(self) -> str:
        return self.content.partition(" ")[0]

    @property
    def ended_well(self) -> bool:
        return self.content.endswith(f" {_DONE}") or (self.heard and not self.content)  # the first rank clears up


class _Heartbeats:
    def __init__(self, folder: Path, ranks: Ranks, bound: float, what: str = "evaluation") -> None:
        self._folder, self._ranks, self._bound, self._what = folder, ranks, bound, what
        self._pause = min(BEAT_SECONDS, bound / 5)
        self._name = uuid.uuid4().hex
        self._ended = threading.Event()
        self._looked = time.monotonic()
        # What an evaluation that was killed has left counts for nothing until it changes.
        self._signs = {rank: _Sign(self._read(rank), self._looked, heard=False) for rank in range(ranks.world_size)}
        del self._signs[ranks.rank]

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """Renew this rank's file, and say in it at the end how that was; the first rank, which ends last, clears up."""
        thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._write("0")
        thread.start()
        state = _FAILED
        try:
            yield
            state = _DONE
        finally:
            self._ended.set()
            thread.join()
            if state == _FAILED or self._is_there():
                self._write(state)
            if state == _DONE and self._ranks.is_first:
                _clear_up(self._folder)

    def look(self) -> None:
        """Return where no other rank is known to be lost.

        Raises:
            LostRankError: one of them failed, gave no sign for the bound, or has not begun within the ranks' timeout.
        """
        now = time.monotonic()
        if now - self._looked < self._pause:
            return
        self._looked = now
        for rank, sign in self._signs.items():
            if (content := self._read(rank)) != sign.content:
                self._signs[rank] = _Sign(content, now, heard=True)
                if sign.heard and content == f"{sign.name} {_FAILED}":
                    raise LostRankError(f"rank {rank} of the {self._what} failed; {_AGAIN}")
            elif not sign.ended_well:
                self._check_silence(rank, sign, now - sign.since)

    def _check_silence(self, rank: int, sign: _Sign, seconds: float) -> None:
        bound = self._bound if sign.heard else self._ranks.timeout
        if seconds > bound:
            raise LostRankError(
                f"rank {rank} of the {self._what} gave no sign of life for {bound:g} s: it died, was stopped, or has not "
                f"begun; {_AGAIN}"
            )

    def _beat(self) -> None:
        count = 1
        while not self._ended.wait(self._pause):
            if not self._is_there():  # the first rank has all answers
                return
            self._write(str(count))
            count += 1

    def _is_there(self) -> bool:
        return self._file(self._ranks.rank).exists()

    def _file(self, rank: int) -> Path:
        return self._folder / f".rank-{rank}"

    def _write(self, state: str) -> None:
        own = self._file(self._ranks.rank)
        with contextlib.suppress(OSError):  # a folder that cannot be written is said where answers are
            new = own.with_name(f"{own.name}.new")
            new.write_text(f"{self._name} {state}")
            os.replace(new, own)  # nobody reads half of it

    def _read(self, rank: int) -> str:
        try:
            return self._file(rank).read_text()
        except OSError:
            return ""
