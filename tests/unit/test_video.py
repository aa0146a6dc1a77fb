"""Frames of a video: the middles of equal segments, in order, RGB, upright; a bad file has one reason."""

import io
from itertools import cycle, islice
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from instructblip import images
from instructblip.data.prepare import video
from instructblip.data.prepare.video import VideoError, middle_frames, read_frames
from tests.kit.videos import COLORS, color_of, colors_of, write_video

NAMES = list(COLORS)


def _colors(count: int) -> list[str]:
    return list(islice(cycle(NAMES), count))


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a.mp4", "libx264", None),
        ("a.mp4", "mpeg4", None),
        ("a.avi", "mpeg4", None),
        ("a.avi", "libx264", None),  # times of packets and frames differ: decoded twice
        ("a.mkv", "libx264", None),  # states no number of frames
        ("a.webm", "libvpx", None),
        ("a.ts", "libx264", "mpegts"),
    ],
)
def test_the_middle_frame_of_each_segment(tmp_path: Path, name: str, codec: str, container: str | None) -> None:
    path = write_video(tmp_path / name, _colors(24), codec=codec, container=container)
    frames = read_frames(path, 4)
    assert colors_of(frames) == [NAMES[number % 8] for number in (3, 9, 15, 21)]
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (64, 48))}
    assert colors_of(read_frames(path, 1)) == [NAMES[12 % 8]]
    assert colors_of(read_frames(path.read_bytes(), 24)) == _colors(24)
    again = read_frames(path, 4)
    assert [frame.tobytes() for frame in again] == [frame.tobytes() for frame in frames]


def test_a_long_video_is_sampled_to_its_end(tmp_path: Path) -> None:
    """The frames of the last segment are all of one colour: none is missed, none comes from past the end."""
    colors = ["red"] * 25 + ["green"] * 25 + ["blue"] * 25 + ["white"] * 25
    path = write_video(tmp_path / "a.mp4", colors, codec="libx264")
    assert colors_of(read_frames(path, 4)) == ["red", "green", "blue", "white"]
    assert colors_of(read_frames(path, 8)) == ["red", "red", "green", "green", "blue", "blue", "white", "white"]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, ["red"] * 4),
        (2, ["red", "red", "green", "green"]),
        (3, ["red", "green", "green", "blue"]),
        (4, ["red", "green", "blue", "yellow"]),
    ],
)
def test_a_short_video_repeats_frames_in_order(tmp_path: Path, count: int, expected: list[str]) -> None:
    assert colors_of(read_frames(write_video(tmp_path / "a.mp4", _colors(count)), 4)) == expected


def test_segments_are_of_equal_time_at_a_variable_frame_rate(tmp_path: Path) -> None:
    """Six frames in 4.8 s (the last is taken to last 0.8 s, the mean): middles at 0.6, 1.8, 3.0 and 4.2 s."""
    path = write_video(tmp_path / "a.mkv", NAMES[:6], codec="libx264", times=[0, 1000, 1100, 1200, 1300, 4000])
    assert colors_of(read_frames(path, 4)) == [NAMES[number] for number in (0, 4, 4, 5)]


@pytest.mark.parametrize(
    ("times", "frames", "expected"),
    [
        (range(280), 4, [35, 105, 175, 245]),
        (range(7, 287), 4, [35, 105, 175, 245]),
        (range(0, 28000, 1000), 4, [3, 10, 17, 24]),
        (range(5), 5, [0, 1, 2, 3, 4]),
        ([1, 2, 4, 3], 2, [1, 3]),  # not in order: frames count as equally long
        ([None, 5, 6, 7], 4, [0, 1, 2, 3]),
        ([3, 3], 2, [0, 1]),
        ([9], 3, [0, 0, 0]),
        ([], 3, []),
    ],
)
def test_middle_frames(times: list[int | None], frames: int, expected: list[int]) -> None:
    assert middle_frames(times, frames) == expected


