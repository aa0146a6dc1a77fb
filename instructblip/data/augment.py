"""RandAugment as the released code uses it, with every random number drawn from the stream that is handed in.

Facts of the released code: operations are drawn evenly and with replacement from ten, each is then left out with
probability 1/2, levels go from 0 to 10, what an operation uncovers is mid-grey, and signs are drawn evenly. The operations
themselves are Pillow's; the released code's own are written to equal those.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_TOP_LEVEL = 10
_SHEAR = 0.3  # at the top level; pixels sideways a pixel down
_TRANSLATION = 10  # pixels
_ROTATION = 30  # degrees
_GREY = (128, 128, 128)
_SKIPPED = 0.5


class Operation(NamedTuple):
    """A drawn operation: its name in `OPERATIONS` and its strength, sign included."""

    name: str
    strength: float


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
