"""Raw folders that lie, are broken or mean harm: every loss is counted or the whole is one clear line."""

import dataclasses
import json
import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from instructblip.data.cards import Card, SplitCounts, load_card
from instructblip.data.prepare.convert import _Seen, prepare_dataset
from instructblip.data.readers import READERS, Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.files import load_list
from instructblip.data.records import Record
from instructblip.data.shards import open_split
from instructblip.errors import UserError
from tests.kit.runs import World, start

SECRET = "a line of a file that is none of the dataset's"


def _read_list(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """A reader that believes everything: `list.json` holds {"key", "file", "ids"} objects."""
    for entry in load_list(source.path("list")):
        records = [Record(text, "question", "what?", answers=("this",)) for text in entry["ids"]]
        yield MediaRecords(entry["key"], entry["key"], source.raw / entry["file"], records)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    monkeypatch.setitem(READERS, "list", Reader(_read_list))
    splits = {"train": SplitCounts(None, None, files={"list": ("list.json", "old/list.json")})}
    return dataclasses.replace(load_card("easy_vqa"), name="hostile", reader="list", splits=splits)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """One good picture, and a secret outside the folder that is a good picture too."""
    folder = tmp_path / "raw"
    folder.mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "good.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "secret.png")
    return folder


Entry = tuple[str, str, list[str]]
GOOD: Entry = ("good", "good.png", ["g"])


def _prepare(raw: Path, card: Card, entries: list[Entry], **options: Any) -> dict[str, Any]:
    """The manifest, after a check that what was lost and what was kept add up to all that was listed."""
    listed = [{"key": key, "file": file, "ids": ids} for key, file, ids in entries]
    (raw / "list.json").write_text(json.dumps(listed))
    (path,) = prepare_dataset(card, raw, raw.parent / "out", progress=False, **options)
    manifest: dict[str, Any] = json.loads(path.read_text())
    assert manifest["records"] + sum(loss["records"] for loss in manifest["lost"]) == sum(len(e[2]) for e in entries)
    return manifest


def _lost(manifest: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {loss["reason"]: (loss["count"], loss["records"]) for loss in manifest["lost"]}


def test_names_that_lead_out_of_the_folder_are_never_read(raw: Path, tmp_path: Path, card: Card) -> None:
    names = [
        "../secret.png",
        "a/../../secret.png",
        str(tmp_path / "secret.png"),
        "../../../../../etc/passwd",
        "/etc/passwd",
    ]
    entries = [(f"k{number}", name, [f"r{number}"]) for number, name in enumerate(names)]
    manifest = _prepare(raw, card, [GOOD, *entries])
    assert _lost(manifest) == {"image name leads out of the raw folder": (5, 5)}
    assert manifest["images"] == 1
    stored = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*.tar"))
    assert (tmp_path / "secret.png").read_bytes() not in stored
    assert b"root:" not in stored


@pytest.mark.parametrize("key", ["../../etc/cron", "a.b", "a/b", "", "a b", "ü", "a\n", "-rf\0"])
def test_ids_that_make_no_member_name_are_counted(raw: Path, card: Card, key: str) -> None:
    manifest = _prepare(raw, card, [GOOD, (key, "good.png", ["r", "s"])])
    assert _lost(manifest) == {"image id is not of letters, digits, _ and -": (1, 2)}


def test_ids_that_occur_twice_are_counted_across_shards(raw: Path, card: Card) -> None:
    entries = [
        GOOD,
        ("a", "good.png", ["1", "2", "1"]),
        ("good", "good.png", ["x", "y"]),
        ("b", "good.png", ["2", "3"]),
    ]
    manifest = _prepare(raw, card, entries, images_per_shard=1)
    assert _lost(manifest) == {"image id occurs twice": (1, 2), "record id occurs twice": (2, 2)}
    split = open_split(raw.parent / "out/hostile/train")
    kept = [split.read(shard, row)[1][number].id for shard, row, number in split.records().tolist()]
    assert kept == ["g", "1", "2", "3"]


def test_texts_that_no_file_can_hold_are_counted(raw: Path, card: Card) -> None:
    names = ["\ud800.png", "a\0.png", "line\nbreak.png", "long" * 1000]
    entries = [(f"k{number}", name, [f"r{number}"]) for number, name in enumerate(names)]
    manifest = _prepare(raw, card, [GOOD, ("half", "good.png", ["\udfff"]), *entries])
    assert _lost(manifest) == {
        "image file cannot be read (File name too long)": (1, 1),
        "image file is missing": (1, 1),
        "image name is not a file name": (2, 2),
        "record holds half a Unicode pair": (1, 1),
    }
    examples = {loss["reason"]: loss["examples"] for loss in manifest["lost"]}
    assert examples["image name is not a file name"] == [r"\ud800.png", r"a\x00.png"]
    assert examples["image file is missing"] == [r"line\nbreak.png"]
    assert len(examples["image file cannot be read (File name too long)"][0]) == 200


def test_many_ids_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Seen, "_RECENT", 7)
    seen = _Seen()
    assert [seen.add(f"{number % 1000}") for number in range(2000)] == [True] * 1000 + [False] * 1000
    assert len(seen._runs) < 10
    assert seen.add("\ud800") and not seen.add("\ud800")


def _png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes whose pixels would fill `width` x `height`."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_files_that_are_no_sound_image_are_counted_by_reason(
    raw: Path, card: Card, caplog: pytest.LogCaptureFixture
) -> None:
    sound = (raw / "good.png").read_bytes()
    Image.new("RGB", (300, 300), "red").save(raw / "cut.jpg")
    Image.new("RGB", (1, 1)).save(raw / "dot.gif")
    files = {
        "empty.jpg": b"",
        "page.jpg": b"<!DOCTYPE html><title>404</title>",
        "cut.jpg": (raw / "cut.jpg").read_bytes()[:-300],
        "bomb.png": _png_that_claims(30_000, 30_000),
        "larger_bomb.png": _png_that_claims(2**31 - 1, 2**31 - 1),
        "dot.jpg": (raw / "dot.gif").read_bytes(),
        "damaged.png": sound[:45] + bytes(20) + sound[65:],
        "text.png": SECRET.encode(),
    }
    for name, content in files.items():
        (raw / name).write_bytes(content)
    os.mkfifo(raw / "pipe.jpg")
    (raw / "endless.jpg").symlink_to("/dev/zero")
    names = ["good.png", *files, "missing.jpg", "pipe.jpg", "endless.jpg"]
    with caplog.at_level(logging.WARNING):
        manifest = _prepare(raw, card, [(name.split(".")[0], name, [name]) for name in names], images_per_shard=4)
    assert _lost(manifest) == {
        "file is not an image": (2, 2),
        "image file is empty": (1, 1),
        "image file is missing": (1, 1),
        "image file is no regular file": (2, 2),
        "image has too many pixels (decompression bomb)": (2, 2),
        "image is a single pixel": (1, 1),
        "image is damaged": (1, 1),
        "image is truncated": (1, 1),
    }
    assert len(caplog.messages) == 8
    assert all("\n" not in line for line in caplog.messages)
    assert manifest["images"] == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not whole JSON"),
        (b'[{"key": "a", "file": "good.png", "ids": ["1"]}, {"ke', "is not whole JSON"),
        (b'[{"key": "\xff\xfe"}]', "is not UTF-8"),
        (b'{"key": "a"}', "must hold a list"),
        (b"[" * 100_000, "list.json"),
        (None, "lacks list.json or old/list.json"),
    ],
)
def test_an_unusable_file_is_one_line_and_leaves_no_shards(
    raw: Path, card: Card, content: bytes | None, words: str
) -> None:
    if content is not None:
        (raw / "list.json").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        prepare_dataset(card, raw, raw.parent / "out", progress=False)
    assert "\n" not in str(caught.value)
    assert "list.json" in str(caught.value)
    assert list((raw.parent / "out").rglob("shard-*")) == []


