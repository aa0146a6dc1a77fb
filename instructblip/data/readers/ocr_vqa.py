"""OCR-VQA: questions about book covers, `dataset.json`, one object keyed by the book's id.

Images are not shipped: the authors' `loadDataset.py` saves each as `images/<id><extension of its url>`. Many links have
died, so a cover that is not there is usual; pages of an HTML error saved as a cover are found by preparation.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.common import (
    MISSING_IMAGE,
    image_folders,
    media_key,
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
    clean_text,
    identifier,
    spoken,
    whole_number,
)
from instructblip.errors import UserError

SPLIT_NUMBER = {"train": 1, "val": 2, "test": 3}
# Tried after the url's own: copies whose covers were all brought to one format exist.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif")


def read_ocr_vqa(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the covers of `train`, `val` or `test` in the file's order.

    An entry whose own split cannot be read is counted in `train` only, as it belongs to one split at most.

    Raises:
        UserError: no such split; the file or the folder of images is missing, or the file is damaged.
    """
    if source.split not in SPLIT_NUMBER:
        raise UserError(f"ocr_vqa has no split {source.split!r}; choose one of {', '.join(SPLIT_NUMBER)}")
    path, folders = source.path("annotations"), image_folders(source)
    seen: set[str] = set()
    for book_id, entry in stream_pairs(path):
        with losses.counting(f"{path.name} {book_id!r}", records=_length(entry)):
            number = whole_number(entry.get("split")) if isinstance(entry, dict) else None
            if number not in SPLIT_NUMBER.values() and source.split == "train":
                raise WrongValueError("book has no split 1, 2 or 3")
            if number != SPLIT_NUMBER[source.split]:
                continue
            if identifier(book_id) is None:
                raise WrongValueError("book id is no id")
            unique(seen, book_id, "book id")
            records = _records(book_id, Fields.of(entry), losses)
            image = find_image(folders, _names(book_id, entry.get("imageURL")))
            if image is None and records:
                losses.add(MISSING_IMAGE, f"images/{book_id}", records=len(records))
            elif image is not None and records:
                yield MediaRecords(media_key("ocr_vqa", book_id), book_id, image, records)


def _length(entry: Any) -> int:
    questions = entry.get("questions") if isinstance(entry, dict) else None
    return len(questions) if isinstance(questions, list) else 0


def _names(book_id: str, url: Any) -> list[str]:
    own = os.path.splitext(url)[1] if isinstance(url, str) else ""
    known = [own] if re.fullmatch(r"\.[A-Za-z0-9]+", own) else []
    return [book_id + extension for extension in (*known, *EXTENSIONS)]


def _records(book_id: str, fields: Fields, losses: Losses) -> list[Record]:
    """The questions of a book. The two lists are parallel: where they differ in length nobody knows what is whose."""
    questions, answers = fields.items("questions"), fields.items("answers")
    if len(questions) != len(answers):
        raise WrongValueError("book has not as many answers as questions")
    genre = fields.optional_text("genre")
    records = []
    for number, pair in enumerate(zip(questions, answers, strict=True)):
        question, answer = clean_text(pair[0]), clean_text(spoken(pair[1]))
        if question is None or answer is None:
            losses.add("question or answer is blank or no text", f"{book_id} question {number}")
            continue
        tags = {"genre": genre} if genre else {}
        records.append(Record(f"{book_id}-{number}", "question", question, (answer,), tags=tags))
    return records


READERS = {"ocr_vqa": Reader(read_ocr_vqa, needs=("annotations", "images"))}
