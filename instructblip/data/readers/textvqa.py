"""TextVQA 0.5.1 (Singh et al. 2019): questions whose answer is to be read in the picture.

Raw files: `TextVQA_0.5.1_{train,val,test}.json`, questions with ten answers (none in test), and
`TextVQA_Rosetta_OCR_v0.2_{train,val,test}.json`, the words an OCR system found in each image; joined by the image's id,
16 hexadecimal digits of OpenImages. The images of train and val both lie in `train_images/`.
"""

from collections.abc import Iterator

from instructblip.data.readers.base import OCR_ROLE, Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.common import (
    MISSING_IMAGE,
    annotators,
    given_answers,
    image_folders,
    media_key,
    rosetta_tokens,
    unique,
    weigh_answers,
)
from instructblip.data.readers.files import (
    find_image,
    load_list,
)
from instructblip.data.records import Record
from instructblip.data.typed import (
    Fields,
    WrongValueError,
)

UNLABELLED_SPLIT = "test"


def read_textvqa(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the images of a split with their `question` records, in the order of the images' first questions.

    Raises:
        UserError: a file is missing, cut short or of another form.
    """
    folders = image_folders(source)
    tokens = rosetta_tokens(source, losses)
    path = source.path("questions")
    by_image: dict[str, list[Record]] = {}
    seen: set[str] = set()
    for row, entry in enumerate(load_list(path, "data")):
        place = f"{path.name} entry {row}"
        with losses.counting(place):
            fields = Fields.of(entry)
            image_id, question_id = fields.id("image_id"), fields.id("question_id")
            question, answers = fields.text("question"), _answers(fields, source.split, place, losses)
            unique(seen, question_id, "question id")
            words = () if tokens is None else tokens.get(image_id, ())
            people = annotators(fields.get("answers"), answers)
            record = Record(question_id, "question", question, *weigh_answers(answers), people, ocr_tokens=words)
            by_image.setdefault(image_id, []).append(record)
    for image_id, records in by_image.items():
        if tokens is not None and image_id not in tokens:
            losses.add("image is not in the OCR file (kept without OCR tokens)", image_id, records=0)
        media = find_image(folders, [f"{image_id}.jpg"])
        if media is None:
            losses.add(MISSING_IMAGE, f"{image_id}.jpg", records=len(records))
        else:
            yield MediaRecords(media_key("textvqa", image_id), image_id, media, records)


def _answers(fields: Fields, split: str, place: str, losses: Losses) -> tuple[str, ...]:
    """The answers that people gave, none in the test split."""
    if split == UNLABELLED_SPLIT and not fields.has("answers"):
        return ()
    answers = given_answers(fields.items("answers"), place, losses)
    if not answers:
        raise WrongValueError("question has no answers")
    return answers


READERS = {"textvqa": Reader(read_textvqa, needs=("questions", "images"), may_name=(OCR_ROLE,))}
