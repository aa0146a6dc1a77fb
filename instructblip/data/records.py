"""The one record type of all datasets, and the sample a model sees."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from instructblip.data.typed import MAX_TEXT, MAX_WHOLE, Fields, WrongValueError, is_unicode, kind_of, parse_json


@dataclass(frozen=True)
class Record:
    """One annotation of one image: what a dataset says, before any template.

    Attributes:
        id: unique within its dataset and split.
        kind: what the record asks (`color`, `caption`, `statement`, ...); views of a dataset select by it.
        question: the question, statement or instruction, as in the source.
        answers: accepted answers, most usual first; `answer_weights` beside them (empty: all equal).
        annotators: how many people were asked, where some answered without text: `answer_weights` leave those out, which
            nobody should be trained on, but official scores count them. None: as many as the weights say.
        captions: reference captions.
        choices: the options of a multiple-choice question; `label` is the index of the right one.
        label: index of the right choice, or class number.
        relevance: how right each of the choices is, 0 to 1, where more than one is.
        context, ocr_tokens, history: what a prompt may put before the question; history is (question, answer) pairs.
        tags: further facts of the source that scores are reported by, such as a question's type or an image's domain.
    """

    id: str
    kind: str
    question: str | None = None
    answers: tuple[str, ...] = ()
    answer_weights: tuple[float, ...] = ()
    annotators: int | None = None
    captions: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    label: int | None = None
    context: str | None = None
    ocr_tokens: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    relevance: tuple[float, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields that hold something, ready for JSON."""
        return {name: value for name, value in vars(self).items() if value not in (None, (), {})}

    @classmethod
    def from_dict(cls, fields: Any) -> Self:
        """Rebuild a record from `to_dict`'s output after a trip through JSON.

        Raises:
            WrongValueError: an unknown field, no id or kind, a value of another type or size, or fields that contradict
                each other.
        """
        if not isinstance(fields, dict) or not {"id", "kind"} <= fields.keys() <= _FIELDS.keys():
            named = sorted(fields) if isinstance(fields, dict) else kind_of(fields)
            raise WrongValueError(f"a record needs id and kind and knows only {sorted(_FIELDS)}, got {named}")
        record = cls(**{name: _FIELDS[name](value, name) for name, value in fields.items()})
        for name, beside in (("answer_weights", record.answers), ("relevance", record.choices)):
            if getattr(record, name) and len(getattr(record, name)) != len(beside):
                raise WrongValueError(f"{name} is not as long as what it belongs to")
        if record.choices and record.label is not None and not 0 <= record.label < len(record.choices):
            raise WrongValueError("label is not the index of a choice")
        return record


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise WrongValueError(f"{name} is {kind_of(value)} where text is due")
    if len(value) > MAX_TEXT or not is_unicode(value):
        raise WrongValueError(f"{name} {'is too long' if len(value) > MAX_TEXT else 'holds half a Unicode pair'}")
    return value


def _items(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple) or len(value) > MAX_ITEMS:
        raise WrongValueError(f"{name} is {kind_of(value)} where a list of {MAX_ITEMS:,} at most is due")
    return value


def _texts(value: Any, name: str) -> tuple[str, ...]:
    return tuple(_text(item, name) for item in _items(value, name))


def _numbers(value: Any, name: str) -> tuple[float, ...]:
    numbers = _items(value, name)
    if not all(type(number) in (int, float) and 0 <= number < math.inf for number in numbers):
        raise WrongValueError(f"{name} holds something else than numbers of 0 or more")
    return tuple(float(number) for number in numbers)


def _whole(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_WHOLE:
        raise WrongValueError(f"{name} is no whole number of 0 or more")
    return value


def _pairs(value: Any, name: str) -> tuple[tuple[str, str], ...]:
    pairs = [_texts(pair, name) for pair in _items(value, name)]
    if any(len(pair) != 2 for pair in pairs):
        raise WrongValueError(f"{name} holds something else than pairs of question and answer")
    return tuple((question, answer) for question, answer in pairs)


def _tags(value: Any, name: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise WrongValueError(f"{name} is {kind_of(value)} where an object is due")
    return {_text(key, name): _text(text, name) for key, text in value.items()}


MAX_ITEMS = 100_000  # of one list in a record
_FIELDS: dict[str, Callable[[Any, str], Any]] = {
    **dict.fromkeys(("id", "kind", "question", "context"), _text),
    **dict.fromkeys(("answers", "captions", "choices", "ocr_tokens"), _texts),
    **dict.fromkeys(("answer_weights", "relevance"), _numbers),
    **dict.fromkeys(("annotators", "label"), _whole),
    "history": _pairs,
    "tags": _tags,
}


def parse_records(content: bytes) -> tuple[str, list[Any]]:
    """The image's id and its records, not looked into yet, of the JSON text that a shard holds beside an image.

    Raises:
        WrongValueError: no such text.
    """
    fields = Fields.of(parse_json(content), "the JSON beside an image")
    return _text(fields.get("image_id"), "image_id"), fields.items("records")


@dataclass(frozen=True)
class Sample:
    """One drawn training or evaluation sample.

    Attributes:
        id: `<dataset>/<record id>`.
        dataset: name of the card it came from.
        record: the annotation it was rendered from.
        frames: encoded image bytes, as stored: one image, or the frames of a video.
        image_location: (shard number within the dataset split, row of the image in the shard).
        image_id: the same for all samples of one image, in all views of a dataset.
        position: where it was drawn in the run.
        instruction, target: text in and text out; `target` is None where the answer is not public.
        template: the template that made them.
        answers: all accepted ones with their weights, where a model is to learn them all; else empty.
    """

    id: str
    dataset: str
    record: Record
    frames: tuple[bytes, ...]
    image_location: tuple[int, int]
    image_id: str
    position: int
    instruction: str
    target: str | None
    template: str
    answers: tuple[tuple[str, float], ...] = ()
