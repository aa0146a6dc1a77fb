"""Preparation: same bytes from the same input, after a kill and with any number of workers; every loss counted."""

import contextlib
import dataclasses
import io
import json
import logging
import os
import select
import shutil
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import webdataset
from PIL import Image
from rich.console import Console

from instructblip.config.schema import PrepareConfig
from instructblip.data.cards import Card, SplitCounts, load_card
from instructblip.data.prepare.command import prepare
from instructblip.data.prepare.convert import check_prepared, prepare_dataset
from instructblip.data.readers import READERS, Losses, MediaRecords, RawSplit, Reader
from instructblip.data.records import Record
from instructblip.data.shards import open_split
from instructblip.errors import UserError
from tests.kit.raw_files import write_raw
from tests.unit.test_media import video

IMAGES = 7
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal")
COUNTS = SplitCounts(IMAGES, 3 * IMAGES, {"color": IMAGES, "absent": IMAGES, "statement": IMAGES})
CARD = dataclasses.replace(load_card("easy_vqa"), splits={"test": COUNTS})


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """The package's test folder with seven images, two questions each."""
    folder = tmp_path / "raw"
    (folder / "test/images").mkdir(parents=True)
    entries = []
    for number, color in enumerate(COLORS):
        Image.effect_noise((16, 16), 50).convert("RGB").save(folder / f"test/images/{number}.png")
        entries += [["what color is the shape?", color, number], ["is there a red shape?", "no", number]]
    (folder / "test/questions.json").write_text(json.dumps(entries))
    return folder


def _prepare(raw: Path, out: Path, card: Card = CARD, **options: Any) -> dict[str, Any]:
    (path,) = prepare_dataset(card, raw, out, **{"images_per_shard": 3, "progress": False} | options)
    manifest: dict[str, Any] = json.loads(path.read_text())
    return manifest


def _files(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.endswith(".lock")}


