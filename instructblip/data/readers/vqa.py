"""The VQA layout: VQA 2.0 and OK-VQA, a file of questions and, where answers are public, a file of annotations.

Both are joined by question id. Each annotation has the answers of ten people, which become distinct answers with the
number of people as weight.

Reader options:
    prefix: of the image keys; the dataset's name.
    description: what `info.description`, where there is one, must hold (without its hyphens): OK-VQA names its files as
        VQA 1.0 does, and numbers its questions in the same way.
    answer_field: split -> the field of an annotated answer that is taken where it is present, `answer` otherwise. OK-VQA
        has the text as typed (`raw_answer`) beside its stem (`answer`), which its scorer compares with.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.common import (
    annotators,
    coco_id,
    coco_images,
    coco_media,
    coco_number,
    image_folders,
    weigh_answers,
)
from instructblip.data.readers.files import (
    peek,
    stream_list,
)
from instructblip.data.records import Record
from instructblip.data.typed import (
    Fields,
    WrongValueError,
    is_text,
    spoken,
)
from instructblip.errors import UserError


@dataclass(frozen=True)
class _Annotation:
    answers: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    annotators: int | None = None
    tags: dict[str, str] = field(default_factory=dict)


def read_vqa(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the images of a split in ascending order of their COCO number, each with its questions in the file's order.

    A split whose card names no `annotations` has records without answers.

    Raises:
        UserError: a file is missing, damaged, of another split or of another dataset.
    """
    folders = image_folders(source)
    questions = _read_questions(source, losses)
    hidden = "annotations" not in source.files
    annotations = {} if hidden else _read_annotations(source, questions, losses)
    records: dict[int, list[Record]] = {}
    for question_id, asked in questions.items():
        annotation = _Annotation() if hidden else annotations.get(question_id)
        if asked is None or (annotation is None and question_id in annotations):
            continue  # counted where it was read
        if annotation is None:
            losses.add("question has no annotation", f"question {question_id}")
            continue
        image_id, question = asked
        given = (annotation.answers, annotation.weights, annotation.annotators)
        record = Record(question_id, "question", question, *given, tags=annotation.tags)
        records.setdefault(image_id, []).append(record)
    yield from coco_media(source.options["prefix"], records, coco_images(folders), losses)


def _read_questions(source: RawSplit, losses: Losses) -> dict[str, tuple[int, str] | None]:
    """Question id -> (image id, question); None for one that was counted as lost."""
    path = source.path("questions")
    _check_header(path, source)
    questions: dict[str, tuple[int, str] | None] = {}
    for row, entry in enumerate(stream_list(path, "questions")):
        with losses.counting(f"{path.name} entry {row}"):
            fields = Fields.of(entry)
            question_id = fields.id("question_id")
            if question_id in questions:
                raise WrongValueError("question id occurs twice", question_id)
            questions[question_id] = None
            questions[question_id] = (coco_number(fields, "image_id"), fields.text("question"))
    return questions


def _read_annotations(
    source: RawSplit, questions: dict[str, tuple[int, str] | None], losses: Losses
) -> dict[str, _Annotation | None]:
    """Question id -> annotation; None for one that was counted as lost."""
    path = source.path("annotations")
    _check_header(path, source)
    taken = source.options.get("answer_field", {}).get(source.split, "answer")
    annotations: dict[str, _Annotation | None] = {}
    for row, entry in enumerate(stream_list(path, "annotations")):
        place = f"{path.name} entry {row}"
        with losses.counting(place, records=0):  # the question of one that is lost here is counted
            fields = Fields.of(entry, "annotation")
            question_id = fields.id("question_id")
            if question_id in annotations:
                raise WrongValueError("annotation repeats a question id", question_id)
            if question_id not in questions:
                losses.add("annotation has no question", f"{place}: question {question_id}")
                continue
            annotations[question_id] = None
            with losses.counting(f"{place}: question {question_id}"):
                if (asked := questions[question_id]) is not None:
                    annotations[question_id] = _annotation(fields, asked[0], taken, place, losses)
    return annotations


def _annotation(fields: Fields, image_id: int, taken: str, place: str, losses: Losses) -> _Annotation:
    if coco_id(fields.get("image_id")) != image_id:
        raise WrongValueError("annotation names another image than its question")
    entries = fields.items("answers")
    people = [entry if isinstance(entry, dict) else {"answer": entry} for entry in entries]
    given = [spoken(entry[taken] if is_text(entry.get(taken)) else entry.get("answer")) for entry in people]
    # Not brought to single spaces: the scorer compares raw texts where all ten people agree.
    texts = [answer.strip() for answer in given if is_text(answer)]
    if not texts:
        raise WrongValueError("annotation has no answer with text")
    if len(texts) < len(given):
        losses.add("answer of one person is blank or no text", place, records=0)
    answers, weights = weigh_answers(texts)
    tags = {name: fields.get(name) for name in ("answer_type", "question_type") if is_text(fields.get(name))}
    return _Annotation(answers, weights, annotators(given, texts), tags)


def _check_header(path: Path, source: RawSplit) -> None:
    """Refuse a file of another split, or of another dataset that uses the same file names."""
    subtype = peek(path, "data_subtype")  # "val2014", "test-dev2015"
    if isinstance(subtype, str) and _first_word(subtype) != _first_word(source.split):
        raise UserError(f"{path} says it is of {subtype}, not of split {source.split}; put the right file there")
    wanted = source.options.get("description")
    info = peek(path, "info") if wanted else None
    said = info.get("description") if isinstance(info, dict) else None
    if wanted and isinstance(said, str) and wanted not in said.replace("-", ""):
        raise UserError(f"{path} says {said!r}, which is not {wanted}; keep each dataset in a folder of its own")


def _first_word(text: str) -> str:
    return re.split("[^a-z]", text)[0]


READERS = {
    "vqa": Reader(
        read_vqa,
        needs=("questions", "images"),
        may_name=("annotations",),
        options=("prefix", "description", "answer_field"),
    )
}
