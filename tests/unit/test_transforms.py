"""Whatever is decoded comes out as upright RGB; whatever cannot be is refused in one line that names the image."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as torchvision_functional

from instructblip import images
from instructblip.data import transforms
from instructblip.data.transforms import (
    AUGMENTATIONS,
    OPERATIONS,
    TRANSFORMS,
    Augmentation,
    Operation,
    View,
    apply_operations,
    augment_frames,
    draw_operations,
    draw_view,
    show_view,
)
from instructblip.errors import DamagedSample, UserError
from instructblip.images import center_crop, decode_image, decode_pixels, fit_frames, image_size, resize_square


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


def test_transparency_is_laid_on_white() -> None:
    for mode, color, seen in (
        ("RGBA", (1, 2, 3, 0), 255),
        ("LA", (9, 0), 255),
        ("LA", (9, 255), 9),
        ("LA", (0, 51), 204),
    ):
        assert decode_image(_encode(Image.new(mode, (2, 2), color)), "x").getpixel((0, 0)) == (seen,) * 3
    assert decode_image(_encode(Image.new("RGBA", (2, 2), (1, 2, 3, 255))), "x").getpixel((0, 0)) == (1, 2, 3)


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
    assert _corners(decode_image(_encode(image, exif=exif), "x", upright=False)) == colours


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_cut_short(format: str) -> None:
    data = _encode(_noise(), format)
    for length in (len(data) // 2, 30, 1):
        with pytest.raises(UserError, match=r"image 7 of shard\.tar cannot be decoded \(.+\); prepare its dataset"):
            decode_image(data[:length], "7 of shard.tar")


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _photo(size: tuple[int, int] = (333, 251)) -> Image.Image:
    """Smooth colours, as a photograph's, so that chroma is subsampled and interpolated somewhere."""
    return _noise((12, 9)).resize(size, Image.Resampling.BICUBIC)


PICTURES = {
    "baseline": _encode(_photo(), "JPEG", quality=90),
    "progressive": _encode(_photo(), "JPEG", progressive=True),
    "full chroma": _encode(_photo(), "JPEG", subsampling=0),
    "half chroma": _encode(_photo((64, 501)), "JPEG", subsampling=1),
    "restarts": _encode(_photo(), "JPEG", restart_marker_blocks=3),
    "grey": _encode(_photo().convert("L"), "JPEG"),
    "cmyk": _encode(_photo().convert("CMYK"), "JPEG"),
    "turned": _encode(_photo(), "JPEG", exif=_exif(6)),
    "not turned": _encode(_photo(), "JPEG", exif=_exif(1)),
    "bytes behind its end": _encode(_photo(), "JPEG") + b"\0" * 99,
    "transparent": _encode(_photo().convert("RGBA").rotate(30, fillcolor=(0, 0, 0, 0))),
    "webp": _encode(_photo(), "WEBP"),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize(
    "at_least", [None, (9, 9), (40, 30), (60, 60), (83, 62), (120, 90), (166, 125), (167, 126), (500, 400)]
)
def test_pixels_are_those_of_pillow(name: str, at_least: tuple[int, int] | None) -> None:
    expected = np.asarray(decode_image(PICTURES[name], "x", at_least=at_least))
    assert np.array_equal(decode_pixels(PICTURES[name], "x", at_least=at_least), expected)


@pytest.mark.parametrize("at_least", [None, (1, 1), (2, 2), (5, 5)])
def test_pixels_of_the_smallest_pictures_are_those_of_pillow(at_least: tuple[int, int] | None) -> None:
    for width in range(1, 20):
        for height in (1, 3, 5, 8, 9, width):
            data = _encode(_noise((width, height)), "JPEG", quality=90, subsampling=0)
            expected = np.asarray(decode_image(data, "x", at_least=at_least))
            assert np.array_equal(decode_pixels(data, "x", at_least=at_least), expected), (width, height)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_pictures_give_the_same_pixels_or_the_same_line() -> None:
    stream, refused = random.Random(0), 0
    for name in ("baseline", "progressive", "turned"):
        for _ in range(60):
            data = bytearray(PICTURES[name])
            for _ in range(3):
                data[stream.randrange(len(data))] = stream.randrange(256)
            damaged = bytes(data[: stream.choice((len(data), len(data), stream.randrange(len(data))))])
            found: list[tuple[object, object]] = []
            for decode in (decode_image, decode_pixels):
                try:
                    pixels = np.asarray(decode(damaged, "x"))
                    found.append((pixels.shape, pixels.tobytes()))  # a damaged size may be 50 megapixels
                except DamagedSample as error:
                    found.append((None, str(error)))
            assert found[0] == found[1]
            refused += found[0][0] is None
    assert 30 < refused < 150


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
    monkeypatch.setattr(images, "MAX_PIXELS", 1200)
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
    squashed = resize_square(image, 8)
    assert (squashed.dtype, tuple(squashed.shape)) == (torch.uint8, (3, 8, 8))
    assert squashed.is_contiguous()
    assert squashed.flatten(1).unique(dim=1).flatten().tolist() == [10, 20, 30]


def test_squash_keeps_what_has_the_size() -> None:
    pixels = resize_square(_noise((16, 16)), 16)
    assert torch.equal(pixels, torch.from_numpy(np.array(_noise((16, 16)))).permute(2, 0, 1))


# --- by name ----------------------------------------------------------------------------------------------------------


def test_center_crop_is_torchvisions() -> None:
    # 570 x 380 at 224: the longer side is 336, not 335 as 380 * (224 / 380) rounds.
    for *size, side in ((60, 40, 24), (40, 60, 24), (31, 97, 24), (50, 50, 24), (570, 380, 224), (428, 642, 32)):
        image = _noise((size[0], size[1]))
        resized = torchvision_functional.resize(image, side, InterpolationMode.BICUBIC)
        expected = np.array(torchvision_functional.center_crop(resized, side))
        assert np.array_equal(center_crop(image, side).permute(1, 2, 0).numpy(), expected)


def test_fits_draw_nothing_and_keep_every_frame() -> None:
    frames = [_encode(_noise((40, 30))), _encode(_noise((20, 30)), "JPEG")]
    for name, fit in (("resize_square", resize_square), ("center_crop", center_crop)):
        found = fit_frames(frames, "x", name, 16)
        assert torch.equal(found, torch.stack([fit(decode_image(frame, "x"), 16) for frame in frames]))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_sample_without_frames_or_with_an_empty_one_is_damaged(name: str) -> None:
    def transform(frames: list[bytes]) -> torch.Tensor:
        if name in AUGMENTATIONS:
            return augment_frames(frames, "7 of a.tar", name, 16, np.random.default_rng(0))
        return fit_frames(frames, "7 of a.tar", name, 16)

    with pytest.raises(DamagedSample, match=r"image 7 of a\.tar has no frame"):
        transform([])
    with pytest.raises(DamagedSample, match=r"image 7 of a\.tar cannot be decoded \(not an image\)"):
        transform([b""])


# --- decoding towards a size ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at_least", "decoded"),
    [((640, 480), (640, 480)), ((321, 10), (640, 480)), ((320, 240), (320, 240)), ((100, 100), (160, 120)),
     ((10, 10), (80, 60)), ((1000, 10), (640, 480))],
)  # fmt: skip
def test_jpeg_is_decoded_at_the_smallest_scale_that_is_enough(
    at_least: tuple[int, int], decoded: tuple[int, int]
) -> None:
    data = _encode(Image.new("RGB", (640, 480), (200, 100, 50)), "JPEG")
    found = decode_image(data, "x", at_least=at_least)
    assert found.size == decoded
    assert max(abs(a - b) for a, b in zip(found.getpixel((5, 5)), (200, 100, 50), strict=True)) < 6


