"""Images a second of this loader, of stock webdataset, and of a map-style Dataset over files, on one core and on two.

    python benchmarks/loader.py --rounds 3 --runs 3

The same JPEGs of 640 x 480, made on the spot, and the same transform (`blip2_image_train`: a crop of half the area or more,
resized to 224 by bicubic interpolation, flipped half of the time) in batches of 32. A variant on k cores is one process that
only receives, and k worker processes, all bound to k cores.
"""

import io
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import simplejpeg
import torch
import webdataset
from measure import Work, compare
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

import instructblip  # noqa: F401  declares what torchvision lacks on CPU, before it is imported
from instructblip.data.batching import Batching
from instructblip.data.loader import load_batches
from instructblip.data.mixture import Mixture, MixtureEntry
from instructblip.data.mixture_dataset import MixtureDataset, TrainingSet, decoded
from instructblip.data.records import Record
from instructblip.data.shards import ShardReader, ShardWriter, open_split, shard_path
from instructblip.data.templates import TemplateSet
from instructblip.training.inspection import loading_parts

IMAGES, SHARDS, WIDTH, HEIGHT, QUALITY = 128, 4, 640, 480, 90
SIZE, BATCH, PER_RUN = 224, 32, 512
NODE = 8 * 190  # samples a second: 8 GPUs at half of what an H200 could do with the 7B model
MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)


# --- what is read -----------------------------------------------------------------------------------------------------


