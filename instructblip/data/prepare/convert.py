"""From raw files to checked shards: parallel by shard, resumable after a kill, the same bytes from the same input."""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from instructblip.data.cards import (
    Card,
    OwnCard,
    SplitCounts,
    changed_source,
    check_prepared_from,
    source_facts,
    source_sha256,
)
from instructblip.data.prepare.media import JPEG_QUALITY, MediaError, MediaOptions, read_media, stored_frames
from instructblip.data.prepare.ocr import OcrOptions, ocr_options, ocr_tokens
from instructblip.data.readers import (
    MEDIA_ROLES,
    OCR_ROLE,
    READERS,
    FileSlice,
    Losses,
    MediaRecords,
    RawSplit,
    is_there,
    unpack_hint,
)
from instructblip.data.records import Record
from instructblip.data.shards import (
    KEY,
    MANIFEST_FORMAT,
    MANIFEST_NAME,
    ShardReader,
    ShardWriter,
    index_path,
    read_manifest,
    shard_path,
)
from instructblip.errors import UserError
from instructblip.files import errors_for_users, exclusive, sha256_file, write_json
from instructblip.images import decode_image
from instructblip.progress import progress_bar

logger = logging.getLogger(__name__)

_OWN_FILE = re.compile(r"(shard-\d{6}\.(tar|index\.safetensors)|manifest\.json)(\.\d+\.partial)?")


@dataclass(frozen=True)
class ShardPlan:
    """What one shard is to hold; sent to a worker process as it is."""

    path: Path
    raw: Path
    images: tuple[MediaRecords, ...]
    options: MediaOptions


def prepare_dataset(
    card: Card,
    raw: Path,
    out: Path,
    *,
    splits: Sequence[str] | None = None,
    workers: int = 1,
    images_per_shard: int = 1000,
    image_size: int | None = None,
    frames: int = 4,
    ocr: str | None = None,
    progress: bool = True,
) -> list[Path]:
    """Convert a dataset to `<out>/<dataset>/<split>/` and return the paths of the manifests.

    A view is converted as its parent, which it shares the shards with. Run again after a kill, it keeps the shards that
    are whole and hold what they should. Bytes depend on the raw files and the options, not on `workers`.

    Args:
        splits: which to convert; None: all of the card, but those of an official one that the raw folder has no files of (a
            line names them).
        workers: number of processes.
        images_per_shard: images or videos.
        image_size: pictures and frames whose shorter side is longer are reduced to it, pixels; None: never.
        frames: how many frames of a video are stored.
        ocr: library that makes the OCR tokens of all records (`prepare/ocr.py`); None: the dataset's own, if any.

    Raises:
        UserError: unknown split, raw files missing or unreadable, nothing found, no such OCR library, disk full.
    """
    numbers = {"workers": workers, "images_per_shard": images_per_shard, "image_size": image_size, "frames": frames}
    if wrong := [name for name, number in numbers.items() if number is not None and number < 1]:
        raise UserError(f"{wrong[0]}={numbers[wrong[0]]} must be 1 or more")
    if not raw.is_dir():
        raise UserError(f"raw={raw} is not a folder; {card.how_to_get}")
    chosen = _present_splits(card, raw) if splits is None else list(splits)
    if unknown := [split for split in chosen if split not in card.splits]:
        raise UserError(f"{card.source} has no split {unknown[0]!r}; choose among {', '.join(card.splits)}")
    if (look := READERS[card.reader].look) is not None:
        for split in chosen:
            look(RawSplit(raw, split, card.splits[split].files, card.told))
    options = MediaOptions(image_size, frames, None if ocr is None else ocr_options(ocr))
    with exclusive(out / f".{card.source}.lock", f"preparing {card.source}", show=progress):
        job = _Job(card, raw, out, images_per_shard, options)
        with _workers(workers) as pool:
            return [_prepare_split(job, split, pool, progress) for split in chosen]


