"""LLaVA-Instruct-150K: `conversation_58k.json`, `detail_23k.json`, `complex_reasoning_77k.json`, each a JSON list.

An entry is a dialogue about one COCO image. Each answer in it is one record, with the turns before it as history. The
answers are left exactly as they are.

Reader options:
    prefix: of the image keys; the dataset's name.
    first_turn_only: take the first question and answer of each dialogue only.
"""

import re
from collections.abc import Iterator
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.common import (
    coco_images,
    coco_media,
    coco_number,
    image_folders,
)
from instructblip.data.readers.files import (
    stream_list,
)
from instructblip.data.records import Record
from instructblip.data.typed import (
    Fields,
    WrongValueError,
    is_text,
)

SPEAKERS = ("human", "gpt")
# The place of the image stands before or after the first question, on a line of its own.
_IMAGE_MARK = re.compile(r"<image>\n|\n<image>|<image>")


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
        with losses.counting(place, records=_answers(fields.get("conversations"))):
            image_id = coco_number(fields, "image")
            dialogue = dialogues.get(image_id, 0)
            dialogues[image_id] = dialogue + 1
            turns = _turns(fields.get("conversations"), place, losses)
            last = 1 if source.options.get("first_turn_only") else len(turns)
            for number, (question, answer) in enumerate(turns[:last]):
                record_id = f"{image_id}-{dialogue}-{number}"
                record = Record(record_id, "dialog", question, (answer,), history=tuple(turns[:number]))
                records.setdefault(image_id, []).append(record)
    yield from coco_media(source.options["prefix"], records, coco_images(folders), losses)


def _turns(conversation: Any, place: str, losses: Losses) -> list[tuple[str, str]]:
    """The (question, answer) pairs of a dialogue, up to the first that is not whole: later ones would lack their history."""
    if not isinstance(conversation, list) or not _alternates(conversation):
        raise WrongValueError("dialogue does not alternate between human and gpt")
    said = [turn["value"] for turn in conversation]
    if said and is_text(said[0]):
        said[0] = _IMAGE_MARK.sub("", said[0]).strip()
    whole = 0
    while whole + 1 < len(said) and is_text(said[whole]) and is_text(said[whole + 1]):
        whole += 2
    if lost := len(said) // 2 - whole // 2:
        losses.add("turn is blank or no text, and so are lost those after it", f"{place} turn {whole}", records=lost)
    elif len(said) % 2:
        losses.add("last question has no answer", place, records=0)
    return list(zip(said[0:whole:2], said[1:whole:2], strict=True))


def _alternates(conversation: list[Any]) -> bool:
    return bool(conversation) and all(
        isinstance(turn, dict) and "value" in turn and turn.get("from") == SPEAKERS[number % 2]
        for number, turn in enumerate(conversation)
    )


def _answers(conversation: Any) -> int:
    """How many records a dialogue that is lost would have given."""
    turns = conversation if isinstance(conversation, list) else []
    return sum(isinstance(turn, dict) and turn.get("from") == "gpt" for turn in turns)


READERS = {"llava": Reader(read_llava, needs=("annotations", "images"), options=("prefix", "first_turn_only"))}
