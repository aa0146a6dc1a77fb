"""From raw files to checked shards: parallel by shard, resumable after a kill, the same bytes from the same input."""

import hashlib
import io
import json
import logging
import os
import re
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from instructblip.data import transforms
from instructblip.data.cards import Card, SplitCounts, source_sha256
from instructblip.data.readers import READERS, Losses, MediaRecords, RawSplit
from instructblip.data.shards import (
    MANIFEST_FORMAT,
    MANIFEST_NAME,
    ShardReader,
    ShardWriter,
    index_path,
    read_manifest,
    shard_path,
)
from instructblip.errors import UserError
from instructblip.files import exclusive, sha256_file, write_json

logger = logging.getLogger(__name__)

# Image formats kept as they are, and the extension stock WebDataset decodes them by. MPO is a JPEG with further
# pictures behind it, as phones write it.
EXTENSION_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}
_OWN_FILE = re.compile(r"(shard-\d{6}\.(tar|index\.safetensors)|manifest\.json)(\.\d+\.partial)?")


@dataclass(frozen=True)
class ShardPlan:
    """What one shard is to hold; sent to a worker process as it is."""

    path: Path
    raw: Path
    images: tuple[MediaRecords, ...]


def prepare_dataset(
    card: Card,
    raw: Path,
    out: Path,
    *,
    splits: Sequence[str] | None = None,
    workers: int = 1,
    images_per_shard: int = 1000,
    progress: bool = True,
) -> list[Path]:
    """Convert a dataset to `<out>/<dataset>/<split>/` and return the paths of the manifests.

    A view is converted as its parent, which it shares the shards with. Run again after a kill, it keeps the shards that
    are whole and hold what they should. Bytes depend on the raw files and `images_per_shard`, not on `workers`.

    Args:
        splits: which to convert; None: all of the card.
        workers: number of processes.

    Raises:
        UserError: unknown split, raw files missing or unreadable, nothing found, disk full.
    """
    if workers < 1 or images_per_shard < 1:
        raise UserError(f"workers={workers} and images_per_shard={images_per_shard} must be 1 or more")
    chosen = list(card.splits) if splits is None else list(splits)
    if unknown := [split for split in chosen if split not in card.splits]:
        raise UserError(f"{card.source} has no split {unknown[0]!r}; choose among {', '.join(card.splits)}")
    if not raw.is_dir():
        raise UserError(f"raw={raw} is not a folder; {card.how_to_get}")
    with exclusive(out / f".{card.source}.lock", f"preparing {card.source}", show=progress):
        return _prepare_splits(card, raw, out, chosen, workers, images_per_shard, progress)


def _prepare_splits(
    card: Card, raw: Path, out: Path, splits: Sequence[str], workers: int, images_per_shard: int, progress: bool
) -> list[Path]:
    manifests = []
    for split in splits:
        folder = out / card.source / split
        losses = Losses()
        plans = _plans(card, raw, folder, split, images_per_shard, losses)
        with _progress_bar(not progress) as bar:
            bar_task = bar.add_task(f"{card.source}/{split}", total=card.splits[split].images)
            shards = []
            for shard in _convert(plans, workers):
                shards.append(shard)
                bar.advance(bar_task, len(shard) + _lost_images(shard))
        manifests.append(_finish(card, split, folder, shards, losses, images_per_shard))
    return manifests


def _plans(
    card: Card, raw: Path, folder: Path, split: str, images_per_shard: int, losses: Losses
) -> Iterator[ShardPlan]:
    """Cut the reader's stream into shards; only a few plans exist at a time, so memory stays flat."""
    images = READERS[card.reader](RawSplit(raw, split), losses)
    number = 0
    while group := tuple(islice(images, images_per_shard)):
        yield ShardPlan(shard_path(folder, number), raw, group)
        number += 1


