"""The audit finds held-out images in training data by content and by id, and nothing where there is nothing."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from instructblip.config.schema import PrepareConfig
from instructblip.data.cards import Card, load_card
from instructblip.data.prepare import audit
from instructblip.data.prepare.audit import audit_prepared, audit_table, normalize_question, source_id
from instructblip.data.prepare.command import prepare
from instructblip.data.records import Record
from instructblip.data.shards import ShardWriter, shard_path
from instructblip.errors import UserError

Entry = tuple[str, int, str]  # id in the source, shade of the picture, question


def _png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def _write(folder: Path, name: str, split: str, entries: Sequence[Entry], kind: str = "question") -> None:
    """A prepared split, a shard for every two images."""
    home, shards = folder / name / split, []
    for number in range(0, len(entries), 2):
        path = shard_path(home, number // 2)
        with ShardWriter.open(path) as writer:
            for row, (image_id, shade, question) in enumerate(entries[number : number + 2]):
                record = Record(f"{number + row}", kind, question, answers=("yes",))
                writer.add(f"k{number + row}", {"png": _png(shade)}, image_id, [record])
        shards.append({"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    manifest = {"format": 1, "dataset": name, "split": split, "shards": shards, "images": len(entries)}
    (home / "manifest.json").write_text(json.dumps(manifest | {"records_by_kind": {kind: len(entries)}}))


def _card(name: str, role: str, **changes: Any) -> Card:
    base = load_card("easy_vqa")
    values = {"name": name, "role": role, "kinds": ("question",), "view_of": None, "image_source": None}
    return dataclasses.replace(base, **values | changes)


TRAIN: list[Entry] = [("000000000007.jpg", 10, "Is it red?"), ("8", 20, "what?"), ("9", 30, "who?")]


def test_an_image_is_found_by_its_bytes_and_by_its_number(tmp_path: Path) -> None:
    test = [
        ("x1", 20, "other"),
        ("COCO_val2014_000000000007", 99, "is it  RED"),
        ("x3", 98, "who?"),
        ("x4", 30, "who?"),
    ]
    _write(tmp_path, "big", "train", TRAIN)
    _write(tmp_path, "small", "test", test)
    cards = [_card("big", "held-in", image_source="coco"), _card("small", "held-out", image_source="coco")]
    result = audit_prepared([tmp_path], cards)
    (overlap,) = result.overlaps
    assert (overlap.images, overlap.by_bytes, overlap.by_id, overlap.questions) == (3, 2, 1, 1)
    assert overlap.examples == ("x1", "COCO_val2014_000000000007", "x4")
    assert result.leaks() == [overlap]
    assert "held-out small, test has 3 images in the training data of big, e.g. x1; leave" in result.summary()[-1]
    by_bytes = audit_prepared([tmp_path], [dataclasses.replace(card, image_source=None) for card in cards])
    assert [(item.images, item.by_id, item.questions) for item in by_bytes.overlaps] == [(2, 0, 1)]


def test_what_a_card_accounts_for_is_no_leak(tmp_path: Path) -> None:
    _write(tmp_path, "big", "train", TRAIN)
    _write(tmp_path, "small", "test", TRAIN[:1])
    big, small = _card("big", "held-in"), _card("small", "held-out", shared_images={"big": "drawn from it"})
    result = audit_prepared([tmp_path], [big, small])
    assert (len(result.overlaps), result.leaks()) == (1, [])
    assert result.summary()[-1] == "stated: small, test in big: drawn from it"
    held_in = dataclasses.replace(small, role="held-in", shared_images={})
    assert audit_prepared([tmp_path], [big, held_in]).leaks() == []  # not zero-shot, but shown
    assert [item.images for item in audit_prepared([tmp_path], [big, held_in]).overlaps] == [1]


def test_only_what_is_trained_and_evaluated_on_is_compared(tmp_path: Path) -> None:
    _write(tmp_path / "a", "big", "train", TRAIN)
    _write(tmp_path / "a", "big", "test", [("1", 40, "?")])
    _write(tmp_path / "b", "small", "test", [("2", 50, "?")])
    _write(tmp_path / "b", "small", "train", TRAIN)  # of a held-out dataset: nobody trains on it
    cards = [_card("big", "held-in"), _card("small", "held-out"), _card("gone", "held-out")]
    result = audit_prepared([tmp_path / "a", tmp_path / "b"], cards)
    assert [used.title for used in result.evaluated] == ["big, test", "small, test"]
    assert [used.title for used in result.trained] == ["big, train"]
    assert (result.overlaps, result.absent) == ([], ["gone test"])
    assert result.summary()[-1] == "2 of 2 pairs share no image"
    other = _card("big", "held-in", kinds=("caption",))  # trains on records that these images do not have
    assert [len(used.names) for used in audit_prepared([tmp_path / "a"], [other]).trained] == [0]


def test_nothing_to_compare_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest.json below"):
        audit_prepared([tmp_path], [])
    _write(tmp_path, "big", "train", TRAIN)
    with pytest.raises(UserError, match="no prepared split that a card evaluates on below"):
        audit_prepared([tmp_path], [_card("big", "held-in")])
    with pytest.raises(UserError, match="no prepared train split of a held-in dataset below"):
        audit_prepared([tmp_path], [_card("big", "held-out")])


def test_damaged_records_are_one_line(tmp_path: Path) -> None:
    _write(tmp_path, "big", "train", TRAIN)
    path = tmp_path / "big/train/shard-000000.tar"
    path.write_bytes(path.read_bytes().replace(b'"records"', b'"rekords"'))
    with pytest.raises(UserError, match=r"shard-000000.tar has damaged records at k0"):
        audit_prepared([tmp_path], [_card("big", "held-in")])


def test_the_command_ends_with_one_when_there_is_a_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "all_cards", lambda: [_card("big", "held-in"), _card("small", "held-out")])
    _write(tmp_path, "big", "train", TRAIN)
    _write(tmp_path, "small", "test", [("1", 77, "?")])
    console = Console(file=io.StringIO(), width=200)
    assert prepare(PrepareConfig(audit=[str(tmp_path)]), console) == 0
    assert "1 of 1 pairs share no image" in console.file.getvalue()
    _write(tmp_path, "small", "test", [("1", 30, "?")])
    assert prepare(PrepareConfig(audit=[str(tmp_path)]), console) == 1
    assert "LEAK" in console.file.getvalue()
    assert audit_table(audit_prepared([tmp_path])).row_count == 1


@pytest.mark.parametrize(
    ("collection", "image_id", "found"),
    [
        ("coco", "391895", "391895"),
        ("coco", "000000391895", "391895"),
        ("coco", "000000391895.jpg", "391895"),
        ("coco", "val2014/COCO_val2014_000000391895.jpg", "391895"),
        ("coco", "VisualDialog_val2018_000000000123.jpg", "123"),
        ("coco", "0", "0"),
        ("coco", "n161313", None),
        ("openimages", "0054C91397F2FE05", "0054c91397f2fe05"),
        ("openimages", "train/0054c91397f2fe05.jpg", "0054c91397f2fe05"),
        ("openimages", "0054c91397f2fe0", None),
        ("youtube", "-4wsuPCjDBc_5_15.avi", "-4wsuPCjDBc"),
        ("youtube", "_O9kWD8nuRU", "_O9kWD8nuRU"),
        ("youtube", "abcdefghijk_1.5_20", "abcdefghijk"),
        ("youtube", "video7010", None),
    ],
)
def test_ids_are_told_in_all_their_forms(collection: str, image_id: str, found: str | None) -> None:
    assert source_id(collection, image_id) == found


def test_questions_are_compared_by_their_words() -> None:
    assert normalize_question(" What's  in\tthe Box?! ") == normalize_question("what s in the box")
    assert normalize_question("où?") != normalize_question("ou?")
