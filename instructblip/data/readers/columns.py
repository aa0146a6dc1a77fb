"""Rows of people's own tables: which columns there are, and the records that a row gives for each task.

docs/data.md, "Own data", lists the columns. A cell of a table that holds text (CSV, TSV) says a list as JSON.
"""

import base64
import binascii
import difflib
import math
import re
import string
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from instructblip.data.readers.base import FileSlice, Losses
from instructblip.data.readers.common import annotators, given_answers, weigh_answers
from instructblip.data.readers.dialogues import Dialogue, count_answers, read_dialogue
from instructblip.data.records import MAX_ITEMS, Record
from instructblip.data.typed import (
    Fields,
    WrongValueError,
    clean_text,
    kind_of,
    parse_json,
    path_below,
    spoken,
    whole_number,
)
from instructblip.errors import UserError

# The letters hold choices one by one, as benchmarks' tables do: A, B, C, ...
LETTERS = tuple(string.ascii_uppercase)
COLUMNS = (
    *("id", "image", "video", "question", "answer", "answers", "caption", "captions", "choices", "label"),
    *("context", "ocr", "conversations", "url"),
)
_MEDIA = ("image", "video")
# Task -> what a table must have: one of each group.
NEEDED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "vqa": (("question", "conversations"), ("answer", "answers", "conversations")),
    "captioning": (("caption", "captions", "conversations"),),
    "multiple_choice": (("question",), ("choices", "A"), ("answer", "label")),
    "classification": (("label",),),
    "statement": (("question",), ("label", "answer")),
    "conversation": (("conversations",),),
}
_KIND = {"vqa": "question", "conversation": "dialog"}
_TRUTHS = {"0": 0, "1": 1, "false": 0, "true": 1, "no": 0, "yes": 1}
_URL = re.compile(r"\s*https?://\S+\s*$")
# A list that stands as text: as JSON, or as Python and numpy print it.
_LIST = re.compile(r"""\s*\[\s*(['"]).*\1\s*\]\s*""", re.DOTALL)
_PLURAL = ("answers", "captions", "choices")
_WITH_HEADER = (".csv", ".tsv", ".tab")
_LETTER = re.compile(r"\(?([A-Za-z])[).:]?")
_DATA_URI = re.compile(r"data:[\w.+/-]*;base64,")
_LONGEST_PATH = 1000  # bytes; longer text without spaces is an encoded image
_LONGEST_ID = 255  # bytes

# A path below the folder of images, the encoded image itself, or where it stands in a file.
MediaValue = str | bytes | FileSlice


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: what its records are called, where it has no id: its number in all tables of the split together, from 0.
        place: where it stands, for messages: `train.csv line 7`.
        values: column, as the table calls it -> value.
    """

    name: str
    place: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """What a row gives: its images or its video, and the records about them."""

    media: tuple[MediaValue, ...]
    video: bool
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what.

    Attributes:
        task, split: what is asked, and in which split: of captions, train has each by itself, others all of an image.
        names: column -> what it is called in the table; its own name where it is not among them.
    """

    task: str
    split: str
    names: Mapping[str, str]

    @cached_property
    def _columns_of(self) -> dict[str, list[str]]:
        """Name in the table -> the columns that it stands for: mostly one, the same."""
        found: dict[str, list[str]] = {}
        for column in (*COLUMNS, *LETTERS):
            found.setdefault(self.names.get(column, column), []).append(column)
        return found

    def wanted(self) -> Collection[str]:
        """The names in the table of all columns that are read."""
        return self._columns_of.keys()

    def check(self, known: Collection[str], path: Path, losses: Losses) -> None:
        """Refuse a table without a column that the task needs; note one that the card names and nothing needs.

        Raises:
            UserError: names the column and those that are there.
        """
        for group in (_MEDIA, *NEEDED[self.task]):
            if not any(self.names.get(column, column) in known for column in group):
                missing = " or ".join(dict.fromkeys(self.names.get(column, column) for column in group))
                there = ", ".join(sorted(known)[:20]) or "none"
                header = " (the first line of a table names them)" if path.suffix in _WITH_HEADER else ""
                column, name = _likeliest(group, known)
                raise UserError(
                    f"{path} has no column {missing}, which task {self.task} needs; the columns there are: {there}{header}; "
                    f"name the right one in the card, as columns: {{{column}: {name}}}"
                )
        for column, name in self.names.items():
            if name not in known:
                losses.add("column of the card is not in the table", f"{path.name}: {name} ({column})", records=0)

    def example(self, row: Row, losses: Losses) -> Example | None:
        """The images and records of a row; None where it cannot be used, which is counted."""
        fields = Fields(
            {
                column: value
                for name, value in row.values.items()
                for column in self._columns_of.get(name, ())
                if not _is_empty(value)
            }
        )
        with losses.counting(row.place, records=_expected(fields, self.task)):
            media, video = _media(fields)
            records = _RECORDS[self.task](fields, row, media, self, losses)
            if any(
                len(value) > MAX_ITEMS
                for record in records
                for value in vars(record).values()
                if isinstance(value, tuple)
            ):
                raise WrongValueError(f"row holds a list of more than {MAX_ITEMS:,}")
            # Of a dialogue whose turns are all lost nothing is left; they were counted one by one.
            return Example(media, video, tuple(records)) if records else None
        return None