def _convert(plans: Iterator[ShardPlan], workers: int) -> Iterator[ShardReader]:
    """Convert every plan, in any order of work, and give the finished shards in the plans' order."""
    if workers == 1:
        yield from map(convert_shard, plans)
        return
    # Fresh processes ("spawn"): the caller may hold threads of torch, which a fork would copy in an unknown state.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool:
        waiting: list[Future[ShardReader]] = []
        try:
            for plan in plans:
                waiting.append(pool.submit(convert_shard, plan))
                while waiting and (waiting[0].done() or len(waiting) > 2 * workers):
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


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
    """Write one shard, or keep it when it is there, whole, and made from the same images and records."""
    losses = Losses()
    images = [(image, _image_bytes(image, plan.raw, losses)) for image in plan.images]
    plan_sha256 = _plan_sha256(images)
    if kept := _finished_shard(plan.path, plan_sha256):
        return kept
    with ShardWriter.open(plan.path) as writer:
        for image, content in images:
            if content is None:
                continue
            try:
                extension = check_image(content)
            except ImageError as error:
                losses.add(str(error), _name(image, plan.raw), records=len(image.records))
                continue
            writer.add(image.key, extension, content, image.media_id, image.records)
        writer.notes = {"plan_sha256": plan_sha256, "lost": json.dumps(losses.to_list(), ensure_ascii=False)}
    return ShardReader(plan.path)


class ImageError(Exception):
    """An image that cannot be kept; the message is the reason it is counted under."""


def check_image(content: bytes) -> str:
    """Decode an image completely and return the file extension it is stored under.

    Raises:
        ImageError: nothing in it, no image, another format, cut short, damaged, or so many pixels (over `MAX_PIXELS`,
            which reading refuses) that it may be meant to exhaust memory.
    """
    if not content:
        raise ImageError("image file is empty")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > transforms.MAX_PIXELS:
                raise Image.DecompressionBombError
            if image.format not in EXTENSION_OF_FORMAT:
                raise ImageError(f"image format {image.format} is neither JPEG nor PNG")
            image.convert("RGB")
            return EXTENSION_OF_FORMAT[image.format]
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError("image has too many pixels (decompression bomb)") from None
    except UnidentifiedImageError:
        raise ImageError("file is not an image") from None
    except Exception as error:  # a decoder fed with damaged bytes may raise anything; it is counted, not swallowed
        truncated = isinstance(error, OSError) and "truncated" in str(error)
        raise ImageError("image is truncated" if truncated else "image is damaged") from error


def _image_bytes(image: MediaRecords, raw: Path, losses: Losses) -> bytes | None:
    if isinstance(image.media, bytes):
        return image.media
    try:
        return image.media.read_bytes()
    except FileNotFoundError:
        losses.add("image file is missing", _name(image, raw), records=len(image.records))
    except OSError as error:
        losses.add(f"image file cannot be read ({error.strerror})", _name(image, raw), records=len(image.records))
    return None


def _name(image: MediaRecords, raw: Path) -> str:
    """The image as a loss names it: its path below the raw folder, wherever that folder is."""
    if isinstance(image.media, Path) and image.media.is_relative_to(raw):
        return image.media.relative_to(raw).as_posix()
    return image.key


def _plan_sha256(images: list[tuple[MediaRecords, bytes | None]]) -> str:
    """Hash of all that goes into a shard: keys, ids, records and image contents, in order."""
    digest = hashlib.sha256()
    for image, content in images:
        content_sha256 = None if content is None else hashlib.sha256(content).hexdigest()
        records = [record.to_dict() for record in image.records]
        digest.update(json.dumps([image.key, image.media_id, content_sha256, records]).encode() + b"\n")
    return digest.hexdigest()


def _finished_shard(path: Path, plan_sha256: str) -> ShardReader | None:
    if not (path.is_file() and index_path(path).is_file()):
        return None
    try:
        shard = ShardReader(path)
    except UserError:
        return None  # half-written or damaged: made again
    same = shard.metadata.get("plan_sha256") == plan_sha256 and sha256_file(path) == shard.tar_sha256
    return shard if same else None


def _lost(shard: ShardReader) -> list[dict[str, Any]]:
    lost: list[dict[str, Any]] = json.loads(shard.metadata["lost"])
    return lost


def _lost_images(shard: ShardReader) -> int:
    return sum(loss["count"] for loss in _lost(shard))


# --- manifest --------------------------------------------------------------------------------------------------------


