"""A-OKVQA 1.0: one JSON list a split. Each question has four choices and ten direct answers; the test split has neither
the right choice nor answers.
"""

from collections.abc import Iterator
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit
from instructblip.data.readers.common import (
    clean_text,
    coco_id,
    coco_images,
    coco_media,
    image_folders,
    plain_id,
    stream_list,
    texts,
    weigh_answers,
)
from instructblip.data.records import Record

HIDDEN_SPLIT = "test"


def read_aokvqa(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the images of a split in ascending order of their COCO number, each with its questions in the file's order.

    Each question is one record with its direct answers and its choices. `tags["difficult_direct_answer"]` says which
    questions the official direct-answer score leaves out.

    Raises:
        UserError: a file or the images are missing, or a file is damaged.
    """
    path, folders = source.path("annotations"), image_folders(source)
    records: dict[int, list[Record]] = {}
    seen: set[str] = set()
    for row, entry in enumerate(stream_list(path)):
        fields = entry if isinstance(entry, dict) else {}
        image_id, record = coco_id(fields.get("image_id")), _record(fields, source.split == HIDDEN_SPLIT)
        place = f"{path.name} entry {row}"
        if fields.get("split", source.split) != source.split:
            losses.add("question is of another split", f"{place}: {fields['split']!r}")
        elif image_id is None or record is None:
            losses.add("question lacks an id, an image, text, choices or answers", place)
        elif record.id in seen:
            losses.add("question id repeats", f"{place}: {record.id}")
        else:
            seen.add(record.id)
            records.setdefault(image_id, []).append(record)
    yield from coco_media("aokvqa", records, coco_images(folders), losses)


def _record(fields: dict[str, Any], hidden: bool) -> Record | None:
    """One question, or None when it lacks something."""
    question_id, question = plain_id(fields.get("question_id")), clean_text(fields.get("question"))
    choices, label = texts(fields.get("choices")), fields.get("correct_choice_idx")
    given = texts(fields.get("direct_answers"))
    if question_id is None or question is None or not choices:
        return None
    if hidden and label is None and given is None:
        given = ()
    elif type(label) is not int or not 0 <= label < len(choices) or not given:
        return None
    difficult = fields.get("difficult_direct_answer")
    answers, weights = weigh_answers(given)
    tags = {"difficult_direct_answer": str(difficult).lower()} if isinstance(difficult, bool) else {}
    return Record(question_id, "question", question, answers, weights, choices=choices, label=label, tags=tags)
