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
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit
from instructblip.data.readers.common import (
    annotators,
    clean_text,
    coco_id,
    coco_images,
    coco_media,
    image_folders,
    is_text,
    peek,
    plain_id,
    stream_list,
    weigh_answers,
)
from instructblip.data.records import Record
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
        fields = entry if isinstance(entry, dict) else {}
        question_id, image_id = plain_id(fields.get("question_id")), coco_id(fields.get("image_id"))
        question = clean_text(fields.get("question"))
        if question_id is not None and question_id in questions:
            losses.add("question id repeats", f"{path.name} entry {row}: {question_id}")
        elif question_id is None or image_id is None or question is None:
            losses.add("question lacks question_id, image_id or text", f"{path.name} entry {row}")
            if question_id is not None:
                questions[question_id] = None
        else:
            questions[question_id] = (image_id, question)
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
        fields = entry if isinstance(entry, dict) else {}
        question_id = plain_id(fields.get("question_id"))
        place = f"{path.name} entry {row}" + (f": question {question_id}" if question_id else "")
        if question_id is None:
            losses.add("annotation has no question_id", place, records=0)  # its question is counted
        elif question_id not in questions:
            losses.add("annotation has no question", place)
        elif question_id in annotations:
            losses.add("annotation repeats a question id", place, records=0)
        elif (asked := questions[question_id]) is None:
            annotations[question_id] = None
        elif coco_id(fields.get("image_id")) != asked[0]:
            losses.add("annotation names another image than its question", place)
            annotations[question_id] = None
        else:
            annotations[question_id] = _annotation(fields, taken, place, losses)
    return annotations


def _annotation(fields: dict[str, Any], taken: str, place: str, losses: Losses) -> _Annotation | None:
    entries = fields.get("answers")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        losses.add("annotation has no list of answers", place)
        return None
    given = [entry[taken] if is_text(entry.get(taken)) else entry.get("answer") for entry in entries]
    # Not brought to single spaces: the scorer compares raw texts where all ten people agree.
    texts = [answer.strip() for answer in given if is_text(answer)]
    if not texts:
        losses.add("annotation has no answer with text", place)
        return None
    if len(texts) < len(given):
        losses.add("answer of one person is blank or no text", place, records=0)
    answers, weights = weigh_answers(texts)
    tags = {name: fields[name] for name in ("answer_type", "question_type") if is_text(fields.get(name))}
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
