"""OCR-VQA: questions about book covers, `dataset.json`, one object keyed by the book's id.

Images are not shipped: the authors' `loadDataset.py` saves each as `images/<id><extension of its url>`. Many links have
died, so a cover that is not there is usual; pages of an HTML error saved as a cover are found by preparation.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit
from instructblip.data.readers.common import (
    MISSING_IMAGE,
    clean_text,
    find_image,
    image_folders,
    plain_id,
    stream_pairs,
)
from instructblip.data.records import Record
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
        number = entry.get("split") if isinstance(entry, dict) else None
        if type(number) is not int or number not in SPLIT_NUMBER.values():
            if source.split == "train":
                losses.add("book has no split 1, 2 or 3", f"{path.name} {book_id!r}", records=_length(entry))
            continue
        if number != SPLIT_NUMBER[source.split]:
            continue
        if plain_id(book_id) is None or book_id in seen:
            reason = "book id repeats" if book_id in seen else "book id is not of letters and digits"
            losses.add(reason, f"{path.name} {book_id!r}", records=_length(entry))
            continue
        seen.add(book_id)
        records = _records(book_id, entry, losses)
        image = find_image(folders, _names(book_id, entry.get("imageURL")))
        if image is None and records:
            losses.add(MISSING_IMAGE, f"images/{book_id}", records=len(records))
        elif image is not None and records:
            yield MediaRecords(f"ocr_vqa_{book_id}", book_id, image, records)


def _length(entry: Any) -> int:
    questions = entry.get("questions") if isinstance(entry, dict) else None
    return len(questions) if isinstance(questions, list) else 0


def _names(book_id: str, url: Any) -> list[str]:
    own = os.path.splitext(url)[1] if isinstance(url, str) else ""
    known = [own] if re.fullmatch(r"\.[A-Za-z0-9]+", own) else []
    return [book_id + extension for extension in (*known, *EXTENSIONS)]


def _records(book_id: str, entry: dict[str, Any], losses: Losses) -> list[Record]:
    """The questions of a book. The two lists are parallel: where they differ in length nobody knows what is whose."""
    questions, answers = entry.get("questions"), entry.get("answers")
    if not isinstance(questions, list) or not isinstance(answers, list) or len(questions) != len(answers):
        losses.add("book's questions and answers are not two lists of one length", book_id, records=_length(entry))
        return []
    genre = clean_text(entry.get("genre"))
    records = []
    for number, pair in enumerate(zip(questions, answers, strict=True)):
        question, answer = clean_text(pair[0]), clean_text(pair[1])
        if question is None or answer is None:
            losses.add("question or answer is blank or no text", f"{book_id} question {number}")
            continue
        tags = {"genre": genre} if genre else {}
        records.append(Record(f"{book_id}-{number}", "question", question, (answer,), tags=tags))
    return records
