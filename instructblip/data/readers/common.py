"""What several readers share beside files: COCO images by their number, captions, answers with weights, OCR tokens."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from instructblip.data.readers.base import OCR_ROLE, Losses, MediaRecords, RawSplit
from instructblip.data.readers.files import PICTURE_EXTENSIONS, find_image, load_object, stream_list, wrong_content
from instructblip.data.records import Record
from instructblip.data.typed import Fields, WrongValueError, clean_text, identifier, is_text, spoken, whole_number
from instructblip.errors import UserError

# The same words as preparation uses for a file that has gone: one reason, one count.
MISSING_IMAGE = "image file is missing"
MISSING_VIDEO = "video file is missing"
_COCO_NAME = re.compile(rf"(?:[A-Za-z0-9]+_)*(\d{{12}})\.(?:{'|'.join(PICTURE_EXTENSIONS)})", re.IGNORECASE)
_KEY = re.compile(r"[A-Za-z0-9_-]{1,150}")
_NOT_OF_A_KEY = re.compile(r"[^A-Za-z0-9_-]+")


# --- ids -------------------------------------------------------------------------------------------------------------


def media_key(prefix: str, media_id: str) -> str:
    """The name of an image in its shard: its id where that is of letters, digits, `_` and `-`, else what of it is, with
    some digits of its hash, for names with spaces, dots, brackets and letters of other scripts.
    """
    key = f"{prefix}_{media_id}"
    if _KEY.fullmatch(key):
        return key
    digest = hashlib.sha256(media_id.encode()).hexdigest()[:12]
    return f"{_NOT_OF_A_KEY.sub('-', key)[:100]}-{digest}"


def coco_id(value: Any) -> int | None:
    """COCO's number of an image, from 442786, "000000442786", "000000442786.jpg" or "COCO_val2014_000000442786.jpg"."""
    if isinstance(value, str):
        match = _COCO_NAME.fullmatch(value.rpartition("/")[2])
        value = int(match[1]) if match else value
    number = whole_number(value)
    return number if number is not None and 0 <= number < 10**12 else None


def coco_number(fields: Fields, key: str) -> int:
    """COCO's number in a field.

    Raises:
        WrongValueError: there is none.
    """
    number = coco_id(fields.get(key))
    if number is None:
        raise WrongValueError(f"{key} is missing" if not fields.has(key) else f"{key} is no number of a COCO image")
    return number


def unique(seen: set[str], value: str, name: str) -> str:
    """The value, which is remembered.

    Raises:
        WrongValueError: it has been seen before.
    """
    if value in seen:
        raise WrongValueError(f"{name} occurs twice", value)
    seen.add(value)
    return value


def check_split(fields: Fields, key: str, split: str) -> None:
    """Refuse an entry that says that it is of another split.

    Raises:
        WrongValueError: it does.
    """
    if fields.has(key) and fields.get(key) != split:
        raise WrongValueError("entry is of another split", repr(fields.get(key)))


def split_ids(path: Path, *keys: str) -> set[str]:
    """The ids that a `pid_splits.json` lists under the first of these keys that it has.

    Raises:
        UserError: as `load_json`; it has none of the keys, or something else than ids under it.
    """
    content = load_object(path)
    entries = next((content[key] for key in keys if key in content), None)
    ids = [identifier(entry) for entry in entries] if isinstance(entries, list) else []
    if not ids or not all(pid is not None and pid.isdecimal() for pid in ids):
        raise wrong_content(path, f"a list of numbers under {' or '.join(map(repr, keys))}")
    return {pid for pid in ids if pid is not None}


def in_number_order(ids: Iterable[str]) -> list[str]:
    """Ids sorted as numbers, "9" before "10"; those that are none last."""
    return sorted(ids, key=lambda text: (not text.isdecimal(), len(text.lstrip("0")), text.lstrip("0"), text))


# --- answers ---------------------------------------------------------------------------------------------------------


