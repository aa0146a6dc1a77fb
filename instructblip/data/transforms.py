"""Encoded image bytes to uint8 pixels. Normalisation happens on the device, inside the vision encoder.

`TRANSFORMS` names what may be done. Two of them are for evaluation and for a feature cache: they draw nothing and decode in
full, so that they equal the released code bit by bit. The others are the released code's augmentations; they draw from the
stream that they are given, which is the position's own, and never from a global one. They decode a JPEG at the smallest DCT
scale (1, 1/2, 1/4 or 1/8) at which the crop still has at least the pixels that are asked for, and resize by PyTorch's
antialiased bicubic kernel, which differs from Pillow's by one grey level at most and takes a sixth of the time.
"""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from instructblip.data.augment import Operation, apply_operations, draw_operations
from instructblip.errors import DamagedSample

MAX_PIXELS = 64_000_000  # decoding is refused above this: 192 MB as RGB
_ORIENTATION = 0x0112  # EXIF; 5 to 8 lie on their side
_CROP_RATIOS = (3 / 4, 4 / 3)  # width by height
_CROP_TRIES = 10

Fit = Callable[[Image.Image, int], Tensor]


@dataclass(frozen=True)
class Augmentation:
    """What a random transform draws for each sample: the same for all frames of a video.

    Attributes:
        crop_area: least and largest share of the image's area that a crop has.
        flip: mirror every second image, where the dataset allows it.
        operations: how many operations of RandAugment are drawn, and their level from 0 to 10.
    """

    crop_area: tuple[float, float]
    flip: bool
    operations: tuple[int, int] | None = None


# --- decoding --------------------------------------------------------------------------------------------------------


def decode_image(data: bytes, where: str, *, at_least: tuple[int, int] | None = None) -> Image.Image:
    """Decode to RGB, upright.

    Args:
        data: an encoded PNG, JPEG, ...
        where: named in the error (shard and key).
        at_least: width and height, upright, that are enough: a JPEG may come out as small as that, but never smaller
            unless it is.

    Raises:
        DamagedSample: not an image, cut short, or larger than `MAX_PIXELS`.
    """
    try:
        image = _open(data, where)
        if at_least is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
            image.draft("RGB", at_least[::-1] if _lies_on_its_side(image) else at_least)
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _damaged(where, error) from None


def image_size(data: bytes, where: str) -> tuple[int, int]:
    """Width and height of the upright image, from its head alone.

    Raises:
        DamagedSample: as `decode_image`.
    """
    try:
        image = _open(data, where)
        return (image.height, image.width) if _lies_on_its_side(image) else image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _damaged(where, error) from None


def _open(data: bytes, where: str) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data))
    if image.width * image.height > MAX_PIXELS:
        raise DamagedSample(
            f"image {where} has {image.width} x {image.height} pixels, the limit is {MAX_PIXELS:,}; "
            "prepare its dataset again, which leaves it out"
        )
    return image


def _lies_on_its_side(image: Image.Image) -> bool:
    return image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)


def _damaged(where: str, error: Exception) -> DamagedSample:
    reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
    return DamagedSample(f"image {where} cannot be decoded ({reason}); prepare its dataset again")


# --- the same for every draw ------------------------------------------------------------------------------------------


def squash(image: Image.Image, size: int) -> Tensor:
    """Resize to a square without keeping the aspect (`blip_image_eval` of the released code): uint8 (3, size, size)."""
    return _pixels(image.resize((size, size), Image.Resampling.BICUBIC))


