"""TextCaps 0.1: one entry a caption (`TextCaps_0.1_<split>.json`), OCR tokens in the files of TextVQA.

The images of `val` lie in `train_images/`, whatever `image_path` says. Every entry repeats all five captions of its image
as `reference_strs`: they are taken once an image. The test split has no captions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from instructblip.data.readers.base import OCR_ROLE, Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.common import (
    MISSING_IMAGE,
    caption_records,
    check_split,
    image_folders,
    media_key,
    rosetta_tokens,
    unique,
)
from instructblip.data.readers.files import (
    find_image,
    stream_list,
)
from instructblip.data.typed import (
    Fields,
    WrongValueError,
    texts,
)

HIDDEN_SPLIT = "test"
SCORED_SPLITS = ("val",)


@dataclass
class _Image:
    captions: list[tuple[str, str]] = field(default_factory=list)
    references: tuple[str, ...] = ()


def read_textcaps(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the images of `train`, `val` or `test` in the order in which the file first names them.

    Raises:
        UserError: a file or the images are missing, or a file is damaged.
    """
    folders = image_folders(source)
    tokens = rosetta_tokens(source, losses)
    for image_id, image in _read_images(source, losses).items():
        references = image.references or tuple(text for _, text in image.captions)
        found = () if tokens is None else tokens.get(image_id)
        records = caption_records(source.split, image_id, image.captions, references, found or ())
        path = find_image(folders, [f"{image_id}.jpg"])
        if not image.captions and source.split != HIDDEN_SPLIT:
            losses.add("image has no captions", image_id, records=0)
        elif path is None:
            losses.add(MISSING_IMAGE, f"{image_id}.jpg", records=len(records))
        else:
            if found is None:
                losses.add("image has no OCR entry; kept without tokens", image_id, records=0)
            yield MediaRecords(media_key("textcaps", image_id), image_id, path, records)


def _read_images(source: RawSplit, losses: Losses) -> dict[str, _Image]:
    """Image id -> its captions."""
    path = source.path("annotations")
    images: dict[str, _Image] = {}
    seen: set[str] = set()
    for row, entry in enumerate(stream_list(path, "data")):
        with losses.counting(f"{path.name} entry {row}"):
            fields = Fields.of(entry)
            image_id = fields.id("image_id")
            check_split(fields, "set_name", source.split)
            if source.split == HIDDEN_SPLIT and image_id in images:
                raise WrongValueError("image is listed twice", image_id)
            image = images.setdefault(image_id, _Image())
            if source.split in SCORED_SPLITS:
                image.references = image.references or texts(fields.get("reference_strs"))
            if source.split != HIDDEN_SPLIT:
                caption_id, text = fields.id("caption_id"), fields.text("caption_str")
                image.captions.append((unique(seen, caption_id, "caption id"), text))
    return images


READERS = {"textcaps": Reader(read_textcaps, needs=("annotations", "images"), may_name=(OCR_ROLE,))}
