"""GQA (Hudson and Manning 2019): compositional questions about Visual Genome's images.

Raw files: `<split>_balanced_questions.json` and `<split>_all_questions.json`, objects keyed by question id; the largest,
`train_all_questions`, is a folder of such files. The test and challenge files have no answers. The images are
`images/<image id>.jpg`. Both ids are text: a question's may begin with a zero, an image's with the letter "n".
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.common import (
    MISSING_IMAGE,
    class_tag,
    image_folders,
    media_key,
    text_tags,
    unique,
)
from instructblip.data.readers.files import (
    find_image,
    stream_pairs,
)
from instructblip.data.records import Record
from instructblip.data.typed import (
    Fields,
    WrongValueError,
    identifier,
)
from instructblip.errors import UserError

UNLABELLED_SPLITS = ("test", "test_all", "challenge", "challenge_all")
TYPES = ("structural", "semantic", "detailed")


def read_gqa(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the images of a split with their `question` records, in the order of the images' first questions.

    Raises:
        UserError: a file or folder is missing, cut short or of another form.
    """
    folders = image_folders(source)
    by_image: dict[str, list[Record]] = {}
    seen: set[str] = set()
    for question_id, entry in _questions(source.path("questions")):
        with losses.counting(f"question {question_id}"):
            if identifier(question_id) is None:
                raise WrongValueError("question id is no id")
            fields = Fields.of(entry)
            image_id, question = fields.id("imageId"), fields.text("question")
            hidden = source.split in UNLABELLED_SPLITS and not fields.has("answer")
            answers = () if hidden else (fields.answer("answer"),)
            unique(seen, question_id, "question id")
            record = Record(question_id, "question", question, answers=answers, tags=_tags(fields))
            by_image.setdefault(image_id, []).append(record)
    for image_id, records in by_image.items():
        media = find_image(folders, [f"{image_id}.jpg"])
        if media is None:
            losses.add(MISSING_IMAGE, f"{image_id}.jpg", records=len(records))
        else:
            yield MediaRecords(media_key("gqa", image_id), image_id, media, records)


def _questions(path: Path) -> Iterator[tuple[str, Any]]:
    """Question ids with their entries, of one file or of all files of a folder in the order of their names."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no JSON file; unpack GQA's questions there")
    for file in files:
        yield from stream_pairs(file)


def _tags(fields: Fields) -> dict[str, str]:
    """The question's types, and whether it belongs to the balanced set: the official scorer counts only those."""
    return text_tags(fields.inner("types"), TYPES) | class_tag(fields, "isBalanced", "balanced")


READERS = {"gqa": Reader(read_gqa, needs=("questions", "images"))}
