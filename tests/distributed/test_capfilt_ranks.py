"""`python -m instructblip.capfilt` on several ranks: the bytes of one, whoever is lost on the way."""

import re
from pathlib import Path

import pytest

from instructblip.distributed import Ranks
from instructblip.errors import UserError
from instructblip.evaluation import heartbeat, journal
from tests.kit.ranks import on_ranks
from tests.kit.web import caption_web, files_of, web_pictures, write_web


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures in three shards, of two chunks each."""
    return write_web(tmp_path_factory.mktemp("web"), web_pictures())


@pytest.fixture(scope="module")
def alone(web: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process writes."""
    return files_of(caption_web(web, tmp_path_factory.mktemp("alone") / "out", batch_size=2))


def share(ranks: Ranks, web: Path, out: Path, dies: bool) -> tuple[int, str]:
    """One rank's part: how many chunks it answered, and what it ended with."""
    heartbeat.BEAT_SECONDS = 0.1
    if dies:
        heartbeat.LOST_SECONDS = 3.0
    append, chunks = journal._append, 0

    def counting(path: Path, lines: list[str]) -> None:
        nonlocal chunks
        chunks += 1
        if dies and ranks.rank == 1 and chunks == 2:
            raise UserError("this rank has lost its disk")
        append(path, lines)

    journal._append = counting  # type: ignore[assignment]
    try:
        caption_web(web, out, batch_size=2)
    except UserError as error:
        return chunks, str(error)
    finally:
        journal._append = append
    return chunks, ""


@pytest.mark.slow
def test_two_ranks_share_the_pictures_and_write_the_bytes_of_one(
    web: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    assert on_ranks(2, share, web, tmp_path / "out", False) == [(3, ""), (3, "")]
    assert files_of(tmp_path / "out") == alone


@pytest.mark.slow
def test_a_lost_rank_is_named_and_one_process_goes_on(web: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    first, second = on_ranks(2, share, web, tmp_path / "out", True)
    assert second == (2, "this rank has lost its disk")
    # It may be lost before the other has heard of it.
    assert re.match(
        r"rank 1 of the capfilt (failed; |gave no sign of life for 3 s: ).*run the same command again", first[1]
    )
    assert not (tmp_path / "out/report.json").exists()
    assert files_of(caption_web(web, tmp_path / "out", batch_size=2)) == alone
