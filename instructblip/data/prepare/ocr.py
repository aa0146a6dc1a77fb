"""OCR tokens made on the images themselves, for datasets that come without, such as OCR-VQA.

RapidOCR (PP-OCR's models on onnxruntime, which its wheel brings along) finds lines of text; their words, in reading order,
are the tokens. One thread and the same versions give the same tokens.
"""

import functools
import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from instructblip.errors import UserError
from instructblip.images import decode_image

TEXT_SCORE = 0.5  # RapidOCR's own choice

Recogniser = Callable[[Image.Image], list[str]]  # RGB image -> lines of text in reading order


@dataclass(frozen=True)
class OcrOptions:
    """What tokens depend on, as it stands in a manifest.

    Attributes:
        library, version: the OCR library, which brings its models.
        runtime: name and version of what runs them.
        threshold: lines with a lower score, 0 to 1, are left out.
    """

    library: str
    version: str
    runtime: str
    threshold: float


def ocr_options(library: str) -> OcrOptions:
    """The options of an OCR library that is installed.

    Raises:
        UserError: not installed.
    """
    try:
        version, runtime = importlib.metadata.version(library), importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"ocr={library} needs {error.name}; install it with: pip install -r requirements-ocr.txt"
        ) from None
    return OcrOptions(library, version, f"onnxruntime {runtime}", TEXT_SCORE)


def ocr_tokens(frames: Iterable[bytes], options: OcrOptions, where: str) -> tuple[str, ...]:
    """The words in an image (of several frames each one once), in reading order.

    Args:
        frames: encoded images, as stored in shards.
        where: names the image in an error.

    Raises:
        UserError: a frame is no image.
    """
    recognise = _recogniser(options)
    found = [[word for line in recognise(decode_image(frame, where)) for word in line.split()] for frame in frames]
    words = found[0] if len(found) == 1 else dict.fromkeys(word for frame in found for word in frame)
    return tuple(words)


@functools.cache
def _recogniser(options: OcrOptions) -> Recogniser:
    """Loaded once a process."""
    return RECOGNISERS[options.library](options)


def _rapidocr(options: OcrOptions) -> Recogniser:
    from rapidocr import RapidOCR

    engine: Any = RapidOCR(  # typed, its result is one of four kinds, and here always the one with texts
        params={
            "Global.text_score": options.threshold,
            "Global.log_level": "critical",  # it would report every image without text
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )
    return lambda image: list(engine(image).txts or ())


RECOGNISERS: dict[str, Callable[[OcrOptions], Recogniser]] = {"rapidocr": _rapidocr}