def photograph(seed: int) -> bytes:
    """A JPEG with detail at all scales, as large as a photograph's: about 60 kB."""
    random = np.random.default_rng(seed)
    layers = np.zeros((HEIGHT, WIDTH, 3))
    for scale in (4, 16, 64, 256):
        coarse = random.normal(size=(3, HEIGHT // scale + 2, WIDTH // scale + 2)).astype(np.float32) * scale**0.5
        fine = [
            np.asarray(Image.fromarray(channel).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) for channel in coarse
        ]
        layers += np.stack(fine, axis=-1)
    layers = (layers - layers.min()) / np.ptp(layers) * 255 + random.normal(size=layers.shape) * 3
    buffer = io.BytesIO()
    Image.fromarray(layers.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def write(folder: Path, parts: list[str]) -> None:
    """Shards with their index, and the same images as files."""
    (folder / "files").mkdir()
    entries: list[dict[str, Any]] = []
    for number in range(SHARDS):
        path = shard_path(folder, number)
        with ShardWriter.open(path) as writer:
            for seed in range(number, IMAGES, SHARDS):
                data = photograph(seed)
                record = Record(str(seed), "question", "what is in the picture?", answers=("noise", "blobs"))
                writer.add(f"image_{seed}", {"jpg": data}, str(seed), [record])
                (folder / "files" / f"{seed}.jpg").write_bytes(data)
        shard = ShardReader(path)
        counts = {"records_by_kind": shard.records_by_kind()}
        entries.append({"name": path.name, "sha256": shard.tar_sha256, "bytes": shard.tar_bytes, **counts})
    manifest = {
        "format": 1,
        "dataset": "noise",
        "split": "train",
        "shards": entries,
        "records_by_kind": {"question": IMAGES},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


# --- the three loaders --------------------------------------------------------------------------------------------------


def our_dataset(folder: Path) -> MixtureDataset:
    templates = TemplateSet("two", "", ("{question}", "Question: {question} Short answer:"))
    noise = TrainingSet("noise", open_split(folder), (), templates)
    mixture = Mixture([MixtureEntry("noise", len(noise), shards=noise.shard_records)])
    return MixtureDataset(mixture, [noise], decoded("blip2_image_train", SIZE))


def whole_step(step: int) -> Batching:
    return Batching()


def ours(folder: Path, workers: int) -> Iterator[int]:
    steps = ((step, list(range(BATCH * step, BATCH * (step + 1)))) for step in itertools.count())
    for loaded in load_batches(our_dataset(folder), steps, batching=whole_step, workers=workers):
        yield sum(len(batch.ids) for batch in loaded.batches)


def torchvision_transform() -> Callable[[Image.Image], torch.Tensor]:
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=(0.5, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


class Files(Dataset[torch.Tensor]):
    """What most people write first: one file an item."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.jpg"))
        self.transform = torchvision_transform()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        with Image.open(self.paths[number]) as image:
            return self.transform(image.convert("RGB"))


def map_style(folder: Path, workers: int) -> Iterator[int]:
    dataset = Files(folder / "files")
    sampler = RandomSampler(dataset, replacement=True, num_samples=10**9)
    for images in DataLoader(dataset, batch_size=BATCH, sampler=sampler, num_workers=workers):
        yield len(images)


def stock_webdataset(folder: Path, workers: int) -> Iterator[int]:
    paths = [str(shard_path(folder, number)) for number in range(SHARDS)]
    dataset = (
        webdataset.WebDataset(paths, resampled=True, shardshuffle=False)  # for ever, shards drawn at random
        .shuffle(100)
        .decode("pil")
        .to_tuple("jpg", "json")
        .map_tuple(torchvision_transform(), dict)
        .batched(BATCH)
    )
    for images, _ in DataLoader(dataset, batch_size=None, num_workers=workers):
        yield len(images)


LOADERS = {"map-style Dataset": map_style, "webdataset": stock_webdataset, "this loader": ours}


def prepare(loader: Callable[[Path, int], Iterator[int]], cores: int, folder: Path, parts: list[str]) -> Work:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    batches = loader(folder, cores)

    def work() -> None:
        loaded = 0
        while loaded < PER_RUN:
            loaded += next(batches)

    return work


def report_parts() -> None:
    """What a sample of this loader costs a core, and how many cores a node of GPUs needs."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    torch.set_num_threads(1)  # as in a worker process; more would wait for each other on the one core
    with TemporaryDirectory() as folder:
        write(Path(folder), [])
        parts = loading_parts(our_dataset(Path(folder)), "blip2_image_train", SIZE, PER_RUN, workers=1)
    whole = sum(parts.values())
    shares = ", ".join(f"{name} {1e3 * seconds:.2f} ms ({seconds / whole:.0%})" for name, seconds in parts.items())
    print(f"this loader on one core, a sample: {shares}")
    print(f"a node of 8 GPUs at 190 samples/s each needs {NODE * whole:.1f} such cores")


def report_decoders() -> None:
    """Milliseconds of a core from a JPEG's bytes to an array, whole and at half its size, by each decoder that is here."""
    from torchvision.io import decode_jpeg

    pictures = [photograph(seed) for seed in range(8)]

    def pillow(data: bytes, half: bool) -> object:
        image = Image.open(io.BytesIO(data))
        if half:
            image.draft("RGB", (WIDTH // 2, HEIGHT // 2))
        return np.asarray(image)

    def turbo(data: bytes, half: bool) -> object:
        least = {"min_height": HEIGHT // 2, "min_width": WIDTH // 2} if half else {}
        return simplejpeg.decode_jpeg(data, "RGB", **least)

    def vision(data: bytes, half: bool) -> object:
        return None if half else decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    for name, decode in {"Pillow": pillow, "simplejpeg": turbo, "torchvision": vision}.items():
        try:
            whole, half = (min(_milliseconds(decode, pictures, half) for _ in range(9)) for half in (False, True))
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0][:80]}")
        else:
            print(f"{name}: {whole:.2f} ms whole, {f'{half:.2f} ms at half' if name != 'torchvision' else 'no half'}")


def _milliseconds(decode: Callable[[bytes, bool], object], pictures: list[bytes], half: bool) -> float:
    begun = time.process_time()
    for data in pictures:
        decode(data, half)
    return (time.process_time() - begun) / len(pictures) * 1e3


if __name__ == "__main__":
    compare(
        {
            f"{name}, {cores} core{'s' * (cores > 1)}": partial(prepare, loader, cores)
            for cores in (1, 2)
            for name, loader in LOADERS.items()
        },
        baseline="map-style Dataset, 1 core",
        unit="image",
        per_run=PER_RUN,
        what="Loading images",
        description="JPEGs of 640 x 480 to 224 x 224. This loader gives uint8, which is normalised on the device; the other "
        "two normalise on the CPU, which is 0.2 ms of their time.",
        setup=write,
    )
    if "--variant" not in sys.argv:
        report_parts()
        report_decoders()
