"""Encoded pictures to pixels: decoding with bounds, and the transforms that are the same for every draw."""

import io
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError
from torch import Tensor

from instructblip.errors import DamagedSample

MAX_PIXELS = 64_000_000  # decoding is refused above this: 192 MB as RGB
_ORIENTATION = 0x0112  # EXIF; 5 to 8 lie on their side

Fit = Callable[[Image.Image, int], Tensor]


# --- decoding --------------------------------------------------------------------------------------------------------


def decode_image(
    data: bytes, where: str, *, at_least: tuple[int, int] | None = None, upright: bool = True
) -> Image.Image:
    """Decode to RGB, upright.

    Args:
        data: an encoded PNG, JPEG, ...
        where: named in the error (shard and key).
        at_least: width and height, upright, that are enough: a JPEG may come out as small as that, but never smaller
            unless it is.
        upright: False leaves the picture as it is stored, whatever its EXIF orientation says, as the released code does.

    Raises:
        DamagedSample: not an image, cut short, or larger than `MAX_PIXELS`.
    """
    try:
        image = _open(data, where)
        if at_least is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
            image.draft("RGB", at_least[::-1] if _lies_on_its_side(image) else at_least)
        if upright:
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


def resize_square(image: Image.Image, size: int) -> Tensor:
    """Resize to a square without keeping the aspect (`blip_image_eval` of the released code): uint8 (3, size, size)."""
    return to_pixels(image.resize((size, size), Image.Resampling.BICUBIC))


def center_crop(image: Image.Image, size: int) -> Tensor:
    """Resize the shorter side, keep the middle (`clip_image_eval` of the released code): uint8 (3, size, size).

    The longer side is `int(size * long / short)`, as torchvision's `Resize` computes it.
    """
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return to_pixels(resized.crop((left, top, left + size, top + size)))


def to_pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# --- by name ----------------------------------------------------------------------------------------------------------

FITS: dict[str, Fit] = {"resize_square": resize_square, "center_crop": center_crop}


def fit_frames(frames: Sequence[bytes], where: str, transform: str, size: int, *, upright: bool = True) -> Tensor:
    """The frames of one sample under a transform that draws nothing: uint8 (F, 3, size, size).

    Raises:
        DamagedSample: as `decode_image`, or no frame.
    """
    fit = FITS[transform]
    return stack_frames([fit(decode_image(frame, where, upright=upright), size) for frame in frames], where)


def stack_frames(frames: list[Tensor], where: str) -> Tensor:
    if not frames:
        raise DamagedSample(f"image {where} has no frame; prepare its dataset again")
    return torch.stack(frames)
