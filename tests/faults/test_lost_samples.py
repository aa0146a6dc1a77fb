"""Damage on the way: counted losses within a tolerance, or one clear line; never a hang, never silence."""

import dataclasses
import io
import multiprocessing
import os
import signal
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from instructblip.data.batching import Batching, Item
from instructblip.data.feature_cache import FeatureCache
from instructblip.data.loader import LoadedStep, load_batches
from instructblip.data.lost import LostSample, LostSamples
from instructblip.data.mixture_dataset import MixtureDataset, TrainingSet, cached
from instructblip.data.records import Record
from instructblip.data.shards import ShardReader, index_path, safetensors_bytes
from instructblip.errors import UserError
from tests.kit.mixtures import jpeg, mixture_of, write_split

IMAGES = [jpeg(seed) for seed in range(8)]
STEPS = [(step, list(range(4 * step, 4 * step + 4))) for step in range(8)]


def _dataset(tmp_path: Path, damaged: dict[int, bytes] | None = None) -> MixtureDataset:
    return mixture_of({"set": write_split(tmp_path / "set", "set", IMAGES, damaged=damaged or {})})


def _batching(step: int) -> Batching:
    return Batching()


def _load(dataset: MixtureDataset, workers: int = 0) -> Iterator[LoadedStep]:
    return load_batches(dataset, iter(STEPS), batching=_batching, workers=workers)


def _ids(steps: Iterator[LoadedStep]) -> list[str]:
    return [sample_id for step in steps for batch in step.batches for sample_id in batch.ids]


# --- lost samples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", IMAGES[1][:200], b"<html>not found</html>"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_gives_way_to_the_next_draw(tmp_path: Path, content: bytes, workers: int) -> None:
    dataset = _dataset(tmp_path, {1: content, 2: content})
    steps = list(_load(dataset, workers))
    expected, lost = [], []
    for _, positions in STEPS:
        for position in positions:
            draws = (dataset.mixture.replacement(position, tries) for tries in range(9))
            records = [dataset.sets[0].locate(draw.record) for draw in draws]
            keys = [(4 * shard + row, place) for shard, row, place in records]
            skipped = next(number for number, (image, _) in enumerate(keys) if image not in (1, 2))
            expected.append("set/{}-{}".format(*keys[skipped]))
            lost += [(position, f"image_{image}") for image, _ in keys[:skipped]]
    assert _ids(iter(steps)) == expected
    assert [(sample.position, sample.key) for step in steps for sample in step.lost] == lost
    assert len(lost) > 5
    first = steps[0].lost[0] if steps[0].lost else next(step.lost[0] for step in steps if step.lost)
    assert first.reason.startswith(f"image {first.key} of {first.shard} cannot be decoded (")


def test_records_that_cannot_be_used_are_lost_too(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path)
    path = tmp_path / "set" / "shard-000000.tar"
    shard, content = ShardReader(path), bytearray(path.read_bytes())
    content[int(shard.arrays["json_offset"][1])] = ord("[")
    text = content.index(b'"answers"', int(shard.arrays["json_offset"][2]))
    content[text : text + 9] = b'"choices"'
    path.write_bytes(content)
    lost = [sample for step in _load(dataset) for sample in step.lost]
    reasons = {sample.key: sample.reason for sample in lost}
    assert set(reasons) == {"image_1", "image_2"}
    assert "image image_1 has damaged records" in reasons["image_1"]
    assert f"has no answer and cannot be trained on (image image_2 of {path})" in reasons["image_2"]


def test_a_dataset_with_nothing_left_ends_at_once(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, dict.fromkeys(range(8), b""))
    with pytest.raises(UserError, match=r"50 records of set in a row cannot be used, the last: image image_\d of .*"):
        next(_load(dataset))


# --- counting -----------------------------------------------------------------------------------------------------------


def _lost(number: int, dataset: str = "set", key: str | None = None) -> LostSample:
    return LostSample(number, dataset, "a.tar", key or f"image_{number}", f"image_{number} of a.tar is broken")


