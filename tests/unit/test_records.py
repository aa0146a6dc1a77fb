"""The boundary of prepared files: records, indexes and manifests that others wrote become typed values, or are named."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instructblip.data.cards import load_card
from instructblip.data.prepare.convert import check_prepared, prepare_dataset
from instructblip.data.records import MAX_ITEMS, Record, parse_records
from instructblip.data.shards import ShardReader, index_path, open_split, read_manifest, safetensors_bytes
from instructblip.data.typed import WrongValueError
from instructblip.errors import DamagedSample, UserError
from tests.kit.raw_files import write_raw

WHOLE: dict[str, Any] = {
    "id": "1",
    "kind": "dialog",
    "question": "größer?",
    "answers": ["ja", "nein"],
    "answer_weights": [3, 0.5],
    "annotators": 4,
    "choices": ["a", "b"],
    "label": 1,
    "context": "",
    "history": [["q", "a"]],
    "relevance": [0, 1.0],
    "tags": {"k": "v"},
}


def test_a_record_survives_a_trip_through_json() -> None:
    record = Record.from_dict(WHOLE)
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert record.answer_weights == (3.0, 0.5) and record.history == (("q", "a"),)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": [1, [2]]}, "question is a list where text is due"),
        ({"question": "\ud800"}, "half a Unicode pair"),
        ({"question": "x" * 1_000_001}, "too long"),
        ({"id": 7}, "id is a number"),
        ({"answers": "ja"}, "answers is a text where a list"),
        ({"answers": ["ja", None]}, "answers is null"),
        ({"choices": ["a"] * (MAX_ITEMS + 1)}, "100,000 at most"),
        ({"answer_weights": [1.0]}, "answer_weights is not as long"),
        ({"answer_weights": [1.0, float("nan")]}, "something else than numbers"),
        ({"answer_weights": [1.0, float("inf")]}, "something else than numbers"),
        ({"answer_weights": [1.0, True]}, "something else than numbers"),
        ({"label": 2}, "label is not the index of a choice"),
        ({"label": True}, "no whole number"),
        ({"label": 2**70}, "no whole number"),
        ({"relevance": [1]}, "relevance is not as long"),
        ({"history": [["q"]]}, "pairs of question and answer"),
        ({"history": {"q": "a"}}, "an object where a list"),
        ({"tags": {"k": 1}}, "k is a number|tags is a number"),
        ({"tags": []}, "tags is a list"),
        ({"colour": "red"}, "knows only"),
    ],
)
def test_a_wrong_value_of_a_record_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(WrongValueError, match=words):
        Record.from_dict(WHOLE | change)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"image_id": "1", "records": ' + b"9" * 5000 + b"}",
        b'{"image_id": "1", "records": [NaN]}',
        b'{"image_id": 1, "records": []}',
        b'{"image_id": "1", "records": {}}',
        b"[]",
        b"\xff",
        b"",
    ],
)
def test_text_beside_an_image_that_is_none_is_refused(content: bytes) -> None:
    with pytest.raises(WrongValueError):
        parse_records(content)


# --- a consistent shard that lies -------------------------------------------------------------------------------------


@pytest.fixture
def split(tmp_path: Path) -> Path:
    write_raw("okvqa", tmp_path / "raw")
    prepare_dataset(load_card("okvqa"), tmp_path / "raw", tmp_path / "out", progress=False)
    return tmp_path / "out/okvqa/train"


def _restate(split: Path, before: dict[str, str]) -> None:
    """Put the new hashes of changed files where the old ones stood."""
    for name in ("shard-000000.index.safetensors", "manifest.json"):
        content = (split / name).read_bytes()
        for path, old in before.items():
            content = content.replace(old.encode(), hashlib.sha256((split / path).read_bytes()).hexdigest().encode())
        (split / name).write_bytes(content)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'"What sport is this?"', b'[1, [2], "         "]', "question is a list"),
        (b'"What sport is this?"', b"[" * 10 + b"1" + b"]" * 10, "question is a list"),
        (b"What sport", b"\\ud800 ort", "half a Unicode pair"),
        (b'"kind":"question"', b'"kind":"answered"', "the kinds of records of .* are not those of its index"),
        (b"\xff\xda\x00", b"\xff\x00\x00", "cannot be decoded"),
    ],
)
def test_check_finds_what_reading_would(split: Path, old: bytes, new: bytes, words: str) -> None:
    names = ("shard-000000.tar", "shard-000000.index.safetensors")
    before = {name: hashlib.sha256((split / name).read_bytes()).hexdigest() for name in names}
    tar = split / names[0]
    content = tar.read_bytes()
    assert len(old) == len(new) and old in content
    tar.write_bytes(content.replace(old, new, 1))
    _restate(split, {names[0]: before[names[0]]})
    _restate(split, {names[1]: before[names[1]]})
    (problem,) = check_prepared(split)
    assert re.search(words, problem), problem
    if "kinds" not in words and "decoded" not in words:
        with pytest.raises(DamagedSample, match=words):
            open_split(split).read(0, 0)


def _wrong_arrays(shard: ShardReader) -> list[tuple[dict[str, Any], dict[str, str]]]:
    arrays, metadata = shard.arrays, shard.metadata
    changes: list[tuple[str, Callable[[Any], Any]]] = [
        ("frame_offset", lambda a: a * 0),
        ("frame_size", lambda a: a - 10**9),
        ("json_offset", lambda a: a + 2**62),
        ("json_size", lambda a: a + 2**62),
        ("frame_image", lambda a: a + 1),
        ("record_image", lambda a: a - 1),
        ("record_kind", lambda a: a + 7),
        ("record_number", lambda a: a - 5),
    ]
    wrong = [({**arrays, name: change(arrays[name])}, metadata) for name, change in changes]
    texts = {
        "keys": '["../x"]',
        "kinds": "{}",
        "extensions": '["/jpg"]',
        "tar_sha256": "../" * 21 + "x",
        "tar_bytes": "-1",
    }
    return wrong + [(dict(arrays), metadata | {name: text}) for name, text in texts.items()]


def test_an_index_that_lies_is_one_line(split: Path) -> None:
    path = split / "shard-000000.tar"
    index, shard = index_path(path), ShardReader(path)
    for arrays, metadata in _wrong_arrays(shard):
        index.write_bytes(safetensors_bytes({name: np.asarray(array) for name, array in arrays.items()}, metadata))
        with pytest.raises(UserError, match="shard-000000"):
            ShardReader(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shards": [{"name": "../../x.tar", "sha256": "0" * 64}]}, "name is not the name of a file in its folder"),
        ({"shards": [{"name": "x.tar", "sha256": "0" * 64}]}, "another name or hash"),
        ({"shards": [{"name": "shard-000000.tar", "sha256": "../" * 21 + "x"}]}, "another name or hash"),
        ({"shards": {}}, "shards is an object where a list is due"),
        ({"images": -1}, "images is not 0 or more"),
        ({"records_by_kind": {"question": 5}}, "records_by_kind is not what records says"),
        ({"records_by_kind": {"question": "many"}}, "a whole number is due"),
        ({"dataset": ["okvqa"]}, "dataset is a list"),
        ({"lost": [{"reason": "x"}]}, "records is missing"),
    ],
)
def test_a_manifest_that_lies_is_one_line(split: Path, change: dict[str, Any], words: str) -> None:
    path = split / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=f"manifest.json is no sound manifest .*{words}"):
        read_manifest(split)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_manifest(split)
