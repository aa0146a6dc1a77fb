"""Shards are read back by us and by stock webdataset; equal content gives equal bytes; damage is named."""

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from safetensors import safe_open

from instructblip.data import shards
from instructblip.data.records import Record
from instructblip.data.shards import INDEX_ARRAYS, ShardReader, ShardWriter, index_path, open_split, safetensors_bytes
from instructblip.errors import DamagedSample, UserError


def _png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4 + number, 5), (number * 20, 7, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def _records(number: int) -> list[Record]:
    """As many records as the number says, of two kinds in turn."""
    kinds = ("shape", "color")
    return [Record(f"{number}-{k}", kinds[k % 2], f"Frage {k}: größer?", answers=("ja",)) for k in range(number)]


def _write(folder: Path, numbers: Iterable[int] = range(4), shard: int = 0) -> Path:
    path = folder / f"shard-{shard:06d}.tar"
    with ShardWriter.open(path) as writer:
        for number in numbers:
            writer.add(f"image_{number}", {"png": _png(number)}, str(number), _records(number))
    return path


def _write_split(folder: Path) -> Path:
    entries = []
    for shard, numbers in enumerate((range(3), range(3, 6))):
        path = _write(folder, numbers, shard)
        content = path.read_bytes()
        entry = {"name": path.name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        entries.append(entry | {"records_by_kind": ShardReader(path).records_by_kind()})
    manifest = {"format": 1, "dataset": "tiny", "split": "test", "shards": entries}
    manifest["records_by_kind"] = {"color": 6, "shape": 9}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    shard = ShardReader(_write(tmp_path))
    assert len(shard) == 4
    for row in (3, 0, 2, 1):
        assert shard.read(row) == ((_png(row),), _records(row))
        assert shard.read_records(row) == _records(row)
    assert shard.records_by_kind() == {"color": 1 + 1, "shape": 1 + 1 + 2}
    assert shard.arrays["record_image"].tolist() == [1, 2, 2, 3, 3, 3]
    assert shard.arrays["record_number"].tolist() == [0, 0, 1, 0, 1, 2]
    assert [shard.kinds[kind] for kind in shard.arrays["record_kind"]] == [
        r.kind for n in range(4) for r in _records(n)
    ]


def _write_videos(folder: Path) -> Path:
    """A video of three frames, a picture, a video of two frames."""
    path = folder / "shard-000000.tar"
    with ShardWriter.open(path) as writer:
        writer.add("a", {f"{number}.png": _png(number) for number in range(3)}, "A", _records(2))
        writer.add("b", {"png": _png(3)}, "B", _records(1))
        writer.add("c", {f"{number}.png": _png(4 + number) for number in range(2)}, "C", _records(3))
    return path


def test_frames_are_read_back_in_order(tmp_path: Path) -> None:
    path = _write_videos(tmp_path)
    shard = ShardReader(path)
    assert (len(shard), len(shard.extensions)) == (3, 6)
    assert [shard.frames_of(row) for row in range(3)] == [slice(0, 3), slice(3, 4), slice(4, 6)]
    for row, numbers, records in ((2, (4, 5), 3), (0, (0, 1, 2), 2), (1, (3,), 1)):
        assert shard.read(row) == (tuple(map(_png, numbers)), _records(records))
        assert json.loads(shard.read_encoded(row)[1])["image_id"] == "ABC"[row]
    with tarfile.open(path) as tar:
        assert [member.name for member in tar.getmembers()[:5]] == ["a.0.png", "a.1.png", "a.2.png", "a.json", "b.png"]
    video, _, _ = webdataset.WebDataset(str(path), shardshuffle=False).decode("pil")
    assert [video[f"{number}.png"].size for number in range(3)] == [(4, 5), (5, 5), (6, 5)]
    assert video["__key__"] == "a"


def test_offsets_are_those_tarfile_finds(tmp_path: Path) -> None:
    path = _write(tmp_path)
    shard = ShardReader(path)
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:2]] == ["image_0.png", "image_0.json"]
    assert [m.offset_data for m in members[::2]] == shard.arrays["frame_offset"].tolist()
    assert [m.offset_data for m in members[1::2]] == shard.arrays["json_offset"].tolist()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_stock_webdataset_iterates_the_shards(tmp_path: Path) -> None:
    path = _write(tmp_path)
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [f"image_{number}" for number in range(4)]
    assert [sample["png"].size for sample in samples] == [(4 + number, 5) for number in range(4)]
    read = [[Record.from_dict(record) for record in sample["json"]["records"]] for sample in samples]
    assert read == [_records(number) for number in range(4)]
    assert [sample["json"]["image_id"] for sample in samples] == ["0", "1", "2", "3"]


