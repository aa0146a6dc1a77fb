"""VSR, Visual Spatial Reasoning (Liu et al. 2023): is a statement about two objects of an image true?

Raw files: `data/splits/{random,zeroshot}/{train,dev,test}.jsonl` of the repository, one JSON object a line with image,
caption, label and relation. The images are COCO's of 2017, train and val: a flat copy, or COCO's own folders.

A statement has no id of its own; its record is named after its image and its number among the image's statements.
"""

from collections.abc import Iterator
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit
from instructblip.data.readers.common import clean_text, coco_id, coco_images, coco_media, image_folders, json_lines
from instructblip.data.records import Record

TAGS = ("relation", "subj", "obj")


def read_vsr(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the images of a split with their `statement` records, in ascending order of COCO's number.

    Raises:
        UserError: the split file or all image folders are missing, or the file is not UTF-8.
    """
    by_image: dict[int, list[Record]] = {}
    for place, entry in json_lines(source.path("statements"), losses):
        values = entry if isinstance(entry, dict) else {}
        image_id, caption, label = coco_id(values.get("image")), clean_text(values.get("caption")), values.get("label")
        if image_id is None or caption is None or type(label) is not int or label not in (0, 1):
            losses.add("line lacks image, caption or label 0 or 1", place)
            continue
        records = by_image.setdefault(image_id, [])
        records.append(_record(f"{image_id}-{len(records)}", caption, label, values))
    yield from coco_media("vsr", by_image, coco_images(image_folders(source)), losses)


def _record(record_id: str, caption: str, label: int, values: dict[str, Any]) -> Record:
    tags = {tag: text for tag in TAGS if (text := clean_text(values.get(tag))) is not None}
    return Record(record_id, "statement", caption, answers=(("false", "true")[label],), label=label, tags=tags)
