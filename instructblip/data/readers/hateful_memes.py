"""Hateful Memes (Kiela et al. 2020): is a meme, picture and text together, hateful?

Raw files: `<split>.jsonl`, one JSON object a line with id, img ("img/<id>.png"), text and label, and the folder `img/`.
Ids are integers in some copies and strings in others, with or without their leading zeros: five digits here. The test
files of the challenge's first phase have no labels.
"""

import re
from collections.abc import Iterator
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit
from instructblip.data.readers.common import MISSING_IMAGE, clean_text, file_name, find_image, image_folders, json_lines
from instructblip.data.records import Record

ID_DIGITS = 5
UNLABELLED_SPLITS = ("test_seen", "test_unseen")


def read_hateful_memes(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield one `meme` record an image, in the file's order; without a label where a test file has none.

    Raises:
        UserError: the split file or the folder of images is missing, or the file is not UTF-8.
    """
    folders = image_folders(source)
    seen = set()
    for place, entry in json_lines(source.path("memes"), losses):
        values = entry if isinstance(entry, dict) else {}
        record = _record(values, source.split, place, losses)
        if record is None:
            continue
        name = file_name(values["img"].rpartition("/")[2])
        media = find_image(folders, [name]) if name else None
        if record.id in seen:
            losses.add("meme repeats an id", f"{place}: {record.id}")
        elif media is None:
            losses.add(MISSING_IMAGE, f"{place}: {record.id}")
        else:
            seen.add(record.id)
            yield MediaRecords(f"hateful_memes_{record.id}", record.id, media, [record])


def _record(values: dict[str, Any], split: str, place: str, losses: Losses) -> Record | None:
    meme_id, text, label = _meme_id(values.get("id")), clean_text(values.get("text")), values.get("label")
    if meme_id is None or text is None or not isinstance(values.get("img"), str):
        losses.add("line lacks id, img or text", place)
    elif label is None and split not in UNLABELLED_SPLITS:
        losses.add("meme has no label", place)
    elif label is not None and (type(label) is not int or label not in (0, 1)):
        losses.add("label is neither 0 nor 1", place)
    else:
        answers = () if label is None else (("no", "yes")[label],)
        return Record(meme_id, "meme", text, answers=answers, label=label)
    return None


def _meme_id(value: Any) -> str | None:
    """An id as five digits; None for what is no id."""
    digits = str(value) if type(value) is int else value
    return digits.zfill(ID_DIGITS) if isinstance(digits, str) and re.fullmatch(r"[0-9]+", digits) else None
