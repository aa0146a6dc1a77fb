"""iVQA (Yang et al. 2021): questions about clips of instruction videos, each with the answers of five people.

Raw files: `{train,val,test}.csv` with the columns video_id (11 characters of YouTube), question, answer1 ... answer5 and,
in the authors' files, start and end in seconds. Every clip has one question. The videos are not shipped: a clip is
`<video_id>_<start>_<end>.mp4`, or `<video_id>.mp4`, in the folder of videos.

Cells are text and nothing else: an empty one is an answer that was not given, "none", "nan" or "NA" are answers.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit
from instructblip.data.readers.common import (
    clean_text,
    find_image,
    given_answers,
    image_folders,
    plain_id,
    weigh_answers,
)
from instructblip.data.readers.video_qa import EXTENSIONS, video_media
from instructblip.data.records import Record
from instructblip.errors import UserError

ANSWER_COLUMNS = ("answer1", "answer2", "answer3", "answer4", "answer5")


def read_ivqa(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the clips of a split with their `video_question` record, in the order of the file.

    Raises:
        UserError: the file is missing, not UTF-8, no CSV or lacks a column; there is no folder of videos.
    """
    folders = image_folders(source, "videos")
    seen = set()
    for place, row in _rows(source.path("questions")):
        video_id, question = plain_id(row["video_id"]), clean_text(row["question"])
        if video_id is None or question is None:
            losses.add("row lacks video_id or question", place)
            continue
        if video_id in seen:
            losses.add("row repeats a video_id", f"{place}: {video_id}")
            continue
        seen.add(video_id)
        answers = given_answers([row[column] for column in ANSWER_COLUMNS], place, losses)
        if not answers:
            losses.add("row has no answer", f"{place}: {video_id}")
            continue
        record = Record(video_id, "video_question", question, *weigh_answers(answers))
        media = _find(video_id, row, folders, losses)
        yield from video_media(f"ivqa_{video_id}", video_id, media, [record], losses)


def _find(video_id: str, row: dict[str, str], folders: list[Path], losses: Losses) -> Path | None:
    start, end = _seconds(row.get("start", "")), _seconds(row.get("end", ""))
    span = f"{video_id}_{start}_{end}" if start and end else None
    if span and (clip := find_image(folders, [f"{span}.{extension}" for extension in EXTENSIONS])):
        return clip
    whole = find_image(folders, [f"{video_id}.{extension}" for extension in EXTENSIONS])
    if whole and span:
        losses.add("clip is not named by its start and end (kept, taken to be cut already)", whole.name, records=0)
    return whole


def _seconds(cell: str) -> str | None:
    """Whole seconds as they stand in file names: "35" for 35 and for 35.0."""
    cell = cell.strip().removesuffix(".0")
    return cell if cell.isdecimal() and cell.isascii() else None


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of the file by column, each with the place it stands in; a cell that a short row lacks is empty."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); it must be a CSV file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); fetch it again") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True)
    try:
        columns = reader.fieldnames or []
        if missing := [name for name in ("video_id", "question", *ANSWER_COLUMNS) if name not in columns]:
            raise UserError(f"{path} has no column {missing[0]}; fetch it again, or correct raw=")
        for row in reader:
            yield f"{path.name} line {reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{path} is not CSV (after line {reader.line_num}: {error}); fetch it again") from None
