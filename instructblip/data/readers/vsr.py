"""VSR, Visual Spatial Reasoning (Liu et al. 2023): is a statement about two objects of an image true?

Raw files: `data/splits/{random,zeroshot}/{train,dev,test}.jsonl` of the repository, one JSON object a line with image,
caption, label and relation. The images are COCO's of 2017, train and val: a flat copy, or COCO's own folders.

A statement has no id of its own; its record is named after its image and its number among the image's statements.
"""

from collections.abc import Iterator

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.common import (
    coco_images,
    coco_media,
    coco_number,
    image_folders,
    text_tags,
)
from instructblip.data.readers.files import (
    json_lines,
)
from instructblip.data.records import Record
from instructblip.data.typed import (
    Fields,
)

TAGS = ("relation", "subj", "obj")


def read_vsr(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the images of a split with their `statement` records, in ascending order of COCO's number.

    Raises:
        UserError: the split file or all image folders are missing, or the file is not UTF-8.
    """
    by_image: dict[int, list[Record]] = {}
    for place, entry in json_lines(source.path("statements"), losses):
        with losses.counting(place):
            fields = Fields.of(entry, "line")
            image_id, caption = coco_number(fields, "image"), fields.text("caption")
            label = fields.whole("label", high=1)
            records = by_image.setdefault(image_id, [])
            record_id, truth = f"{image_id}-{len(records)}", ("false", "true")[label]
            tags = text_tags(fields, TAGS)
            records.append(Record(record_id, "statement", caption, answers=(truth,), label=label, tags=tags))
    yield from coco_media("vsr", by_image, coco_images(image_folders(source)), losses)


READERS = {"vsr": Reader(read_vsr, needs=("statements", "images"))}
