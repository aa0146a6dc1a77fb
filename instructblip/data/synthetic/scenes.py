"""Made-up pictures and clips, what is true of them (a few shapes of one colour on one side, a word on the other), and where
a card wants them.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from instructblip.data.readers import RawSplit

COLORS = {
    "red": (200, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 70, 200),
    "yellow": (220, 190, 30),
    "purple": (130, 50, 160),
    "orange": (230, 130, 30),
}
BLACK = (10, 10, 10)
SHAPES = ("circle", "square", "triangle")
SIDES = ("left", "right")
WORDS = ("exit", "open", "stop", "taxi", "milk", "park", "sale", "north")
NUMBERS = ("a", "two", "three")
PICTURE_SIZE = (128, 96)  # pixels
CLIP_FRAMES = 8
FRAMES_PER_SECOND = 10


@dataclass(frozen=True)
class Scene:
    """What a picture or a clip shows.

    Attributes:
        number: no other scene of any dataset has it; ids are made of it.
        count: how many shapes, 1 to 3.
        color, shape, side: of the shapes; all are alike and on one side.
        word: stands on the other side, in capitals.
    """

    number: int
    count: int
    color: str
    shape: str
    side: str
    word: str

    @property
    def things(self) -> str:
        """The shapes in words: `two red circles`."""
        return f"{NUMBERS[self.count - 1]} {self.color} {self.named}"

    @property
    def named(self) -> str:
        """The shapes' name in its number: `circles`."""
        return self.shape + ("s" if self.count > 1 else "")

    @property
    def other_side(self) -> str:
        """Where the word is."""
        return SIDES[1 - SIDES.index(self.side)]

    @property
    def text(self) -> str:
        """The word as it is written in the picture."""
        return self.word.upper()

    def statement(self, *, true: bool) -> str:
        """A sentence about a place, true of the picture or not."""
        verb = "are" if self.count > 1 else "is"
        return f"The {self.named} {verb} at the {self.side if true else self.other_side} side of the word."

    def captions(self, count: int) -> list[str]:
        """So many descriptions, 10 at most."""
        things, text, side = self.things, self.text, self.side
        phrases = (
            f"{things} beside the word {text}",
            f"{things} on the {side} and the word {text} on the {self.other_side}",
            f"the word {text} next to {things}",
            f"a sign that says {text} and {things}",
            f"{things} at the {side} of a plain picture",
            f"a picture of {things}",
            f"a drawing with {things} and a word",
            f"{self.color} {self.named} and some text",
            f"the text {text} with {things} at its side",
            f"there is a word at the {self.other_side} and {things} at the {side}",
        )
        return [f"{phrase[0].upper()}{phrase[1:]}." for phrase in phrases[:count]]

    def asked(self, *topics: str) -> list[tuple[str, str]]:
        """(question, answer) pairs, one a topic out of color, count, shape, side and word."""
        verb = "are" if self.count > 1 else "is"
        pairs = {
            "color": (f"What color {verb} the {self.named}?", self.color),
            "count": (f"How many {self.shape}s are there?", str(self.count)),
            "shape": ("What shape is shown?", self.shape),
            "side": (f"{verb.capitalize()} the {self.named} on the left?", "yes" if self.side == "left" else "no"),
            "word": ("What does the text say?", self.word),
        }
        return [pairs[topic] for topic in topics]


@dataclass(frozen=True)
class MadeUpSplit:
    """A split to be made up: what its reader will be told, and the scenes that it shows."""

    source: RawSplit
    scenes: Sequence[Scene]

    @property
    def name(self) -> str:
        """Of the split."""
        return self.source.split

    def has(self, role: str) -> bool:
        """Whether the card names a place for a role's files."""
        return role in self.source.files

    def place(self, role: str, number: int = 0) -> Path:
        """The first place that the card names for a role, or another; the last where there are fewer."""
        places = self.source.files[role]
        return self.source.raw / places[min(number, len(places) - 1)]


def make_scenes(first: int, count: int) -> list[Scene]:
    """So many scenes, numbered from `first`; a scene follows from its number."""
    return [_scene(number) for number in range(first, first + count)]


def _scene(number: int) -> Scene:
    draw = random.Random(number)
    color, shape, side, word = (draw.choice(list(values)) for values in (COLORS, SHAPES, SIDES, WORDS))
    return Scene(number, draw.randrange(3) + 1, color, shape, side, word)


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_scene(scene: Scene, shift: int = 0) -> Image.Image:
    """The picture of a scene; its shapes stand `shift` pixels lower, for the frames of a clip."""
    stream = random.Random(f"places of {scene.number}")
    picture = Image.new("RGB", PICTURE_SIZE, tuple(stream.randrange(215, 256) for _ in range(3)))
    pen = ImageDraw.Draw(picture)
    left = 8 if scene.side == "left" else 72
    for row in range(scene.count):
        x, y, size = left + stream.randrange(20), 4 + 30 * row + shift, stream.randrange(16, 26)
        _draw_shape(pen, scene.shape, (x, y, x + size, y + size), COLORS.get(scene.color, BLACK))
    place = (72 if scene.side == "left" else 8, stream.randrange(20, 60))
    pen.text(place, scene.text, fill=BLACK, font=ImageFont.load_default(16))
    return picture


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], color: tuple[int, ...]) -> None:
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    else:
        pen.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])], fill=color)


def write_picture(path: Path, scene: Scene) -> None:
    """Write a scene's picture in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_scene(scene).save(path)


def write_coco_picture(folder: Path, scene: Scene) -> str:
    """Write a scene's picture under the name that COCO's release of that folder would give it, and return the name."""
    release = re.fullmatch(r"(?:train|val|test)201[45]|VisualDialog_\w+", folder.name)
    prefix = "" if release is None else f"{folder.name}_" if folder.name.startswith("V") else f"COCO_{folder.name}_"
    name = f"{prefix}{scene.number:012d}.jpg"
    write_picture(folder / name, scene)
    return name


# --- clips -----------------------------------------------------------------------------------------------------------


def write_clip(path: Path, scene: Scene) -> None:
    """Write a clip of under a second in which a scene's shapes sink, in the container that the name says."""
    write_video(path, [np.asarray(draw_scene(scene, shift)) for shift in range(CLIP_FRAMES)])


def write_video(
    path: Path,
    frames: Iterable[npt.NDArray[np.uint8]],
    *,
    codec: str = "mpeg4",
    container: str | None = None,
    times: Iterable[int] | None = None,
    rotation: int | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a video.

    Args:
        frames: RGB, (H, W, 3), all of one size; ten a second.
        container: FFmpeg's name of the format; None: by the path's extension.
        times: when each frame is shown, milliseconds, instead.
        rotation: display rotation to state, degrees counter-clockwise.
        options: of the container.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures, shown = list(frames), None if times is None else list(times)
    with av.open(str(path), "w", format=container, options=options or {}) as file:
        stream = file.add_stream(codec, rate=FRAMES_PER_SECOND)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if shown is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number, pixels in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number if shown is None else shown[number]
            frame.time_base = Fraction(1, FRAMES_PER_SECOND if shown is None else 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path
