"""Files for public leaderboards, from a model's outputs on a whole split.

Each is one JSON list with an object a record. VQAv2 and TextVQA: the result format of visualqa.org, which EvalAI's TextVQA
challenge shares; VizWiz: by image name; NoCaps: COCO's caption results; VisDial: the ranks of all options for each round,
as the challenge's starter code writes them (the test split has one round a dialog, its last).
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from instructblip.data.records import Record
from instructblip.evaluation.metrics.records import ModelOutput
from instructblip.evaluation.metrics.score import same_length
from instructblip.evaluation.metrics.visdial import option_ranks
from instructblip.files import write_atomically

Row = dict[str, Any]

SUBMISSION = "submission.json"


def submission_rows(dataset: str, outputs: Sequence[ModelOutput], records: Sequence[Record]) -> list[Row]:
    """The objects of a dataset's leaderboard file, in the order of the records.

    Args:
        dataset: a name in `SUBMISSIONS`.
        outputs, records: one a sample, of a whole split: servers refuse a part of one.

    Raises:
        ValueError: a dataset without a leaderboard file, different lengths, no records, a record whose id is not of the
            dataset's form or comes twice, or a VisDial round without a score for each option.
    """
    if dataset not in SUBMISSIONS:
        raise ValueError(f"no leaderboard file is known for {dataset}; there is one for {', '.join(SUBMISSIONS)}")
    same_length("records", outputs, records)
    if not records:
        raise ValueError(f"a submission to {dataset} needs at least one record")
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise ValueError(f"record {record.id!r} of {dataset} comes twice")
        seen.add(record.id)
    return [SUBMISSIONS[dataset](output, record) for output, record in zip(outputs, records, strict=True)]


def write_submission(folder: Path, dataset: str, outputs: Sequence[ModelOutput], records: Sequence[Record]) -> Path:
    """Write `submission.json` into the folder and return its path; errors as `submission_rows`."""
    path = folder / SUBMISSION
    write_atomically(path, json.dumps(submission_rows(dataset, outputs, records), ensure_ascii=False) + "\n")
    return path


def _answer(output: ModelOutput, record: Record) -> Row:
    return {"question_id": _integer(record.id, record), "answer": output.text}


def _vizwiz(output: ModelOutput, record: Record) -> Row:
    return {"image": f"{record.id}.jpg", "answer": output.text}


def _caption(output: ModelOutput, record: Record) -> Row:
    return {"image_id": _integer(record.id, record), "caption": output.text}


def _ranks(output: ModelOutput, record: Record) -> Row:
    image, _, number = record.id.rpartition("-")
    if not record.choices or len(output.scores) != len(record.choices):
        raise ValueError(f"record {record.id!r} has {len(record.choices)} options but {len(output.scores)} scores")
    return {
        "image_id": _integer(image, record),
        "round_id": _integer(number, record),
        "ranks": option_ranks(output.scores),
    }


SUBMISSIONS: dict[str, Callable[[ModelOutput, Record], Row]] = {
    "vqav2": _answer,
    "textvqa": _answer,
    "vizwiz": _vizwiz,
    "nocaps": _caption,
    "visdial": _ranks,
}


def _integer(text: str, record: Record) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"record {record.id!r}: the leaderboard needs whole numbers as ids, {text!r} is none")
    return int(text)