def test_shards_and_manifest(raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        manifest = _prepare(raw, tmp_path / "out")
    assert caplog.messages == []
    assert (manifest["dataset"], manifest["split"], manifest["licence"]) == ("easy_vqa", "test", "MIT")
    assert (manifest["images"], manifest["records"]) == (7, 21)
    assert manifest["records_by_kind"] == {"absent": 7, "color": 7, "statement": 7}
    assert [shard["images"] for shard in manifest["shards"]] == [3, 3, 1]
    assert (manifest["lost"], manifest["differences"]) == ([], [])
    split = open_split(tmp_path / "out/easy_vqa/test")
    answers = [split.read(shard, row)[1][number].answers for shard, row, number in split.records(["color"])]
    assert answers == [(color,) for color in COLORS]
    assert split.read(2, 0)[0] == ((raw / "test/images/6.png").read_bytes(),)


def test_stock_webdataset_reads_what_prepare_writes(raw: Path, tmp_path: Path) -> None:
    _prepare(raw, tmp_path / "out")
    urls = [str(path) for path in sorted((tmp_path / "out").rglob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [sample["json"]["image_id"] for sample in samples] == [str(number) for number in range(IMAGES)]
    assert {sample["png"].size for sample in samples} == {(16, 16)}


def test_one_and_two_workers_write_the_same_bytes(raw: Path, tmp_path: Path) -> None:
    (raw / "test/images/1.png").write_bytes(b"<html>")
    _prepare(raw, tmp_path / "one")
    _prepare(raw, tmp_path / "two", workers=2, images_per_shard=3)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
    assert len(_files(tmp_path / "one")) == 7


def test_a_view_is_prepared_as_its_parent(raw: Path, tmp_path: Path) -> None:
    view = dataclasses.replace(load_card("easy_vqa_color"), splits=CARD.splits)
    _prepare(raw, tmp_path / "parent")
    _prepare(raw, tmp_path / "view", view)
    assert _files(tmp_path / "parent") == _files(tmp_path / "view")


def test_a_killed_run_goes_on_to_the_same_bytes(raw: Path, tmp_path: Path) -> None:
    _prepare(raw, tmp_path / "whole")
    _prepare(raw, tmp_path / "killed")
    folder = tmp_path / "killed/easy_vqa/test"
    (folder / "manifest.json").unlink()
    (folder / "shard-000001.index.safetensors").unlink()  # killed between tar and index
    (folder / "shard-000002.tar").rename(folder / "shard-000002.tar.99999.partial")  # killed before the rename
    (folder / "shard-000002.index.safetensors").unlink()
    _prepare(raw, tmp_path / "killed")
    assert _files(tmp_path / "killed") == _files(tmp_path / "whole")


@dataclasses.dataclass(frozen=True)
class WaitingRecord(Record):
    """A record whose conversion waits at a pipe, wherever it is: in this process or in a worker."""

    def to_dict(self) -> dict[str, Any]:
        """The fields, once somebody has written to the pipe."""
        (pipe := Path(self.tags["pipe"])).exists() and pipe.read_bytes()
        return super().to_dict()


def _prepare_waiting(raw: Path, out: Path, workers: int) -> dict[str, Any]:
    """Prepare pictures of which the fifth has a record that waits at `pipe`, if that is there."""

    def read(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
        for number in range(IMAGES):
            fields = {
                "id": str(number),
                "kind": "absent",
                "tags": {"pipe": "pipe" if number != 4 else str(raw / "pipe")},
            }
            record = (WaitingRecord if number == 4 else Record)(**fields)
            yield MediaRecords(f"k{number}", str(number), raw / f"test/images/{number}.png", [record])

    with mock.patch.dict(READERS, waiting=Reader(read)):
        return _prepare(raw, out, dataclasses.replace(CARD, reader="waiting"), workers=workers)


@contextlib.contextmanager
def _waiting(raw: Path, out: Path, workers: int) -> Iterator[tuple[BaseProcess, int]]:
    """A process that prepares and waits in the middle of the second shard, and our end of its pipe; killed at the end."""
    os.mkfifo(raw / "pipe")
    process = get_context("forkserver").Process(target=_prepare_waiting, args=(raw, out, workers))
    process.start()
    try:
        writing = None
        while writing is None:
            with contextlib.suppress(OSError):  # nobody has opened the other end yet
                writing = os.open(raw / "pipe", os.O_WRONLY | os.O_NONBLOCK)
            process.join(0.02)
            assert process.exitcode is None
        yield process, writing
        os.close(writing)
    finally:
        process.kill()
        process.join()
        (raw / "pipe").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_is_really_killed_goes_on_to_the_same_bytes(raw: Path, tmp_path: Path, workers: int) -> None:
    first = tmp_path / "killed/easy_vqa/test/shard-000000.index.safetensors"
    with _waiting(raw, tmp_path / "killed", workers) as (process, _):
        while not first.is_file():
            process.join(0.02)
            assert process.exitcode is None
    assert not (tmp_path / "killed/easy_vqa/test/manifest.json").exists()
    inode = first.stat().st_ino
    _prepare_waiting(raw, tmp_path / "killed", 1)
    _prepare_waiting(raw, tmp_path / "whole", 1)
    assert first.stat().st_ino == inode
    assert _files(tmp_path / "killed") == _files(tmp_path / "whole")


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(raw: Path, tmp_path: Path) -> None:
    with _waiting(raw, tmp_path / "out", 2) as (process, writing):
        process.kill()
        process.join()
        poll = select.poll()
        poll.register(writing, 0)
        assert poll.poll(20_000), "a worker still holds its end of the pipe: it outlived its parent"


def test_finished_shards_are_kept_and_damaged_ones_made_again(raw: Path, tmp_path: Path) -> None:
    _prepare(raw, tmp_path / "out")
    before = _files(tmp_path / "out")
    folder = tmp_path / "out/easy_vqa/test"
    os.truncate(folder / "shard-000001.tar", 700)
    damaged = bytearray((folder / "shard-000002.tar").read_bytes())
    damaged[600] ^= 1
    (folder / "shard-000002.tar").write_bytes(damaged)
    inodes = [(folder / f"shard-{number:06d}.tar").stat().st_ino for number in range(3)]
    _prepare(raw, tmp_path / "out")
    kept = [(folder / f"shard-{number:06d}.tar").stat().st_ino == inodes[number] for number in range(3)]
    assert kept == [True, False, False]
    assert _files(tmp_path / "out") == before


def test_changed_raw_files_or_options_are_noticed(raw: Path, tmp_path: Path) -> None:
    _prepare(raw, tmp_path / "out", images_per_shard=2)
    Image.new("RGB", (16, 16), "red").save(raw / "test/images/4.png")
    _prepare(raw, tmp_path / "out")
    _prepare(raw, tmp_path / "fresh")
    assert _files(tmp_path / "out") == _files(tmp_path / "fresh")  # the fourth shard of two images is gone, too


def test_bad_images_are_counted_by_reason_and_kept_over_a_second_run(
    raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (raw / "test/images/0.png").write_bytes(b"")
    (raw / "test/images/4.png").write_bytes(b"")
    (raw / "test/images/5.png").unlink()
    (raw / "test/images/6.png").write_bytes(b"<html>")  # the only image of its shard
    manifest = _prepare(raw, tmp_path / "out")
    files = ["test/images/0.png", "test/images/4.png"]
    assert manifest["lost"] == [
        {"reason": "file is not an image", "count": 1, "records": 3, "examples": ["test/images/6.png"]},
        {"reason": "image file is empty", "count": 2, "records": 6, "examples": files},
        {"reason": "image file is missing", "count": 1, "records": 3, "examples": ["test/images/5.png"]},
    ]
    assert (manifest["images"], manifest["records"]) == (3, 9)
    assert manifest["records"] + sum(loss["records"] for loss in manifest["lost"]) == manifest["expected"]["records"]
    assert manifest["differences"][:2] == ["images: expected 7, found 3", "records: expected 21, found 9"]
    assert "easy_vqa/test: images: expected 7, found 3" in caplog.messages
    assert any("2 x image file is empty (6 records), first test/images/0.png" in line for line in caplog.messages)
    assert _prepare(raw, tmp_path / "out") == manifest
    assert len(open_split(tmp_path / "out/easy_vqa/test").records()) == 9


def test_unverified_and_unknown_counts(raw: Path, tmp_path: Path) -> None:
    card = dataclasses.replace(CARD, verified=False, splits={"test": SplitCounts(8, None, {"shape": 2})})
    assert _prepare(raw, tmp_path / "out", card)["differences"] == [
        "images: expected 8 (a number nobody has verified yet), found 7",
        "shape records: expected 2 (a number nobody has verified yet), found 0",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"splits": ["dev"]}, "easy_vqa has no split 'dev'; choose among test"),
        ({"workers": 0}, "must be 1 or more"),
        ({"images_per_shard": 0}, "must be 1 or more"),
        ({"image_size": 0}, "image_size=0 must be 1 or more"),
        ({"frames": -4}, "frames=-4 must be 1 or more"),
    ],
)
def test_wrong_options_are_one_line(raw: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        _prepare(raw, tmp_path / "out", **options)


def _write_clips(raw: Path) -> None:
    """Two videos and a picture, by a reader of their own."""
    raw.mkdir()
    for number in range(2):
        video(raw / f"{number}.mp4", seconds=2 + 2 * number)
    Image.new("RGB", (64, 48), "red").save(raw / "2.png")


def _read_clips(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    for number in range(2):
        record = Record(f"v{number}", "video_question", "red?", answers=("yes",))
        yield MediaRecords(f"clip_{number}", f"v{number}", source.raw / f"{number}.mp4", [record], video=True)
    yield MediaRecords("picture", "p", source.raw / "2.png", [Record("p", "question", "red?", answers=("yes",))])


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Card:
    _write_clips(tmp_path / "clips")
    monkeypatch.setitem(READERS, "clips", Reader(_read_clips))
    return dataclasses.replace(CARD, name="clips", reader="clips", splits={"test": SplitCounts(3, 3)})


@pytest.mark.parametrize("workers", [1, 2])
def test_videos_are_stored_as_frames(clips: Card, tmp_path: Path, workers: int) -> None:
    options = {"images_per_shard": 2, "frames": 3, "image_size": 32, "workers": workers}
    manifest = _prepare(tmp_path / "clips", tmp_path / "out", clips, **options)
    chosen = {"images_per_shard": 2, "frames": 3, "image_size": 32, "ocr": None, "jpeg_quality": 95}
    assert manifest["options"] == chosen
    assert (manifest["images"], manifest["frames"]) == (3, 7)
    assert [(shard["images"], shard["frames"]) for shard in manifest["shards"]] == [(2, 6), (1, 1)]
    split = open_split(tmp_path / "out/clips/test")
    assert [len(split.read(shard, row)[0]) for shard, row, _ in split.records()] == [3, 3, 1]
    sizes = {Image.open(io.BytesIO(frame)).size for frame in split.read(0, 1)[0] + split.read(1, 0)[0]}
    assert sizes == {(48, 32), (43, 32)}
    assert check_prepared(tmp_path / "out") == []
    content = bytearray((tmp_path / "out/clips/test/shard-000000.tar").read_bytes())
    content[int(split.shards[0].arrays["frame_offset"][4]) + 99] ^= 1
    (tmp_path / "out/clips/test/shard-000000.tar").write_bytes(content)
    assert len(check_prepared(tmp_path / "out")) == 1


def test_shards_of_other_options_are_made_again(clips: Card, tmp_path: Path) -> None:
    shards = {}
    for options in ({}, {"frames": 2}, {"frames": 2, "image_size": 40}, {"image_size": 40}):
        _prepare(tmp_path / "clips", tmp_path / "kept", clips, **options)
        name = " ".join(f"{key}={value}" for key, value in options.items())
        _prepare(tmp_path / "clips", tmp_path / f"fresh {name}", clips, **options)
        assert _files(tmp_path / "kept") == _files(tmp_path / f"fresh {name}")
        shards[name] = (tmp_path / "kept/clips/test/shard-000000.tar").read_bytes()
    assert len(set(shards.values())) == 4


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_to_keep_is_an_error(raw: Path, tmp_path: Path, workers: int) -> None:
    for path in (raw / "test/images").iterdir():
        path.unlink()
    with pytest.raises(
        UserError, match="no image of easy_vqa/test could be kept \\(7 x image file is missing, first test/images/"
    ):
        _prepare(raw, tmp_path / "out", workers=workers)
    with pytest.raises(UserError, match="is not a folder; raw= is the folder"):
        _prepare(raw / "absent", tmp_path / "out")


def test_check_finds_what_is_not_as_listed(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"no manifest.json below"):
        check_prepared(out)
    _prepare(raw, out)
    assert check_prepared(out) == check_prepared(out / "easy_vqa/test") == []
    folder = out / "easy_vqa/test"
    content = bytearray((folder / "shard-000000.tar").read_bytes())
    content[-1] ^= 1
    (folder / "shard-000000.tar").write_bytes(content)
    (folder / "shard-000001.tar").unlink()
    for suffix in ("tar", "index.safetensors"):
        (folder / f"shard-000009.{suffix}").write_bytes((folder / f"shard-000002.{suffix}").read_bytes())
    problems = check_prepared(out)
    assert [problem.split(str(folder) + "/")[1][:16] for problem in problems] == [
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000009.ind",
        "shard-000009.tar",
    ]
    assert "content differs from its index" in problems[0]
    assert "cannot be read" in problems[1]
    assert "not in the manifest" in problems[3]


def test_processes_that_prepare_the_same_dataset_do_not_disturb_each_other(raw: Path, tmp_path: Path) -> None:
    options = {"splits": ["test"], "images_per_shard": 1, "progress": False}
    arguments = (load_card("easy_vqa"), raw, tmp_path / "out")
    processes = [
        get_context("forkserver").Process(target=prepare_dataset, args=arguments, kwargs=options) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list((tmp_path / "out/easy_vqa/test").glob("*.tar"))) == 7
    assert check_prepared(tmp_path / "out/easy_vqa/test") == []


def _warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]


def test_splits_that_the_raw_folder_has_no_file_of_are_left_out_visibly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw, console = tmp_path / "raw", Console(file=io.StringIO(), width=300)
    write_raw("vqav2", raw)
    for name in ("v2_OpenEnded_mscoco_test2015_questions.json", "v2_OpenEnded_mscoco_test-dev2015_questions.json"):
        (raw / name).unlink()
    assert prepare(PrepareConfig(dataset="vqav2", raw=str(raw), out=str(tmp_path / "out")), console) == 0
    assert sorted(path.name for path in (tmp_path / "out/vqav2").iterdir()) == ["train", "val"]
    assert f"skipped, as {raw} has no files of them: test-dev, test" in console.file.getvalue()
    assert _warned(caplog) == [
        f"vqav2/{split}: skipped, {raw} has no file of it, such as v2_OpenEnded_mscoco_{split}2015_questions.json"
        for split in ("test-dev", "test")
    ]
    with pytest.raises(UserError, match="lacks v2_OpenEnded_mscoco_test2015_questions"):
        _prepare(raw, tmp_path / "out", load_card("vqav2"), splits=["test"])


def test_a_split_that_is_there_in_part_or_a_folder_with_nothing_is_an_error(tmp_path: Path) -> None:
    raw, card = tmp_path / "raw", load_card("vqav2")
    write_raw("vqav2", raw)
    (raw / "v2_OpenEnded_mscoco_val2014_questions.json").unlink()
    with pytest.raises(
        UserError, match=r"lacks v2_OpenEnded_mscoco_val2014_questions\.json \(questions of split val\)"
    ):
        prepare_dataset(card, raw, tmp_path / "out", progress=False)
    (tmp_path / "images_only/train2014").mkdir(parents=True)
    with pytest.raises(UserError, match=r"lacks v2_OpenEnded_mscoco_train2014_questions\.json"):
        prepare_dataset(card, tmp_path / "images_only", tmp_path / "out", progress=False)
    write_raw("vqav2", tmp_path / "other")
    shutil.rmtree(tmp_path / "other/test2015")  # questions without their images are no missing split
    with pytest.raises(UserError, match=r"lacks test2015 or images/test2015 \(images of split test-dev\)"):
        prepare_dataset(card, tmp_path / "other", tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()  # said before train was converted


def test_a_file_that_splits_share_makes_no_split_present(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_raw("iconqa", tmp_path / "raw")  # its pid_splits.json is of all splits
    manifests = prepare_dataset(load_card("iconqa"), tmp_path / "raw", tmp_path / "out", progress=False)
    assert [path.parent.name for path in manifests] == ["test"]
    assert len(_warned(caplog)) == 2
