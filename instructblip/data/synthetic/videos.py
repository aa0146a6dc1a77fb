"""Made-up files of the video question answering datasets, in the layouts of the official ones."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from instructblip.data.readers.ivqa import ANSWER_COLUMNS
from instructblip.data.synthetic.scenes import MadeUpSplit, Scene, write_clip
from instructblip.files import write_atomically, write_json

_TOPICS = ("color", "shape", "word")


def write_msvd_qa(splits: Sequence[MadeUpSplit]) -> None:
    """Questions of each split, AVI clips named by the left column of `youtube_mapping.txt`."""
    mappings: dict[Path, list[str]] = {}
    for split in splits:
        write_json(split.place("questions"), _questions(split.scenes))
        for scene in split.scenes:
            clip = f"{_youtube_id('msvd', scene)}_1_2"
            mappings.setdefault(split.place("mapping"), []).append(f"{clip} vid{scene.number}")
            write_clip(split.place("videos") / f"{clip}.avi", scene)
    for path, lines in mappings.items():
        write_atomically(path, "\n".join(lines) + "\n")


def write_msrvtt_qa(splits: Sequence[MadeUpSplit]) -> None:
    """Questions of each split with categories; MP4 videos, those of test in the second folder."""
    for split in splits:
        questions = [entry | {"category_id": number % 20} for number, entry in enumerate(_questions(split.scenes))]
        write_json(split.place("questions"), questions)
        for scene in split.scenes:
            write_clip(split.place("videos", int(split.name == "test")) / f"video{scene.number}.mp4", scene)


def _questions(scenes: Sequence[Scene]) -> list[dict[str, object]]:
    return [
        {"id": 10 * scene.number + number, "video_id": scene.number, "question": question.lower(), "answer": answer}
        for scene in scenes
        for number, (question, answer) in enumerate(scene.asked(*_TOPICS))
    ]


def write_ivqa(splits: Sequence[MadeUpSplit]) -> None:
    """One CSV a split, five answers a clip, clips named by id, start and end."""
    for split in splits:
        table = io.StringIO()
        rows = csv.writer(table)
        rows.writerow(("video_id", "start", "end", "question", *ANSWER_COLUMNS))
        for scene in split.scenes:
            ((question, answer),) = scene.asked("color")
            video = _youtube_id("ivqa", scene)
            rows.writerow((video, 3, 4, question, *[answer] * 3, f"dark {answer}", f"{answer} paint"))
            write_clip(split.place("videos") / f"{video}_3_4.mp4", scene)
        write_atomically(split.place("questions"), table.getvalue())


def _youtube_id(prefix: str, scene: Scene) -> str:
    """Eleven characters."""
    return f"{prefix}{scene.number:0{11 - len(prefix)}d}"


WRITERS = {"ivqa": write_ivqa, "msrvtt_qa": write_msrvtt_qa, "msvd_qa": write_msvd_qa}