def _likeliest(columns: Sequence[str], known: Collection[str]) -> tuple[str, str]:
    """Which of some columns is there under another name, and that name; NAME where none is like them."""
    plain = {name.strip().lower(): name for name in known}
    for column in columns:
        if near := difflib.get_close_matches(column, plain, n=1):
            return column, plain[near[0]]
    return columns[0], "NAME"


def _is_empty(value: Any) -> bool:
    """Whether a cell holds nothing: no value, NaN as tables have it, or blank text."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


def _expected(fields: Fields, task: str) -> int:
    """How many records a row that is lost would have given."""
    if task in ("vqa", "conversation") and fields.has("conversations"):
        return max(1, count_answers(_maybe_listed(fields.get("conversations"))))
    captions = _maybe_listed(fields.get("captions"))
    return max(1, len(captions)) if task == "captioning" and isinstance(captions, list) else 1


# --- images ----------------------------------------------------------------------------------------------------------


def _media(fields: Fields) -> tuple[tuple[MediaValue, ...], bool]:
    """The images or the video of a row, and whether it is a video."""
    if fields.has("image") and fields.has("video"):
        raise WrongValueError("row has both an image and a video")
    column = "video" if fields.has("video") else "image"
    value = _maybe_listed(fields.get(column))
    if value is None or value == []:
        raise WrongValueError(f"{column} is missing")
    if not isinstance(value, list):
        return (_one_media(value, column),), column == "video"
    if column == "video" and len(value) > 1:
        raise WrongValueError("row has several videos")
    return tuple(_one_media(item, column) for item in value), column == "video"


def _one_media(value: Any, column: str) -> MediaValue:
    if isinstance(value, dict):  # as Hugging Face stores images: bytes, or a path to them
        value = value.get("bytes") or value.get("path")
    if isinstance(value, FileSlice) or (isinstance(value, bytes) and value):
        return value
    if not isinstance(value, str) or not value.strip():
        raise WrongValueError(f"{column} is {kind_of(value)} where a path is due" if value else f"{column} is missing")
    text = value.strip()
    if match := _DATA_URI.match(text):
        return _decoded(text[match.end() :], column)
    if "://" in text[:20]:
        raise WrongValueError(f"{column} is a URL; download it, and give the path of the file", text)
    if len(text) > _LONGEST_PATH and " " not in text:
        return _decoded(text, column)
    path = path_below(text.replace("\\", "/"))  # as tables from Windows have it
    if path is None:
        what = "an absolute path; give it as it is below its folder" if text[0] == "/" else "no path below its folder"
        raise WrongValueError(f"{column} is {what}", repr(text))
    return path


def _decoded(text: str, column: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise WrongValueError(f"{column} is neither a path nor base64") from None


# --- records ---------------------------------------------------------------------------------------------------------


def _maybe_listed(value: Any) -> Any:
    """The list that a cell says as JSON; any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = parse_json(value.strip(), constant=lambda _: None)
        except WrongValueError:
            return value
        return found if isinstance(found, list) else value
    return value


def _listed(fields: Fields, column: str) -> list[Any]:
    """A list, which a cell may say as JSON.

    Raises:
        WrongValueError: there is none.
    """
    value = _maybe_listed(fields.get(column))
    if isinstance(value, str) and value.lstrip().startswith("["):
        raise WrongValueError(f'{column} is no list as JSON writes it, ["a", "b"]')
    return Fields({column: value}).items(column)


