"""What a shard holds of an image or video: kept as it is when sound, re-encoded when asked or needed, else a reason."""

import dataclasses
import hashlib
import io
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from instructblip import images
from instructblip.data.prepare.media import (
    TRANSPARENT,
    WITHOUT_END,
    MediaError,
    MediaOptions,
    read_media,
    store_image,
    stored_frames,
)
from instructblip.data.readers import FileSlice, MediaRecords
from instructblip.images import decode_image


def _image(format: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(buffer, format)
    return buffer.getvalue()


def _halves(format: str, size: tuple[int, int], **options: object) -> bytes:
    """A picture whose left half is red and right half blue."""
    image = Image.new("RGB", size, "blue")
    image.paste("red", (0, 0, size[0] // 2, size[1]))
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _turned(size: tuple[int, int]) -> bytes:
    """As a camera held upright writes it: to be turned a quarter clockwise, so that red comes to the top."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return _halves("JPEG", size, exif=exif)


def _color(image: Image.Image, place: tuple[float, float]) -> str:
    red, _, blue = image.getpixel((int(place[0] * image.width), int(place[1] * image.height)))
    return "red" if red > 200 > 60 > blue else "blue" if blue > 200 > 60 > red else "?"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "image file is empty"),
        (bytes(300), "file is not an image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "file is not an image but HEIC, which is not read; save it as JPEG"),
        (b"%PDF-1.7\n", "file is not an image but a PDF; save its pages as JPEG or PNG"),
        (b'<?xml version="1.0"?>\n<svg/>', "file is not an image but SVG, which is not read; save it as PNG"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "file is not an image but a pointer of Git LFS; run git lfs pull",
        ),
        (b"<!DOCTYPE html><html>not found</html>", "file is not an image"),
        (_image("JPEG")[:-200], "image is truncated"),
        (_image("PNG")[:300], "image is truncated"),
        (_image("PNG")[:-200], "image is truncated"),
        (_image("GIF", "L")[:-200], "image is truncated"),
        (_image("GIF", "L", (1, 1)), "image is a single pixel"),
        (_image("JPEG", "RGB", (1, 1)), "image is a single pixel"),
        (_image("EPS"), "image format EPS is not taken"),
        (_halves("PNG", (3000, 3000)), "too many pixels"),
        (_image("PNG")[:45] + b"\xff" * 40 + _image("PNG")[85:], "image is"),
    ],
)
def test_bad_images_have_a_reason(content: bytes, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 5_000_000)
    with pytest.raises(MediaError, match=reason):
        store_image(content)
    with pytest.raises(MediaError, match=reason):
        store_image(content, image_size=8)


@pytest.mark.parametrize(
    ("format", "mode", "extension"),
    [
        ("PNG", "RGB", "png"),
        ("PNG", "RGBA", "png"),
        ("PNG", "LA", "png"),
        ("PNG", "P", "png"),
        ("PNG", "1", "png"),
        ("JPEG", "L", "jpg"),
        ("JPEG", "CMYK", "jpg"),
        ("MPO", "RGB", "jpg"),
    ],
)
def test_sound_images_are_kept_whatever_their_mode(format: str, mode: str, extension: str) -> None:
    content = _image(format, mode)
    assert store_image(content) == (extension, content, ())
    assert store_image(content, image_size=30) == (extension, content, ())
    assert store_image(_image(format, mode, (1, 2)))[0] == extension
    reduced = Image.open(io.BytesIO(store_image(content, image_size=15)[1]))
    assert (reduced.format, reduced.mode, reduced.size) == ("JPEG", "RGB", (20, 15))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "BMP", "TIFF", "AVIF", "PPM", "TGA"])
def test_formats_that_webdataset_cannot_decode_are_re_encoded(format: str) -> None:
    extension, content, _ = store_image(_halves(format, (40, 30)))
    image = Image.open(io.BytesIO(content))
    assert (extension, image.format, image.size) == ("jpg", "JPEG", (40, 30))
    assert (_color(image, (0.2, 0.5)), _color(image, (0.8, 0.5))) == ("red", "blue")


def test_sixteen_bits_are_reduced_to_eight_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(np.tile(ramp, (8, 1))).save(buffer, "PNG")
    extension, content, _ = store_image(buffer.getvalue())
    pixels = np.asarray(decode_image(content, "ramp"), dtype=int)
    assert extension == "jpg"
    assert abs(pixels[4, :, 0] - ramp // 256).max() <= 4


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 255), (-5, 5), (0, 70_000)])
def test_floating_point_and_32_bits_are_scaled_to_eight(low: int, high: int) -> None:
    ramp = np.linspace(low, high, 64).astype(np.int32 if high > 255 else np.float32)
    buffer = io.BytesIO()
    Image.fromarray(np.tile(ramp, (8, 1))).save(buffer, "TIFF")
    pixels = np.asarray(decode_image(store_image(buffer.getvalue())[1], "ramp"), dtype=int)
    assert abs(pixels[4, :, 0] - np.linspace(0, 255, 64)).max() <= 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white_and_said(mode: str) -> None:
    drawn = Image.new("RGBA", (80, 60), (0, 0, 0, 0))
    drawn.paste((0, 0, 0, 255), (20, 20, 60, 40))
    buffer = io.BytesIO()
    drawn.convert(mode).save(buffer, "PNG")
    kept, small = store_image(buffer.getvalue()), store_image(buffer.getvalue(), image_size=30)
    assert tuple(kept) == ("png", buffer.getvalue(), (TRANSPARENT,))
    assert small.notes == (TRANSPARENT,)
    for content in (kept.content, small.content):
        image = decode_image(content, "drawn")
        assert [image.getpixel((1, 1)), image.getpixel((image.width // 2, image.height // 2))] == [(255,) * 3, (0,) * 3]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("image_size", [None, 16])
def test_a_jpeg_that_lacks_only_its_end_is_kept_and_said(progressive: bool, image_size: int | None) -> None:
    buffer = io.BytesIO()
    picture = Image.effect_noise((96, 96), 60).convert("RGB")
    picture.save(buffer, "JPEG", quality=90, progressive=progressive)
    whole = buffer.getvalue()
    for cut in (1, 2):
        extension, content, notes = store_image(whole[:-cut], image_size)
        assert (extension, notes) == ("jpg", (WITHOUT_END,))
        if image_size is None:
            assert content == whole
    for share in (0.5, 0.8):
        with pytest.raises(MediaError, match="image is truncated"):
            store_image(whole[: int(share * len(whole))], image_size)


def test_a_large_jpeg_is_reduced_before_its_pixels_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100_000)
    content = _halves("JPEG", (800, 600))
    assert Image.open(io.BytesIO(store_image(content, image_size=60).content)).size == (80, 60)
    progressive = _halves("JPEG", (800, 600), progressive=True)  # whose coefficients are in memory at full size
    for large, image_size in ((content, None), (content, 400), (progressive, 60)):
        with pytest.raises(MediaError, match="too many pixels"):
            store_image(large, image_size)


def test_a_turned_image_is_kept_and_read_upright_and_reduced_upright() -> None:
    content = _turned((80, 40))
    assert store_image(content) == ("jpg", content, ())
    upright = decode_image(content, "kept")
    reduced = Image.open(io.BytesIO(store_image(content, image_size=20)[1]))
    assert (upright.size, reduced.size, reduced.getexif()) == ((40, 80), (20, 40), {})
    for image in (upright, reduced):
        assert (_color(image, (0.5, 0.2)), _color(image, (0.5, 0.8))) == ("red", "blue")


@pytest.mark.parametrize(
    ("size", "reduced"), [((500, 301), (166, 100)), ((64, 700), (64, 700)), ((1000, 120), (833, 100))]
)
def test_the_shorter_side_is_reduced_and_never_enlarged(size: tuple[int, int], reduced: tuple[int, int]) -> None:
    assert Image.open(io.BytesIO(store_image(_image("JPEG", "RGB", size), image_size=100)[1])).size == reduced


def test_equal_input_gives_equal_bytes() -> None:
    content = _halves("JPEG", (300, 200))
    assert len({hashlib.sha256(store_image(content, image_size=50)[1]).digest() for _ in range(3)}) == 1


# --- files -----------------------------------------------------------------------------------------------------------


def test_only_files_below_the_raw_folder_are_read(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    (raw / "images").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "elsewhere/a.png").write_bytes(b"a")
    (raw / "linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(raw / "pipe.png")
    (raw / "zero.png").symlink_to("/dev/zero")
    (raw / "large.png").touch()
    os.truncate(raw / "large.png", (1 << 28) + 1)  # takes no space

    def read(media: Path, video: bool = False) -> bytes:
        (content,) = read_media(MediaRecords("key", "id", media, [], video), raw)
        return content

    assert read(raw / "linked/a.png") == b"a"
    assert read(raw / "images/../linked/a.png") == b"a"
    for name in ("../secret.png", "images/../../secret.png", str(tmp_path / "secret.png"), "/etc/passwd"):
        with pytest.raises(MediaError, match="image name leads out of the raw folder"):
            read(raw / name)
    for name, reason in (
        ("images/none.png", "image file is missing"),
        ("images", "image file is no regular file"),
        ("pipe.png", "image file is no regular file"),
        ("zero.png", "image file is no regular file"),
        ("large.png", "image file has more than 256 MiB"),
        ("linked/a.png/b.png", "image file is missing"),
        ("a\0b.png", "image name is not a file name"),
        ("\ud800.png", "image name is not a file name"),
        ("a" * 300, r"image file cannot be read \(File name too long\)"),
    ):
        with pytest.raises(MediaError, match=reason):
            read(raw / name)
    with pytest.raises(MediaError, match="video file is missing"):
        read(raw / "none.mp4", video=True)


def test_a_part_of_a_file_is_read_and_several_images_stand_together(tmp_path: Path) -> None:
    (tmp_path / "all.bin").write_bytes(b"..one.two..")
    one, two, behind = (FileSlice(tmp_path / "all.bin", offset, 3, f"at {offset}") for offset in (2, 6, 10))
    assert read_media(MediaRecords("key", "id", (one, two), []), tmp_path / "raw") == (b"one", b"two")
    with pytest.raises(MediaError, match="image file is cut short"):
        read_media(MediaRecords("key", "id", behind, []), tmp_path)
    with pytest.raises(MediaError, match="image has more than 256 MiB"):
        read_media(MediaRecords("key", "id", dataclasses.replace(one, size=1 << 29), []), tmp_path)
    pictures = [_image("PNG"), _image("JPEG")]
    frames, _ = stored_frames(pictures, False, MediaOptions())
    assert list(frames.items()) == list(zip(["0.png", "1.jpg"], pictures, strict=True))


# --- videos ----------------------------------------------------------------------------------------------------------


def video(path: Path, seconds: int = 4, size: tuple[int, int] = (96, 64)) -> bytes:
    """A video of ten frames a second that is red in its first half and blue in the second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.time_base = Fraction(1, 10)
        for number in range(10 * seconds):
            picture = Image.new("RGB", size, "red" if number < 5 * seconds else "blue")
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path.read_bytes()


def test_a_video_is_stored_as_frames_in_order(tmp_path: Path) -> None:
    frames, _ = stored_frames([video(tmp_path / "a.mp4")], True, MediaOptions())
    assert list(frames) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    images = [decode_image(frame, "frame") for frame in frames.values()]
    assert [image.size for image in images] == [(96, 64)] * 4
    assert [_color(image, (0.5, 0.5)) for image in images] == ["red", "red", "blue", "blue"]
    small, _ = stored_frames([video(tmp_path / "a.mp4")], True, MediaOptions(image_size=32, frames=2))
    assert [decode_image(frame, "frame").size for frame in small.values()] == [(48, 32)] * 2


def test_a_bad_video_has_a_reason() -> None:
    with pytest.raises(MediaError, match="video"):
        stored_frames([b"<html>"], True, MediaOptions())
