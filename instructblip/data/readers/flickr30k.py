"""Flickr30K (Young et al. 2014): five captions for each of 31,783 photographs, in Karpathy's splits.

Raw files: Karpathy's `dataset_flickr30k.json`, which alone says which split an image is in; the captions as
`results_20130124.token` ("<file>#<number><tab><caption>") or as Kaggle's `results.csv` ("<file>| <number>| <caption>",
in which one row lacks its second separator). Where there is neither, the sentences of Karpathy's file are the captions:
the same ones, without the space before the full stop.

769 images are in no split; they are counted as lost in `train`. An entry or line that names no image or split is counted in
every split, for it may belong to any.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.common import (
    MISSING_IMAGE,
    image_folders,
    media_key,
)
from instructblip.data.readers.files import (
    find_image,
    load_list,
    table_rows,
    text_lines,
)
from instructblip.data.records import Record
from instructblip.data.typed import (
    Fields,
    WrongValueError,
    clean_text,
    file_name,
    whole_number,
)

SPLITS = ("train", "val", "test")
CAPTIONS_PER_IMAGE = 5
CSV_COLUMNS = ("image_name", "comment_number", "comment")
_TOKEN_LINE = re.compile(r"([^#\t]+)#([0-9]{1,3})\t(.*)")
# The row without its second separator reads "2199200615.jpg| 4   A dog runs across the grass .".
_CSV_LINE = re.compile(r"([^|]+)\| *([0-9]{1,3})(?: *\| *| +)(.*)")


@dataclass(frozen=True)
class _Image:
    file: str
    split: str
    captions: tuple[str, ...]


def read_flickr30k(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the images of a split in Karpathy's order: a `caption` record a caption in train, else one of all `captions`.

    Raises:
        UserError: a file or folder is missing, cut short or of another form.
    """
    images = _read_images(source.path("splits"), source.split, losses)
    captions = {image_id: image.captions for image_id, image in images.items()}
    if files := source.paths("captions"):
        captions = _read_captions(files[0], losses)
        for image_id in sorted(captions.keys() - images.keys()) if source.split == "train" else ():
            losses.add("image is in no split", image_id, records=len(captions[image_id]))
    folders = image_folders(source)
    for image_id, image in images.items():
        if image.split != source.split:
            continue
        records, media = _records(image_id, captions.get(image_id, ()), source.split), find_image(folders, [image.file])
        if not records:
            losses.add("image has no captions", image_id)
        elif media is None:
            losses.add(MISSING_IMAGE, image.file, records=len(records))
        else:
            if (count := len(captions[image_id])) != CAPTIONS_PER_IMAGE:
                losses.add("image has not 5 captions (kept)", f"{image_id}: {count}", records=0)
            yield MediaRecords(media_key("flickr30k", image_id), image_id, media, records)


def _records(image_id: str, captions: tuple[str, ...], split: str) -> list[Record]:
    if split == "train":
        return [Record(f"{image_id}-{number}", "caption", answers=(text,)) for number, text in enumerate(captions)]
    return [Record(image_id, "captions", captions=captions)] if captions else []


def _read_images(path: Path, split: str, losses: Losses) -> dict[str, _Image]:
    """Image id, which is its file's name without the extension -> file, split and sentences, from Karpathy's file."""
    images: dict[str, _Image] = {}
    for row, entry in enumerate(load_list(path, "images")):
        with losses.counting(f"{path.name} entry {row}"):
            fields = Fields.of(entry)
            name = fields.file_name("filename")
            if fields.get("split") not in SPLITS:
                raise WrongValueError("image is of no known split", repr(fields.get("split")))
            if Path(name).stem not in images:
                images[Path(name).stem] = _Image(name, fields.get("split"), _sentences(fields.get("sentences")))
            elif fields.get("split") == split:
                raise WrongValueError("image entry repeats a filename", name)
    return images


def _sentences(values: Any) -> tuple[str, ...]:
    entries = [entry for entry in values if isinstance(entry, dict)] if isinstance(values, list) else []
    return tuple(text for entry in entries if (text := clean_text(entry.get("raw"))) is not None)


def _read_captions(path: Path, losses: Losses) -> dict[str, tuple[str, ...]]:
    """Image id -> captions in the order of their numbers. A bad line takes a caption with it, and no record."""
    captions: dict[tuple[str, int], str] = {}
    for place, cells in _lines(path):
        with losses.counting(place, records=0):
            name, number, caption = file_name(cells[0]), whole_number(cells[1]), clean_text(cells[2])
            if name is None or number is None or caption is None:
                raise WrongValueError("line is not a caption of an image")
            if (Path(name).stem, number) in captions:
                raise WrongValueError("caption repeats a number")
            captions[Path(name).stem, number] = caption
    by_image: dict[str, tuple[str, ...]] = {}
    for (image_id, _), caption in sorted(captions.items()):
        by_image[image_id] = (*by_image.get(image_id, ()), caption)
    return by_image


def _lines(path: Path) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """Place, file name, number and caption of each line; three empty texts for a line of another form."""
    pattern = _TOKEN_LINE
    if path.suffix == ".csv":
        head = next(text_lines(path), "")
        if "|" not in head:  # a spreadsheet's copy
            for place, row in table_rows(path, CSV_COLUMNS):
                yield place, (row[CSV_COLUMNS[0]], row[CSV_COLUMNS[1]], row[CSV_COLUMNS[2]])
            return
        pattern = _CSV_LINE
    for number, line in enumerate(text_lines(path), start=1):
        names = tuple(cell.strip() for cell in line.split("|"))
        if line.strip() and not (number == 1 and names == CSV_COLUMNS):
            match = pattern.fullmatch(line.strip())
            yield f"{path.name} line {number}", (match[1].strip(), match[2], match[3]) if match else ("", "", "")


READERS = {"flickr30k": Reader(read_flickr30k, needs=("splits", "images"), may_name=("captions",))}
