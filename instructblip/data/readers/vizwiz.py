"""VizWiz-VQA (Gurari et al. 2018): questions that blind people spoke about a picture they had taken.

Raw files: `Annotations/{train,val,test}.json`, a list of {image, question, answers, answer_type, answerable}; the test
file has image and question only. There is one question an image and no question id: the image's name stands for it, as
the record has it, for releases pad its number differently. "unanswerable" is an answer like any other.
"""

from collections.abc import Iterator
from pathlib import Path

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.common import (
    annotators,
    class_tag,
    existing_image,
    given_answers,
    image_folders,
    media_key,
    text_tags,
    unique,
    weigh_answers,
)
from instructblip.data.readers.files import (
    load_list,
)
from instructblip.data.records import Record
from instructblip.data.typed import (
    Fields,
    WrongValueError,
)

UNLABELLED_SPLIT = "test"


def read_vizwiz(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield one `question` record an image, in the file's order; without answers in the test split.

    Raises:
        UserError: a file is missing, cut short or of another form.
    """
    folders = image_folders(source)
    path = source.path("questions")
    seen: set[str] = set()
    for row, entry in enumerate(load_list(path)):
        place = f"{path.name} entry {row}"
        with losses.counting(place):
            fields = Fields.of(entry)
            name, question = fields.file_name("image"), fields.text("question")
            media = existing_image(folders, name)
            answers = _answers(fields, source.split, place, losses)
            stem = unique(seen, Path(name).stem, "image")
            people = annotators(fields.get("answers"), answers)
            tags = text_tags(fields, ["answer_type"]) | class_tag(fields, "answerable")
            record = Record(stem, "question", question, *weigh_answers(answers), people, tags=tags)
            yield MediaRecords(media_key("vizwiz", stem), stem, media, [record])


def _answers(fields: Fields, split: str, place: str, losses: Losses) -> tuple[str, ...]:
    """The answers that people gave, none in the test split."""
    if split == UNLABELLED_SPLIT and not fields.has("answers"):
        return ()
    said = [entry.get("answer") if isinstance(entry, dict) else entry for entry in fields.items("answers")]
    answers = given_answers(said, place, losses)
    if not answers:
        raise WrongValueError("question has no answers")
    return answers


READERS = {"vizwiz": Reader(read_vizwiz, needs=("questions", "images"))}