def _said(fields: Fields, column: str) -> str:
    """Text as it stands, which may be a number.

    Raises:
        WrongValueError: there is none, or a list stands there as text.
    """
    if isinstance(text := fields.get(column), str) and _LIST.fullmatch(text):
        plural = "" if column in _PLURAL else f", and call its column {column}s"
        raise WrongValueError(f'{column} holds a list; write it as JSON does, ["a", "b"]{plural}', text)
    return Fields({column: spoken(fields.get(column))}).verbatim(column)


def _ids(fields: Fields, row: Row, count: int) -> list[str]:
    """Ids of a row's records: its `id`, or its name; where there are several, their numbers behind it.

    Files of dialogues repeat their ids, which name images: there the row's name stands in.
    """
    own = row.name
    if fields.has("id") and not fields.has("conversations"):
        own = _said(fields, "id")
        if not own.isprintable() or len(own.encode()) > _LONGEST_ID:
            raise WrongValueError("id is no id")
    return [own] if count == 1 else [f"{own}-{number}" for number in range(count)]


def _beside(fields: Fields) -> dict[str, Any]:
    """What every record of a row has: context and OCR tokens."""
    tokens = _maybe_listed(fields.get("ocr"))
    words = tokens.split() if isinstance(tokens, str) else tokens if isinstance(tokens, list) else []
    cleaned = tuple(text for word in words if (text := clean_text(spoken(word))) is not None)
    return {"context": _said(fields, "context") if fields.has("context") else None, "ocr_tokens": cleaned}


def _answers(fields: Fields, row: Row, losses: Losses) -> dict[str, Any]:
    """The answers of a question and how many people gave each."""
    if fields.has("answer"):
        return {"answers": (_said(fields, "answer"),)}
    value = _maybe_listed(fields.get("answers"))
    if not isinstance(value, list):
        return {"answers": (_said(fields, "answers" if fields.has("answers") else "answer"),)}
    people = [item.get("answer") if isinstance(item, dict) else item for item in _listed(fields, "answers")]
    people = [None if isinstance(item, float) and math.isnan(item) else item for item in people]
    given = given_answers(people, row.place, losses)
    if not given:
        raise WrongValueError("answers hold no answer with text")
    answers, weights = weigh_answers(given)
    # A list without repeats says which answers are accepted, and no number of people.
    if set(weights) == {1.0} and annotators(people, given) is None:
        return {"answers": answers}
    return {"answers": answers, "answer_weights": weights, "annotators": annotators(people, given)}


def _question_records(
    fields: Fields, row: Row, media: Collection[MediaValue], columns: Columns, losses: Losses
) -> list[Record]:
    if fields.has("conversations"):
        return _dialogue_records(fields, row, media, columns, losses)
    (record_id,) = _ids(fields, row, 1)
    question, answers, beside = _said(fields, "question"), _answers(fields, row, losses), _beside(fields)
    return [Record(record_id, "question", question, **answers, **beside)]


def _dialogue_records(
    fields: Fields, row: Row, media: Collection[MediaValue], columns: Columns, losses: Losses
) -> list[Record]:
    """A record for each answer, with the turns before it as history."""
    dialogue = _dialogue(fields, row, media, losses)
    beside, kind = _beside(fields), _KIND[columns.task]
    beside["context"] = beside["context"] or dialogue.system
    turns = tuple((question.strip(), answer.strip()) for question, answer in dialogue.turns)
    ids = _ids(fields, row, len(turns))
    return [
        Record(ids[number], kind, question, (answer,), history=turns[:number], **beside)
        for number, (question, answer) in enumerate(turns)
    ]


def _dialogue(fields: Fields, row: Row, media: Collection[MediaValue], losses: Losses) -> Dialogue:
    said = _listed(fields, "conversations")
    dialogue = read_dialogue(said, row.place, losses, images=len(media))
    if not count_answers(said):
        raise WrongValueError("dialogue has no answer")
    return dialogue


