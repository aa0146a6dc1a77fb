"""Encoded pictures to pixels: decoding with bounds, and the transforms that are the same for every draw."""

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

from instructblip.errors import DamagedSample

if TYPE_CHECKING:  # imported where it is needed: preparing data does without
    from torch import Tensor

MAX_PIXELS = 64_000_000  # decoding is refused above this: 192 MB as RGB
REFUSED_FORMATS = ("EPS",)  # a program, which Pillow gives to Ghostscript
_ORIENTATION = 0x0112  # EXIF; 5 to 8 lie on their side
_JPEG_END = b"\xff\xd9"
_JPEG_SCAN = b"\xff\xda"
_ROWS_NEEDED = 0.9  # of a JPEG without its end
_BLOCK = 8  # pixels a side of what a JPEG transforms at once
_BLOCK_ROWS = 16  # that are coded together, so that a cut a few bytes before the end costs all of them
_PROBE = b"\x55" * 256  # bits that decode to something, whatever the Huffman table

Fit = Callable[[Image.Image, int], "Tensor"]


# --- decoding --------------------------------------------------------------------------------------------------------


def decode_image(
    data: bytes,
    where: str,
    *,
    at_least: tuple[int, int] | None = None,
    upright: bool = True,
    transparency: str = "white",
) -> Image.Image:
    """Decode to RGB, upright, transparency laid on white.

    Args:
        data: an encoded PNG, JPEG, ...
        where: named in the error (shard and key).
        at_least: width and height, upright, that are enough: a JPEG may come out as small as that, but never smaller
            unless it is.
        upright: False leaves the picture as it is stored, whatever its EXIF orientation says, as the released code does.
        transparency: `dropped` shows the colours that lie beneath, often black, as the released code does.

    Raises:
        DamagedSample: not an image, cut short, or larger than `MAX_PIXELS`.
    """
    try:
        image = _open(data, where)
        if at_least is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
            image.draft("RGB", at_least[::-1] if _lies_on_its_side(image) else at_least)
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image) if transparency == "white" else image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _damaged(where, error) from None


