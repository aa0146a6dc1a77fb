"""report.html: the scores of an evaluation and a gallery of its samples in one self-contained page.

The page loads nothing: pictures are data URIs, each stored once however many questions share it, and a
Content-Security-Policy admits only this page's own style and script, by their hashes. Without JavaScript everything is
shown; the script adds the filter and the search.
"""

import base64
import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from instructblip.files import write_atomically
from instructblip.page import page_environment

_TEMPLATE = "report.html.jinja"
_LONGEST_SIDE = 640  # pixels; larger pictures are stored reduced, so that a report of thousands stays openable
_TINY_SIDE = 128  # pixels; pictures up to this size are enlarged with hard pixel edges
_CANDIDATES_SHOWN = 6


@dataclass(frozen=True)
class ReportRow:
    """One score of the summary table.

    Attributes:
        dataset, title: name of the card, and what to call it.
        task, mode, metric: such as "visual question answering", "ranking", "accuracy".
        count: samples scored.
        value, low, high: the score and its 95% interval, in the metric's scale.
        baselines: scores to compare with, by any name ("images withheld", "majority", "paper"), in the same scale.
    """

    dataset: str
    title: str
    task: str
    mode: str
    metric: str
    count: int
    value: float
    low: float
    high: float
    baselines: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportExample:
    """One sample of the gallery.

    Attributes:
        image: encoded picture, as Pillow reads.
        question: as in the dataset; instruction: the prompt that the model got.
        answer, prediction: text; correct: whether the metric counts it as right.
        scores: (candidate, log-likelihood in nats), empty for open generation.
    """

    image: bytes
    question: str
    instruction: str
    answer: str
    prediction: str
    correct: bool
    scores: list[tuple[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class ReportSection:
    """The part of the page on one dataset.

    Attributes:
        dataset: as in its `ReportRow`.
        protocol: name and value of everything that fixes the evaluation (split, prompt, decoding, ...).
        breakdowns: scores by a property: {"question type": [(label, count, value), ...]}.
        examples: the gallery.
    """

    dataset: str
    protocol: dict[str, str] = field(default_factory=dict)
    breakdowns: dict[str, list[tuple[str, int, float]]] = field(default_factory=dict)
    examples: list[ReportExample] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """Everything the page says. `created` is an ISO date; `checkpoint` names what was evaluated."""

    title: str
    checkpoint: str
    created: str
    summary: list[ReportRow]
    sections: list[ReportSection]


@dataclass(frozen=True)
class _Picture:
    uri: str
    width: int
    height: int
    tiny: bool


def write_report(path: Path, report: Report) -> None:
    """Write `report` as one HTML file.

    Raises:
        UserError: the disk is full or the folder may not be written.
        PIL.UnidentifiedImageError: an example's image is no picture.
    """
    environment = page_environment(Path(__file__).parent)
    images = dict.fromkeys(example.image for section in report.sections for example in section.examples)
    page = environment.get_template(_TEMPLATE).render(
        report=report,
        titles={row.dataset: row.title for row in report.summary},
        baseline_names=list(dict.fromkeys(name for row in report.summary for name in row.baselines)),
        pictures=[_picture(image) for image in images],
        picture_number={image: number for number, image in enumerate(images)},
        axis_end=axis_end,
        candidates=candidates,
        shown=_CANDIDATES_SHOWN,
    )
    write_atomically(path, page)


def candidates(example: ReportExample) -> list[dict[str, Any]]:
    """The candidates of an example, most likely first.

    Each has its name, log-likelihood (nats), probability among the candidates (softmax), and whether it is the answer
    or the prediction.
    """
    if not example.scores:
        return []
    peak = max(score for _, score in example.scores)
    total = math.fsum(math.exp(score - peak) for _, score in example.scores)
    return [
        {
            "name": name,
            "nats": score,
            "probability": math.exp(score - peak) / total,
            "is_answer": name == example.answer,
            "is_prediction": name == example.prediction,
        }
        for name, score in sorted(example.scores, key=lambda pair: -pair[1])
    ]


def axis_end(*values: float) -> float:
    """End of the axis that a score is drawn on: 100, or the next multiple of 50 above where a metric goes beyond it."""
    return max(100.0, 50.0 * math.ceil(max(values) / 50.0))


def _picture(encoded: bytes) -> _Picture:
    with Image.open(io.BytesIO(encoded)) as image:
        width, height = image.size
        mime = {"PNG": "image/png", "JPEG": "image/jpeg"}.get(image.format or "")
        if max(width, height) > _LONGEST_SIDE or mime is None:
            reduced = image.convert("RGB")
            reduced.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
            buffer = io.BytesIO()
            reduced.save(buffer, format="JPEG", quality=85)
            encoded, mime, (width, height) = buffer.getvalue(), "image/jpeg", reduced.size
    uri = f"data:{mime};base64,{base64.b64encode(encoded).decode()}"
    return _Picture(uri, width, height, tiny=max(width, height) <= _TINY_SIDE)
