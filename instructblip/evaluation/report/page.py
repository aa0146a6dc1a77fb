"""Write report.html: the scores of an evaluation and a gallery of its samples in one self-contained page.

The page loads nothing: pictures are data URIs, each stored once however many questions share it, and a
Content-Security-Policy admits only this page's own style and script, by their hashes. Without JavaScript everything is
shown; the script adds the filter, the search, larger pictures, and tables that sort by a click.
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from instructblip.evaluation.report.table import MADE_UP_DATA, MARKS, MODELS, ComparabilityNote
from instructblip.files import write_atomically
from instructblip.html import page_environment
from instructblip.images import decode_image

_TEMPLATE = "page.html.jinja"
_LONGEST_SIDE = 320  # pixels; 13 datasets of 60 samples stay below 15 MB
_TINY_SIDE = 128  # pixels; pictures up to this size are enlarged with hard pixel edges
_QUALITIES = (78, 60, 40, 20)  # of WebP, tried until a picture is small enough
_MOST_BYTES = 11_000
_GAP = 4  # pixels between frames
_CANDIDATES = 10  # shown of each sample
_CANDIDATES_OPEN = 4  # of these, at once
_LABELS_OPEN = 12  # of a breakdown, at once


@dataclass(frozen=True)
class Picture:
    """A picture as the page holds it; `tiny` ones keep hard pixel edges."""

    uri: str
    width: int
    height: int
    tiny: bool


@dataclass(frozen=True)
class ReportRow:
    """One score of the summary table.

    Attributes:
        dataset, title: name of the card, and what to call it.
        task, mode, metric: such as "visual question answering", "ranking", "accuracy".
        count: samples scored.
        value, low, high: the score and its 95% interval, in the metric's scale; None where answers are not public.
        baselines: scores to compare with, by any name ("images withheld", "majority"), in the same scale.
        paper: the paper's scores, by the models of `paper.MODELS`.
        marks: why they must not be compared with, and details.
    """

    dataset: str
    title: str
    task: str
    mode: str
    metric: str
    count: int
    value: float | None
    low: float | None
    high: float | None
    baselines: dict[str, float] = field(default_factory=dict)
    paper: dict[str, float] = field(default_factory=dict)
    marks: dict[ComparabilityNote, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FoundText:
    """A caption that an image found, its score, and whether it is one of the image's own."""

    text: str
    score: float
    right: bool


@dataclass(frozen=True)
class FoundPictures:
    """The images that a caption of the sample found.

    Attributes:
        caption: what looked.
        rank: place of its own image, 1 for the best; None: not found.
        pictures: (picture, score, whether it is its own), best first.
    """

    caption: str
    rank: int | None
    pictures: list[tuple[Picture, float, bool]]


@dataclass(frozen=True)
class ReportExample:
    """One sample of the gallery.

    Attributes:
        picture: see `thumbnail`.
        question: as in the dataset; instruction: the prompt that the model got.
        answers: (text, how many annotators gave it); prediction: text.
        outcome: `right`, `partial` or `wrong`; empty for a metric that knows no right and wrong, or hidden answers.
        score: on the metric's scale; None where there is none.
        scores: (candidate, log-likelihood in nats), empty for open generation and retrieval.
        texts, pictures: what retrieval found, best first.
    """

    picture: Picture
    question: str
    instruction: str
    answers: list[tuple[str, int]]
    prediction: str
    outcome: str
    score: float | None = None
    scores: list[tuple[str, float]] = field(default_factory=list)
    texts: list[FoundText] = field(default_factory=list)
    pictures: list[FoundPictures] = field(default_factory=list)