def _present_splits(card: Card, raw: Path) -> list[str]:
    """The splits that the raw folder has any annotation file of; all of them where it has none at all.

    All of a card of one's own too: what that names is meant to be there.

    Files that several splits share say nothing about a split, unless it has no others. Images do not either: a split
    whose annotations are there without its images is an error, and said before an hour is spent on the others.

    Raises:
        UserError: a split's annotations are there, and no folder of its images or videos.
    """
    shared = Counter((role, places) for counts in card.splits.values() for role, places in counts.files.items())
    absent = {}
    for split, counts in card.splits.items():
        files = {role: places for role, places in counts.files.items() if role not in MEDIA_ROLES}
        own = {role: places for role, places in files.items() if shared[role, places] == 1} or files
        if own and not any(is_there(raw, place) for places in own.values() for place in places):
            absent[split] = next(iter(own.values()))[0]
    if isinstance(card, OwnCard):
        absent = {}
    elif len(absent) == len(card.splits):
        return list(card.splits)
    for split, place in absent.items():
        logger.warning("%s/%s: skipped, %s has no file of it, such as %s", card.source, split, raw, place)
    present = [split for split in card.splits if split not in absent]
    for split in present:
        files = card.splits[split].files
        for role in MEDIA_ROLES:
            if role in files:
                RawSplit(raw, split, files).path(role)
    return present


@dataclass(frozen=True)
class _Job:
    """What `prepare_dataset` was asked for, apart from how."""

    card: Card
    raw: Path
    out: Path
    images_per_shard: int
    options: MediaOptions


@dataclass(frozen=True)
class _Pool:
    executor: ProcessPoolExecutor
    workers: int


def _prepare_split(job: _Job, split: str, pool: _Pool | None, progress: bool) -> Path:
    name = f"{job.card.source}/{split}"
    losses = Losses()
    _note_other_card(job, split)
    with _scratch(job) as scratch, progress_bar("images", show=progress) as bar:
        bar_task = bar.add_task(name, total=job.card.splits[split].images)
        shards = []
        for shard in _convert(_plans(job, split, scratch, losses), pool):
            shards.append(shard)
            bar.advance(bar_task, len(shard) + _lost_images(shard))
    return _finish(job, split, shards, losses)


def _note_other_card(job: _Job, split: str) -> None:
    """Say so where the shards of another card of the same name, or of this one as it was, are replaced."""
    folder = job.out / job.card.source / split
    if (folder / MANIFEST_NAME).is_file() and (changed := changed_source(job.card, read_manifest(folder))):
        logger.warning("%s/%s: replaces what another card gave (%s)", job.card.source, split, "; ".join(changed))


@contextlib.contextmanager
def _scratch(job: _Job) -> Iterator[Path]:
    """An empty folder for what a reader sets aside, gone at the end; what a killed run left in it goes first."""
    folder = job.out / f".{job.card.source}.scratch"
    shutil.rmtree(folder, ignore_errors=True)
    with errors_for_users(folder):
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _plans(job: _Job, split: str, scratch: Path, losses: Losses) -> Iterator[ShardPlan]:
    """Cut the reader's stream into shards; only a few plans exist at a time, so memory stays flat."""
    files = job.card.splits[split].files
    if job.options.ocr is not None:
        files = {role: places for role, places in files.items() if role != OCR_ROLE}
    source = RawSplit(job.raw, split, files, job.card.told, scratch)
    images = without_repeats(READERS[job.card.reader](source, losses), losses)
    folder = job.out / job.card.source / split
    number = 0
    while group := tuple(islice(images, job.images_per_shard)):
        yield ShardPlan(shard_path(folder, number), job.raw, group, job.options)
        number += 1


def without_repeats(images: Iterable[MediaRecords], losses: Losses) -> Iterator[MediaRecords]:
    """Count and leave out images and records whose id has occurred before in the split, or makes no member's name."""
    keys, record_ids = _Seen(), _Seen()
    for image in images:
        if not KEY.fullmatch(image.key):
            losses.add("image id is not of letters, digits, _ and -", image.media_id, records=len(image.records))
        elif not keys.add(image.key):
            losses.add("image id occurs twice", image.media_id, records=len(image.records))
        else:
            records = [record for record in image.records if record_ids.add(record.id)]
            for record in image.records if len(records) < len(image.records) else ():
                if not any(record is kept for kept in records):
                    losses.add("record id occurs twice", record.id)
            yield image if len(records) == len(image.records) else replace(image, records=records)


