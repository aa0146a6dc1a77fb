"""One row of the files that public leaderboards take: VQAv2's and TextVQA's, VizWiz's, NoCaps', VisDial's.

VQAv2 and TextVQA: the result format of visualqa.org, which EvalAI's TextVQA challenge shares; VizWiz: by image name; NoCaps:
COCO's caption results; VisDial: the ranks of all options for each round, as the challenge's starter code writes them (the
test split has one round a dialog, its last).
"""

from typing import Any

from instructblip.data.records import Record
from instructblip.evaluation.metrics.metric import ModelOutput
from instructblip.evaluation.metrics.visdial import option_ranks

Row = dict[str, Any]


def answer_row(output: ModelOutput, record: Record) -> Row:
    """A short answer by question id.

    Raises:
        ValueError: the record's id is no whole number.
    """
    return {"question_id": _integer(record.id, record), "answer": output.text}


def vizwiz_row(output: ModelOutput, record: Record) -> Row:
    """A short answer by image name."""
    return {"image": f"{record.id}.jpg", "answer": output.text}


def caption_row(output: ModelOutput, record: Record) -> Row:
    """A caption by image id.

    Raises:
        ValueError: the record's id is no whole number.
    """
    return {"image_id": _integer(record.id, record), "caption": output.text}


def ranks_row(output: ModelOutput, record: Record) -> Row:
    """The rank of each option of a dialog's round.

    Raises:
        ValueError: the record's id is not of the form `image-round`, or an option has no score.
    """
    image, _, number = record.id.rpartition("-")
    if not record.choices or len(output.scores) != len(record.choices):
        raise ValueError(f"record {record.id!r} has {len(record.choices)} options but {len(output.scores)} scores")
    return {
        "image_id": _integer(image, record),
        "round_id": _integer(number, record),
        "ranks": option_ranks(output.scores),
    }


def _integer(text: str, record: Record) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"record {record.id!r}: the leaderboard needs whole numbers as ids, {text!r} is none")
    return int(text)
