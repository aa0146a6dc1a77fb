"""IconQA (Lu et al. 2021), its questions with choices in words: abstract diagrams, mostly of school mathematics.

Raw files: `iconqa_data/iconqa/{train,val,test}/choose_txt/<pid>/` with `data.json` and `image.png`; some copies name the
folder, and the type in the file, `choose_text`. `pid_splits.json` lists the problems of each split. The other two
types, choices in pictures and blanks to fill in, are no part of InstructBLIP's evaluation and are not read.
"""

from collections.abc import Iterator
from pathlib import Path

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.common import (
    existing_image,
    in_number_order,
    split_ids,
    text_tags,
)
from instructblip.data.readers.files import (
    load_json,
)
from instructblip.data.records import Record
from instructblip.data.typed import (
    Fields,
    WrongValueError,
)
from instructblip.errors import UserError

TYPES = ("choose_txt", "choose_text")


def read_iconqa(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the problems of a split, one `multiple_choice` record each, in ascending order of their numbers.

    Raises:
        UserError: the folder of problems or `pid_splits.json` is missing, or of another form.
    """
    folder = source.path("problems")
    if not folder.is_dir():
        raise UserError(f"{folder} must be a folder with a folder for each problem; unpack iconqa_data.zip again")
    listed = split_ids(source.path("pid_splits"), *(f"{name}_{source.split}" for name in TYPES))
    found = {path.name for path in folder.iterdir() if path.name.isdecimal()}
    for pid in in_number_order(listed | found):
        with losses.counting(pid):
            if pid not in found:
                raise WrongValueError("problem has no folder")
            if pid not in listed:
                raise WrongValueError("problem is not among those of its split in pid_splits.json")
            record, image = _record(folder / pid / "data.json", pid), existing_image([folder / pid], "image.png")
            yield MediaRecords(f"iconqa_{pid}", pid, image, [record])


def _record(path: Path, pid: str) -> Record:
    try:
        fields = Fields.of(load_json(path), "data.json")
    except UserError:  # one file of thousands: it costs its own problem only
        raise WrongValueError("data.json is missing or damaged") from None
    if fields.get("ques_type") not in TYPES:
        raise WrongValueError("ques_type is not that of the folder", repr(fields.get("ques_type")))
    question, choices = fields.text("question"), fields.texts("choices")
    label, tags = fields.whole("answer", high=len(choices) - 1), text_tags(fields, ["grade"])
    return Record(pid, "multiple_choice", question, choices=choices, label=label, tags=tags)


READERS = {"iconqa": Reader(read_iconqa, needs=("problems", "pid_splits"))}
