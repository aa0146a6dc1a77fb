"""MSVD-QA and MSRVTT-QA (Xu et al. 2017): questions made from the captions of short videos, each with one answer.

Raw files of both: `{train,val,test}_qa.json`, a list of `{answer, id, question, video_id}` (MSRVTT-QA: `category_id` too),
where video_id is a number and the ids run on over the splits.

* MSVD-QA: `youtube_mapping.txt` has a line `<YouTube id>_<start>_<end> vid<video_id>` for each clip, and the clip's file
  is named by the left column (`YouTubeClips/*.avi`). Copies that name the file by the right column are read as well.
* MSRVTT-QA: `video<video_id>.mp4`, counted from 0, in two folders, for the two archives of the videos.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.common import (
    MISSING_VIDEO,
    image_folders,
    media_key,
    unique,
)
from instructblip.data.readers.files import (
    VIDEO_EXTENSIONS,
    find_image,
    load_list,
    text_lines,
)
from instructblip.data.records import Record
from instructblip.data.typed import (
    Fields,
    whole_number,
)

MAX_NUMBER = 10**9 - 1  # of a video
# The kinds of question that results on these datasets are broken down by.
QUESTION_TYPES = ("what", "who", "how", "when", "where")
_MAPPING_LINE = re.compile(r"(?P<clip>[A-Za-z0-9_-]+)\s+vid(?P<number>\d{1,9})")


def read_msvd_qa(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the clips of a split with their `video_question` records, in the order of their first questions.

    A clip is named by YouTube id, start and end in seconds: `-4wsuPCjDBc_5_15`.

    Raises:
        UserError: a file or the folder of videos is missing, cut short or of another form.
    """
    clips = _read_mapping(source.path("mapping"), losses)
    folders = image_folders(source, "videos")
    for number, records in _read_questions(source, losses).items():
        clip = clips.get(number)
        if clip is None:
            losses.add("video is not in youtube_mapping.txt", f"vid{number}", records=len(records))
            continue
        yield from _video("msvd_qa", clip, folders, (clip, f"vid{number}"), records, losses)


def read_msrvtt_qa(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the videos of a split with their `video_question` records, in the order of their first questions.

    Raises:
        UserError: the questions or all folders of videos are missing; the questions are cut short or of another form.
    """
    folders = image_folders(source, "videos")
    for number, records in _read_questions(source, losses).items():
        yield from _video("msrvtt_qa", f"video{number}", folders, (f"video{number}",), records, losses)


def _read_mapping(path: Path, losses: Losses) -> dict[int, str]:
    """Number of a video -> name of its clip, from `youtube_mapping.txt`; each number and each name once.

    A line of another form, a number or a name that comes again is counted, with no record lost.

    Raises:
        UserError: missing, unreadable, not UTF-8.
    """
    clips: dict[int, str] = {}
    names = set()
    for row, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        match = _MAPPING_LINE.fullmatch(line.strip())
        if match is None:
            losses.add("mapping line is not <clip> vid<number>", f"{path.name} line {row}", records=0)
        elif int(match["number"]) in clips or match["clip"] in names:
            losses.add("mapping line repeats a video", f"{path.name} line {row}: {line.strip()}", records=0)
        else:
            clips[int(match["number"])] = match["clip"]
            names.add(match["clip"])
    return clips


def video_media(
    key: str, media_id: str, media: Path | None, records: list[Record], losses: Losses
) -> Iterator[MediaRecords]:
    """One video with its records; without a file it is counted."""
    if media is None:
        losses.add(MISSING_VIDEO, media_id, records=len(records))
    else:
        yield MediaRecords(key, media_id, media, records, video=True)


def _video(
    dataset: str, media_id: str, folders: list[Path], names: tuple[str, ...], records: list[Record], losses: Losses
) -> Iterator[MediaRecords]:
    media = find_image(folders, [f"{name}.{extension}" for name in names for extension in VIDEO_EXTENSIONS])
    return video_media(media_key(dataset, media_id), media_id, media, records, losses)


def _read_questions(source: RawSplit, losses: Losses) -> dict[int, list[Record]]:
    """Number of a video -> its records, in the order of the file."""
    path = source.path("questions")
    by_video: dict[int, list[Record]] = {}
    seen: set[str] = set()
    for row, entry in enumerate(load_list(path)):
        with losses.counting(f"{path.name} entry {row}"):
            fields = Fields.of(entry)
            question_id, video = fields.id("id"), fields.whole("video_id", high=MAX_NUMBER)
            question, answer = fields.text("question"), fields.answer("answer")
            unique(seen, question_id, "question id")
            record = Record(question_id, "video_question", question, answers=(answer,), tags=_tags(question, fields))
            by_video.setdefault(video, []).append(record)
    return by_video


def _tags(question: str, fields: Fields) -> dict[str, str]:
    first = question.split()[0].lower()
    tags = {"question_type": first if first in QUESTION_TYPES else "other"}
    if (category := whole_number(fields.get("category_id"))) is not None:
        tags["category"] = str(category)
    return tags


READERS = {
    "msrvtt_qa": Reader(read_msrvtt_qa, needs=("questions", "videos")),
    "msvd_qa": Reader(read_msvd_qa, needs=("questions", "mapping", "videos")),
}