@dataclass(frozen=True)
class ReportSection:
    """The part of the page on one dataset.

    Attributes:
        dataset: as in its `ReportRow`.
        protocol: name and value of everything that fixes the evaluation (split, prompt, decoding, ...).
        parts: further scores: (name, value, interval or nothing).
        breakdowns: scores by a property: {"question type": [(label, count, value), ...]}.
        notes: what else a reader must know, such as samples that failed.
        examples: the gallery.
    """

    dataset: str
    protocol: dict[str, str] = field(default_factory=dict)
    parts: list[tuple[str, str, str]] = field(default_factory=list)
    breakdowns: dict[str, list[tuple[str, int, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    examples: list[ReportExample] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """Everything the page says. `created` is an ISO date; `checkpoint` and `model` name what was evaluated.

    `not_evaluated` has a line for each dataset of the suite without a score: its name, and why.
    """

    title: str
    checkpoint: str
    model: str
    created: str
    summary: list[ReportRow]
    sections: list[ReportSection]
    not_evaluated: list[str] = field(default_factory=list)


def write_report(path: Path, report: Report) -> None:
    """Write `report` as one HTML file.

    Raises:
        UserError: the disk is full or the folder may not be written.
    """
    environment = page_environment(Path(__file__).parent)
    examples = [example for section in report.sections for example in section.examples]
    found = (picture for example in examples for row in example.pictures for picture, _, _ in row.pictures)
    pictures = dict.fromkeys(chain((example.picture for example in examples), found))
    outcomes = {example.outcome for example in examples}
    page = environment.get_template(_TEMPLATE).render(
        report=report,
        titles={row.dataset: row.title for row in report.summary},
        baseline_names=list(dict.fromkeys(name for row in report.summary for name in row.baselines)),
        models={key: name for key, name in MODELS.items() if any(key in row.paper for row in report.summary)},
        made_up=MADE_UP_DATA,
        invented=[row.title for row in report.summary if MADE_UP_DATA in row.marks],
        marks=[mark for mark in MARKS if any(mark in row.marks for row in report.summary)],
        outcomes=[name for name in ("right", "partial", "wrong") if name in outcomes],
        pictures=list(pictures),
        picture_number={picture: number for number, picture in enumerate(pictures)},
        axis_end=axis_end,
        candidates=candidates,
        candidates_open=_CANDIDATES_OPEN,
        labels_open=_LABELS_OPEN,
    )
    write_atomically(path, page)


def thumbnail(frames: Sequence[bytes], where: str) -> Picture:
    """A picture, or the frames of a video side by side, small enough for a page of hundreds.

    Args:
        frames: encoded pictures; at least one.
        where: named in the error (shard and key).

    Raises:
        UserError: one of them is no picture.
    """
    sheet = contact_sheet(frames, where)
    tiny = len(frames) == 1 and max(sheet.size) <= _TINY_SIDE
    if tiny:
        kind, content = "png", _encoded(sheet, "PNG", optimize=True)
    else:
        for quality in _QUALITIES:
            kind, content = "webp", _encoded(sheet, "WEBP", quality=quality)
            if len(content) <= _MOST_BYTES:
                break
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Picture(uri, *sheet.size, tiny)


def contact_sheet(frames: Sequence[bytes], where: str) -> Image.Image:
    """A picture, or the frames of a video side by side, of at most `_LONGEST_SIDE` pixels; see `thumbnail`."""
    images = [decode_image(frame, where) for frame in frames]
    sheet = images[0] if len(images) == 1 else _side_by_side(images)
    sheet.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    return sheet


def candidates(example: ReportExample) -> list[dict[str, Any]]:
    """The ten likeliest candidates of an example and, if it is not among them, the answer.

    Each has its rank, name, log-likelihood (nats), probability among the candidates (softmax), and whether it is the
    answer or the prediction.
    """
    if not example.scores:
        return []
    peak = max(score for _, score in example.scores)
    total = math.fsum(math.exp(score - peak) for _, score in example.scores)
    right = {text for text, _ in example.answers}
    rows = [
        {
            "rank": rank,
            "name": name,
            "nats": score,
            "probability": math.exp(score - peak) / total,
            "is_answer": name in right,
            "is_prediction": name == example.prediction,
        }
        for rank, (name, score) in enumerate(sorted(example.scores, key=lambda pair: -pair[1]), start=1)
    ]
    return rows[:_CANDIDATES] + [row for row in rows[_CANDIDATES:] if row["is_answer"]]


def axis_end(*values: float) -> float:
    """End of the axis that a score is drawn on: 100, or the next multiple of 50 above where a metric goes beyond it."""
    return max(100.0, 50.0 * math.ceil(max(values) / 50.0))


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Frames in rows of two, left to right."""
    side = (_LONGEST_SIDE - _GAP) // 2
    for image in images:
        image.thumbnail((side, side))
    width, height = max(image.width for image in images), max(image.height for image in images)
    rows = math.ceil(len(images) / 2)
    sheet = Image.new("RGB", (2 * width + _GAP, rows * (height + _GAP) - _GAP), "white")
    for number, image in enumerate(images):
        sheet.paste(image, ((number % 2) * (width + _GAP), (number // 2) * (height + _GAP)))
    return sheet
