"""Frozen vision features kept on disk by content, so that an image is encoded once for all epochs and all runs.

One file a shard, named by the shard's SHA-256, in a folder named by what decides the features: the encoder's weights, the
transform and the image size. The features are stored in the encoder's own precision, so training with the cache and
without it see the same numbers. Of use whenever training images are not augmented.
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from instructblip.data.shards import ShardReader
from instructblip.errors import UserError
from instructblip.files import atomic_path
from instructblip.images import fit_frames
from instructblip.models.fingerprint import fingerprint
from instructblip.models.instructblip import InstructBLIP
from instructblip.progress import progress_bar

Encode = Callable[[Tensor], Tensor]  # uint8 (B, 3, H, W) -> tokens (B, P, V)
_BATCH = 50


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
        self._open: dict[str, Any] = {}

    def fill(self, shards: Sequence[ShardReader], encode: Encode, title: str) -> None:
        """Encode what is not in the cache yet, with a progress bar.

        Raises:
            UserError: the features would not fit on the disk, or an image cannot be decoded.
        """
        missing = [shard for shard in shards if not self._holds(shard)]
        if not missing:
            return
        self._check_space(missing, encode)
        with progress_bar("images") as progress:
            task = progress.add_task(title, total=sum(len(shard.extensions) for shard in missing))
            for shard in missing:
                self._fill_shard(shard, encode, lambda count: progress.advance(task, count))

    def tokens(self, shard: ShardReader, row: int) -> Tensor:
        """Tokens (F, P, V) of one image, F frames of a video."""
        path = self._path(shard)
        if path.name not in self._open:
            # Kept open: rows are read from the memory map, nothing is loaded whole.
            self._open[path.name] = safe_open(str(path), framework="pt").get_slice("tokens")
        tokens: Tensor = self._open[path.name][shard.frames_of(row)]
        return tokens

    def _path(self, shard: ShardReader) -> Path:
        return self.folder / f"{shard.tar_sha256}.safetensors"

    def _holds(self, shard: ShardReader) -> bool:
        """Whether the shard's features are there, whole (a file cut short does not open) and as many as its frames."""
        try:
            with safe_open(str(self._path(shard)), framework="pt") as file:
                return bool(file.get_slice("tokens").get_shape()[0] == len(shard.extensions))
        except (OSError, SafetensorError):
            return False

    def _fill_shard(self, shard: ShardReader, encode: Encode, advance: Callable[[int], None]) -> None:
        pieces = []
        frames = (frame for row in range(len(shard)) for frame in shard_pixels(shard, row, self.image_size))
        while batch := list(islice(frames, _BATCH)):
            pieces.append(encode(torch.stack(batch)).cpu())
            advance(len(batch))
        with atomic_path(self._path(shard)) as partial:
            save_file({"tokens": torch.cat(pieces)}, str(partial))

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


ReadImage = Callable[[ShardReader, int], Tensor]  # image tokens (F, P, V) or uint8 pixels (F, 3, H, W) of F frames


def feature_cache(model: InstructBLIP, folder: Path) -> FeatureCache:
    """The cache of this model's frozen image tokens below `folder`."""
    vision = model.vision
    identity = f"{fingerprint(vision)} {vision.layers} {vision.grid} {vision.mean.tolist()} {vision.std.tolist()}"
    return FeatureCache(folder, encoder_fingerprint=identity, image_size=vision.image_size)


def cached_images(model: InstructBLIP, cache: FeatureCache, shards: Sequence[ShardReader], title: str) -> ReadImage:
    """Encode the images of these shards once and return a reader of their tokens."""
    device = model.device

    def encode(images_B3HW: Tensor) -> Tensor:
        tokens: Tensor = model.vision(images_B3HW.to(device))
        return tokens

    cache.fill(shards, encode, title)
    return cache.tokens
