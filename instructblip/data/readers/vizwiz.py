"""VizWiz-VQA (Gurari et al. 2018): questions that blind people spoke about a picture they had taken.

Raw files: `Annotations/{train,val,test}.json`, a list of {image, question, answers, answer_type, answerable}; the test
file has image and question only. There is one question an image and no question id: the image's name stands for it, as
the record has it, for releases pad its number differently. "unanswerable" is an answer like any other.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit
from instructblip.data.readers.common import (
    MISSING_IMAGE,
    annotators,
    clean_text,
    file_name,
    find_image,
    given_answers,
    image_folders,
    is_text,
    load_list,
    weigh_answers,
)
from instructblip.data.records import Record

UNLABELLED_SPLIT = "test"


def read_vizwiz(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield one `question` record an image, in the file's order; without answers in the test split.

    Raises:
        UserError: a file is missing, cut short or of another form.
    """
    folders = image_folders(source)
    seen = set()
    for row, entry in enumerate(load_list(source.path("questions"))):
        values = entry if isinstance(entry, dict) else {}
        name, question = file_name(values.get("image")), clean_text(values.get("question"))
        place = f"entry {row}: {name}"
        if name is None or question is None:
            losses.add("entry lacks image or question", f"entry {row}")
        elif (stem := Path(name).stem) in seen:
            losses.add("entry repeats an image", place)
        elif (media := find_image(folders, [name])) is None:
            losses.add(MISSING_IMAGE, name)
        elif (answers := _answers(values.get("answers"), source.split, place, losses)) is None:
            losses.add("question has no answers", place)
        else:
            seen.add(stem)
            people = annotators(values.get("answers"), answers)
            record = Record(stem, "question", question, *weigh_answers(answers), people, tags=_tags(values))
            yield MediaRecords(f"vizwiz_{stem}", stem, media, [record])


def _answers(entries: Any, split: str, place: str, losses: Losses) -> tuple[str, ...] | None:
    """The answers that people gave, none in the test split; None where they should be and are not."""
    if entries is None and split == UNLABELLED_SPLIT:
        return ()
    if isinstance(entries, list):
        entries = [entry.get("answer") if isinstance(entry, dict) else None for entry in entries]
    return given_answers(entries, place, losses) or None


def _tags(values: dict[str, Any]) -> dict[str, str]:
    tags = {"answer_type": values["answer_type"].strip()} if is_text(values.get("answer_type")) else {}
    answerable = values.get("answerable")
    if type(answerable) is int and answerable in (0, 1):
        tags["answerable"] = ("false", "true")[answerable]
    return tags
