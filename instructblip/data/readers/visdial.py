"""VisDial 1.0 (Das et al. 2017): dialogs of ten questions and answers about an image, 100 possible answers a question.

Raw files: `visdial_1.0_{train,val,test}.json`; a round gives its question, answer and options as indexes of two lists
that all dialogs share. `visdial_1.0_{train,val}_dense_annotations.json` say of one round of a dialog how right each
option is; joined by the image's id and the round's number, which begins at 1. The options stand in no particular order:
`gt_index` is the place of the right one among them. A test dialog ends with a question whose answer is not public; the
rounds before it are its history and give no records.

The images of train are COCO's of 2014; those of val and test are VisDial's own, with numbers that COCO uses otherwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.common import (
    MISSING_IMAGE,
    coco_id,
    coco_images,
    coco_number,
    image_folders,
    unique,
)
from instructblip.data.readers.files import (
    load_list,
    stream_list,
)
from instructblip.data.records import Record
from instructblip.data.typed import (
    Fields,
    WrongValueError,
    clean_text,
    spoken,
    whole_number,
)

OPTIONS = 100
UNLABELLED_SPLIT = "test"


def read_visdial(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the image of each dialog with one `dialog` record a round, in the file's order.

    Raises:
        UserError: a file or folder is missing, cut short or of another form.
    """
    path = source.path("dialogs")
    shared = _Shared.load(path, source, losses)
    images = coco_images(image_folders(source))
    seen: set[str] = set()
    for row, dialog in enumerate(stream_list(path, "data.dialogs")):
        with losses.counting(f"dialogs entry {row}"):
            fields = Fields.of(dialog, "dialog")
            image_id, rounds = coco_number(fields, "image_id"), fields.items("dialog")
            if not rounds:
                raise WrongValueError("dialog has no rounds")
            count = 1 if source.split == UNLABELLED_SPLIT else len(rounds)
            with losses.counting(f"dialogs entry {row}: image {image_id}", records=count):
                unique(seen, str(image_id), "image of a dialog")
                records = _records(image_id, fields.optional_text("caption"), rounds, shared, source.split)
                if image_id not in images:
                    raise WrongValueError(MISSING_IMAGE)
                yield MediaRecords(f"visdial_{image_id:012d}", _media_id(images[image_id]), images[image_id], records)
    for image_id, number in shared.relevance:
        losses.add("dense annotation of a round that is not there", f"image {image_id} round {number}", records=0)


@dataclass(frozen=True)
class _Shared:
    """What all dialogs share: texts by index, and (image id, number of the round from 1) -> how right each option is."""

    questions: list[str | None]
    answers: list[str | None]
    relevance: dict[tuple[int, int], tuple[float, ...]]

    @classmethod
    def load(cls, path: Path, source: RawSplit, losses: Losses) -> "_Shared":
        questions, answers = (
            [clean_text(spoken(text)) for text in stream_list(path, f"data.{key}")] for key in ("questions", "answers")
        )
        return cls(questions, answers, _relevance(source, losses))


def _relevance(source: RawSplit, losses: Losses) -> dict[tuple[int, int], tuple[float, ...]]:
    """The dense annotations of a split, where the card names a file of them."""
    relevance: dict[tuple[int, int], tuple[float, ...]] = {}
    entries = load_list(source.path("dense")) if "dense" in source.files else []
    for row, entry in enumerate(entries):
        with losses.counting(f"dense entry {row}", records=0):
            fields = Fields.of(entry, "dense annotation")
            image_id, number = coco_number(fields, "image_id"), fields.whole("round_id", low=1)
            scores = _scores(fields.get("gt_relevance") or fields.get("relevance"))  # the key in val and in train
            if scores is None:
                raise WrongValueError("dense annotation has not 100 scores, or all of them are 0")
            if (image_id, number) in relevance:
                raise WrongValueError("dense annotation repeats a round", f"image {image_id} round {number}")
            relevance[image_id, number] = scores
    return relevance


def _scores(value: Any) -> tuple[float, ...] | None:
    """100 numbers from 0 to 1; None for anything else, and for zeros only, which NDCG is not defined for."""
    if not isinstance(value, list) or len(value) != OPTIONS:
        return None
    if not all(type(score) in (int, float) and 0 <= score <= 1 for score in value) or not any(value):
        return None
    return tuple(float(score) for score in value)


def _records(image_id: int, caption: str | None, rounds: list[Any], shared: _Shared, split: str) -> list[Record]:
    records = []
    history: list[tuple[str, str]] = []
    for number, entry in enumerate(rounds, start=1):
        hidden = split == UNLABELLED_SPLIT and number == len(rounds)
        fields = Fields.of(entry, "a round")
        question = _text(shared.questions, fields.get("question"), "question")
        answer = None if hidden else _text(shared.answers, fields.get("answer"), "answer")
        if hidden or split != UNLABELLED_SPLIT:
            choices = _choices(fields.get("answer_options"), shared)
            records.append(
                Record(
                    id=f"{image_id}-{number}",
                    kind="dialog",
                    question=question,
                    answers=() if answer is None else (answer,),
                    choices=choices,
                    label=_label(fields.get("gt_index"), choices, answer),
                    context=caption,
                    history=tuple(history),
                    relevance=shared.relevance.pop((image_id, number), ()),
                )
            )
        if answer is not None:
            history.append((question, answer))
    return records


def _text(texts: list[str | None], index: Any, what: str) -> str:
    """A question or answer by its index."""
    number = whole_number(index)
    text = texts[number] if number is not None and 0 <= number < len(texts) else None
    if text is None:
        raise WrongValueError(f"a round's {what} is not an index of the list of {what}s")
    return text


def _choices(options: Any, shared: _Shared) -> tuple[str, ...]:
    """The options' texts; none where the file leaves them out, as some copies of train do."""
    if options is None:
        return ()
    if not isinstance(options, list) or len(options) != OPTIONS:
        raise WrongValueError("a round has not 100 options")
    return tuple(_text(shared.answers, option, "answer") for option in options)


def _label(index: Any, choices: tuple[str, ...], answer: str | None) -> int | None:
    """The place of the right option; None where there are no options, or the answer is not public."""
    if answer is None or not choices:
        return None
    place = whole_number(index)
    if place is None or not 0 <= place < len(choices) or choices[place] != answer:
        raise WrongValueError("gt_index is not the place of the answer among the options")
    return place


def _media_id(image: Path) -> str:
    """COCO's number for COCO's images, the file's name for VisDial's own, so that the two are never taken for one."""
    return image.stem if image.stem.startswith("VisualDialog") else str(coco_id(image.name))


READERS = {"visdial": Reader(read_visdial, needs=("dialogs", "images"), may_name=("dense",))}
