"""Pictures or videos sorted into a folder per class: `train/hat/a.jpg` is a hat. Folders within a class belong to it.

Reader options, which the card gives: dataset (its name); named and novel, where questions are made of the classes
(`class_questions`).
"""

import logging
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.class_questions import OPTIONS, ClassQuestions
from instructblip.data.readers.common import media_key
from instructblip.data.readers.files import PICTURE_EXTENSIONS, VIDEO_EXTENSIONS
from instructblip.data.readers.records import own_files
from instructblip.data.records import Record
from instructblip.data.typed import WrongValueError, clean_text, path_below
from instructblip.errors import UserError

logger = logging.getLogger(__name__)

_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})
_OF_SYSTEMS = ("Thumbs.db", "desktop.ini", "__MACOSX")  # which Windows and macOS put among people's files


def read_folders(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the pictures and videos of a split, each with a `classification` record and the questions that the card asks
    for, in the order of their paths.

    The id of an image and of its first record is its path below the split's folder; the class is the first part of it.

    Raises:
        UserError: a folder is missing, cannot be listed, or has no folder in it; options that make no questions.
    """
    questions = ClassQuestions.told(source.options)
    for folder in _class_folders(source):
        for path in _files(folder):
            name = path.relative_to(folder).as_posix()
            with losses.counting(name):
                yield _media(path, name, source.options["dataset"], questions)


def look_at_folders(source: RawSplit) -> None:
    """Look whether there are folders of classes, and say so where there is one alone.

    Raises:
        UserError: there are none, or those that there are hold splits; options that make no questions.
    """
    ClassQuestions.told(source.options)
    classes = {
        path.name
        for folder in _class_folders(source)
        for path in folder.iterdir()
        if path.is_dir() and not _is_hidden(path.name)
    }
    if classes and classes <= _SPLITS:
        first, place = min(classes), source.files["folder"][0]
        raise UserError(
            f"the folders in {place} are called {', '.join(sorted(classes))}, which would be classes; if they are splits, "
            f"name them in the card: splits: {{{first}: {{folder: {place}/{first}}}}}"
        )
    if len(classes) == 1:
        logger.warning("split %s has one class alone, %s: nothing can be told apart", source.split, *classes)


def _class_folders(source: RawSplit) -> list[Path]:
    folders = own_files(source, "folder")
    for folder in folders:
        if not folder.is_dir() or not any(path.is_dir() and not _is_hidden(path.name) for path in folder.iterdir()):
            raise UserError(f"{folder} must be a folder with a folder for each class; correct the card or raw=")
    return folders


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder but hidden ones and those of a system, sorted.

    Links to folders of classes are followed, others are not.
    """
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if _is_hidden(name):
            continue
        if not path.is_dir():
            yield path
            continue
        for place, within, files in os.walk(path, onerror=_cannot_be_listed):
            within[:] = sorted(inner for inner in within if not _is_hidden(inner))
            yield from (Path(place, file) for file in sorted(files) if not _is_hidden(file))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _OF_SYSTEMS


def _cannot_be_listed(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be listed ({error.strerror}); mend its rights") from None


def _media(path: Path, name: str, dataset: str, questions: ClassQuestions | None) -> MediaRecords:
    media_id = path_below(unicodedata.normalize("NFC", name))
    extension = path.suffix[1:].lower()
    if extension not in (*PICTURE_EXTENSIONS, *VIDEO_EXTENSIONS):
        raise WrongValueError("file has no extension of a picture or video")
    if media_id is None or (label := clean_text(media_id.partition("/")[0])) is None:
        raise WrongValueError("file name cannot be printed", repr(name))
    if "/" not in media_id:
        raise WrongValueError("picture lies in no folder of a class")
    kind, asked = "classification", []
    if questions is not None:
        kind, asked = questions.kind(kind, label, [label]), questions.records(media_id, label)
    records = [Record(media_id, kind, answers=(label,)), *asked]
    return MediaRecords(media_key(dataset, media_id), media_id, path, records, extension in VIDEO_EXTENSIONS)


READERS = {
    "folders": Reader(
        read_folders, needs=("folder",), options=("task", *OPTIONS), tasks=("classification",), look=look_at_folders
    )
}
