"""LLaVA-Instruct-150K: `conversation_58k.json`, `detail_23k.json`, `complex_reasoning_77k.json`, each a JSON list.

An entry is a dialogue about one COCO image. Each answer in it is one record, with the turns before it as history. The
answers are left exactly as they are.

Reader options:
    prefix: of the image keys; the dataset's name.
    first_turn_only: take the first question and answer of each dialogue only.
"""

from collections.abc import Iterator

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.common import (
    coco_images,
    coco_media,
    coco_number,
    image_folders,
)
from instructblip.data.readers.dialogues import count_answers, read_dialogue
from instructblip.data.readers.files import (
    stream_list,
)
from instructblip.data.records import Record
from instructblip.data.typed import (
    Fields,
)


def read_llava(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the images in ascending order of their COCO number, each with its dialogues in the file's order.

    Ids of entries repeat, within a file too, so a record's id is `<image>-<dialogue of this image>-<turn>`.

    Raises:
        UserError: the file or the images are missing, or the file is damaged.
    """
    path, folders = source.path("annotations"), image_folders(source)
    records: dict[int, list[Record]] = {}
    dialogues: dict[int, int] = {}
    for row, entry in enumerate(stream_list(path)):
        fields, place = Fields(entry if isinstance(entry, dict) else {}), f"{path.name} entry {row}"
        with losses.counting(place, records=count_answers(fields.get("conversations"))):
            image_id = coco_number(fields, "image")
            dialogue = dialogues.get(image_id, 0)
            dialogues[image_id] = dialogue + 1
            turns = read_dialogue(fields.get("conversations"), place, losses).turns
            last = 1 if source.options.get("first_turn_only") else len(turns)
            for number, (question, answer) in enumerate(turns[:last]):
                record_id = f"{image_id}-{dialogue}-{number}"
                record = Record(record_id, "dialog", question, (answer,), history=turns[:number])
                records.setdefault(image_id, []).append(record)
    yield from coco_media(source.options["prefix"], records, coco_images(folders), losses)


READERS = {
    "llava": Reader(read_llava, needs=("annotations", "images"), options=("prefix", "first_turn_only")),
}
