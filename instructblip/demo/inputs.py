"""What a visitor gives, read within the page's bounds; what is wrong is said in one line."""

from pathlib import Path

from PIL import Image

from instructblip.config.schema import DemoLimitsConfig
from instructblip.errors import DamagedSample, UserError
from instructblip.images import decode_image, image_size

_MILLION = 1_000_000


def read_picture(path: str | None, limits: DemoLimitsConfig) -> Image.Image:
    """An uploaded picture, upright, in RGB.

    Raises:
        UserError: none, no picture, or one that is too large; its pixels are counted before they are decoded.
    """
    if path is None:
        raise UserError("there is no picture yet; upload one, take one with the camera, or click an example")
    if (size := Path(path).stat().st_size) > limits.bytes:
        raise UserError(
            f"the picture's file has {size / _MILLION:.1f} MB, and the page takes {limits.bytes / _MILLION:g} MB; "
            "give a smaller one"
        )
    data = Path(path).read_bytes()
    try:
        width, height = image_size(data, "you gave")
        if width * height > limits.pixels:
            raise UserError(
                f"the picture has {width:,} x {height:,} pixels, and the page takes {limits.pixels / _MILLION:g} million; "
                "give a smaller one"
            )
        return decode_image(data, "you gave")
    except DamagedSample as error:
        what = str(error).partition(";")[0]  # what follows is for datasets
        raise UserError(f"the {what}; give a PNG, JPEG or WebP file") from None


def read_text(name: str, text: str | None, limits: DemoLimitsConfig, *, needed: bool) -> str:
    """A prompt, or another text.

    Args:
        name: what it is, for the message.
        text: as it was typed.
        limits: of the page.
        needed: whether it may not stay empty.

    Raises:
        UserError: too long, or missing.
    """
    found = (text or "").strip()
    if needed and not found:
        raise UserError(f"there is no {name} yet; write one")
    if len(found) > limits.characters:
        raise UserError(
            f"the {name} has {len(found):,} characters, and the page takes {limits.characters:,}; shorten it"
        )
    return found


def read_candidates(text: str | None, limits: DemoLimitsConfig) -> list[str]:
    """Candidates, one a line; blank lines and repetitions are left out.

    Raises:
        UserError: fewer than two, too many, or one that is too long.
    """
    lines = (text or "").splitlines()[: 100 * limits.candidates]  # a page of blank lines is not read to its end
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(found) < 2:
        raise UserError("candidates are compared with each other; write at least two, one a line")
    if len(found) > limits.candidates:
        raise UserError(
            f"there are {len(found):,} candidates, and the page takes {limits.candidates:,}; leave some out"
        )
    return [read_text("candidate", line, limits, needed=True) for line in found]


def read_number(name: str, value: object, most: int) -> int:
    """A whole number from 1 to `most`.

    Raises:
        UserError: another value.
    """
    if not isinstance(value, int | float) or not 1 <= value <= most or value != int(value):  # NaN lies within no bounds
        raise UserError(f"{name} is {value}; give a whole number from 1 to {most}")
    return int(value)
