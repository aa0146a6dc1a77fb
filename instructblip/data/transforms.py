"""Encoded image bytes to uint8 pixels. Normalisation happens on the device, inside the vision encoder.

`TRANSFORMS` names what may be done. Two of them are for evaluation and for a feature cache: they draw nothing and decode in
full, so that they equal the released code bit by bit. The others are the released code's augmentations; they draw from the
stream that they are given, which is the position's own, and never from a global one. They decode a JPEG at the smallest DCT
scale (1, 1/2, 1/4 or 1/8) at which the crop still has at least the pixels that are asked for, and resize by PyTorch's
antialiased bicubic kernel, which differs from Pillow's by one grey level at most and takes a sixth of the time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.nn import functional

from instructblip.images import FITS, decode_pixels, image_size, stack_frames, to_pixels

_CROP_RATIOS = (3 / 4, 4 / 3)  # width by height
_CROP_TRIES = 10


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


class Operation(NamedTuple):
    """A drawn operation: its name in `OPERATIONS` and its strength, sign included."""

    name: str
    strength: float


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


def decode_for(data: bytes, where: str, view: View, size: int) -> npt.NDArray[np.uint8]:
    """The pixels (H, W, 3), at the smallest scale at which the view's crop has `size` pixels a side.

    Raises:
        DamagedSample: as `decode_image`.
    """
    return decode_pixels(data, where, at_least=(math.ceil(size / view.width), math.ceil(size / view.height)))


def show_view(data: bytes, where: str, view: View, size: int) -> Tensor:
    """The pixels of a view: uint8 (3, size, size).

    Raises:
        DamagedSample: as `decode_image`.
    """
    image_HWC = decode_for(data, where, view, size)
    down, across, _ = image_HWC.shape
    width, height = max(1, round(view.width * across)), max(1, round(view.height * down))
    left = min(round(view.left * across), across - width)
    top = min(round(view.top * down), down - height)
    crop_HWC = image_HWC[top : top + height, left : left + width]
    if not crop_HWC.flags.writeable:  # Pillow's memory, which PyTorch does not take
        crop_HWC = crop_HWC.copy()
    crop_1CHW = torch.from_numpy(crop_HWC).permute(2, 0, 1)[None]
    pixels = functional.interpolate(crop_1CHW, size=(size, size), mode="bicubic", antialias=True)[0]
    if view.flip:
        pixels = pixels.flip(2)
    if view.operations:
        operated = apply_operations(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), view.operations)
        return to_pixels(operated)
    return pixels.contiguous()


# By the names of the released code. At level 5 the factor of brightness and of sharpness is 1: they change nothing there.
AUGMENTATIONS: dict[str, Augmentation] = {
    "blip_image_train": Augmentation((0.5, 1.0), flip=True, operations=(2, 5)),
    "blip_image_pretrain": Augmentation((0.2, 1.0), flip=True, operations=(2, 5)),  # BLIP's own repository, pretrain.py
    "blip2_image_train": Augmentation((0.5, 1.0), flip=True),
    "clip_image_train": Augmentation((0.9, 1.0), flip=False),
}

TRANSFORMS = (*FITS, *AUGMENTATIONS)


def augment_frames(
    frames: Sequence[bytes], where: str, transform: str, size: int, random: np.random.Generator, *, flip: bool = True
) -> Tensor:
    """The frames of one sample under a random transform, all under the same view: uint8 (F, 3, size, size).

    Raises:
        DamagedSample: as `decode_image`, or no frame.
    """
    if not frames:
        return stack_frames([], where)
    view = draw_view(AUGMENTATIONS[transform], image_size(frames[0], where), random, flip=flip)
    return stack_frames([show_view(frame, where, view, size) for frame in frames], where)


_TOP_LEVEL = 10
_SHEAR = 0.3  # at the top level; pixels sideways a pixel down
_TRANSLATION = 10  # pixels
_ROTATION = 30  # degrees
_GREY = (128, 128, 128)
_SKIPPED = 0.5


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Map places of the result to places of the image by the first two rows of a matrix."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR, fillcolor=_GREY
    )


OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, _: image,
    "auto_contrast": lambda image, _: ImageOps.autocontrast(image),
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "shear_x": lambda image, shear: _affine(image, (1, -shear, 0, 0, 1, 0)),
    "shear_y": lambda image, shear: _affine(image, (1, 0, 0, -shear, 1, 0)),
    "translate_x": lambda image, pixels: _affine(image, (1, 0, pixels, 0, 1, 0)),
    "translate_y": lambda image, pixels: _affine(image, (1, 0, 0, 0, 1, pixels)),
    "rotate": lambda image, degrees: image.rotate(degrees, resample=Image.Resampling.BILINEAR, fillcolor=_GREY),
}

_NAMES = tuple(OPERATIONS)
_SIGNED = {
    "shear_x": _SHEAR,
    "shear_y": _SHEAR,
    "translate_x": _TRANSLATION,
    "translate_y": _TRANSLATION,
    "rotate": _ROTATION,
}


def draw_operations(random: np.random.Generator, count: int, level: int) -> tuple[Operation, ...]:
    """Draw `count` operations at a level from 0 to 10; those that are left out do not appear.

    Three numbers are drawn for each, used or not, so what one operation is does not shift the next one's numbers.
    """
    drawn = []
    for _ in range(count):
        name = _NAMES[int(random.integers(len(_NAMES)))]
        skipped, sign = random.random() < _SKIPPED, 1.0 if random.random() < 0.5 else -1.0
        factor = level / _TOP_LEVEL * 1.8 + 0.1  # of brightness and sharpness
        if not skipped:
            drawn.append(Operation(name, sign * _SIGNED[name] * level / _TOP_LEVEL if name in _SIGNED else factor))
    return tuple(drawn)


def apply_operations(image: Image.Image, operations: tuple[Operation, ...]) -> Image.Image:
    """Apply drawn operations one after the other to an RGB image."""
    for name, strength in operations:
        image = OPERATIONS[name](image, strength)
    return image