def _caption_records(
    fields: Fields, row: Row, media: Collection[MediaValue], columns: Columns, losses: Losses
) -> list[Record]:
    """Each caption in train; in another split all of the row's, which those of its image's other rows are added to."""
    if fields.has("caption"):
        texts = [_said(fields, "caption")]
    elif fields.has("captions"):
        listed = isinstance(_maybe_listed(fields.get("captions")), list)
        texts = (
            list(Fields({"captions": _listed(fields, "captions")}).texts("captions"))
            if listed
            else [_said(fields, "captions")]
        )
    elif fields.has("conversations"):
        texts = [answer.strip() for _, answer in _dialogue(fields, row, media, losses).turns[:1]]
    else:
        raise WrongValueError("caption is missing")
    beside = _beside(fields)
    if columns.split != "train" and texts:
        return [Record(_ids(fields, row, 1)[0], "captions", captions=tuple(texts), **beside)]
    if isinstance(url := fields.get("url"), str) and _URL.match(url):  # by which lists of web captions name a picture
        beside["tags"] = {"url": url.strip()}
    ids = _ids(fields, row, len(texts))
    return [Record(record_id, "caption", answers=(text,), **beside) for record_id, text in zip(ids, texts, strict=True)]


def _choice_records(
    fields: Fields, row: Row, media: Collection[MediaValue], columns: Columns, losses: Losses
) -> list[Record]:
    (record_id,) = _ids(fields, row, 1)
    question, choices = _said(fields, "question"), _choices(fields)
    label = fields.whole("label", high=len(choices) - 1) if _has_number(fields, "label") else _chosen(fields, choices)
    return [Record(record_id, "multiple_choice", question, choices=choices, label=label, **_beside(fields))]


def _choices(fields: Fields) -> tuple[str, ...]:
    if fields.has("choices"):
        return Fields({"choices": _listed(fields, "choices")}).texts("choices")
    lettered = [spoken(fields.get(letter)) for letter in LETTERS]
    count = next((number for number, choice in enumerate(lettered) if choice is None), len(lettered))
    if count < 2:
        raise WrongValueError("choices is missing")
    return Fields({"choices": lettered[:count]}).texts("choices")


def _has_number(fields: Fields, column: str) -> bool:
    return whole_number(fields.get(column)) is not None


def _chosen(fields: Fields, choices: tuple[str, ...]) -> int:
    """The choice that an answer says: by its number from 0, its letter, or its text.

    Raises:
        WrongValueError: it says none of them, or two different ones, such as 1 for [1, 2, 3].
    """
    column = "label" if fields.has("label") else "answer"
    text = " ".join(_said(fields, column).split())
    folded = [choice.casefold() for choice in choices]
    meant = {number for number, choice in enumerate(choices) if choice == text}
    meant = meant or {number for number, choice in enumerate(folded) if choice == text.casefold()}
    number, letter = whole_number(text), _LETTER.fullmatch(text)
    if number is not None and 0 <= number < len(choices):
        meant.add(number)
    if letter and (place := LETTERS.index(letter[1].upper())) < len(choices):
        meant.add(place)
    if len(meant) > 1:
        raise WrongValueError(f"{column} may mean two of the choices, by its number, letter or text", text)
    if not meant:
        numbers = f" (numbers are from 0 to {len(choices) - 1})" if number is not None else ""
        raise WrongValueError(f"{column} is none of the choices", text + numbers)
    return meant.pop()


def _class_records(
    fields: Fields, row: Row, media: Collection[MediaValue], columns: Columns, losses: Losses
) -> list[Record]:
    (record_id,) = _ids(fields, row, 1)
    question = _said(fields, "question") if fields.has("question") else None
    name = unicodedata.normalize("NFC", fields.answer("label"))  # one class, however its letters are written
    return [Record(record_id, "classification", question, answers=(name,), **_beside(fields))]


def _statement_records(
    fields: Fields, row: Row, media: Collection[MediaValue], columns: Columns, losses: Losses
) -> list[Record]:
    (record_id,) = _ids(fields, row, 1)
    statement, column = _said(fields, "question"), "label" if fields.has("label") else "answer"
    value = fields.get(column)
    said = str(value).lower() if isinstance(value, bool) else _said(fields, column).lower()
    if said not in _TRUTHS:
        raise WrongValueError(f"{column} is neither true nor false", said)
    label = _TRUTHS[said]
    truth = ("false", "true")[label]
    return [Record(record_id, "statement", statement, answers=(truth,), label=label, **_beside(fields))]


_RecordsOfRow = Callable[[Fields, Row, Collection[MediaValue], Columns, Losses], list[Record]]
_RECORDS: Mapping[str, _RecordsOfRow] = {
    "vqa": _question_records,
    "captioning": _caption_records,
    "multiple_choice": _choice_records,
    "classification": _class_records,
    "statement": _statement_records,
    "conversation": _dialogue_records,
}
