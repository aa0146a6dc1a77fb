"""IconQA (Lu et al. 2021), its questions with choices in words: abstract diagrams, mostly of school mathematics.

Raw files: `iconqa_data/iconqa/{train,val,test}/choose_txt/<pid>/` with `data.json` and `image.png`; some copies name the
folder, and the type in the file, `choose_text`. `pid_splits.json` lists the problems of each split. The other two
types, choices in pictures and blanks to fill in, are no part of InstructBLIP's evaluation and are not read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit
from instructblip.data.readers.common import MISSING_IMAGE, clean_text, in_number_order, load_json, split_ids
from instructblip.data.records import Record
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
        image = folder / pid / "image.png"
        if pid not in found:
            losses.add("problem has no folder", pid)
        elif pid not in listed:
            losses.add("problem is not among those of its split in pid_splits.json", pid)
        elif record := _record(folder / pid / "data.json", pid, losses):
            if image.is_file():
                yield MediaRecords(f"iconqa_{pid}", pid, image, [record])
            else:
                losses.add(MISSING_IMAGE, f"{pid}/image.png")


def _record(path: Path, pid: str, losses: Losses) -> Record | None:
    try:
        content = load_json(path)
    except UserError:  # one file of thousands: it costs its own problem only
        losses.add("data.json is missing or damaged", pid)
        return None
    values = content if isinstance(content, dict) else {}
    question, choices, label = clean_text(values.get("question")), _choices(values.get("choices")), values.get("answer")
    if values.get("ques_type") not in TYPES:
        losses.add("ques_type is not that of the folder", f"{pid}: {values.get('ques_type')!r}")
    elif question is None or not choices:
        losses.add("problem lacks question or choices", pid)
    elif type(label) is not int or not 0 <= label < len(choices):
        losses.add("answer is not the index of a choice", f"{pid}: {label!r}")
    else:
        grade = clean_text(values.get("grade"))
        tags = {} if grade is None else {"grade": grade}
        return Record(pid, "multiple_choice", question, choices=choices, label=label, tags=tags)
    return None


def _choices(values: Any) -> tuple[str, ...] | None:
    """Choices as text: some are numbers in the file. None when one is neither."""
    if not isinstance(values, list):
        return None
    choices = [clean_text(str(value) if type(value) in (int, float) else value) for value in values]
    return None if None in choices else tuple(choice for choice in choices if choice is not None)