def test_each_image_is_said_once_and_counted_each_time() -> None:
    lines: list[str] = []
    lost = LostSamples(fraction=0.0, samples=10, say=lines.append)
    lost.add([_lost(1), _lost(1), _lost(2)], {"set": 50})
    lost.add([_lost(1), _lost(1, "other")], {"set": 60, "other": 3})
    assert lost.counts == {"set": 4, "other": 1}
    assert lines == [
        "lost a sample of set: image_1 of a.tar is broken; another takes its place",
        "lost a sample of set: image_2 of a.tar is broken; another takes its place",
        "lost a sample of other: image_1 of a.tar is broken; another takes its place",
    ]


def test_past_both_tolerances_the_run_ends_with_the_list() -> None:
    lost = LostSamples(fraction=0.001, samples=10, say=lambda line: None)
    lost.add([_lost(number) for number in range(10)], {"set": 10})  # ten are always tolerated
    lost.add([_lost(number) for number in range(10, 15)], {"set": 15_000})  # and one in a thousand
    with pytest.raises(UserError) as error:
        lost.add([_lost(15)], {"set": 15_999})
    line = "set has lost 16 of 15,999 drawn samples, more than 10 and 0.1%: image_0 of a.tar, image_1 of a.tar, "
    assert str(error.value).startswith(line)
    assert str(error.value).endswith("image_15 of a.tar; prepare it again, or raise data.tolerance.fraction or "
                                     "data.tolerance.samples")  # fmt: skip
    assert "\n" not in str(error.value)


def test_counting_goes_on_after_a_restart() -> None:
    lines: list[str] = []
    before = LostSamples(fraction=0.0, samples=3, say=lines.append)
    before.add([_lost(1), _lost(2)], {"set": 9})
    after = LostSamples(fraction=0.0, samples=3, say=lines.append)
    after.restore(before.state())
    assert before.state() == {"set": {"lost": 2, "first": ["image_1 of a.tar", "image_2 of a.tar"]}}
    after.add([_lost(1)], {"set": 12})
    assert (after.counts, len(lines)) == ({"set": 3}, 2)
    with pytest.raises(UserError, match=r"set has lost 4 of 13 .* image_1 of a.tar, image_2 of a.tar; prepare"):
        after.add([_lost(2)], {"set": 13})


# --- what no other sample may take the place of -------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "gone", "another tar"])
def test_a_shard_that_is_damaged_on_the_way_ends_the_run_in_one_line(tmp_path: Path, damage: str, workers: int) -> None:
    dataset = _dataset(tmp_path)
    steps = load_batches(dataset, iter(STEPS * 50), batching=_batching, workers=workers)
    next(steps)
    paths = sorted((tmp_path / "set").glob("*.tar"))
    for path in paths:
        if damage == "truncated":
            os.truncate(path, path.stat().st_size - 512)
        elif damage == "gone":
            path.unlink()
        else:
            _swap_first_members(path)
    line = {
        "truncated": r"shard .*\.tar has [\d,]+ bytes where its index says [\d,]+; run prepare.py again",
        "gone": r"shard .*\.tar cannot be read \(No such file or directory\); run prepare.py again",
        "another tar": r"shard .*\.tar does not match its index: image_\d\.(jpg|json) is not where that says; run prepare",
    }[damage]
    with pytest.raises(UserError, match=line) as error:
        list(steps)
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)