@pytest.mark.slow
def test_equal_content_gives_equal_bytes_in_another_process(tmp_path: Path) -> None:
    path = _write(tmp_path / "a")
    code = (
        "import sys, pathlib; sys.path[:0] = sys.argv[2:]; import test_shards as t; t._write(pathlib.Path(sys.argv[1]))"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", code, str(tmp_path / "b"), str(here), str(here.parents[1])]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    for written in (path, index_path(path)):
        assert written.read_bytes() == (tmp_path / "b" / written.name).read_bytes()


def test_index_is_plain_safetensors(tmp_path: Path) -> None:
    with safe_open(index_path(_write(tmp_path)), framework="np") as file:
        assert sorted(file.keys()) == sorted(INDEX_ARRAYS)
        assert file.metadata()["version"] == "2"
        assert json.loads(file.metadata()["extensions"]) == ["png"] * 4
        assert {file.get_tensor(name).dtype for name in INDEX_ARRAYS} == {np.dtype(np.int64)}


def test_safetensors_bytes_hold_arrays_of_length_zero(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(safetensors_bytes({"a": np.zeros(0, np.int64), "b": np.arange(3)}, {"ö": "ü"}))
    with safe_open(tmp_path / "x", framework="np") as file:
        assert (file.get_tensor("a").shape, file.get_tensor("b").tolist()) == ((0,), [0, 1, 2])
        assert file.metadata() == {"ö": "ü"}


def test_a_shard_without_images_can_be_read(tmp_path: Path) -> None:
    shard = ShardReader(_write(tmp_path, range(0)))
    assert (len(shard), shard.records_by_kind()) == (0, {})


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    def numbers() -> Iterator[int]:
        yield 0
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        _write(tmp_path, numbers())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "ok"])
def test_keys_that_webdataset_would_misread_are_refused(tmp_path: Path, key: str) -> None:
    with ShardWriter.open(tmp_path / "shard-000000.tar") as writer:
        writer.add("ok", {"png": _png(1)}, "1", [])
        with pytest.raises(ValueError, match="image key"):
            writer.add(key, {"png": _png(1)}, "1", [])


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk full"):
        _write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_readers_may_be_pickled_forked_and_shared_among_threads(tmp_path: Path) -> None:
    shard = pickle.loads(pickle.dumps(ShardReader(_write(tmp_path))))
    rows = [row % 4 for row in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shard.read, rows)) == [((_png(row),), _records(row)) for row in rows]


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path)
    shard = ShardReader(path)
    os.truncate(path, 3000)
    with pytest.raises(UserError, match=r"shard-000000.tar has 3,000 bytes where its index says 10,240; run prepare"):
        ShardReader(path)
    with pytest.raises(UserError, match="has 3,000 bytes"):
        shard.read(0)


def test_missing_shard_or_index_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path)
    index = index_path(path).read_bytes()
    path.rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"shard-000000.tar cannot be read \(No such file"):
        ShardReader(path)
    (tmp_path / "away").rename(path)
    for content in (b"", index[:40], index[:-8]):
        index_path(path).write_bytes(content)
        with pytest.raises(UserError, match=r"shard-000000.tar has no usable index: .* is damaged"):
            ShardReader(path)
    index_path(path).unlink()
    with pytest.raises(UserError, match="is missing"):
        ShardReader(path)


def test_index_that_is_incomplete_or_of_another_version_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path)
    shard = ShardReader(path)
    for metadata, arrays, words in (
        ({**shard.metadata, "version": "1"}, shard.arrays, "another version"),
        ({}, shard.arrays, "another version"),
        ({**shard.metadata, "keys": '["a"]'}, shard.arrays, "damaged index"),
        (shard.metadata, {**shard.arrays, "record_kind": np.arange(2)}, "damaged index"),
    ):
        index_path(path).write_bytes(safetensors_bytes(arrays, metadata))
        with pytest.raises(UserError, match=words):
            ShardReader(path)


def test_damaged_records_are_named(tmp_path: Path) -> None:
    path = _write(tmp_path)
    shard = ShardReader(path)
    content = bytearray(path.read_bytes())
    content[int(shard.arrays["json_offset"][2])] = ord("[")
    path.write_bytes(content)
    with pytest.raises(UserError, match="image image_2 has damaged records"):
        shard.read(2)
    with pytest.raises(UserError, match="image image_2 has damaged records"):
        shard.read_records(2)
    assert shard.read(1) == ((_png(1),), _records(1))


