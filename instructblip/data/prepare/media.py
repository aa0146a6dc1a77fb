"""From a raw image or video to what a shard holds: checked by decoding it, kept as it is where that will do.

A sound JPEG or PNG is stored byte for byte, whatever its mode (greyscale, CMYK, palette, RGBA) and EXIF rotation: reading
turns it upright and to RGB, transparency laid on white. Re-encoded, as JPEG, are pictures larger than asked, pictures of
more than 8 bits, and all other formats that Pillow decodes (GIF, WebP, AVIF, BMP, TIFF, ...), which stock WebDataset does
not. A JPEG that lacks only its end is given one.
"""

import contextlib
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

from instructblip import images
from instructblip.data.prepare.ocr import OcrOptions
from instructblip.data.prepare.video import VideoError, read_frames
from instructblip.data.readers import FileSlice, MediaRecords
from instructblip.data.tars import MAX_PICTURE_BYTES

# The extension by which stock WebDataset decodes what is kept. MPO is a JPEG with further pictures behind it, as phones
# write it.
EXTENSION_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}
MAX_BYTES = {"image": MAX_PICTURE_BYTES, "video": 1 << 32}
_JPEG_START = b"\xff\xd8\xff"
# What people take for pictures that are read -> what to do about it.
_OTHER_KINDS = {
    re.compile(rb"....ftyp(hei|hev|mif1|msf1)", re.DOTALL): "HEIC, which is not read; save it as JPEG",
    re.compile(rb"%PDF"): "a PDF; save its pages as JPEG or PNG",
    re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<svg", re.DOTALL): "SVG, which is not read; save it as PNG",
    re.compile(rb"version https://git-lfs"): "a pointer of Git LFS; run git lfs pull",
}
JPEG_QUALITY = 95  # of what is re-encoded and of video frames; chroma halved, as cameras and videos have it


@dataclass(frozen=True)
class MediaOptions:
    """What is stored of an image or video.

    Attributes:
        image_size: pictures and frames whose shorter side is longer are reduced to it, pixels; None: never.
        frames: how many frames of a video.
        ocr: how the OCR tokens are made; None: they are the dataset's own, if any.
    """

    image_size: int | None = None
    frames: int = 4
    ocr: OcrOptions | None = None


# Why a picture is not quite what its file says; counted in the manifest beside what was lost.
WITHOUT_END = "JPEG lacks its end"
TRANSPARENT = "transparent picture, read on white"


class StoredImage(NamedTuple):
    """An image as a shard holds it, and what there is to say of it."""

    extension: str
    content: bytes
    notes: tuple[str, ...] = ()


class MediaError(Exception):
    """An image or video that cannot be kept; the message is the reason it is counted under."""


def read_media(item: MediaRecords, raw: Path) -> tuple[bytes, ...]:
    """The content of an image or video, or of several images that stand together.

    Raises:
        MediaError: a file that is not below the raw folder (or a link that is), does not exist, cannot be read, is no file
            (a pipe or device would be waited for or read for ever), or larger than any sound one.
    """
    what = "video" if item.video else "image"
    several = item.media if isinstance(item.media, tuple) else (item.media,)
    return tuple(
        _read_slice(media, what) if isinstance(media, FileSlice) else _read_file(media, raw, what) for media in several
    )


def _read_file(path: Path, raw: Path, what: str) -> bytes:
    # By name alone: a folder of images may well be a link to where they are.
    if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(raw)):
        raise MediaError(f"{what} name leads out of the raw folder")
    with _opened(path, what) as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES[what]:
            raise MediaError(f"{what} file has more than {MAX_BYTES[what] >> 20:,} MiB")
        return file.read()


def _read_slice(media: FileSlice, what: str) -> bytes:
    if media.size > MAX_BYTES[what]:
        raise MediaError(f"{what} has more than {MAX_BYTES[what] >> 20:,} MiB")
    with _opened(media.path, what) as file:
        file.seek(media.offset)
        content = file.read(media.size)
    if len(content) < media.size:
        raise MediaError(f"{what} file is cut short")
    return content


