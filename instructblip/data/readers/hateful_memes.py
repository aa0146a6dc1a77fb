"""Hateful Memes (Kiela et al. 2020): is a meme, picture and text together, hateful?

Raw files: `<split>.jsonl`, one JSON object a line with id, img ("img/<id>.png"), text and label, and the folder `img/`.
Ids are integers in some copies and strings in others, with or without their leading zeros: five digits here. The test
files of the challenge's first phase have no labels.
"""

import re
from collections.abc import Iterator

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.common import (
    existing_image,
    image_folders,
    media_key,
    unique,
)
from instructblip.data.readers.files import (
    json_lines,
)
from instructblip.data.records import Record
from instructblip.data.typed import (
    Fields,
    WrongValueError,
    file_name,
)

ID_DIGITS = 5
UNLABELLED_SPLITS = ("test_seen", "test_unseen")


def read_hateful_memes(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield one `meme` record an image, in the file's order; without a label where a test file has none.

    Raises:
        UserError: the split file or the folder of images is missing, or the file is not UTF-8.
    """
    folders = image_folders(source)
    seen: set[str] = set()
    for place, entry in json_lines(source.path("memes"), losses):
        with losses.counting(place):
            fields = Fields.of(entry, "line")
            record = _record(fields, source.split)
            name = file_name(fields.verbatim("img").rpartition("/")[2])
            if name is None:
                raise WrongValueError("img is not the name of a file")
            media = existing_image(folders, name)
            unique(seen, record.id, "id")
            yield MediaRecords(media_key("hateful_memes", record.id), record.id, media, [record])


def _record(fields: Fields, split: str) -> Record:
    meme_id, text = fields.id("id").zfill(ID_DIGITS), fields.text("text")
    if not re.fullmatch("[0-9]+", meme_id):
        raise WrongValueError("id is not of digits")
    if split in UNLABELLED_SPLITS and not fields.has("label"):
        return Record(meme_id, "meme", text)
    label = fields.whole("label", high=1)
    return Record(meme_id, "meme", text, answers=(("no", "yes")[label],), label=label)


READERS = {"hateful_memes": Reader(read_hateful_memes, needs=("memes", "images"))}