class _Seen:
    """Remembers texts in 8 bytes each: their 64-bit hashes, in sorted runs that are merged when they are of like length.

    A set of 14 million ids would take two gigabytes. Two of 14 million texts share a hash with probability 5e-6.
    """

    _RECENT = 1 << 16

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._runs: list[npt.NDArray[np.uint64]] = []

    def add(self, text: str) -> bool:
        """Remember a text; return whether it is new."""
        number = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())
        if number in self._recent or any(_holds(run, np.uint64(number)) for run in self._runs):
            return False
        self._recent.add(number)
        if len(self._recent) == self._RECENT:
            self._runs.append(np.sort(np.fromiter(self._recent, dtype=np.uint64)))
            self._recent.clear()
            while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
                self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]))]
        return True


def _holds(run: npt.NDArray[np.uint64], number: np.uint64) -> bool:
    place = int(np.searchsorted(run, number))
    return place < len(run) and bool(run[place] == number)


@contextlib.contextmanager
def _workers(number: int) -> Iterator[_Pool | None]:
    """Processes that convert shards; None for one, which is this process."""
    if number == 1:
        yield None
        return
    # Not forks of this process: it may hold threads of torch, which they would copy in an unknown state.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, not by each worker
    with ProcessPoolExecutor(number, mp_context=context, initializer=_end_with_parent) as executor:
        try:
            yield _Pool(executor, number)
        except BaseException:
            executor.shutdown(wait=True, cancel_futures=True)
            raise


def _convert(plans: Iterator[ShardPlan], pool: _Pool | None) -> Iterator[ShardReader]:
    """Convert every plan, in any order of work, and give the finished shards in the plans' order."""
    if pool is None:
        yield from map(convert_shard, plans)
        return
    waiting: list[Future[ShardReader]] = []
    for plan in plans:
        waiting.append(pool.executor.submit(convert_shard, plan))
        while waiting and (waiting[0].done() or len(waiting) > 2 * pool.workers):
            yield waiting.pop(0).result()
    while waiting:
        yield waiting.pop(0).result()


def _end_with_parent() -> None:
    """End this worker when its parent is gone; workers of a killed run would otherwise wait for work for ever."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# --- one shard -------------------------------------------------------------------------------------------------------


def convert_shard(plan: ShardPlan) -> ShardReader:
    """Write one shard, or keep it when it is there, whole, and made from the same images, records and options.

    One image is in memory at a time.
    """
    if kept := _finished_shard(plan):
        return kept
    losses, notes, digest = Losses(), Losses(), _plan_digest(plan.options)
    with ShardWriter.open(plan.path) as writer:
        for image in plan.images:
            contents = None
            try:
                contents = read_media(image, plan.raw)
                frames, said = stored_frames(contents, image.video, plan.options)
                writer.add(image.key, frames, image.media_id, _with_ocr(image, frames, plan.options.ocr))
                for note in said:
                    notes.add(note, _name(image, plan.raw), records=len(image.records))
            except MediaError as error:
                losses.add(str(error), _name(image, plan.raw), records=len(image.records))
            except UnicodeEncodeError:
                losses.add("record holds half a Unicode pair", _name(image, plan.raw), records=len(image.records))
            digest.update(_plan_line(image, contents))
        writer.notes = {"plan_sha256": digest.hexdigest(), "lost": json.dumps(losses.to_list(), ensure_ascii=False)}
        if notes.reasons:
            writer.notes["noted"] = json.dumps(notes.to_list(), ensure_ascii=False)
    return ShardReader(plan.path)


def _with_ocr(image: MediaRecords, frames: Mapping[str, bytes], options: OcrOptions | None) -> list[Record]:
    """The records of an image with the tokens that OCR finds in it, in place of any they had; as they are without OCR."""
    if options is None:
        return image.records
    tokens = ocr_tokens(frames.values(), options, image.key)
    return [replace(record, ocr_tokens=tokens) for record in image.records]


def _name(image: MediaRecords, raw: Path) -> str:
    """The image as a loss names it: its path below the raw folder, wherever that folder is."""
    several = image.media if isinstance(image.media, tuple) else (image.media,)
    names = [media.name if isinstance(media, FileSlice) else _below(media, raw) for media in several]
    return " + ".join(name or image.key for name in names)


def _below(path: Path, raw: Path) -> str | None:
    return path.relative_to(raw).as_posix() if path.is_relative_to(raw) else None


def _plan_digest(options: MediaOptions) -> "hashlib._Hash":
    """Hash of all that goes into a shard: the options, then keys, ids, records and contents of the images, in order."""
    return hashlib.sha256(json.dumps([asdict(options), JPEG_QUALITY]).encode() + b"\n")


def _plan_line(image: MediaRecords, contents: Sequence[bytes] | None) -> bytes:
    hashes = [hashlib.sha256(content).hexdigest() for content in contents or ()]
    records = [record.to_dict() for record in image.records]
    read = hashes[0] if len(hashes) == 1 else hashes or None
    return json.dumps([image.key, image.media_id, image.video, read, records]).encode() + b"\n"


def _finished_shard(plan: ShardPlan) -> ShardReader | None:
    if not (plan.path.is_file() and index_path(plan.path).is_file()):
        return None
    try:
        shard = ShardReader(plan.path)
    except UserError:
        return None  # half-written or damaged: made again
    if sha256_file(plan.path) != shard.tar_sha256:
        return None
    digest = _plan_digest(plan.options)
    for image in plan.images:
        try:
            contents = read_media(image, plan.raw)
        except MediaError:
            contents = None
        digest.update(_plan_line(image, contents))
    return shard if shard.metadata.get("plan_sha256") == digest.hexdigest() else None


def _lost(shard: ShardReader, what: str = "lost") -> list[dict[str, Any]]:
    """What a shard's index says was `lost`, or `noted` of what was kept."""
    lost: list[dict[str, Any]] = json.loads(shard.metadata.get(what, "[]"))
    return lost


