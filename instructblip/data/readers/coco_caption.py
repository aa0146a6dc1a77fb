"""COCO captions: Karpathy's splits (`dataset_coco.json`), and COCO's own caption files (`captions_val2017.json`)."""

from collections.abc import Iterator, Sequence
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.common import (
    MISSING_IMAGE,
    caption_records,
    coco_id,
    coco_images,
    coco_media,
    coco_number,
    image_folders,
    unique,
)
from instructblip.data.readers.files import (
    stream_list,
)
from instructblip.data.typed import (
    Fields,
    WrongValueError,
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
    seen_images: set[str] = set()
    seen_captions: set[str] = set()
    for row, entry in enumerate(stream_list(path, "images")):
        place, sentences = f"{path.name} image {row}", _list(entry, "sentences")
        with losses.counting(place, records=len(sentences)):
            split, image_id = _split_and_number(entry, source.split)
            if split != source.split:
                continue
            unique(seen_images, str(image_id), "image number")
            captions = _captions(sentences, ("sentid", "raw"), f"{place}: {image_id}", seen_captions, losses)
            records = caption_records(split, str(image_id), captions, [text for _, text in captions])
            if not captions:
                losses.add("image has no captions", f"{place}: {image_id}", records=0)
            elif image_id not in images:
                losses.add(MISSING_IMAGE, f"COCO image {image_id}", records=len(records))
            else:
                yield MediaRecords(f"coco_caption_{image_id:012d}", str(image_id), images[image_id], records)


def _split_and_number(entry: Any, wanted: str) -> tuple[str | None, int]:
    """The split of an image, None where it is not known and not to be counted here, and its number.

    Raises:
        WrongValueError: no split (said in `train` only), or no number in an image of the wanted one.
    """
    fields = Fields(entry if isinstance(entry, dict) else {})
    named = fields.get("split")
    split = SPLIT_OF_KARPATHY.get(named) if isinstance(named, str) else None
    if split is None and wanted == "train":
        raise WrongValueError("image is of no known split", repr(named))
    return split, _image_id(fields) if split == wanted else -1


def read_coco_captions(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the images of a `captions_{train,val}{2014,2017}.json` in ascending order of their number.

    The reader option `prefix` is that of the image keys.

    Raises:
        UserError: the file or the images are missing, or the file is damaged.
    """
    path, folders = source.path("annotations"), image_folders(source)
    captions: dict[int, list[tuple[str, str]]] = {}
    for row, entry in enumerate(stream_list(path, "images")):
        with losses.counting(f"{path.name} image {row}", records=0):
            captions[coco_number(Fields.of(entry), "id")] = []
    seen: set[str] = set()
    for row, entry in enumerate(stream_list(path, "annotations")):
        with losses.counting(place := f"{path.name} {row}"):
            image_id = coco_number(Fields.of(entry), "image_id")
            if image_id not in captions:
                raise WrongValueError("caption is of no listed image")
            captions[image_id] += _captions([entry], ("id", "caption"), place, seen, losses)
    records = {}
    for image_id, pairs in captions.items():
        if pairs:
            records[image_id] = caption_records(source.split, str(image_id), pairs, [text for _, text in pairs])
        else:
            losses.add("image has no captions", f"{path.name}: {image_id}", records=0)
    yield from coco_media(source.options["prefix"], records, coco_images(folders), losses)


def _image_id(fields: Fields) -> int:
    """The image's number, which the file name has as well.

    Raises:
        WrongValueError: there is none, or the two differ.
    """
    number, named = coco_id(fields.get("cocoid")), coco_id(fields.get("filename"))
    if number is not None and named is not None and number != named:
        raise WrongValueError("cocoid is not the number of filename")
    return number if number is not None else coco_number(fields, "filename")


def _captions(
    entries: Sequence[Any], names: tuple[str, str], place: str, seen: set[str], losses: Losses
) -> list[tuple[str, str]]:
    """(id, caption) pairs of entries that have them in the fields of these two names; `seen` collects the ids."""
    captions = []
    for entry in entries:
        with losses.counting(place):
            fields = Fields.of(entry, "caption")
            caption_id, text = fields.id(names[0]), fields.text(names[1])
            captions.append((unique(seen, caption_id, "caption id"), text))
    return captions


def _list(entry: Any, key: str) -> list[Any]:
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if isinstance(value, list) else []


READERS = {
    "coco_captions": Reader(read_coco_captions, needs=("annotations", "images"), options=("prefix",)),
    "coco_karpathy": Reader(read_coco_karpathy, needs=("annotations", "images")),
}
