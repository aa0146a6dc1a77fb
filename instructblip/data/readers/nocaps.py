"""nocaps (Agrawal et al. 2019): ten captions for each of 4,500 validation images, taken from OpenImages.

Raw files: `nocaps_val_4500_captions.json` in COCO's form, whose images may carry a `domain` (in-domain, near-domain,
out-domain: how far their objects are from COCO's); `nocaps_test_image_info.json` without captions; the images as
`<OpenImages id>.jpg`. Scores are kept by an image's integer id, files by its OpenImages id.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit
from instructblip.data.readers.common import (
    MISSING_IMAGE,
    clean_text,
    file_name,
    find_image,
    image_folders,
    is_text,
    load_list,
)
from instructblip.data.records import Record

CAPTIONS_PER_IMAGE = 10


def read_nocaps(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield one `captions` record an image, in the file's order; without captions where the card names no file of them.

    Raises:
        UserError: a file is missing, cut short or of another form.
    """
    captioned = "captions" in source.files
    path = source.path("captions" if captioned else "image_info")
    images = _images(load_list(path, "images"), losses)
    captions = _captions(load_list(path, "annotations"), images, losses) if captioned else {}
    folders = image_folders(source)
    for image_id, image in images.items():
        name, domain, found = image["file_name"], image.get("domain"), captions.get(image_id, ())
        media = find_image(folders, [name])
        if captioned and not found:
            losses.add("image has no captions", f"image {image_id}")
            continue
        if media is None:
            losses.add(MISSING_IMAGE, name)
            continue
        if captioned and len(found) != CAPTIONS_PER_IMAGE:
            losses.add("image has not all of its 10 captions (kept)", f"image {image_id}: {len(found)}", records=0)
        record = Record(str(image_id), "captions", captions=found, tags={"domain": domain} if is_text(domain) else {})
        yield MediaRecords(f"nocaps_{Path(name).stem}", Path(name).stem, media, [record])


def _images(entries: list[Any], losses: Losses) -> dict[int, dict[str, Any]]:
    """Image entries by their integer ids."""
    images: dict[int, dict[str, Any]] = {}
    names = set()
    for row, image in enumerate(entries):
        if not (isinstance(image, dict) and type(image.get("id")) is int and file_name(image.get("file_name"))):
            losses.add("image entry lacks id or file_name", f"images entry {row}")
        elif image["id"] in images or Path(image["file_name"]).stem in names:
            losses.add("image entry repeats an id or file_name", f"images entry {row}")
        else:
            images[image["id"]] = image
            names.add(Path(image["file_name"]).stem)
    return images


def _captions(entries: list[Any], images: dict[int, dict[str, Any]], losses: Losses) -> dict[int, tuple[str, ...]]:
    """Image id -> its captions in the order of their ids. A lost caption takes no record with it."""
    captions: dict[int, tuple[int, str]] = {}
    for row, entry in enumerate(entries):
        values = entry if isinstance(entry, dict) else {}
        caption_id, image_id, caption = values.get("id"), values.get("image_id"), clean_text(values.get("caption"))
        if type(caption_id) is not int or type(image_id) is not int or caption is None:
            losses.add("caption entry lacks id, image_id or caption", f"annotations entry {row}", records=0)
        elif image_id not in images:
            losses.add("caption of an image that is not listed", f"caption {caption_id}: image {image_id}", records=0)
        elif caption_id in captions:
            losses.add("caption repeats an id", f"caption {caption_id}", records=0)
        else:
            captions[caption_id] = image_id, caption
    by_image: dict[int, tuple[str, ...]] = {}
    for _, (image_id, caption) in sorted(captions.items()):
        by_image[image_id] = (*by_image.get(image_id, ()), caption)
    return by_image
