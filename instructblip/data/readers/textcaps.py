"""TextCaps 0.1: one entry a caption (`TextCaps_0.1_<split>.json`), OCR tokens in the files of TextVQA.

The images of `val` lie in `train_images/`, whatever `image_path` says. Every entry repeats all five captions of its image
as `reference_strs`: they are taken once an image. The test split has no captions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit
from instructblip.data.readers.common import (
    MISSING_IMAGE,
    caption_records,
    clean_text,
    find_image,
    image_folders,
    plain_id,
    rosetta_tokens,
    stream_list,
    texts,
)

HIDDEN_SPLIT = "test"


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
            yield MediaRecords(f"textcaps_{image_id}", image_id, path, records)


def _read_images(source: RawSplit, losses: Losses) -> dict[str, _Image]:
    """Image id -> its captions."""
    path = source.path("annotations")
    images: dict[str, _Image] = {}
    seen: set[str] = set()
    for row, entry in enumerate(stream_list(path, "data")):
        fields, place = entry if isinstance(entry, dict) else {}, f"{path.name} entry {row}"
        image_id = plain_id(fields.get("image_id"))
        if image_id is None:
            losses.add("entry has no image_id", place)
        elif fields.get("set_name", source.split) != source.split:
            losses.add("entry is of another split", f"{place}: {fields['set_name']!r}")
        elif source.split == HIDDEN_SPLIT:
            if image_id in images:
                losses.add("image is listed twice", f"{place}: {image_id}")
            images[image_id] = _Image()
        else:
            _add_caption(images.setdefault(image_id, _Image()), fields, seen, place, losses)
            if source.split != "train":
                images[image_id].references = images[image_id].references or texts(fields.get("reference_strs")) or ()
    return images


def _add_caption(image: _Image, fields: dict[str, Any], seen: set[str], place: str, losses: Losses) -> None:
    caption_id, text = plain_id(fields.get("caption_id")), clean_text(fields.get("caption_str"))
    if caption_id is None or text is None:
        losses.add("caption is blank or has no id", place)
    elif caption_id in seen:
        losses.add("caption id repeats", f"{place}: {caption_id}")
    else:
        seen.add(caption_id)
        image.captions.append((caption_id, text))
