"""Tiny videos whose frames have known colours."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from instructblip.data.synthetic import scenes

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


def write_video(path: Path, colors: Sequence[str], *, top: str | None = None, **options: Any) -> Path:
    """Write a video of 64 x 48 pixels with one frame a colour; `top` is that of the upper quarter of every frame.

    Further options are those of `scenes.write_video`.
    """
    frames = [np.full((48, 64, 3), COLORS[color], np.uint8) for color in colors]
    for pixels in frames if top is not None else ():
        pixels[:12] = COLORS[top]
    return scenes.write_video(path, frames, **options)


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
