"""Ranks of an evaluation find out who is gone within a bound, and suspect nobody who is at work or has ended well."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from instructblip.distributed import ALONE, Ranks
from instructblip.errors import UserError
from instructblip.evaluation import heartbeat
from instructblip.evaluation.heartbeat import watched

BOUND = 0.5
FIRST, SECOND = Ranks(0, 2, timeout=30.0), Ranks(1, 2, timeout=30.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat, "LOST_SECONDS", BOUND)


@contextlib.contextmanager
def left(ranks: Ranks, folder: Path) -> Iterator[None]:
    """A rank that goes without a word when the block ends: its file stays as it is."""
    beats = heartbeat._Heartbeats(folder, ranks, BOUND)
    with contextlib.ExitStack() as stack:
        stack.enter_context(beats.going_on())
        yield
        beats._ended.set()
        beats._write = lambda state: None  # type: ignore[method-assign]
        kept = folder / f".rank-{ranks.rank}", (folder / f".rank-{ranks.rank}").read_text()
    kept[0].write_text(kept[1])


def look(ranks: Ranks, seconds: float) -> None:
    """As the work between batches and the wait for the others do."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ranks.poll_stop()
        time.sleep(0.005)


def test_one_alone_watches_nobody_and_clears_up_after_those_that_were_killed(tmp_path: Path) -> None:
    with left(SECOND, tmp_path):
        pass
    with watched(tmp_path, ALONE) as ranks:
        assert ranks is ALONE
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_who_works_or_has_ended_well_is_not_suspected(tmp_path: Path) -> None:
    with watched(tmp_path, FIRST) as first:
        with watched(tmp_path, SECOND) as second:
            look(first, 1.2 * BOUND)
            look(second, 0.1)
        look(first, 1.2 * BOUND)
    assert list(tmp_path.iterdir()) == []


def test_who_ended_well_before_anybody_looked_is_not_suspected(tmp_path: Path) -> None:
    with watched(tmp_path, Ranks(0, 2, timeout=0.1)) as first:
        with watched(tmp_path, SECOND):
            pass
        look(first, 0.3)


@pytest.mark.parametrize(("gone", "watching"), [(SECOND, FIRST), (FIRST, SECOND)])
def test_who_gives_no_sign_is_named_within_the_bound(tmp_path: Path, gone: Ranks, watching: Ranks) -> None:
    with (
        pytest.raises(
            UserError, match=rf"^rank {gone.rank} of the evaluation gave no sign of life for 0\.5 s: .* again"
        ),
        watched(tmp_path, watching) as ranks,
    ):
        with left(gone, tmp_path):
            look(ranks, 0.2)
        began = time.monotonic()
        try:
            look(ranks, 20 * BOUND)
        finally:
            assert time.monotonic() - began < 4 * BOUND


def test_a_shorter_timeout_is_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "LOST_SECONDS", 600.0)
    with (
        pytest.raises(UserError, match=r"no sign of life for 0\.3 s"),
        watched(tmp_path, Ranks(0, 2, timeout=0.3)) as ranks,
    ):
        with left(SECOND, tmp_path):
            look(ranks, 0.2)
        look(ranks, 5.0)


@pytest.mark.parametrize("error", [UserError("no memory"), KeyboardInterrupt(), RuntimeError("a defect")])
def test_who_fails_says_so_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    monkeypatch.setattr(heartbeat, "LOST_SECONDS", 600.0)
    with pytest.raises(UserError, match=r"^rank 1 of the evaluation failed; look at what it said last"):  # noqa: SIM117
        with watched(tmp_path, Ranks(0, 2)) as ranks:
            with contextlib.suppress(BaseException), watched(tmp_path, Ranks(1, 2)):
                monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
                time.sleep(0.1)
                ranks.poll_stop()
                raise error
            look(ranks, 20.0)


@pytest.mark.slow
def test_what_a_killed_evaluation_left_counts_for_nothing(tmp_path: Path) -> None:
    with left(SECOND, tmp_path):
        pass
    assert (tmp_path / ".rank-1").exists()
    with watched(tmp_path, FIRST) as first:
        look(first, 2 * BOUND)  # rank 1 still loads the model
        with watched(tmp_path, SECOND):
            look(first, 0.1)
        look(first, 0.1)
    assert list(tmp_path.iterdir()) == []


def test_who_never_begins_is_named_after_the_timeout(tmp_path: Path) -> None:
    began = time.monotonic()
    with (
        pytest.raises(
            UserError, match=r"^rank 1 of the evaluation gave no sign of life for 0\.2 s: .* or has not begun; "
        ),
        watched(tmp_path, Ranks(0, 2, timeout=0.2)) as ranks,
    ):
        look(ranks, 20.0)
    assert time.monotonic() - began < 5.0


def test_a_stop_comes_before_a_failure(tmp_path: Path) -> None:
    """A rank that was told to stop has told the others so before it leaves."""

    class Stopped(BaseException):
        pass

    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped), watched(tmp_path, Ranks(0, 2, poll_stop=stop)) as ranks:
        look(ranks, 1.0)
