"""What several readers share: JSON files, clean text, COCO images by their number, answers with weights."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeGuard

import ijson

from instructblip.data.readers.base import OCR_ROLE, Losses, MediaRecords, RawSplit
from instructblip.data.records import Record
from instructblip.errors import UserError
from instructblip.files import read_json

# The same words as preparation uses for a file that has gone: one reason, one count.
MISSING_IMAGE = "image file is missing"
MAX_OPENED = 5000  # brackets in one chunk of the parser, 64 KiB
_COCO_NAME = re.compile(r"(?:[A-Za-z0-9]+_)*(\d{12})\.(?:jpg|jpeg|JPG|JPEG)")
_PLAIN_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")  # no longer than a file's name may be
_FILE_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}(?:\.[A-Za-z0-9]{1,16})?")


# --- files -----------------------------------------------------------------------------------------------------------


def load_json(path: Path) -> Any:
    """A whole JSON file.

    Raises:
        UserError: missing, unreadable, cut short, not JSON, not UTF-8, nested absurdly deep.
    """
    try:
        return read_json(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); it must be a JSON file") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deep to be a dataset's JSON; fetch it again") from None


def load_list(path: Path, key: str | None = None) -> list[Any]:
    """The list that a JSON file holds, or holds under `key`; else a UserError."""
    content = load_json(path)
    entries = content if key is None else content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise _wrong_content(path, "a list" if key is None else f"a list under {key!r}")
    return entries


def stream_list(path: Path, key: str | None = None) -> Iterator[Any]:
    """The entries of a JSON list (of the list under `key` of an object), one at a time, in flat memory.

    Raises:
        UserError: as `load_json`, on reaching the bad place; nothing under `key`.
    """
    wanted = "a list" if key is None else f"a list under {key!r} with something in it"
    found = False
    for entry in _stream(path, b"[" if key is None else b"{", wanted, lambda file: _items(file, key)):
        found = True
        yield entry
    if key is not None and not found:
        raise _wrong_content(path, wanted)


def peek(path: Path, key: str) -> Any:
    """The value under `key` of the object in a JSON file, None without one; read only as far as it stands.

    Raises:
        UserError: as `stream_list`.
    """
    wanted = "an object of keys and values"
    return next(_stream(path, b"{", wanted, lambda file: ijson.items(file, key, use_float=True)), None)


def stream_pairs(path: Path) -> Iterator[tuple[str, Any]]:
    """Key and value pairs of a JSON object in the file's order; a key that occurs twice is given twice.

    Raises:
        UserError: as `load_json`, on reaching the bad place.
    """
    return _stream(path, b"{", "an object of keys and values", lambda file: ijson.kvitems(file, "", use_float=True))


def _items(file: "_Shallow", key: str | None) -> Iterator[Any]:
    return ijson.items(file, "item" if key is None else f"{key}.item", use_float=True)


def _stream(path: Path, first: bytes, wanted: str, parse: Callable[["_Shallow"], Iterator[Any]]) -> Iterator[Any]:
    try:
        with open(path, "rb") as file:
            if not file.read(4096).lstrip().startswith(first):
                raise _wrong_content(path, wanted)
            file.seek(0)
            yield from parse(_Shallow(file))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); it must be a JSON file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; fetch it again") from None
    except (ijson.JSONError, RecursionError) as error:
        lines = str(error).splitlines() or ["damaged"]
        raise UserError(f"{path} is not whole JSON ({lines[0]}); fetch it again") from None


class _Shallow:
    """A file that refuses to be read where it opens thousands of brackets without closing them: the parser's time grows
    with the square of the depth, so that a megabyte of brackets would keep it busy for an hour.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        """The next `size` bytes at most."""
        chunk = self._file.read(size)
        opened = chunk.count(b"[") + chunk.count(b"{") - chunk.count(b"]") - chunk.count(b"}")
        if opened > MAX_OPENED:
            raise ijson.JSONError("nested too deep")
        return chunk


def _wrong_content(path: Path, wanted: str) -> UserError:
    return UserError(f"{path} must hold {wanted}; fetch it again, or correct raw=")


# --- values ----------------------------------------------------------------------------------------------------------


