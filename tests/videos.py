"""Tiny videos whose frames have known colours."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

COLORS = {
    "red": (200, 30, 30),
    "green": (30, 200, 30),
    "blue": (30, 30, 200),
    "yellow": (200, 200, 30),
    "cyan": (30, 200, 200),
    "magenta": (200, 30, 200),
    "white": (230, 230, 230),
    "black": (20, 20, 20),
}


def write_video(
    path: Path,
    colors: Sequence[str],
    *,
    codec: str = "mpeg4",
    container: str | None = None,
    times: Sequence[int] | None = None,
    rotation: int | None = None,
    top: str | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a video of 64 x 48 pixels with one frame a colour, ten a second.

    Args:
        container: FFmpeg's name of the format; None: by the path's extension.
        times: when each frame is shown, milliseconds, instead.
        rotation: display rotation to state, degrees counter-clockwise.
        top: colour of the upper quarter of every frame.
        options: of the container.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=container, options=options or {}) as file:
        stream = file.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number, color in enumerate(colors):
            pixels = np.full((48, 64, 3), COLORS[color], np.uint8)
            if top is not None:
                pixels[:12] = COLORS[top]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, 10) if times is None else Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def colors_of(frames: Sequence[Image.Image]) -> list[str]:
    """The name of each picture's mean colour; one far from all (channels swapped, say) has none."""
    return [color_of(frame, (0, 0, *frame.size)) for frame in frames]


def color_of(frame: Image.Image, box: tuple[int, int, int, int]) -> str:
    """The name of the mean colour in a box of a picture."""
    mean = np.array(frame.crop(box), dtype=np.float64).reshape(-1, 3).mean(axis=0)
    for name, color in COLORS.items():
        if abs(mean - color).max() < 25:
            return name
    return f"none: {mean.round()}"
