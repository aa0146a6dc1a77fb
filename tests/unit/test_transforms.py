"""Whatever is decoded comes out as upright RGB; whatever cannot be is refused in one line that names the image."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from instructblip.data import transforms
from instructblip.data.transforms import decode_image, squash
from instructblip.errors import UserError


def _encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _corners(image: Image.Image) -> list[object]:
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(place) for place in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


def _noise(size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_rgb_is_kept_bit_by_bit() -> None:
    decoded = decode_image(_encode(_noise()), "x")
    assert decoded.mode == "RGB"
    assert np.array_equal(np.array(decoded), np.array(_noise()))


def test_greyscale_becomes_three_equal_channels() -> None:
    assert decode_image(_encode(Image.new("L", (3, 2), 77)), "x").getpixel((1, 1)) == (77, 77, 77)
    assert decode_image(_encode(Image.new("1", (3, 2), 1)), "x").getpixel((1, 1)) == (255, 255, 255)
    assert decode_image(_encode(Image.new("L", (3, 2), 77), "JPEG"), "x").getpixel((1, 1)) == (77, 77, 77)


def test_palette_becomes_its_colours() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    decoded = decode_image(_encode(image), "x")
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (200, 100, 50)]


def test_transparency_is_dropped() -> None:
    assert decode_image(_encode(Image.new("RGBA", (2, 2), (1, 2, 3, 0))), "x").getpixel((0, 0)) == (1, 2, 3)
    assert decode_image(_encode(Image.new("LA", (2, 2), (9, 0))), "x").getpixel((0, 0)) == (9, 9, 9)


def test_cmyk_jpeg_is_decoded() -> None:
    assert decode_image(_encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"), "x").getpixel((4, 4)) == (255,) * 3


# EXIF orientation -> where the stored corners (top left, top right, bottom left, bottom right) belong.
@pytest.mark.parametrize(
    ("orientation", "order"),
    [(1, [0, 1, 2, 3]), (2, [1, 0, 3, 2]), (3, [3, 2, 1, 0]), (4, [2, 3, 0, 1]), (6, [2, 0, 3, 1]), (8, [1, 3, 0, 2])],
)
def test_exif_orientation_is_applied(orientation: int, order: list[int]) -> None:
    image = Image.new("RGB", (4, 3))
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    for place, colour in zip(((0, 0), (3, 0), (0, 2), (3, 2)), colours, strict=True):
        image.putpixel(place, colour)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(_encode(image, exif=exif), "x")
    assert decoded.size == ((3, 4) if orientation in (6, 8) else (4, 3))
    assert _corners(decoded) == [colours[number] for number in order]


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_cut_short(format: str) -> None:
    data = _encode(_noise(), format)
    for length in (len(data) // 2, 30, 1):
        with pytest.raises(UserError, match=r"image 7 of shard\.tar cannot be decoded \(.+\); prepare its dataset"):
            decode_image(data[:length], "7 of shard.tar")


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n", bytes(100)])
def test_not_an_image(data: bytes) -> None:
    with pytest.raises(UserError, match=r"image 7 cannot be decoded \(not an image\)"):
        decode_image(data, "7")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_damaged_bytes_never_give_another_error(format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stream, whole = random.Random(0), _encode(_noise(), format, exif=exif)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(3):
            data[stream.randrange(min(len(data), 200))] = stream.randrange(256)
        try:
            assert decode_image(bytes(data), "x").mode == "RGB"
        except UserError:
            refused += 1
    assert refused > 50


def test_limit_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "MAX_PIXELS", 1200)
    assert decode_image(_encode(_noise((40, 30))), "x").size == (40, 30)
    with pytest.raises(UserError, match=r"image bomb has 41 x 30 pixels, the limit is 1,200"):
        decode_image(_encode(_noise((41, 30))), "bomb")


@pytest.mark.parametrize("side", [9_000, 40_000])
def test_a_header_that_promises_too_much_is_refused_unread(side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(UserError, match=r"image bomb .*(pixels|bomb)"):
        decode_image(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", 0), "bomb")


def test_squash_ignores_the_aspect() -> None:
    image = Image.new("RGB", (40, 10), (10, 20, 30))
    squashed = squash(image, 8)
    assert (squashed.dtype, tuple(squashed.shape)) == (torch.uint8, (3, 8, 8))
    assert squashed.is_contiguous()
    assert squashed.flatten(1).unique(dim=1).flatten().tolist() == [10, 20, 30]


def test_squash_keeps_what_has_the_size() -> None:
    pixels = squash(_noise((16, 16)), 16)
    assert torch.equal(pixels, torch.from_numpy(np.array(_noise((16, 16)))).permute(2, 0, 1))
