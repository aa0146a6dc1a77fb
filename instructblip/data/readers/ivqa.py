"""iVQA (Yang et al. 2021): questions about clips of instruction videos, each with the answers of five people.

Raw files: `{train,val,test}.csv` with the columns video_id (11 characters of YouTube), question, answer1 ... answer5 and,
in the authors' files, start and end in seconds. Every clip has one question. The videos are not shipped: a clip is
`<video_id>_<start>_<end>.mp4`, or `<video_id>.mp4`, in the folder of videos.

Cells are text and nothing else: an empty one is an answer that was not given, "none", "nan" or "NA" are answers.
"""

from collections.abc import Iterator
from pathlib import Path

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.common import (
    given_answers,
    image_folders,
    media_key,
    unique,
    weigh_answers,
)
from instructblip.data.readers.files import (
    VIDEO_EXTENSIONS,
    find_image,
    table_rows,
)
from instructblip.data.readers.video_qa import video_media
from instructblip.data.records import Record
from instructblip.data.typed import (
    Fields,
    WrongValueError,
)

ANSWER_COLUMNS = ("answer1", "answer2", "answer3", "answer4", "answer5")


def read_ivqa(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the clips of a split with their `video_question` record, in the order of the file.

    Raises:
        UserError: the file is missing, not UTF-8, no CSV or lacks a column; there is no folder of videos.
    """
    folders = image_folders(source, "videos")
    seen: set[str] = set()
    for place, row in table_rows(source.path("questions"), ("video_id", "question", *ANSWER_COLUMNS)):
        with losses.counting(place):
            fields = Fields(row)
            video_id, question = unique(seen, fields.id("video_id"), "video_id"), fields.text("question")
            answers = given_answers([row[column] for column in ANSWER_COLUMNS], place, losses)
            if not answers:
                raise WrongValueError("row has no answer", video_id)
            record = Record(video_id, "video_question", question, *weigh_answers(answers))
            media = _find(video_id, row, folders, losses)
            yield from video_media(media_key("ivqa", video_id), video_id, media, [record], losses)


def _find(video_id: str, row: dict[str, str], folders: list[Path], losses: Losses) -> Path | None:
    start, end = _seconds(row.get("start", "")), _seconds(row.get("end", ""))
    span = f"{video_id}_{start}_{end}" if start and end else None
    if span and (clip := find_image(folders, [f"{span}.{extension}" for extension in VIDEO_EXTENSIONS])):
        return clip
    whole = find_image(folders, [f"{video_id}.{extension}" for extension in VIDEO_EXTENSIONS])
    if whole and span:
        losses.add("clip is not named by its start and end (kept, taken to be cut already)", whole.name, records=0)
    return whole


def _seconds(cell: str) -> str | None:
    """Whole seconds as they stand in file names: "35" for 35 and for 35.0."""
    cell = cell.strip().removesuffix(".0")
    return cell if cell.isdecimal() and cell.isascii() else None


READERS = {"ivqa": Reader(read_ivqa, needs=("questions", "videos"))}
