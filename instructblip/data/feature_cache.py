"""Frozen vision features kept on disk by content, so that an image is encoded once for all epochs and all runs.

One file a shard, named by the shard's SHA-256, in a folder named by what decides the features: the encoder's weights and
settings, the transform and the image size. The features are computed and stored in the encoder's own precision, so training
with the cache and without it see the same numbers, unless a run's autocast (`recipe.precision=bf16`) rounds what a float32
encoder computes. Each frame has a checksum, which is compared when it is read: to read all of them at the start would take
as long as an epoch. Of use whenever training images are not augmented.
"""

import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from instructblip.data.shards import ShardReader
from instructblip.errors import UserError
from instructblip.files import atomic_path
from instructblip.images import fit_frames
from instructblip.models.base import Model
from instructblip.models.fingerprint import fingerprint, settings_sha256
from instructblip.progress import progress_bar

Encode = Callable[[Tensor], Tensor]  # uint8 (B, 3, H, W) -> tokens (B, P, V)
_BATCH = 50
_BATCH_ON_CPU = 8  # the demo's encoder takes half the time of 50: the widest maps stay in the processor's cache
_LONGEST_HEADER = 1 << 16
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_AGAIN = "run the same command again (train.py with resume=auto), which encodes those images anew"


def shard_pixels(
    shard: ShardReader,
    row: int,
    image_size: int,
    transform: str = "resize_square",
    upright: bool = True,
    transparency: str = "white",
) -> Tensor:
    """The frames of one row under a transform of `transforms.FITS`: uint8 (F, 3, image_size, image_size)."""
    frames, _ = shard.read_encoded(row)
    where = f"{shard.keys[row]} of {shard.path}"
    return fit_frames(frames, where, transform, image_size, upright=upright, transparency=transparency)


class FeatureCache:
    """Image tokens by shard and row.

    Args:
        folder: root of the cache.
        encoder_fingerprint: of the frozen encoder's weights and settings.
        image_size: side of the squashed input, pixels.
    """

    def __init__(self, folder: Path, *, encoder_fingerprint: str, image_size: int) -> None:
        identity = f"{encoder_fingerprint} resize_square {image_size}"
        self.folder = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.image_size = image_size
        self._layouts: dict[str, _Layout] = {}  # no open files: it may be forked, pickled and shared among threads

    def fill(self, shards: Sequence[ShardReader], encode: Encode, title: str, batch: int = _BATCH) -> None:
        """Encode what is not in the cache yet, `batch` images at a time, with a progress bar.

        Raises:
            UserError: the features would not fit on the disk, or an image cannot be decoded.
        """
        missing = [shard for shard in shards if _layout(self._path(shard), len(shard.extensions)) is None]
        if not missing:
            return
        self._check_space(missing, encode)
        with progress_bar("images") as progress:
            task = progress.add_task(title, total=sum(len(shard.extensions) for shard in missing))
            for shard in missing:
                self._fill_shard(shard, encode, batch, lambda count: progress.advance(task, count))

    def tokens(self, shard: ShardReader, row: int) -> Tensor:
        """Tokens (F, P, V) of one image, F frames of a video.

        Raises:
            UserError: the file is damaged or gone; a damaged one is removed, so that the next `fill` makes it anew.
        """
        path = self._path(shard)
        if path.name not in self._layouts:
            layout = _layout(path, len(shard.extensions))
            if layout is None:
                raise _damaged(path)
            self._layouts[path.name] = layout
        return self._layouts[path.name].read(path, shard.frames_of(row))

    def _path(self, shard: ShardReader) -> Path:
        return self.folder / f"{shard.tar_sha256}.safetensors"

    def _fill_shard(self, shard: ShardReader, encode: Encode, size: int, advance: Callable[[int], None]) -> None:
        pieces = []
        frames = (frame for row in range(len(shard)) for frame in shard_pixels(shard, row, self.image_size))
        while batch := list(islice(frames, size)):
            pieces.append(encode(torch.stack(batch)).cpu())
            advance(len(batch))
        tokens = torch.cat(pieces).contiguous()
        sums = torch.tensor([zlib.crc32(_bytes(frame)) for frame in tokens])
        with atomic_path(self._path(shard)) as partial:
            save_file({"tokens": tokens, "crc32": sums}, str(partial))

    def _check_space(self, shards: Sequence[ShardReader], encode: Encode) -> None:
        probe = encode(torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8))
        needed = sum(len(shard.extensions) for shard in shards) * probe.numel() * probe.element_size()
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"the vision features need {needed / 1e9:.1f} GB in {self.folder}, {free / 1e9:.1f} GB are free; "
                "free some space, set INSTRUCTBLIP_CACHE to another disk, or set data.cache_features=false"
            )


