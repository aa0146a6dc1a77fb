"""nocaps (Agrawal et al. 2019): ten captions for each of 4,500 validation images, taken from OpenImages.

Raw files: `nocaps_val_4500_captions.json` in COCO's form, whose images may carry a `domain` (in-domain, near-domain,
out-domain: how far their objects are from COCO's); `nocaps_test_image_info.json` without captions; the images as
`<OpenImages id>.jpg`. Scores are kept by an image's integer id, files by its OpenImages id.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.common import (
    MISSING_IMAGE,
    image_folders,
    media_key,
    text_tags,
)
from instructblip.data.readers.files import (
    find_image,
    load_list,
)
from instructblip.data.records import Record
from instructblip.data.typed import (
    Fields,
    WrongValueError,
)

CAPTIONS_PER_IMAGE = 10


def read_nocaps(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield one `captions` record an image, in the file's order; without captions where the card names no file of them.

    Raises:
        UserError: a file is missing, cut short or of another form.
    """
    captioned = "captions" in source.files
    path = source.path("captions" if captioned else "image_info")
    images = _images(load_list(path, "images"), path.name, losses)
    captions = _captions(load_list(path, "annotations"), path.name, images, losses) if captioned else {}
    folders = image_folders(source)
    for image_id, image in images.items():
        found, media = captions.get(image_id, ()), find_image(folders, [image.name])
        if captioned and not found:
            losses.add("image has no captions", f"image {image_id}")
            continue
        if media is None:
            losses.add(MISSING_IMAGE, image.name)
            continue
        if captioned and len(found) != CAPTIONS_PER_IMAGE:
            losses.add("image has not all of its 10 captions (kept)", f"image {image_id}: {len(found)}", records=0)
        record = Record(str(image_id), "captions", captions=found, tags=image.tags)
        yield MediaRecords(media_key("nocaps", image.stem), image.stem, media, [record])


@dataclass(frozen=True)
class _Image:
    name: str
    tags: dict[str, str]

    @property
    def stem(self) -> str:
        return Path(self.name).stem


def _images(entries: list[Any], file: str, losses: Losses) -> dict[int, _Image]:
    """Image entries by their integer ids."""
    images: dict[int, _Image] = {}
    stems = set()
    for row, entry in enumerate(entries):
        with losses.counting(f"{file} image {row}"):
            fields = Fields.of(entry)
            image_id, image = fields.whole("id"), _Image(fields.file_name("file_name"), text_tags(fields, ["domain"]))
            if image_id in images or image.stem in stems:
                raise WrongValueError("image entry repeats an id or file_name", image.name)
            images[image_id] = image
            stems.add(image.stem)
    return images


def _captions(entries: list[Any], file: str, images: dict[int, _Image], losses: Losses) -> dict[int, tuple[str, ...]]:
    """Image id -> its captions in the order of their ids. A lost caption takes no record with it."""
    captions: dict[int, tuple[int, str]] = {}
    for row, entry in enumerate(entries):
        with losses.counting(f"{file} annotation {row}", records=0):
            fields = Fields.of(entry)
            caption_id, image_id, caption = fields.whole("id"), fields.whole("image_id"), fields.text("caption")
            if image_id not in images:
                raise WrongValueError("caption is of no listed image", f"image {image_id}")
            if caption_id in captions:
                raise WrongValueError("caption id occurs twice", str(caption_id))
            captions[caption_id] = image_id, caption
    by_image: dict[int, tuple[str, ...]] = {}
    for _, (image_id, caption) in sorted(captions.items()):
        by_image[image_id] = (*by_image.get(image_id, ()), caption)
    return by_image


READERS = {"nocaps": Reader(read_nocaps, needs=("images",), may_name=("captions", "image_info"))}