def test_a_wrong_split_is_one_line(raw: Path, card: Card) -> None:
    with pytest.raises(UserError, match="has no split 'test'; choose among train"):
        _prepare(raw, card, [GOOD], splits=["test"])


def _cut_questions(raw: Path) -> None:
    path = raw / "test/questions.json"
    os.truncate(path, path.stat().st_size // 2)


def _no_questions(raw: Path) -> None:
    (raw / "test/questions.json").unlink()


def _no_images(raw: Path) -> None:
    for path in (raw / "test/images").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("harm", "words"),
    [(_cut_questions, "not whole JSON"), (_no_questions, "does not exist"), (_no_images, "image file is missing")],
)
def test_the_command_ends_in_one_line_without_a_traceback(
    world: World, tmp_path: Path, harm: Callable[[Path], None], words: str
) -> None:
    raw = tmp_path / "raw"
    (raw / "test/images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(raw / "test/images/0.png")
    (raw / "test/questions.json").write_text(json.dumps([["what color is the shape?", "red", 0]]))
    harm(raw)
    command = start(
        world, "prepare.py", "dataset=easy_vqa", "split=test", f"raw={raw}", f"out={tmp_path / 'out'}", cwd=tmp_path
    )
    assert command.wait() not in (0, 1)
    assert "Traceback" not in command.output
    assert words in command.output