def _lost_images(shard: ShardReader) -> int:
    return sum(loss["count"] for loss in _lost(shard))


# --- manifest --------------------------------------------------------------------------------------------------------


def _finish(job: _Job, split: str, shards: list[ShardReader], losses: Losses) -> Path:
    """Remove what an earlier run with other options left, write the manifest, and warn about what differs."""
    card, folder = job.card, job.out / job.card.source / split
    notes = Losses()
    for shard in shards:
        losses.merge(_lost(shard))
        notes.merge(_lost(shard, "noted"))
    if not sum(len(shard) for shard in shards):
        raise UserError(
            f"no image of {card.source}/{split} could be kept ({_why_none(losses)}); {_what_to_do(job, split)}"
        )
    for path in foreign_files(folder, {shard.path for shard in shards}):
        path.unlink()
    manifest = _manifest(card, split, shards, losses)
    manifest["noted"] = notes.to_list()
    manifest["options"] = {
        "images_per_shard": job.images_per_shard,
        **asdict(job.options),
        "jpeg_quality": JPEG_QUALITY,
    }
    for difference in manifest["differences"]:
        logger.warning("%s/%s: %s", card.source, split, difference)
    for loss in manifest["lost"]:
        what = f"{loss['count']:,} x {loss['reason']} ({loss['records']:,} records), first {loss['examples'][0]}"
        logger.warning("%s/%s: lost %s", card.source, split, what)
    for note in manifest["noted"]:
        logger.warning("%s/%s: kept %s x %s", card.source, split, f"{note['count']:,}", note["reason"])
    write_json(folder / MANIFEST_NAME, manifest)
    return folder / MANIFEST_NAME


def _why_none(losses: Losses) -> str:
    """Each reason with its first example."""
    listed = [f"{loss['count']} x {loss['reason']}, first {loss['examples'][0]}" for loss in losses.to_list()]
    return "; ".join(listed) or "no entries"


def _what_to_do(job: _Job, split: str) -> str:
    places = [place for role in MEDIA_ROLES for place in job.card.splits[split].files.get(role, ())]
    packed = next(
        (hint for folder in (job.raw, *(job.raw / place for place in places)) if (hint := unpack_hint(folder))), ""
    )
    return f"{packed}check the card and raw=: {job.card.how_to_get}"


def _manifest(card: Card, split: str, shards: list[ShardReader], losses: Losses) -> dict[str, Any]:
    found = shards_manifest(card.source, split, [shard_entry(shard) for shard in shards])
    expected = card.splits[split]
    return found | {
        "card_sha256": source_sha256(card),
        "expected": {
            "images": expected.images,
            "records": expected.records,
            "records_by_kind": expected.records_by_kind,
            "verified": card.verified,
        },
        "differences": _differences(expected, found["images"], found["records_by_kind"], card.verified),
        "lost": losses.to_list(),
        "source": {"homepage": card.homepage, "how_to_get": card.how_to_get, **source_facts(card, split)},
        "licence": card.licence,
    }