def decode_pixels(data: bytes, where: str, *, at_least: tuple[int, int] | None = None) -> npt.NDArray[np.uint8]:
    """The pixels (H, W, 3) of `decode_image`, upright and on white; a plain JPEG does not pass through Pillow's memory.

    Both decoders are libjpeg-turbo and agree to the bit. What simplejpeg does not take, or warns of, Pillow decides.

    Args:
        data, where, at_least: as of `decode_image`.

    Raises:
        DamagedSample: as `decode_image`.
    """
    with contextlib.suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        image = _open(data, where)
        # Below a block, sides rounded up do not say which of eight scales is meant.
        plain = type(image) is JpegImagePlugin.JpegImageFile and image.mode == "RGB" and min(image.size) > _BLOCK
        if plain and not _is_turned(image):
            width, height = (-(-side // _dct_scale(image.size, at_least)) for side in image.size)
            pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
            return pixels
    return np.asarray(decode_image(data, where, at_least=at_least))


def _dct_scale(size: tuple[int, int], at_least: tuple[int, int] | None) -> int:
    """What `Image.draft` would divide the sides by."""
    if at_least is None:
        return 1
    ratio = min(side // least for side, least in zip(size, at_least, strict=True))
    return next((scale for scale in (8, 4, 2) if ratio >= scale), 1)


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
    if image.format in REFUSED_FORMATS:
        raise DamagedSample(f"image {where} is {image.format}, which is not read; prepare its dataset again")
    if image.width * image.height > MAX_PIXELS:
        raise DamagedSample(
            f"image {where} has {image.width} x {image.height} pixels, the limit is {MAX_PIXELS:,}; "
            "prepare its dataset again, which leaves it out"
        )
    return image


def _lies_on_its_side(image: Image.Image) -> bool:
    return image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)


def _is_turned(image: Image.Image) -> bool:
    return image.getexif().get(_ORIENTATION, 1) != 1


def _damaged(where: str, error: Exception) -> DamagedSample:
    reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
    return DamagedSample(f"image {where} cannot be decoded ({reason}); prepare its dataset again")


# --- to RGB -----------------------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB: what is transparent lies on white, more than 8 bits are scaled to 8.

    Raises:
        OSError, SyntaxError, ValueError: it cannot be decoded.
    """
    image.load()
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    drawn = image.convert("RGBA")
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(drawn)
    return page.convert("RGB")


def is_transparent(image: Image.Image) -> bool:
    """Whether any pixel of a decoded image is transparent, wholly or in part."""
    if not image.has_transparency_data or image.mode.startswith("I"):
        return False
    return bool(image.convert("RGBA").getchannel("A").getextrema()[0] != 255)


def _eight_bits(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Grey levels of 16 or 32 bits, or of floating point, as uint8 (H, W).

    16 bits lose their lower half. Other values are taken for 8 bits or for 0 to 1 where they all lie there, and are
    stretched from the least to the largest where they do not.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if (image.mode != "F" and low >= 0 and 255 < high < 65536) or image.mode.startswith("I;16"):
        values = values // 256
    elif image.mode == "F" and low >= 0 and high <= 1:
        values = values * 255
    elif low < 0 or high > 255:
        values = (values - low) * (255 / (high - low))
    return values.clip(0, 255).round().astype(np.uint8)


# --- JPEGs without their end -----------------------------------------------------------------------------------------


def mended_jpeg(content: bytes, at_least: tuple[int, int] | None = None) -> bytes | None:
    """A JPEG whose file was cut near its end, with an end marker; None where more is missing than a tenth of its rows, or
    than the last row of blocks in a small one (a quarter at most).

    Pillow's `LOAD_TRUNCATED_IMAGES` puts the same marker there, however much is missing. How much that is shows when
    other bytes follow the cut: rows that are whole do not change with them.

    Args:
        at_least: decode at a size not below this, as `decode_image` does.

    Raises:
        OSError, SyntaxError, ValueError: it cannot be decoded.
    """
    kept = content.removesuffix(b"\xff")  # the first byte of a marker or of an escaped one
    if not _has_last_scan(kept):
        return None
    height = JpegImagePlugin.JpegImageFile(io.BytesIO(kept)).height
    ended, probed = (_decoded_jpeg(kept + tail + _JPEG_END, at_least) for tail in (b"", _PROBE))
    changed = np.flatnonzero((ended != probed).reshape(len(ended), -1).any(axis=1))
    whole = 1.0 if len(changed) == 0 else float(changed[0] / len(ended))
    needed = max(0.75, min(_ROWS_NEEDED, 1 - _BLOCK_ROWS / height))
    return kept + _JPEG_END if whole >= needed else None


def _has_last_scan(content: bytes) -> bool:
    """Whether the last scan that is there gives the lowest bit of what it is about: earlier ones of a progressive JPEG do
    not, so that more scans are missing altogether."""
    start = content.rfind(_JPEG_SCAN)
    length = int.from_bytes(content[start + 2 : start + 4], "big")
    header = content[start + 2 : start + 2 + length]
    return start >= 0 and len(header) == length > 3 and header[-1] & 0x0F == 0


def _decoded_jpeg(content: bytes, at_least: tuple[int, int] | None) -> npt.NDArray[np.uint8]:
    image = JpegImagePlugin.JpegImageFile(io.BytesIO(content))
    if at_least is not None:
        image.draft(None, at_least)
    return np.asarray(image)


# --- the same for every draw ------------------------------------------------------------------------------------------


def resize_square(image: Image.Image, size: int) -> "Tensor":
    """Resize to a square without keeping the aspect (`blip_image_eval` of the released code): uint8 (3, size, size)."""
    return to_pixels(image.resize((size, size), Image.Resampling.BICUBIC))


def center_crop(image: Image.Image, size: int) -> "Tensor":
    """Resize the shorter side, keep the middle (`clip_image_eval` of the released code): uint8 (3, size, size).

    The longer side is `int(size * long / short)`, as torchvision's `Resize` computes it.
    """
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return to_pixels(resized.crop((left, top, left + size, top + size)))


def to_pixels(image: Image.Image) -> "Tensor":
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# --- by name ----------------------------------------------------------------------------------------------------------

FITS: dict[str, Fit] = {"resize_square": resize_square, "center_crop": center_crop}


def fit_frames(
    frames: Sequence[bytes],
    where: str,
    transform: str,
    size: int,
    *,
    upright: bool = True,
    transparency: str = "white",
) -> "Tensor":
    """The frames of one sample under a transform that draws nothing: uint8 (F, 3, size, size).

    Raises:
        DamagedSample: as `decode_image`, or no frame.
    """
    fit = FITS[transform]
    decoded = [decode_image(frame, where, upright=upright, transparency=transparency) for frame in frames]
    return stack_frames([fit(picture, size) for picture in decoded], where)


def stack_frames(frames: "list[Tensor]", where: str) -> "Tensor":
    if not frames:
        raise DamagedSample(f"image {where} has no frame; prepare its dataset again")
    import torch

    return torch.stack(frames)
