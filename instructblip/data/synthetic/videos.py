"""Made-up files of the video question answering datasets, in the layouts of the official ones."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from instructblip.data.readers.ivqa import ANSWER_COLUMNS
from instructblip.data.synthetic.scenes import Scene, write_clip
from instructblip.files import write_atomically, write_json

_TOPICS = ("color", "shape", "word")


def write_msvd_qa(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """Questions of each split, AVI clips named by the left column of `youtube_mapping.txt`."""
    lines = []
    for split, scenes in splits.items():
        write_json(raw / f"{split}_qa.json", _questions(scenes))
        for scene in scenes:
            clip = f"{_youtube_id('msvd', scene)}_1_2"
            lines.append(f"{clip} vid{scene.number}")
            write_clip(raw / "YouTubeClips" / f"{clip}.avi", scene)
    write_atomically(raw / "youtube_mapping.txt", "\n".join(lines) + "\n")


def write_msrvtt_qa(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """Questions of each split with categories; MP4 videos in the folders of the two archives."""
    for split, scenes in splits.items():
        questions = [entry | {"category_id": number % 20} for number, entry in enumerate(_questions(scenes))]
        write_json(raw / f"{split}_qa.json", questions)
        for scene in scenes:
            write_clip(raw / ("TestVideo" if split == "test" else "TrainValVideo") / f"video{scene.number}.mp4", scene)


def _questions(scenes: Sequence[Scene]) -> list[dict[str, object]]:
    return [
        {"id": 10 * scene.number + number, "video_id": scene.number, "question": question.lower(), "answer": answer}
        for scene in scenes
        for number, (question, answer) in enumerate(scene.asked(*_TOPICS))
    ]


def write_ivqa(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """One CSV a split, five answers a clip, clips named by id, start and end."""
    for split, scenes in splits.items():
        table = io.StringIO()
        rows = csv.writer(table)
        rows.writerow(("video_id", "start", "end", "question", *ANSWER_COLUMNS))
        for scene in scenes:
            ((question, answer),) = scene.asked("color")
            video = _youtube_id("ivqa", scene)
            rows.writerow((video, 3, 4, question, *[answer] * 3, f"dark {answer}", f"{answer} paint"))
            write_clip(raw / "videos" / f"{video}_3_4.mp4", scene)
        write_atomically(raw / f"{split}.csv", table.getvalue())


def _youtube_id(prefix: str, scene: Scene) -> str:
    """Eleven characters."""
    return f"{prefix}{scene.number:0{11 - len(prefix)}d}"
