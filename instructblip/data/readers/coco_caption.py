"""COCO captions: Karpathy's splits (`dataset_coco.json`), and COCO's own caption files (`captions_val2017.json`)."""

from collections.abc import Iterator, Sequence
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit
from instructblip.data.readers.common import (
    MISSING_IMAGE,
    caption_records,
    clean_text,
    coco_id,
    coco_images,
    coco_media,
    image_folders,
    plain_id,
    stream_list,
)

# The 30,504 images of the official val2014 that Karpathy & Fei-Fei kept for neither validation nor test are trained on.
SPLIT_OF_KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def read_coco_karpathy(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the images of `train`, `val` or `test` in the file's order, found by number in whichever folder they lie.

    An entry of an unknown split is counted in `train` only, as it belongs to one split at most.

    Raises:
        UserError: the file or the images are missing, or the file is damaged.
    """
    path, images = source.path("annotations"), coco_images(image_folders(source))
    seen_images: set[int] = set()
    seen_captions: set[str] = set()
    for row, entry in enumerate(stream_list(path, "images")):
        fields, place = entry if isinstance(entry, dict) else {}, f"{path.name} image {row}"
        sentences = fields["sentences"] if isinstance(fields.get("sentences"), list) else []
        named = fields.get("split")
        split = SPLIT_OF_KARPATHY.get(named) if isinstance(named, str) else None
        if split != source.split:
            if split is None and source.split == "train":
                losses.add("image is of no known split", f"{place}: {named!r}", records=len(sentences))
            continue
        image_id = _image_id(fields)
        if image_id is None or image_id in seen_images:
            reason = "image has no number, or two" if image_id is None else "image is listed twice"
            losses.add(reason, place, records=len(sentences))
            continue
        seen_images.add(image_id)
        captions = _captions(sentences, ("sentid", "raw"), f"{place}: {image_id}", seen_captions, losses)
        records = caption_records(split, str(image_id), captions, [text for _, text in captions])
        if not captions:
            losses.add("image has no captions", f"{place}: {image_id}", records=0)
        elif image_id not in images:
            losses.add(MISSING_IMAGE, f"COCO image {image_id}", records=len(records))
        else:
            yield MediaRecords(f"coco_caption_{image_id:012d}", str(image_id), images[image_id], records)


def read_coco_captions(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the images of a `captions_{train,val}{2014,2017}.json` in ascending order of their number.

    The reader option `prefix` is that of the image keys.

    Raises:
        UserError: the file or the images are missing, or the file is damaged.
    """
    path, folders = source.path("annotations"), image_folders(source)
    captions: dict[int, list[tuple[str, str]]] = {}
    for row, entry in enumerate(stream_list(path, "images")):
        image_id = coco_id(entry.get("id")) if isinstance(entry, dict) else None
        if image_id is None:
            losses.add("image has no number", f"{path.name} image {row}", records=0)
        else:
            captions[image_id] = []
    seen: set[str] = set()
    for row, entry in enumerate(stream_list(path, "annotations")):
        image_id, place = coco_id(entry.get("image_id")) if isinstance(entry, dict) else None, f"{path.name} {row}"
        if image_id is None or image_id not in captions:
            losses.add("caption is of no listed image", place)
        else:
            captions[image_id] += _captions([entry], ("id", "caption"), place, seen, losses)
    records = {}
    for image_id, pairs in captions.items():
        if pairs:
            records[image_id] = caption_records(source.split, str(image_id), pairs, [text for _, text in pairs])
        else:
            losses.add("image has no captions", f"{path.name}: {image_id}", records=0)
    yield from coco_media(source.options["prefix"], records, coco_images(folders), losses)


def _image_id(fields: dict[str, Any]) -> int | None:
    """The image's number, which the file name has as well; None where there is none or the two differ."""
    number, named = coco_id(fields.get("cocoid")), coco_id(fields.get("filename"))
    if number is not None and named is not None and number != named:
        return None
    return number if number is not None else named


def _captions(
    entries: Sequence[Any], names: tuple[str, str], place: str, seen: set[str], losses: Losses
) -> list[tuple[str, str]]:
    """(id, caption) pairs of entries that have them in the fields of these two names; `seen` collects the ids."""
    captions = []
    for entry in entries:
        caption_id, text = (entry.get(name) if isinstance(entry, dict) else None for name in names)
        caption_id, text = plain_id(caption_id), clean_text(text)
        if caption_id is None or text is None:
            losses.add("caption is blank or has no id", place)
        elif caption_id in seen:
            losses.add("caption id repeats", f"{place}: {caption_id}")
        else:
            seen.add(caption_id)
            captions.append((caption_id, text))
    return captions
