"""GQA (Hudson and Manning 2019): compositional questions about Visual Genome's images.

Raw files: `<split>_balanced_questions.json` and `<split>_all_questions.json`, objects keyed by question id; the largest,
`train_all_questions`, is a folder of such files. The test and challenge files have no answers. The images are
`images/<image id>.jpg`. Both ids are text: a question's may begin with a zero, an image's with the letter "n".
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit
from instructblip.data.readers.common import (
    MISSING_IMAGE,
    clean_text,
    find_image,
    image_folders,
    plain_id,
    stream_pairs,
)
from instructblip.data.records import Record
from instructblip.errors import UserError

UNLABELLED_SPLITS = ("test", "test_all", "challenge", "challenge_all")
TYPES = ("structural", "semantic", "detailed")


def read_gqa(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the images of a split with their `question` records, in the order of the images' first questions.

    Raises:
        UserError: a file or folder is missing, cut short or of another form.
    """
    folders = image_folders(source)
    by_image: dict[str, list[Record]] = {}
    seen = set()
    for question_id, entry in _questions(source.path("questions")):
        values = entry if isinstance(entry, dict) else {}
        image_id, question, answer = (clean_text(values.get(key)) for key in ("imageId", "question", "answer"))
        if plain_id(question_id) is None or plain_id(image_id) is None or question is None:
            losses.add("question lacks an id, imageId or question", f"question {question_id}")
        elif answer is None and source.split not in UNLABELLED_SPLITS:
            losses.add("question has no answer", f"question {question_id}")
        elif question_id in seen:
            losses.add("question repeats an id", f"question {question_id}")
        else:
            assert image_id is not None
            seen.add(question_id)
            answers = () if answer is None else (answer,)
            record = Record(question_id, "question", question, answers=answers, tags=_tags(values))
            by_image.setdefault(image_id, []).append(record)
    for image_id, records in by_image.items():
        media = find_image(folders, [f"{image_id}.jpg"])
        if media is None:
            losses.add(MISSING_IMAGE, f"{image_id}.jpg", records=len(records))
        else:
            yield MediaRecords(f"gqa_{image_id}", image_id, media, records)


def _questions(path: Path) -> Iterator[tuple[str, Any]]:
    """Question ids with their entries, of one file or of all files of a folder in the order of their names."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no JSON file; unpack GQA's questions there")
    for file in files:
        yield from stream_pairs(file)


def _tags(values: dict[str, Any]) -> dict[str, str]:
    """The question's types, and whether it belongs to the balanced set: the official scorer counts only those."""
    types = values.get("types")
    texts = {name: clean_text(types.get(name)) for name in TYPES} if isinstance(types, dict) else {}
    tags = {name: text for name, text in texts.items() if text is not None}
    if isinstance(values.get("isBalanced"), bool):
        tags["balanced"] = ("false", "true")[values["isBalanced"]]
    return tags
