"""TextVQA 0.5.1 (Singh et al. 2019): questions whose answer is to be read in the picture.

Raw files: `TextVQA_0.5.1_{train,val,test}.json`, questions with ten answers (none in test), and
`TextVQA_Rosetta_OCR_v0.2_{train,val,test}.json`, the words an OCR system found in each image; joined by the image's id,
16 hexadecimal digits of OpenImages. The images of train and val both lie in `train_images/`.
"""

from collections.abc import Iterator
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit
from instructblip.data.readers.common import (
    MISSING_IMAGE,
    annotators,
    clean_text,
    find_image,
    given_answers,
    image_folders,
    load_list,
    plain_id,
    rosetta_tokens,
    weigh_answers,
)
from instructblip.data.records import Record

UNLABELLED_SPLIT = "test"


def read_textvqa(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the images of a split with their `question` records, in the order of the images' first questions.

    Raises:
        UserError: a file is missing, cut short or of another form.
    """
    folders = image_folders(source)
    tokens = rosetta_tokens(source, losses)
    by_image: dict[str, list[Record]] = {}
    seen = set()
    for row, entry in enumerate(load_list(source.path("questions"), "data")):
        values = entry if isinstance(entry, dict) else {}
        image_id, question_id = plain_id(values.get("image_id")), plain_id(values.get("question_id"))
        question, place = clean_text(values.get("question")), f"data entry {row}: question {question_id}"
        if image_id is None or question_id is None or question is None:
            losses.add("entry lacks question_id, image_id or question", f"data entry {row}")
        elif question_id in seen:
            losses.add("question repeats an id", place)
        elif (answers := _answers(values.get("answers"), source.split, place, losses)) is None:
            losses.add("question has no answers", place)
        else:
            seen.add(question_id)
            words = () if tokens is None else tokens.get(image_id, ())
            people = annotators(values.get("answers"), answers)
            record = Record(question_id, "question", question, *weigh_answers(answers), people, ocr_tokens=words)
            by_image.setdefault(image_id, []).append(record)
    for image_id, records in by_image.items():
        if tokens is not None and image_id not in tokens:
            losses.add("image is not in the OCR file (kept without OCR tokens)", image_id, records=0)
        media = find_image(folders, [f"{image_id}.jpg"])
        if media is None:
            losses.add(MISSING_IMAGE, f"{image_id}.jpg", records=len(records))
        else:
            yield MediaRecords(f"textvqa_{image_id}", image_id, media, records)


def _answers(entries: Any, split: str, place: str, losses: Losses) -> tuple[str, ...] | None:
    """The answers that people gave, none in the test split; None where they should be and are not."""
    if entries is None and split == UNLABELLED_SPLIT:
        return ()
    return given_answers(entries, place, losses) or None
