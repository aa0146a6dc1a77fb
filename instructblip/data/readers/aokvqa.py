"""A-OKVQA 1.0: one JSON list a split. Each question has four choices and ten direct answers; the test split has neither
the right choice nor answers.
"""

from collections.abc import Iterator

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.common import (
    check_split,
    class_tag,
    coco_images,
    coco_media,
    coco_number,
    image_folders,
    unique,
    weigh_answers,
)
from instructblip.data.readers.files import (
    stream_list,
)
from instructblip.data.records import Record
from instructblip.data.typed import (
    Fields,
)

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
        with losses.counting(f"{path.name} entry {row}"):
            fields = Fields.of(entry)
            check_split(fields, "split", source.split)
            image_id, record = coco_number(fields, "image_id"), _record(fields, source.split == HIDDEN_SPLIT)
            unique(seen, record.id, "question id")
            records.setdefault(image_id, []).append(record)
    yield from coco_media("aokvqa", records, coco_images(folders), losses)


def _record(fields: Fields, hidden: bool) -> Record:
    """One question; in the hidden split without its right choice and answers."""
    question_id, question, choices = fields.id("question_id"), fields.text("question"), fields.texts("choices")
    label, answers, weights = None, tuple[str, ...](), tuple[float, ...]()
    if not hidden or fields.has("correct_choice_idx") or fields.has("direct_answers"):
        label = fields.whole("correct_choice_idx", high=len(choices) - 1)
        answers, weights = weigh_answers(fields.texts("direct_answers"))
    tags = class_tag(fields, "difficult_direct_answer")
    return Record(question_id, "question", question, answers, weights, choices=choices, label=label, tags=tags)


READERS = {"aokvqa": Reader(read_aokvqa, needs=("annotations", "images"))}
