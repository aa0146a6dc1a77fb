"""easy-VQA (Victor Zhou, MIT licence): questions about one coloured shape in a 64 x 64 picture.

Raw folder: the `data/` of the official package `easy-vqa` 1.0: `{train,test}/questions.json`, a list of
`[question, answer, image id]`, and `{train,test}/images/<image id>.png`.

The package's train split is divided into `train` and `validation` by image, so that no picture is in both; `test` is
the package's own. A yes/no question is of the kind `present` or `absent`, by what the picture shows, and also gives a
`statement` record, to be judged true or false. A picture whose questions tell both its shape and its colour, as those of
nine in ten do, has a `caption` record besides.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.files import (
    find_image,
    load_list,
)
from instructblip.data.records import Record
from instructblip.data.typed import (
    whole_number,
)
from instructblip.errors import UserError

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
KIND_OF_ANSWER = {
    "yes": "yes_no",
    "no": "yes_no",  # divided by what the picture shows, see `_yes_no_kind`
    **dict.fromkeys(SHAPES, "shape"),
    **dict.fromkeys(COLORS, "color"),
}
PACKAGE_SPLIT = {"train": "train", "validation": "train", "test": "test"}
VALIDATION_SHARE = 10  # one image in ten of the package's train split

_WORD = re.compile(r"\w+")
_THING = rf"(?P<thing>(?:{'|'.join(COLORS)}) shape|{'|'.join(SHAPES)})"
# The 8 yes/no forms of the source, each asked of a shape or of a colour: 16 in all. "Yes" makes the statement true,
# in the negated forms as well: "is there not a red shape?" is answered "yes" where there is none.
STATEMENT_OF_QUESTION = tuple(
    (re.compile(question.replace("THING", _THING)), statement)
    for question, statement in (
        (r"is there a THING\?", "There is a {thing}."),
        (r"is there a THING in the image\?", "There is a {thing} in the image."),
        (r"is a THING present\?", "A {thing} is present."),
        (r"does the image contain a THING\?", "The image contains a {thing}."),
        (r"is there not a THING\?", "There is not a {thing}."),
        (r"is there not a THING in the image\?", "There is not a {thing} in the image."),
        (r"does the image not contain a THING\?", "The image does not contain a {thing}."),
        (r"is no THING present\?", "No {thing} is present."),
    )
)


def read_easy_vqa(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the images of `train`, `validation` or `test` in ascending order of their ids.

    Raises:
        UserError: no such split; `questions.json` missing, cut short or not a list.
    """
    raw, split = source.raw, source.split
    if split not in PACKAGE_SPLIT:
        raise UserError(f"easy_vqa has no split {split!r}; choose one of {', '.join(PACKAGE_SPLIT)}")
    package_split = PACKAGE_SPLIT[split]
    path = raw / package_split / "questions.json"
    by_image: dict[int, list[tuple[str, str]]] = {}
    for row, entry in enumerate(load_list(path)):
        asked = _asked(entry)
        if asked is None:
            # Without an image id nobody knows which half of the package's train split it belonged to: count it once.
            if split != "validation":
                losses.add("entry is not [question, answer, image id]", f"{package_split}/questions.json entry {row}")
            continue
        question, answer, image_id = asked
        if split_of_image(package_split, image_id) == split:
            by_image.setdefault(image_id, []).append((question, answer))
    images = raw / package_split / "images"
    for image_id in sorted(by_image):
        name = f"{image_id}.png"
        yield MediaRecords(
            key=f"easy_vqa_{package_split}_{image_id:06d}",
            media_id=str(image_id),
            media=find_image([images], [name]) or images / name,
            records=_records(f"{package_split}-{image_id}", by_image[image_id], losses),
        )


def split_of_image(package_split: str, image_id: int) -> str:
    """Where an image of the package goes: a stable hash of its id, so neither order nor number of images matters."""
    if package_split == "test":
        return "test"
    digest = hashlib.sha256(f"easy_vqa/train/{image_id}".encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") % VALIDATION_SHARE == 0 else "train"


def statement_of(question: str) -> str | None:
    """A yes/no question as the statement that "yes" makes true; None for a form that is not among the 16."""
    for pattern, statement in STATEMENT_OF_QUESTION:
        if match := pattern.fullmatch(question):
            return statement.format(thing=match["thing"])
    return None


def caption_of(questions: Sequence[tuple[str, str]]) -> str | None:
    """What the (question, answer) pairs of a picture tell of it, such as "a red circle"; None unless both are told.

    All pairs but those about what is not there speak of what is.
    """
    about = [pair for pair in questions if pair[1] not in ("yes", "no") or _yes_no_kind(*pair) == "present"]
    told = {word for pair in about for text in pair for word in _WORD.findall(text)}
    colors, shapes = told.intersection(COLORS), told.intersection(SHAPES)
    return f"a {colors.pop()} {shapes.pop()}" if len(colors) == len(shapes) == 1 else None


def _yes_no_kind(question: str, answer: str) -> str:
    """Whether the picture shows the thing that is asked about; "yes" to a negated question says that it does not."""
    negated = re.search(r"\b(not|no)\b", question) is not None
    return "present" if (answer == "yes") != negated else "absent"


def _asked(entry: Any) -> tuple[str, str, int] | None:
    if not isinstance(entry, list) or len(entry) != 3:
        return None
    question, answer, image_id = entry[0], entry[1], whole_number(entry[2])
    sound = isinstance(question, str) and isinstance(answer, str) and image_id is not None and image_id >= 0
    return (question, answer, image_id) if sound and image_id is not None else None


def _records(image: str, questions: list[tuple[str, str]], losses: Losses) -> list[Record]:
    records = []
    for number, (question, answer) in enumerate(questions):
        record_id = f"{image}-{number}"
        kind = KIND_OF_ANSWER.get(answer)
        if kind is None:
            losses.add("answer is not among the 13", f"{record_id}: {answer!r}")
            continue
        if kind != "yes_no":
            records.append(Record(id=record_id, kind=kind, question=question, answers=(answer,)))
            continue
        records.append(Record(record_id, _yes_no_kind(question, answer), question, answers=(answer,)))
        statement = statement_of(question)
        if statement is None:
            losses.add("yes/no question of unknown form gives no statement", f"{record_id}: {question!r}")
            continue
        label = int(answer == "yes")
        truth = ("false", "true")[label]
        records.append(Record(f"{record_id}-statement", "statement", statement, answers=(truth,), label=label))
    if caption := caption_of(questions):
        records.append(Record(f"{image}-caption", "caption", captions=(caption,)))
    return records


READERS = {"easy_vqa": Reader(read_easy_vqa)}