def test_orientation_is_known_before_decoding() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = _encode(Image.new("RGB", (640, 480)), "JPEG", exif=exif)
    assert image_size(data, "x") == (480, 640)
    assert decode_image(data, "x", at_least=(240, 100)).size == (240, 320)
    assert decode_image(data, "x", at_least=(241, 100)).size == (480, 640)
    assert decode_image(_encode(_noise((40, 30))), "x", at_least=(4, 3)).size == (40, 30)  # PNG has no such scales


def test_a_crop_is_never_decoded_below_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, interpolate = [], torch.nn.functional.interpolate

    def spy(crop: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append(tuple(crop.shape[2:]))
        return interpolate(crop, **options)

    monkeypatch.setattr(transforms.functional, "interpolate", spy)
    data = _encode(_noise((333, 217)), "JPEG")
    random = np.random.default_rng(3)
    for _ in range(200):
        view = draw_view(AUGMENTATIONS["blip2_image_train"], (333, 217), random)
        show_view(data, "x", view, 48)
    assert min(min(size) for size in seen) >= 48
    assert max(size[0] for size in seen) <= 109  # and always at half of 217 or less


# --- drawn ------------------------------------------------------------------------------------------------------------


def test_a_view_in_full_is_torchvisions_resized_crop() -> None:
    data, random = _encode(_noise((50, 40))), np.random.default_rng(1)
    image = decode_image(data, "x")
    for flip in (False, True):
        view = draw_view(Augmentation((0.5, 1.0), flip=False), (50, 40), random)._replace(flip=flip)
        box = [round(view.top * 40), round(view.left * 50), round(view.height * 40), round(view.width * 50)]
        cropped = torchvision_functional.resized_crop(image, *box, [32, 32], InterpolationMode.BICUBIC)
        expected = np.array(torchvision_functional.hflip(cropped) if flip else cropped).astype(int)
        found = show_view(data, "x", view, 32)
        assert (found.dtype, tuple(found.shape), found.is_contiguous()) == (torch.uint8, (3, 32, 32), True)
        assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() <= 1


def test_crops_have_the_stated_areas_and_ratios() -> None:
    random = np.random.default_rng(0)
    for name, least in (
        ("blip_image_train", 0.5),
        ("blip_image_pretrain", 0.2),
        ("blip2_image_train", 0.5),
        ("clip_image_train", 0.9),
    ):
        views = [draw_view(AUGMENTATIONS[name], (640, 480), random) for _ in range(300)]
        areas = np.array([view.width * view.height for view in views])
        ratios = np.array([view.width * 640 / (view.height * 480) for view in views])
        assert least - 0.01 < areas.min() < least + 0.05
        assert 0.95 < areas.max() <= 1.0
        assert ratios.min() > 0.74
        assert ratios.max() < 1.34
        assert all(
            0 <= view.left <= 1 - view.width + 1e-9 and 0 <= view.top <= 1 - view.height + 1e-9 for view in views
        )
        assert {view.flip for view in views} == ({False} if name == "clip_image_train" else {False, True})
        assert any(view.operations for view in views) == name.startswith("blip_")


@pytest.mark.parametrize(("size", "kept"), [((1000, 10), (13, 10)), ((10, 1000), (10, 13))])
def test_an_image_that_no_crop_fits_gives_its_middle(size: tuple[int, int], kept: tuple[int, int]) -> None:
    view = draw_view(Augmentation((0.9, 1.0), flip=False), size, np.random.default_rng(0))
    assert (round(view.width * size[0]), round(view.height * size[1])) == kept
    assert view.left == pytest.approx((1 - view.width) / 2, abs=0.01)


def test_flip_is_left_out_where_a_dataset_forbids_it() -> None:
    random = np.random.default_rng(0)
    views = [draw_view(AUGMENTATIONS["blip2_image_train"], (64, 48), random, flip=False) for _ in range(50)]
    assert not any(view.flip for view in views)


def test_the_stream_decides_and_no_global_one() -> None:
    data = _encode(_noise((64, 48)), "JPEG")
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state())
    found = [augment_frames([data], "x", "blip_image_train", 32, np.random.default_rng(k)) for k in (4, 4, 5)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state())
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_frames_of_a_video_share_a_view() -> None:
    data = _encode(_noise((64, 48)), "JPEG")
    for seed in range(5):
        frames = augment_frames([data] * 3, "x", "blip_image_train", 32, np.random.default_rng(seed))
        assert frames.shape == (3, 3, 32, 32)
        assert torch.equal(frames[0], frames[2])