@contextlib.contextmanager
def _opened(path: Path, what: str) -> Iterator[BinaryIO]:
    """A regular file, open to be read; what goes wrong with it is a MediaError."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise MediaError(f"{what} file is no regular file")
            yield file
    except IsADirectoryError:
        raise MediaError(f"{what} file is no regular file") from None
    except (FileNotFoundError, NotADirectoryError):
        raise MediaError(f"{what} file is missing") from None
    except OSError as error:
        raise MediaError(f"{what} file cannot be read ({error.strerror})") from None
    except ValueError:  # a null byte, or half a Unicode pair
        raise MediaError(f"{what} name is not a file name") from None


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe without a writer would keep us waiting


def stored_frames(
    contents: Sequence[bytes], video: bool, options: MediaOptions
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """What a shard holds of one image or video, or of several images that stand together.

    Returns:
        Extension -> encoded bytes, in order; and what there is to say of it.

    Raises:
        MediaError: one cannot be kept; see `store_image` and `read_frames`.
    """
    if not video:
        stored = [store_image(content, options.image_size) for content in contents]
        extensions = [f"{number}." if len(stored) > 1 else "" for number in range(len(stored))]
        frames = {place + image.extension: image.content for place, image in zip(extensions, stored, strict=True)}
        return frames, tuple(dict.fromkeys(note for image in stored for note in image.notes))
    try:
        frames_shown = read_frames(contents[0], options.frames)
    except VideoError as error:
        raise MediaError(str(error)) from error
    return {f"{number}.jpg": _jpeg(frame, options.image_size) for number, frame in enumerate(frames_shown)}, ()


def store_image(content: bytes, image_size: int | None = None) -> StoredImage:
    """Decode an image completely and return extension and bytes to store it under and as.

    Raises:
        MediaError: nothing in it, no image, a format that is not taken, cut short by more than its end, damaged, a single
            pixel (what a shop sends for a picture that is gone), or so many pixels (over `MAX_PIXELS`, which reading
            refuses, after a JPEG was reduced in decoding) that it may be meant to exhaust memory.
    """
    if not content:
        raise MediaError("image file is empty")
    try:
        return _store(content, image_size)
    except MediaError:
        raise
    except Image.DecompressionBombError:
        raise MediaError("image has too many pixels (decompression bomb)") from None
    except UnidentifiedImageError:
        kind = next((f" but {name}" for pattern, name in _OTHER_KINDS.items() if pattern.match(content)), "")
        raise MediaError(f"file is not an image{kind}") from None
    except Exception as error:  # a decoder fed with damaged bytes may raise anything; it is counted, not swallowed
        if not (isinstance(error, OSError) and "truncated" in str(error)):
            raise MediaError("image is damaged") from error
        return _store_without_end(content, image_size)


def _store_without_end(content: bytes, image_size: int | None) -> StoredImage:
    enough = None if image_size is None else (2 * image_size, 2 * image_size)
    with contextlib.suppress(Exception):  # whatever a decoder makes of damaged bytes: the file is truncated
        if content.startswith(_JPEG_START) and (mended := images.mended_jpeg(content, enough)):
            stored = _store(mended, image_size)
            return stored._replace(notes=(WITHOUT_END, *stored.notes))
    raise MediaError("image is truncated")


def _store(content: bytes, image_size: int | None) -> StoredImage:
    with warnings.catch_warnings(action="ignore"), _open(content, image_size) as image:
        too_large = image_size is not None and min(image.size) > image_size
        if image_size is not None and too_large:
            ample = (2 * image_size, 2 * image_size)  # a JPEG is decoded at half the size, and half of that, above it
            image.draft(None, ample)
        _check_pixels(image)
        if image.width * image.height == 1:
            raise MediaError("image is a single pixel")
        if image.format in images.REFUSED_FORMATS:
            raise MediaError(f"image format {image.format} is not taken")
        extension = EXTENSION_OF_FORMAT.get(image.format or "")
        deep = image.mode == "F" or image.mode.startswith("I")
        rgb = images.to_rgb(ImageOps.exif_transpose(image))  # as reading does
        notes = (TRANSPARENT,) if images.is_transparent(image) else ()
        if too_large or deep or extension is None:
            return StoredImage("jpg", _jpeg(rgb, image_size), notes)
        return StoredImage(extension, content, notes)


def _open(content: bytes, image_size: int | None) -> Image.Image:
    """Open an image. Pillow refuses many pixels at once; a JPEG that is to be reduced may have more of them, unless it is
    progressive: all coefficients of such a one are in memory, at its full size."""
    if image_size is not None and content.startswith(_JPEG_START):
        image: Image.Image = JpegImagePlugin.JpegImageFile(io.BytesIO(content))
        if not image.info.get("progressive"):
            return image
    image = Image.open(io.BytesIO(content))
    _check_pixels(image)
    return image


def _check_pixels(image: Image.Image) -> None:
    if image.width * image.height > images.MAX_PIXELS:
        raise Image.DecompressionBombError


def _jpeg(image: Image.Image, image_size: int | None) -> bytes:
    if image_size is not None and min(image.size) > image_size:
        scale = image_size / min(image.size)
        size = (max(image_size, round(image.width * scale)), max(image_size, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