def shards_manifest(dataset: str, split: str, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a manifest says of its shards and of all of them together, given the entries of each."""
    by_kind: Counter[str] = Counter()
    for entry in entries:
        by_kind.update(entry["records_by_kind"])
    return {
        "format": MANIFEST_FORMAT,
        "dataset": dataset,
        "split": split,
        "images": sum(entry["images"] for entry in entries),
        "frames": sum(entry["frames"] for entry in entries),
        "records": by_kind.total(),
        "records_by_kind": dict(sorted(by_kind.items())),
        "shards": list(entries),
    }


def shard_entry(shard: ShardReader) -> dict[str, Any]:
    """What a manifest says of one shard."""
    return {
        "name": shard.path.name,
        "bytes": shard.tar_bytes,
        "sha256": shard.tar_sha256,
        "index_sha256": sha256_file(index_path(shard.path)),
        "images": len(shard),
        "frames": len(shard.extensions),
        "records": len(shard.arrays["record_kind"]),
        "records_by_kind": shard.records_by_kind(),
    }


def _differences(expected: SplitCounts, images: int, by_kind: Mapping[str, int], verified: bool) -> list[str]:
    """One line for each number that is not the card's; a number the card leaves out cannot differ."""
    sure = "" if verified else " (a number nobody has verified yet)"
    numbers = [("images", expected.images, images), ("records", expected.records, sum(by_kind.values()))]
    for kind, number in expected.records_by_kind.items():
        numbers.append((f"{kind} records", number, by_kind.get(kind, 0)))
    return [f"{what}: expected {a:,}{sure}, found {b:,}" for what, a, b in numbers if a is not None and a != b]


def foreign_files(folder: Path, shards: set[Path]) -> list[Path]:
    """Shards and indexes in the folder that are not of this set, and half-written files of a killed run."""
    known = shards | {index_path(shard) for shard in shards} | {folder / MANIFEST_NAME}
    return [path for path in sorted(folder.iterdir()) if _OWN_FILE.fullmatch(path.name) and path not in known]


# --- checking --------------------------------------------------------------------------------------------------------


def check_prepared(folder: Path, card: Card | None = None, split: str | None = None) -> list[str]:
    """Compare every shard and index below a split, dataset or output folder with its manifest, byte by byte, and read every
    record and picture as training does.

    Args:
        folder: see above.
        card, split: look at this dataset only, which must be prepared from this card, and at this split.

    Returns:
        One line for each problem; empty when all is well.

    Raises:
        UserError: there is no manifest at all.
    """
    found = {path.parent: read_manifest(path.parent) for path in sorted(folder.rglob(MANIFEST_NAME))}
    manifests = {
        path: manifest
        for path, manifest in found.items()
        if (card is None or manifest["dataset"] == card.source) and split in (None, manifest["split"])
    }
    if not manifests:
        of = "" if card is None else f" of {card.name}"
        raise UserError(f"no {MANIFEST_NAME}{of} below {folder}; give the folder that prepare.py wrote to")
    problems = []
    for path, manifest in manifests.items():
        if card is not None:
            try:
                check_prepared_from(card, manifest)
            except UserError as error:
                problems.append(str(error))
        problems += _check_split(path, manifest)
    return problems


def _unreadable(shard: ShardReader) -> list[str]:
    """A line for each image of a shard that reading would refuse: its place in the tar, its records, its pixels."""
    problems = []
    for row, key in enumerate(shard.keys):
        try:
            frames, records = shard.read(row)
            for frame in frames:
                decode_image(frame, f"{key} of {shard.path}")
            mine = shard.arrays["record_image"] == row
            if [record.kind for record in records] != [shard.kinds[kind] for kind in shard.arrays["record_kind"][mine]]:
                problems.append(f"{shard.path}: the kinds of records of {key} are not those of its index")
        except UserError as error:
            problems.append(str(error))
    return problems


def _check_split(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    problems = []
    for entry in manifest["shards"]:
        path = folder / entry["name"]
        try:
            shard = ShardReader(path)
        except UserError as error:
            problems.append(str(error))
            continue
        if sha256_file(path) != shard.tar_sha256:
            problems.append(f"{path}: content differs from its index (SHA-256)")
        if shard_entry(shard) != entry:
            problems.append(f"{path}: shard or index is not the one the manifest lists")
        problems += _unreadable(shard)
    extra = foreign_files(folder, {folder / entry["name"] for entry in manifest["shards"]})
    return problems + [f"{path}: not in the manifest" for path in extra]
