"""`python -m instructblip.capfilt`, killed whenever, goes on and ends with the same bytes."""

import io
import json
import multiprocessing
import os
import random
import signal
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from instructblip import files
from instructblip.capfilt.captioning import Answer, Captioning
from instructblip.capfilt.pictures import Seen
from instructblip.data.cards import load_card
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.errors import UserError
from instructblip.evaluation import journal
from tests.kit.own_tables import write_tar
from tests.kit.streams import web_members, write_web_tars
from tests.kit.tars import as_tarfile_writes
from tests.kit.web import caption_web, files_of, web_pictures, write_web

KILLS = 10


class Killed(BaseException):
    """Nothing catches it; what runs on the way out is undone by `killed_after`."""


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures in three shards."""
    return write_web(tmp_path_factory.mktemp("web"), web_pictures())


@pytest.fixture(scope="module")
def whole(web: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nothing interrupted."""
    return caption_web(web, tmp_path_factory.mktemp("whole") / "out")


@contextmanager
def killed_after(moments: int) -> Iterator[list[str]]:
    """Die at the moment of that number, before or in the midst of a write; give the moments that came.

    A file that was being written is left beside its place, and of the journal's last lines a half.
    """
    came: list[str] = []
    replace, append, add, unlink = os.replace, journal._append, tarfile.TarFile.addfile, Path.unlink
    dead = False

    def moment(name: str, half: Callable[[], None] = lambda: None) -> None:
        nonlocal dead
        came.append(name)
        if len(came) == moments:
            half()
            dead = True
            raise Killed

    def replacing(source: Path, target: Path) -> None:
        moment(f"replace {Path(target).name}")
        replace(source, target)

    def appending(path: Path, lines: list[str]) -> None:
        moment(f"append {path.name}", lambda: append(path, [line[: len(line) // 2] for line in lines[:2]]))
        append(path, lines)

    def adding(tar: tarfile.TarFile, *arguments: Any) -> None:
        moment("member")
        add(tar, *arguments)

    def unlinking(path: Path, *arguments: Any, **options: Any) -> None:
        if not dead:  # a killed process leaves its half-written files
            unlink(path, *arguments, **options)

    with (
        patch.object(files.os, "replace", replacing),
        patch.object(journal, "_append", appending),
        patch.object(tarfile.TarFile, "addfile", adding),
        patch.object(Path, "unlink", unlinking),
    ):
        yield came


def test_what_is_converted_and_what_is_captioned_have_the_bytes_that_tarfile_alone_writes(
    web: Path, whole: Path
) -> None:
    shards = [*web.rglob("*.tar"), *whole.rglob("*.tar")]
    assert len(shards) == 6
    for shard in shards:
        assert shard.read_bytes() == as_tarfile_writes(shard)


def test_tars_that_nobody_prepared_give_the_bytes_of_those_that_somebody_did(tmp_path: Path) -> None:
    card = write_web_tars(tmp_path / "raw", tars=2, samples=2)
    write_tar(tmp_path / "raw/00001.tar", {**web_members(1, 2), "c.txt": b"no picture"})
    prepare_dataset(load_card(card), tmp_path / "raw", tmp_path / "shards", images_per_shard=2, progress=False)
    prepared, foreign = caption_web(tmp_path / "shards", tmp_path / "a"), caption_web(card, tmp_path / "b")
    names = ["captions.json", *(f"web_capfilt/train/shard-{number:06d}.tar" for number in range(2))]
    for name in names:
        assert (foreign / name).read_bytes() == (prepared / name).read_bytes()
    (lost,) = json.loads((foreign / "report.json").read_text())["lost"]
    assert (lost["reason"], lost["count"], lost["examples"]) == ("image is missing", 1, ["00001.tar: c"])
    with pytest.raises(UserError, match=r"mine\.yaml has no split val, but train; set split="):
        caption_web(card, tmp_path / "c", split="val")


def test_tars_lose_what_preparing_loses_and_empty_ones_stop_nothing(tmp_path: Path) -> None:
    """A sample that stands in its tar twice, half a Unicode pair, and tars of which no download came through."""
    card = write_web_tars(tmp_path / "raw", tars=4, samples=2, shards=["*.tar", "00000.tar"])
    plain, again = web_members(0, 2), web_members(9, 1)
    with tarfile.open(tmp_path / "raw/00000.tar", "w") as tar:
        for name, content in (*plain.items(), *list(plain.items())[:3]):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    write_tar(tmp_path / "raw/00001.tar", {})
    write_tar(tmp_path / "raw/00002.tar", {"a.txt": b"no picture at all"})
    half = {"b.jpg": again["000090000.jpg"], "b.txt": b"a text", "b.json": b'{"url": "http://a.org/\\ud800"}'}
    write_tar(tmp_path / "raw/00003.tar", {**web_members(3, 1), **half})
    prepare_dataset(load_card(card), tmp_path / "raw", tmp_path / "shards", images_per_shard=2, progress=False)
    prepared, foreign = caption_web(tmp_path / "shards", tmp_path / "a"), caption_web(card, tmp_path / "b")
    assert (foreign / "captions.json").read_bytes() == (prepared / "captions.json").read_bytes()
    lost = {loss["reason"]: loss["count"] for loss in json.loads((foreign / "report.json").read_text())["lost"]}
    assert lost == {"image id occurs twice": 1, "image is missing": 1, "record holds half a Unicode pair": 1}


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_no_byte(web: Path, whole: Path, tmp_path: Path) -> None:
    with killed_after(0) as came:
        out = caption_web(web, tmp_path / "once")
    assert files_of(out) == files_of(whole)
    moments: dict[str, list[int]] = {}
    for number, name in enumerate(came, start=1):
        moments.setdefault(name.split()[0], []).append(number)
    stream, died = random.Random(0), []
    while len(died) < KILLS:
        out = tmp_path / f"after{len(died)}"
        while len(died) < KILLS:  # a folder may be killed in several times
            try:
                with killed_after(stream.choice(moments[stream.choice(sorted(moments))])) as came:
                    caption_web(web, out)
            except Killed:
                died.append(came[-1].split()[0])
            else:
                break
        assert files_of(caption_web(web, out)) == files_of(whole)
    assert set(died) == moments.keys() == {"replace", "append", "member"}


@pytest.mark.slow
def test_a_process_killed_while_it_writes_a_shard_leaves_nothing_that_stays(
    web: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = multiprocessing.get_context("forkserver").Process(target=_die_at_the_ninth_member, args=(web, out))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert list((out / "web_capfilt/train").glob("*.partial"))
    assert files_of(caption_web(web, out)) == files_of(whole)


def _die_at_the_ninth_member(web: Path, out: Path) -> None:
    add, members = tarfile.TarFile.addfile, 0

    def dying(tar: tarfile.TarFile, *arguments: Any) -> None:
        nonlocal members
        members += 1
        if members == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        add(tar, *arguments)

    with patch.object(tarfile.TarFile, "addfile", dying):
        caption_web(web, out)


def test_a_chunk_that_was_cut_is_answered_whole_and_no_other_again(web: Path, whole: Path, tmp_path: Path) -> None:
    out, asked = tmp_path / "out", []
    with pytest.raises(Killed), killed_after(2) as came:  # the plan, then the first shard's only chunk
        caption_web(web, out)
    assert came[-1] == "append journal-0.jsonl"
    answer = Captioning.answer

    def counting(captioning: Captioning, pictures: Sequence[Seen]) -> list[Answer]:
        asked.append(len(pictures))
        return answer(captioning, pictures)

    with patch.object(Captioning, "answer", counting):
        assert files_of(caption_web(web, out)) == files_of(whole)
        assert asked == [4, 4, 3]
        assert files_of(caption_web(web, out)) == files_of(whole)
    assert asked == [4, 4, 3]


def test_another_process_at_work_in_the_folder_is_left_alone(web: Path, tmp_path: Path) -> None:
    with (
        files.claimed_folder(tmp_path / "out", "capfilt"),
        pytest.raises(UserError, match=r"another capfilt is writing to .*, or give another out="),
    ):
        caption_web(web, tmp_path / "out")