# --- files -----------------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """Where the frames of a file lie, each of `size` bytes from `start` on, and the CRC-32 of each."""

    start: int
    size: int
    shape: tuple[int, ...]  # of a frame's tokens: (P, V)
    dtype: torch.dtype
    sums: list[int]

    def read(self, path: Path, frames: slice) -> Tensor:
        count = frames.stop - frames.start
        content = bytearray(count * self.size)
        try:
            # Not from a memory map: where a file is cut or its disk fails, reading that ends the process.
            with open(path, "rb", buffering=0) as file:
                file.seek(self.start + frames.start * self.size)
                whole = file.readinto(content) == len(content)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); {_AGAIN}") from None
        pieces = memoryview(content)
        found = [zlib.crc32(pieces[k * self.size : (k + 1) * self.size]) for k in range(count)]
        if not whole or found != self.sums[frames]:
            raise _damaged(path)
        return torch.frombuffer(content, dtype=self.dtype).view(count, *self.shape)


def _layout(path: Path, frames: int) -> _Layout | None:
    """The layout of a file that is as long as it says, with checksums for so many frames; None for any other."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _LONGEST_HEADER)))
            tokens, sums = header["tokens"], header["crc32"]
            start, end = (8 + length + offset for offset in tokens["data_offsets"])
            first, last = (8 + length + offset for offset in sums["data_offsets"])
            file.seek(first)
            stored = np.frombuffer(file.read(last - first), dtype="<i8").tolist()
            as_long = file.seek(0, os.SEEK_END) == max(end, last)
            dtype, shape = _DTYPES.get(tokens["dtype"]), tuple(tokens["shape"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if dtype is None or not as_long or shape[:1] != (frames,) or len(stored) != frames:
        return None
    size = math.prod(shape[1:]) * dtype.itemsize
    return _Layout(start, size, shape[1:], dtype, stored) if end - start == frames * size else None


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _damaged(path: Path) -> UserError:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return UserError(f"{path} is damaged; remove it, and {_AGAIN}")
    return UserError(f"{path} was damaged, and is removed; {_AGAIN}")


ReadImage = Callable[[ShardReader, int], Tensor]  # image tokens (F, P, V) or uint8 pixels (F, 3, H, W) of F frames


def feature_cache(model: Model, folder: Path) -> FeatureCache:
    """The cache of this model's frozen image tokens below `folder`."""
    vision, adapter = model.vision, model.adapters.get("vision")
    identity = f"{fingerprint(vision)} {settings_sha256(vision)} {vision.mean.tolist()} {vision.std.tolist()}"
    if adapter is not None:
        identity += f" {adapter.alpha}"
    return FeatureCache(folder, encoder_fingerprint=identity, image_size=vision.image_size)


def cached_images(model: Model, cache: FeatureCache, shards: Sequence[ShardReader], title: str) -> ReadImage:
    """Encode the images of these shards once and return a reader of their tokens."""
    device = model.device

    def encode(images_B3HW: Tensor) -> Tensor:
        tokens: Tensor = model.vision(images_B3HW.to(device))
        return tokens

    cache.fill(shards, encode, title, _BATCH_ON_CPU if device.type == "cpu" else _BATCH)
    return cache.tokens