@pytest.mark.parametrize("total", [1, 2, 3, 7, 50, 1001])
@pytest.mark.parametrize("frames", [1, 3, 4, 8])
def test_middle_frames_of_a_constant_rate_by_formula(total: int, frames: int) -> None:
    ticks = [512 * number for number in range(total)]
    assert middle_frames(ticks, frames) == [(2 * number + 1) * total // (2 * frames) for number in range(frames)]


@pytest.mark.parametrize(
    ("rotation", "size", "side"),
    [
        (90, (48, 64), (0, 16, 8, 48)),  # counter-clockwise: the top comes to the left
        (180, (64, 48), (8, 40, 56, 48)),
        (-90, (48, 64), (40, 16, 48, 48)),
    ],
)
def test_a_rotated_video_stands_upright(
    tmp_path: Path, rotation: int, size: tuple[int, int], side: tuple[int, int, int, int]
) -> None:
    path = write_video(tmp_path / "a.mp4", ["blue"] * 3, codec="libx264", rotation=rotation, top="white")
    frame = read_frames(path, 1)[0]
    assert frame.size == size
    assert color_of(frame, side) == "white"
    assert color_of(frame, (20, 20, 28, 28)) == "blue"


def _gif() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), COLORS[name]) for name in NAMES[:4]]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=100)
    return buffer.getvalue()


def test_a_gif_is_a_video() -> None:
    assert colors_of(read_frames(_gif(), 4)) == NAMES[:4]


def _sound(path: Path) -> bytes:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path.read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        b"<html>this video is gone</html>",
        bytes(5000),
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:FOLDER/other.ts\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile file:FOLDER/other.ts\n",
    ],
)
def test_what_is_no_video_is_refused_and_opens_no_other_file(tmp_path: Path, content: bytes) -> None:
    """FFmpeg reads the playlist, and with it the other file, unless it is told which formats to expect."""
    content = content.replace(b"FOLDER", str(tmp_path).encode())
    write_video(tmp_path / "other.ts", ["red"] * 4, codec="libx264", container="mpegts")
    with pytest.raises(VideoError, match=r"^file is not a readable video$"):
        read_frames(content, 4)


def test_reasons_of_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_video(tmp_path / "a.mp4", _colors(40), options={"movflags": "faststart"}).read_bytes()
    avi = write_video(tmp_path / "a.avi", _colors(40)).read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    cases: list[tuple[Path | bytes, str]] = [
        (tmp_path / "absent.mp4", "video file is missing"),
        (tmp_path, "video file cannot be read (Is a directory)"),
        (tmp_path / "empty.mp4", "video file is empty"),
        (whole[: len(whole) * 7 // 10], "video is truncated or damaged"),
        (avi[: len(avi) * 6 // 10], "video is truncated or damaged"),
        (_sound(tmp_path / "sound.mp4"), "file has no video stream"),
    ]
    for media, reason in cases:
        with pytest.raises(VideoError) as error:
            read_frames(media, 4)
        assert str(error.value) == reason
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(VideoError, match="too many pixels"):
        read_frames(whole, 4)


def test_what_a_decoder_may_raise_has_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", _colors(4))

    def broken(content: bytes) -> None:
        raise OverflowError

    monkeypatch.setattr(video, "_packet_times", broken)
    with pytest.raises(VideoError, match="damaged"):
        read_frames(path, 4)


def test_damaged_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    content = write_video(tmp_path / "a.mp4", _colors(16), codec="libx264").read_bytes()
    random = np.random.default_rng(0)
    kept = 0
    for _ in range(60):
        damaged = np.frombuffer(content, np.uint8).copy()
        places = random.integers(len(damaged), size=int(random.integers(1, 40)))
        damaged[places] = random.integers(256, size=len(places))
        try:
            frames = read_frames(damaged.tobytes(), 4)
        except VideoError:
            continue
        kept += 1
        assert [frame.mode for frame in frames] == ["RGB"] * 4
    assert kept < 60


def test_at_least_one_frame_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frames=0"):
        read_frames(b"x", 0)