def _shifted(index: Path, shard: ShardReader) -> None:
    """An index whose first two images changed places: the tar has as many bytes as before."""
    arrays = {name: array.copy() for name, array in shard.arrays.items()}
    for name in ("frame_offset", "frame_size", "json_offset", "json_size"):
        arrays[name][:2] = arrays[name][1::-1]
    index.write_bytes(safetensors_bytes(arrays, shard.metadata))


def test_an_index_that_does_not_match_its_tar_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path)
    _shifted(index_path(path), ShardReader(path))
    shard = ShardReader(path)
    line = r"shard-000000.tar does not match its index: image_0.(png|json) is not where that says; run prepare"
    for read in (shard.read, shard.read_encoded, shard.read_records):
        with pytest.raises(UserError, match=line) as error:
            read(0)
        assert not isinstance(error.value, DamagedSample)
    assert shard.read(3) == ((_png(3),), _records(3))


def test_damage_of_one_record_is_a_damaged_sample(tmp_path: Path) -> None:
    path = _write(tmp_path)
    shard = ShardReader(path)
    content = bytearray(path.read_bytes())
    content[int(shard.arrays["json_offset"][1])] = ord("[")
    path.write_bytes(content)
    with pytest.raises(DamagedSample, match="image image_1 has damaged records"):
        shard.read(1)


def test_shards_are_opened_when_needed_and_the_last_ones_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_READERS_KEPT", 1)
    split = open_split(_write_split(tmp_path))
    first = split.shards[0]
    assert split.shards[0] is first
    assert split.shards[1].path.name == "shard-000001.tar"
    assert split.shards[0] is not first
    assert [shard.path.name for shard in split.shards] == ["shard-000000.tar", "shard-000001.tar"]
    assert [shard.path.name for shard in split.shards[1:]] == ["shard-000001.tar"]
    with pytest.raises(IndexError):
        split.shards[2]


def test_opening_a_split_reads_no_index_and_misses_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    read_index = shards._read_index
    monkeypatch.setattr(shards, "_read_index", lambda path: read.append(path) or read_index(path))
    open_split(_write_split(tmp_path)).record_counts()
    read.clear()
    open_split(tmp_path).record_counts()
    assert read == []
    tar = tmp_path / "shard-000001.tar"
    os.truncate(tar, tar.stat().st_size - 512)
    with pytest.raises(UserError, match=r"shard-000001.tar has [\d,]+ bytes where its index says"):
        open_split(tmp_path)
    tar.unlink()
    tar.symlink_to(tmp_path / "gone.tar")
    with pytest.raises(UserError, match=r"shard-000001.tar cannot be read"):
        open_split(tmp_path)
    index_path(tar).unlink()
    with pytest.raises(UserError, match=r"shard-000001.index.safetensors is missing"):
        open_split(tmp_path)


def test_records_are_counted_by_shard_without_opening_one(tmp_path: Path) -> None:
    split = open_split(_write_split(tmp_path))
    for kinds in ((), ("color",), ("shape", "color")):
        numbers = split.records(kinds)[:, 0]
        assert split.record_counts(kinds) == tuple(np.bincount(numbers, minlength=2).tolist())
    with pytest.raises(UserError, match="no records of kind colour"):
        split.record_counts(["colour"])


def test_open_split_locates_records_by_kind_in_stored_order(tmp_path: Path) -> None:
    split = open_split(_write_split(tmp_path))
    everything = split.records()
    assert everything.dtype == np.int64
    assert everything[:4].tolist() == [[0, 1, 0], [0, 2, 0], [0, 2, 1], [1, 0, 0]]
    assert len(everything) == 15
    colors = split.records(["color"])
    assert colors.tolist() == [[0, 2, 1], [1, 0, 1], [1, 1, 1], [1, 1, 3], [1, 2, 1], [1, 2, 3]]
    for shard, row, number in colors.tolist():
        assert split.read(shard, row)[1][number].kind == "color"
    assert split.records(["color", "shape"]).tolist() == everything.tolist()
    assert (split.dataset, split.split, len(split.sha256)) == ("tiny", "test", 64)
    with pytest.raises(UserError, match="no records of kind colour; it has color, shape"):
        split.records(["colour"])


def test_open_split_refuses_what_its_manifest_does_not_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a prepared split"):
        open_split(tmp_path)
    _write_split(tmp_path)
    _write(tmp_path, range(2, 5), 1)
    with pytest.raises(UserError, match=r"shard-000001.tar is not the one its manifest lists"):
        open_split(tmp_path).shards[1]  # as many bytes as the one that is listed
    (tmp_path / "manifest.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match="not a manifest of format 1"):
        open_split(tmp_path)