def center_crop(image: Image.Image, size: int) -> Tensor:
    """Resize the shorter side, keep the middle (`clip_image_eval` of the released code): uint8 (3, size, size)."""
    scale = size / min(image.size)
    width, height = (size if side == min(image.size) else int(side * scale) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return _pixels(resized.crop((left, top, left + size, top + size)))


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# --- drawn ------------------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """What was drawn for one sample: the crop as shares of width and height, and what follows it."""

    left: float
    top: float
    width: float
    height: float
    flip: bool
    operations: tuple[Operation, ...]


def draw_view(
    augmentation: Augmentation, size: tuple[int, int], random: np.random.Generator, *, flip: bool = True
) -> View:
    """Draw a crop, a flip and the operations of RandAugment for an image of this width and height.

    The crop is that of torchvision's RandomResizedCrop: a share of the area and a ratio (log-uniform from 3/4 to 4/3), drawn
    up to ten times until it fits; then the largest one in the middle.

    Args:
        flip: False where mirroring would make the dataset's answers wrong.
    """
    left, top, width, height = _draw_crop(augmentation.crop_area, size, random)
    mirrored = augmentation.flip and flip and bool(random.random() < 0.5)
    operations = draw_operations(random, *augmentation.operations) if augmentation.operations else ()
    return View(left / size[0], top / size[1], width / size[0], height / size[1], mirrored, operations)


def _draw_crop(
    share: tuple[float, float], size: tuple[int, int], random: np.random.Generator
) -> tuple[int, int, int, int]:
    """Left, top, width and height in pixels."""
    across, down = size
    for _ in range(_CROP_TRIES):
        area = across * down * random.uniform(*share)
        ratio = math.exp(random.uniform(math.log(_CROP_RATIOS[0]), math.log(_CROP_RATIOS[1])))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= across and 0 < height <= down:
            return int(random.integers(across - width + 1)), int(random.integers(down - height + 1)), width, height
    width, height = across, down
    if across / down < _CROP_RATIOS[0]:
        height = round(across / _CROP_RATIOS[0])
    elif across / down > _CROP_RATIOS[1]:
        width = round(down * _CROP_RATIOS[1])
    return (across - width) // 2, (down - height) // 2, width, height


def decode_for(data: bytes, where: str, view: View, size: int) -> Image.Image:
    """The image, at the smallest scale at which the view's crop has `size` pixels a side.

    Raises:
        DamagedSample: as `decode_image`.
    """
    return decode_image(data, where, at_least=(math.ceil(size / view.width), math.ceil(size / view.height)))


def show_view(data: bytes, where: str, view: View, size: int) -> Tensor:
    """The pixels of a view: uint8 (3, size, size).

    Raises:
        DamagedSample: as `decode_image`.
    """
    image = decode_for(data, where, view, size)
    width, height = max(1, round(view.width * image.width)), max(1, round(view.height * image.height))
    left = min(round(view.left * image.width), image.width - width)
    top = min(round(view.top * image.height), image.height - height)
    crop_HWC = np.asarray(image)[top : top + height, left : left + width].copy()  # the image is read-only
    crop_1CHW = torch.from_numpy(crop_HWC).permute(2, 0, 1)[None]
    pixels = functional.interpolate(crop_1CHW, size=(size, size), mode="bicubic", antialias=True)[0]
    if view.flip:
        pixels = pixels.flip(2)
    if view.operations:
        operated = apply_operations(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), view.operations)
        return _pixels(operated)
    return pixels.contiguous()


# --- by name ----------------------------------------------------------------------------------------------------------

FITS: dict[str, Fit] = {"squash": squash, "center_crop": center_crop}

# By the names of the released code. At level 5 the factor of brightness and of sharpness is 1: they change nothing there.
AUGMENTATIONS: dict[str, Augmentation] = {
    "blip_image_train": Augmentation((0.5, 1.0), flip=True, operations=(2, 5)),
    "blip2_image_train": Augmentation((0.5, 1.0), flip=True),
    "clip_image_train": Augmentation((0.9, 1.0), flip=False),
}

TRANSFORMS = (*FITS, *AUGMENTATIONS)


def fit_frames(frames: Sequence[bytes], where: str, transform: str, size: int) -> Tensor:
    """The frames of one sample under a transform that draws nothing: uint8 (F, 3, size, size).

    Raises:
        DamagedSample: as `decode_image`, or no frame.
    """
    return _stack([FITS[transform](decode_image(frame, where), size) for frame in frames], where)


def augment_frames(
    frames: Sequence[bytes], where: str, transform: str, size: int, random: np.random.Generator, *, flip: bool = True
) -> Tensor:
    """The frames of one sample under a random transform, all under the same view: uint8 (F, 3, size, size).

    Raises:
        DamagedSample: as `decode_image`, or no frame.
    """
    if not frames:
        return _stack([], where)
    view = draw_view(AUGMENTATIONS[transform], image_size(frames[0], where), random, flip=flip)
    return _stack([show_view(frame, where, view, size) for frame in frames], where)


def _stack(frames: list[Tensor], where: str) -> Tensor:
    if not frames:
        raise DamagedSample(f"image {where} has no frame; prepare its dataset again")
    return torch.stack(frames)