def test_operations_are_drawn_evenly_and_half_of_them_left_out() -> None:
    random = np.random.default_rng(0)
    drawn = [operation for _ in range(4000) for operation in draw_operations(random, 2, 5)]
    assert abs(len(drawn) - 4000) < 200
    counts = {name: sum(operation.name == name for operation in drawn) for name in OPERATIONS}
    assert min(counts.values()) > 320
    assert max(counts.values()) < 480
    strengths = {name: {round(o.strength, 6) for o in drawn if o.name == name} for name in OPERATIONS}
    assert strengths["brightness"] == strengths["sharpness"] == {1.0}
    assert strengths["shear_x"] == strengths["shear_y"] == {-0.15, 0.15}
    assert strengths["translate_x"] == strengths["translate_y"] == {-5.0, 5.0}
    assert strengths["rotate"] == {-15.0, 15.0}


def test_operations_do_what_they_are_called() -> None:
    image = _noise((32, 32))
    pixels = np.array(image)

    def apply(name: str, strength: float) -> np.ndarray:
        return np.array(apply_operations(image, (Operation(name, strength),)))

    for name in ("identity", "brightness", "sharpness"):
        assert np.array_equal(apply(name, 1.0), pixels)
    assert np.array_equal(apply("translate_x", 5.0)[:, :-5], pixels[:, 5:])
    assert (apply("translate_x", 5.0)[:, -5:] == 128).all()
    assert np.array_equal(apply("translate_y", -5.0)[5:], pixels[:-5])
    assert np.abs(apply("brightness", 0.5).astype(int) - pixels // 2).max() <= 1
    assert tuple(apply("rotate", 15.0)[0, 0]) == tuple(apply("rotate", -15.0)[0, 31]) == (128,) * 3
    assert tuple(apply("shear_x", 0.15)[31, 0]) == (128,) * 3
    dark = Image.fromarray(pixels // 4)
    assert np.array(apply_operations(dark, (Operation("auto_contrast", 0.0),))).max() == 255
    assert np.array(apply_operations(dark, (Operation("equalize", 0.0),))).mean() > 100
    both = apply_operations(image, (Operation("translate_x", 5.0), Operation("translate_y", 5.0)))
    assert np.array_equal(np.array(both)[:-5, :-5], pixels[5:, 5:])


def test_a_view_applies_its_operations_to_the_resized_crop() -> None:
    data = _encode(_noise((32, 32)))
    whole = View(0.0, 0.0, 1.0, 1.0, flip=True, operations=(Operation("translate_x", 5.0),))
    expected = torch.from_numpy(np.array(_noise((32, 32)))).permute(2, 0, 1).flip(2)
    assert torch.equal(show_view(data, "x", whole, 32)[:, :, :-5], expected[:, :, 5:])