def _swap_first_members(path: Path) -> None:
    """A tar of the same size whose images have changed places."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, content in reversed(members):
            tar.addfile(member, io.BytesIO(content))
    assert buffer.tell() == path.stat().st_size
    changed = path.with_suffix(".changed")
    changed.write_bytes(buffer.getvalue())
    changed.replace(path)  # a worker reads the one or the other


def test_an_index_that_does_not_match_is_not_a_lost_sample(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path)
    for path in sorted((tmp_path / "set").glob("*.tar")):
        shard = ShardReader(path)
        arrays = {name: array + 512 * name.endswith("offset") for name, array in shard.arrays.items()}
        index_path(path).write_bytes(safetensors_bytes(arrays, shard.metadata))
    with pytest.raises(UserError, match="does not match its index"):
        list(_load(dataset))


# --- workers --------------------------------------------------------------------------------------------------------------


def test_a_killed_worker_ends_the_run_in_one_line(tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())
    steps = load_batches(_dataset(tmp_path), iter(STEPS * 50), batching=_batching, workers=2)
    next(steps)
    for worker in set(multiprocessing.active_children()) - before:
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"a data worker process was killed \(exit code -9\); .* lower data.workers"):
        list(steps)
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.slow
def test_a_stopped_worker_ends_the_run_in_one_line_within_the_bound(tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())
    steps = load_batches(_dataset(tmp_path), iter(STEPS * 50), batching=_batching, workers=2, timeout=1.0)
    next(steps)
    for worker in set(multiprocessing.active_children()) - before:
        os.kill(worker.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"^the data workers gave nothing for 1 s: .* raise parallel.timeout, and go on"
    ):
        list(steps)
    assert time.monotonic() - began < 5
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.slow
def test_a_slow_worker_is_waited_for(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path)
    slow = _Slow(dataset.mixture, dataset.sets, dataset.make_image)
    steps = load_batches(slow, iter(STEPS), batching=_batching, workers=1, timeout=1.5)
    assert _ids(steps) == _ids(_load(dataset))
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


class _Slow(MixtureDataset):
    """Takes 0.2 s a step, 1.6 s for all of them."""

    def read(self, position: int) -> tuple[Item, list[LostSample]]:
        time.sleep(0.05)
        return super().read(position)


@pytest.fixture
def forkserver() -> Iterator[None]:
    """Workers that share nothing with this process but what they are sent, as spawned ones do."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_cached_features_reach_workers_that_are_not_forked(tmp_path: Path, forkserver: None) -> None:
    dataset = _dataset(tmp_path)
    cache = FeatureCache(tmp_path / "features", encoder_fingerprint="mean", image_size=4)
    cache.fill(list(dataset.sets[0].split.shards), _mean_colour, "encoding")
    kept = MixtureDataset(dataset.mixture, dataset.sets, cached(cache.tokens))
    expected = list(_load(kept))  # which opens the files of the cache
    found = list(_load(kept, workers=1))
    assert _ids(iter(found)) == _ids(iter(expected))
    for one, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, (b.images for b in one.batches), (b.images for b in other.batches)))


def _mean_colour(images_B3HW: torch.Tensor) -> torch.Tensor:
    return images_B3HW.float().mean((2, 3))[:, None]


class _Defect(dict):
    """Templates that fail in a way that no user can mend."""

    @property
    def templates(self) -> tuple[str, ...]:
        raise KeyError("a defect of the code")


def test_a_defect_in_a_worker_keeps_its_traceback(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path)
    dataset.sets[0] = dataclasses.replace(dataset.sets[0], templates=_Defect())
    with pytest.raises(KeyError, match="a defect of the code"):
        next(_load(dataset, workers=1))


@pytest.mark.parametrize("how", ["close", "drop", "end"])
def test_an_early_stop_leaves_no_process(tmp_path: Path, how: str) -> None:
    before = set(multiprocessing.active_children())
    steps = load_batches(_dataset(tmp_path), iter(STEPS * (1 if how == "end" else 50)), batching=_batching, workers=2)
    next(steps)
    assert len(set(multiprocessing.active_children()) - before) == 2
    if how == "close":
        steps.close()
    elif how == "drop":
        del steps
    else:
        list(steps)
    assert set(multiprocessing.active_children()) <= before


def test_workers_outlive_a_signal_to_all_processes(tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())
    dataset = _dataset(tmp_path)
    expected = _ids(_load(dataset))
    steps = _load(dataset, workers=1)
    first = next(steps)
    (worker,) = set(multiprocessing.active_children()) - before
    for received in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(worker.pid, received)
    assert _ids(iter([first])) + _ids(steps) == expected


def test_sets_find_their_records_without_a_table(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path)
    for kinds in ((), ("a",), ("b",)):
        found = TrainingSet("set", dataset.sets[0].split, kinds, dataset.sets[0].templates)
        assert [found.locate(record) for record in range(len(found))] == [
            tuple(row) for row in found.split.records(kinds).tolist()
        ]
        shard, row, place = found.locate(len(found) - 1)
        record = found.split.read(shard, row)[1][place]
        assert isinstance(record, Record)
        assert not kinds or record.kind in kinds