def clean_text(value: Any) -> str | None:
    """Text on one line with single spaces; None for what is no text, is blank, or cannot be written as UTF-8."""
    return " ".join(value.split()) or None if is_text(value) else None


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a JSON value is text with something in it; half of a surrogate pair, which UTF-8 cannot hold, is none."""
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def texts(value: Any) -> tuple[str, ...] | None:
    """A JSON list of texts, cleaned; None when it is no list or holds anything else."""
    if not isinstance(value, list):
        return None
    cleaned = [clean_text(item) for item in value]
    return None if None in cleaned else tuple(text for text in cleaned if text is not None)


def plain_id(value: Any) -> str | None:
    """An id of letters, digits, `_` and `-`, as text; None for another, which might name a file outside its folder."""
    text = str(value) if type(value) is int else value
    return text if isinstance(text, str) and _PLAIN_ID.fullmatch(text) else None


def path_below(value: Any) -> str | None:
    """A relative path that an annotation gives, or None for what is no path or would leave its folder (`/`, `..`)."""
    if not is_text(value) or not value.isprintable() or len(value.encode()) > 1000:
        return None
    path = PurePosixPath(value)
    sound = not path.is_absolute() and ".." not in path.parts and all(len(part.encode()) < 256 for part in path.parts)
    return str(path) if sound else None


def coco_id(value: Any) -> int | None:
    """COCO's number of an image, from 442786, "000000442786", "000000442786.jpg" or "COCO_val2014_000000442786.jpg"."""
    if isinstance(value, str):
        match = _COCO_NAME.fullmatch(value.rpartition("/")[2])
        value = int(match[1]) if match else int(value) if re.fullmatch(r"[0-9]{1,12}", value) else None
    return value if type(value) is int and 0 <= value < 10**12 else None


def weigh_answers(answers: Iterable[str]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Distinct answers, most usual first (the earlier of equals), and how many people gave each."""
    counted = Counter(answers).most_common()
    return tuple(answer for answer, _ in counted), tuple(float(count) for _, count in counted)


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


def find_image(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    """The first of these names that is a file in one of the folders; earlier folders first."""
    paths = (folder / name for folder in folders for name in names)
    return next((path for path in paths if path.is_file()), None)


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
        image_id = plain_id(entry.get("image_id")) if isinstance(entry, dict) else None
        found = entry.get("ocr_tokens") if image_id is not None else None
        if image_id is None or not isinstance(found, list):
            losses.add("OCR entry lacks image_id or ocr_tokens", f"{path.name} entry {row}", records=0)
        elif image_id in tokens:
            losses.add("OCR entry repeats an image", f"{path.name} entry {row}: {image_id}", records=0)
        else:
            tokens[image_id] = tuple(text for token in found if (text := clean_text(token)) is not None)
    return tokens


# --- for readers of one JSON object a line and of images found by name ------------------------------------------------


def text_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, cut at line feeds only.

    Raises:
        UserError: missing, unreadable, not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); it must be a text file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); fetch it again") from None


def json_lines(path: Path, losses: Losses) -> Iterator[tuple[str, Any]]:
    """The values of a file with one JSON value a line, each with the place it stands in; a bad line is counted.

    Raises:
        UserError: as `text_lines`.
    """
    for number, line in enumerate(text_lines(path), start=1):
        if line.strip():
            place = f"{path.name} line {number}"
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError):
                losses.add("line is not JSON", place)


def load_object(path: Path) -> dict[str, Any]:
    """The object of keys and values that a JSON file holds; else a UserError."""
    content = load_json(path)
    if not isinstance(content, dict):
        raise _wrong_content(path, "an object of keys and values")
    return content


def image_folders(source: RawSplit, role: str = "images") -> list[Path]:
    """The folders of a split that exist, one at least.

    Raises:
        UserError: none does; names all of them.
    """
    source.path(role)
    return source.paths(role)


def file_name(value: Any) -> str | None:
    """The name of a file, without a folder before it; None for what could name a file elsewhere, or a hidden one."""
    return value if isinstance(value, str) and _FILE_NAME.fullmatch(value) else None


def given_answers(values: Any, place: str, losses: Losses) -> tuple[str, ...]:
    """The texts in a list of people's answers, without the space around them; a blank one is counted, no record lost.

    Scorers compare answers as they were given, so that nothing else is changed. Empty for what is no list.
    """
    answers = tuple(value.strip() for value in values if is_text(value)) if isinstance(values, list) else ()
    if answers and len(answers) < len(values):
        losses.add("answer of one person is blank or no text", place, records=0)
    return answers


def annotators(values: Any, answers: Sequence[str]) -> int | None:
    """How many people gave the `values`, where `answers`, those with text, are fewer; None where they are all."""
    return len(values) if isinstance(values, list) and len(answers) < len(values) else None


def split_ids(path: Path, *keys: str) -> set[str]:
    """The ids that a `pid_splits.json` lists under the first of these keys that it has.

    Raises:
        UserError: as `load_json`; it has none of the keys, or something else than ids under it.
    """
    content = load_object(path)
    entries = next((content[key] for key in keys if key in content), None)
    ids = [plain_id(entry) for entry in entries] if isinstance(entries, list) else []
    if not ids or not all(pid is not None and pid.isdecimal() for pid in ids):
        raise _wrong_content(path, f"a list of numbers under {' or '.join(map(repr, keys))}")
    return {pid for pid in ids if pid is not None}


def in_number_order(ids: Iterable[str]) -> list[str]:
    """Ids sorted as numbers, "9" before "10"; those that are none last."""
    return sorted(ids, key=lambda text: (not text.isdecimal(), len(text.lstrip("0")), text.lstrip("0"), text))
