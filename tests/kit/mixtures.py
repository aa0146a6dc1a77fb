"""Small prepared training splits and mixtures over them, written by hand so that single samples can be damaged."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from instructblip.data.mixture import Mixture, MixtureEntry, MixtureSegment
from instructblip.data.mixture_dataset import MixtureDataset, TrainingSet, decoded
from instructblip.data.records import Record
from instructblip.data.shards import ShardReader, ShardWriter, open_split, shard_path
from instructblip.data.templates import TemplateSet

TEMPLATES = TemplateSet("three", "", ("{question}", "Q: {question} A:", "Question: {question} Short answer:"))


def jpeg(seed: int, size: tuple[int, int] = (52, 40)) -> bytes:
    """A picture of blocks of colour, another one for each seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def write_split(
    folder: Path, name: str, images: Sequence[bytes], *, images_per_shard: int = 4, damaged: Mapping[int, bytes] = {}
) -> Path:
    """Write a training split: image number k has k % 3 + 1 records, of the kinds a, b, a.

    Args:
        damaged: image number -> bytes that stand in its place.
    """
    entries = []
    for number, first in enumerate(range(0, len(images), images_per_shard)):
        path = shard_path(folder, number)
        with ShardWriter.open(path) as writer:
            for k in range(first, min(first + images_per_shard, len(images))):
                records = [
                    Record(f"{k}-{place}", "aba"[place], f"what is {k}-{place}?", answers=(f"{name} {k}", "other"))
                    for place in range(k % 3 + 1)
                ]
                writer.add(f"image_{k}", {"jpg": damaged.get(k, images[k])}, str(k), records)
        shard = ShardReader(path)
        entry = {"name": path.name, "sha256": shard.tar_sha256, "bytes": shard.tar_bytes}
        entry["index_sha256"] = hashlib.sha256(path.with_suffix(".index.safetensors").read_bytes()).hexdigest()
        entries.append(entry | {"records_by_kind": shard.records_by_kind()})
    kinds = {kind: sum(entry["records_by_kind"].get(kind, 0) for entry in entries) for kind in "ab"}
    manifest = {"format": 1, "dataset": name, "split": "train", "shards": entries, "records_by_kind": kinds}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def mixture_of(
    folders: Mapping[str, Path],
    *,
    transform: str = "blip_image_train",
    image_size: int = 16,
    seed: int = 11,
    kinds: Mapping[str, tuple[str, ...]] = {},
    flip: Mapping[str, bool] = {},
    group: int | None = None,
) -> MixtureDataset:
    """A mixture of splits, weighted by square roots; so many records of one image together, if a `group` is given."""
    sets = [
        TrainingSet(name, open_split(folder), kinds.get(name, ()), TEMPLATES, flip.get(name, True))
        for name, folder in folders.items()
    ]
    entries = [
        MixtureEntry(item.name, len(item), 1.0, item.shard_records, None if group is None else item.images)
        for item in sets
    ]
    segments = [] if group is None else [MixtureSegment(group, group)]
    mixture = Mixture(entries, seed=seed, segments=segments)
    return MixtureDataset(mixture, sets, decoded(transform, image_size))
