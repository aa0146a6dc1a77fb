"""The one record type of all datasets, and the sample a model sees."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Self


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
        return {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, (), {})}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Rebuild a record from `to_dict`'s output after a trip through JSON.

        Raises:
            ValueError: an unknown field, or no id or kind.
        """
        if not {"id", "kind"} <= fields.keys() <= _RECORD_FIELDS:
            known = sorted(_RECORD_FIELDS)
            raise ValueError(f"a record needs id and kind and knows only {known}, got {sorted(fields)}")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        if "history" in values:
            values["history"] = tuple((question, answer) for question, answer in values["history"])
        return cls(**values)


_RECORD_FIELDS = {field.name for field in dataclasses.fields(Record)}


@dataclass(frozen=True)
class Sample:
    """One drawn training or evaluation sample.

    Attributes:
        id: `<dataset>/<record id>`.
        dataset: name of the card it came from.
        record: the annotation it was rendered from.
        frames: encoded image bytes, as stored: one image, or the frames of a video.
        image_location: (shard number within the dataset split, row of the image in the shard).
        instruction, target: text in and text out; `target` is None where the answer is not public.
        template: the template that made them.
    """

    id: str
    dataset: str
    record: Record
    frames: tuple[bytes, ...]
    image_location: tuple[int, int]
    instruction: str
    target: str | None
    template: str