def weigh_answers(answers: Iterable[str]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Distinct answers, most usual first (the earlier of equals), and how many people gave each."""
    counted = Counter(answers).most_common()
    return tuple(answer for answer, _ in counted), tuple(float(count) for _, count in counted)


def given_answers(values: Any, place: str, losses: Losses) -> tuple[str, ...]:
    """The texts in a list of people's answers, without the space around them; a blank one is counted, no record lost.

    Scorers compare answers as they were given, so that nothing else is changed; a number is the text of it. Empty for
    what is no list.
    """
    said = [spoken(value) for value in values] if isinstance(values, list) else []
    answers = tuple(value.strip() for value in said if is_text(value))
    if answers and len(answers) < len(said):
        losses.add("answer of one person is blank or no text", place, records=0)
    return answers


def annotators(values: Any, answers: Sequence[str]) -> int | None:
    """How many people gave the `values`, where `answers`, those with text, are fewer; None where they are all."""
    return len(values) if isinstance(values, list) and len(answers) < len(values) else None


def class_tag(fields: Fields, key: str, name: str | None = None) -> dict[str, str]:
    """A field that says yes or no (true, 1, "1", ...) as a tag of its key or of `name`; nothing where it says neither."""
    value = fields.get(key)
    number = int(value) if isinstance(value, bool) else whole_number(value)
    return {name or key: ("false", "true")[number]} if number in (0, 1) else {}


def text_tags(fields: Fields, keys: Iterable[str]) -> dict[str, str]:
    """The fields that hold text, as tags."""
    return {key: text for key in keys if (text := fields.optional_text(key)) is not None}


# --- captions --------------------------------------------------------------------------------------------------------


def caption_records(
    split: str,
    media_id: str,
    captions: Sequence[tuple[str, str]],
    references: Sequence[str],
    ocr_tokens: tuple[str, ...] = (),
) -> list[Record]:
    """The records of one image: each caption in `train`, the image with all its references in `test`, both otherwise.

    Args:
        captions: (id, caption) pairs.
        references: what a generated caption is compared with; none where they are not public.
    """
    single = [Record(caption_id, "caption", answers=(text,), ocr_tokens=ocr_tokens) for caption_id, text in captions]
    whole = Record(f"captions-{media_id}", "captions", captions=tuple(references), ocr_tokens=ocr_tokens)
    return single if split == "train" else [whole] if split == "test" else [*single, whole]


# --- images ----------------------------------------------------------------------------------------------------------


def image_folders(source: RawSplit, role: str = "images") -> list[Path]:
    """The folders of a split that exist, one at least.

    Raises:
        UserError: none does; names all of them.
    """
    source.path(role)
    return source.paths(role)


def existing_image(folders: Sequence[Path], *names: str) -> Path:
    """As `find_image`.

    Raises:
        WrongValueError: there is none.
    """
    found = find_image(folders, names)
    if found is None:
        raise WrongValueError(MISSING_IMAGE, names[0])
    return found


def coco_images(folders: Iterable[Path]) -> dict[int, Path]:
    """COCO images by number, whatever folder and form of name they have: the 2014 and 2017 releases divide the same
    images otherwise and name them otherwise. The first folder that has an image gives it.

    Raises:
        UserError: a folder cannot be listed.
    """
    images: dict[int, Path] = {}
    for folder in folders:
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            raise UserError(f"{folder} cannot be listed ({error.strerror}); it must be a folder of images") from None
        for name in names:
            if match := _COCO_NAME.fullmatch(name):
                images.setdefault(int(match[1]), folder / name)
    return images


def coco_media(
    prefix: str, records: Mapping[int, list[Record]], images: Mapping[int, Path], losses: Losses
) -> Iterator[MediaRecords]:
    """Images with their records in ascending order of COCO's number; an image that is in no folder is counted."""
    for image_id in sorted(records):
        if image_id not in images:
            losses.add(MISSING_IMAGE, f"COCO image {image_id}", records=len(records[image_id]))
            continue
        yield MediaRecords(f"{prefix}_{image_id:012d}", str(image_id), images[image_id], records[image_id])


# --- OCR tokens ------------------------------------------------------------------------------------------------------


def rosetta_tokens(source: RawSplit, losses: Losses) -> dict[str, tuple[str, ...]] | None:
    """Image id -> OCR tokens, from a TextVQA_Rosetta_OCR file, which serves TextVQA and TextCaps; None where the split's
    files name none.

    A malformed entry or a second one for the same image is counted, with no record lost.

    Raises:
        UserError: the file is missing or damaged.
    """
    if OCR_ROLE not in source.files:
        return None
    path = source.path(OCR_ROLE)
    tokens: dict[str, tuple[str, ...]] = {}
    for row, entry in enumerate(stream_list(path, "data")):
        with losses.counting(f"{path.name} entry {row}", records=0):
            fields = Fields.of(entry, "OCR entry")
            image_id, found = fields.id("image_id"), fields.items("ocr_tokens")
            if image_id in tokens:
                raise WrongValueError("OCR entry repeats an image")
            tokens[image_id] = tuple(text for token in found if (text := clean_text(spoken(token))) is not None)
    return tokens
