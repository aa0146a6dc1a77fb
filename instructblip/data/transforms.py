"""Encoded image bytes to uint8 pixels. Normalisation happens on the device, inside the vision encoder."""

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from instructblip.errors import UserError

MAX_PIXELS = 64_000_000  # decoding is refused above this: 192 MB as RGB


def decode_image(data: bytes, where: str) -> Image.Image:
    """Decode to RGB, upright.

    Args:
        data: an encoded PNG, JPEG, ...
        where: named in the error (shard and key).

    Raises:
        UserError: not an image, cut short, or larger than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise UserError(
                f"image {where} has {image.width} x {image.height} pixels, the limit is {MAX_PIXELS:,}; "
                "prepare its dataset again, which leaves it out"
            )
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"image {where} cannot be decoded ({reason}); prepare its dataset again") from None


def squash(image: Image.Image, size: int) -> Tensor:
    """Resize to a square without keeping the aspect (the released evaluation transform): uint8 (3, size, size)."""
    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()