def _finish(
    card: Card, split: str, folder: Path, shards: list[ShardReader], losses: Losses, images_per_shard: int
) -> Path:
    """Remove what an earlier run with other options left, write the manifest, and warn about what differs."""
    for shard in shards:
        losses.merge(_lost(shard))
    if not sum(len(shard) for shard in shards):
        found = "; ".join(f"{loss['count']} x {loss['reason']}" for loss in losses.to_list()) or "no entries"
        raise UserError(f"no image of {card.source}/{split} could be kept ({found}); check raw=: {card.how_to_get}")
    for path in _foreign_files(folder, {shard.path for shard in shards}):
        path.unlink()
    manifest = _manifest(card, split, shards, losses)
    manifest["options"] = {"images_per_shard": images_per_shard}
    for difference in manifest["differences"]:
        logger.warning("%s/%s: %s", card.source, split, difference)
    for loss in manifest["lost"]:
        what = f"{loss['count']:,} x {loss['reason']} ({loss['records']:,} records), first {loss['examples'][0]}"
        logger.warning("%s/%s: lost %s", card.source, split, what)
    write_json(folder / MANIFEST_NAME, manifest)
    return folder / MANIFEST_NAME


def _manifest(card: Card, split: str, shards: list[ShardReader], losses: Losses) -> dict[str, Any]:
    by_kind: Counter[str] = Counter()
    for shard in shards:
        by_kind.update(shard.records_by_kind())
    expected = card.splits[split]
    images = sum(len(shard) for shard in shards)
    return {
        "format": MANIFEST_FORMAT,
        "dataset": card.source,
        "split": split,
        "card_sha256": source_sha256(card),
        "images": images,
        "records": by_kind.total(),
        "records_by_kind": dict(sorted(by_kind.items())),
        "expected": {
            "images": expected.images,
            "records": expected.records,
            "records_by_kind": expected.records_by_kind,
            "verified": card.verified,
        },
        "differences": _differences(expected, images, by_kind, card.verified),
        "lost": losses.to_list(),
        "shards": [_shard_entry(shard) for shard in shards],
        "source": {"homepage": card.homepage, "how_to_get": card.how_to_get, "reader": card.reader},
        "licence": card.licence,
    }


def _shard_entry(shard: ShardReader) -> dict[str, Any]:
    return {
        "name": shard.path.name,
        "bytes": shard.tar_bytes,
        "sha256": shard.tar_sha256,
        "index_sha256": sha256_file(index_path(shard.path)),
        "images": len(shard),
        "records": len(shard.arrays["record_kind"]),
        "records_by_kind": shard.records_by_kind(),
    }


def _differences(expected: SplitCounts, images: int, by_kind: Counter[str], verified: bool) -> list[str]:
    """One line for each number that is not the card's; a number the card leaves out cannot differ."""
    sure = "" if verified else " (a number nobody has verified yet)"
    numbers = [("images", expected.images, images), ("records", expected.records, by_kind.total())]
    for kind, number in expected.records_by_kind.items():
        numbers.append((f"{kind} records", number, by_kind[kind]))
    return [f"{what}: expected {a:,}{sure}, found {b:,}" for what, a, b in numbers if a is not None and a != b]


def _foreign_files(folder: Path, shards: set[Path]) -> list[Path]:
    """Shards and indexes in the folder that are not of this set, and half-written files of a killed run."""
    known = shards | {index_path(shard) for shard in shards} | {folder / MANIFEST_NAME}
    return [path for path in sorted(folder.iterdir()) if _OWN_FILE.fullmatch(path.name) and path not in known]


# --- checking --------------------------------------------------------------------------------------------------------


def check_prepared(folder: Path) -> list[str]:
    """Compare every shard and index below a split, dataset or output folder with its manifest, byte by byte.

    Returns:
        One line for each problem; empty when all is well.

    Raises:
        UserError: there is no manifest at all.
    """
    manifests = sorted(folder.rglob(MANIFEST_NAME))
    if not manifests:
        raise UserError(f"no {MANIFEST_NAME} below {folder}; give the folder that prepare.py wrote to")
    return [problem for manifest in manifests for problem in _check_split(manifest.parent)]


def _check_split(folder: Path) -> list[str]:
    manifest = read_manifest(folder)
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
        if _shard_entry(shard) != entry:
            problems.append(f"{path}: shard or index is not the one the manifest lists")
    extra = _foreign_files(folder, {folder / entry["name"] for entry in manifest["shards"]})
    return problems + [f"{path}: not in the manifest" for path in extra]


# --- progress --------------------------------------------------------------------------------------------------------


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("- images/s" if speed is None else f"{speed:,.0f} images/s")


def _progress_bar(disable: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    return Progress(*columns, disable=disable)
