"""Files for public leaderboards, from a model's outputs on a whole split.

Each is one JSON list with an object a record. Which leaderboards there are, and what their rows look like, is in the records
of the metrics (`Metric.submissions`).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instructblip.data.records import Record
from instructblip.evaluation.metrics import METRICS, ModelOutput
from instructblip.evaluation.metrics.metric import SubmissionRow
from instructblip.evaluation.metrics.score import same_length
from instructblip.files import write_atomically

Row = dict[str, Any]

SUBMISSION = "submission.json"
# Dataset -> the row of its leaderboard's file.
SUBMISSIONS: Mapping[str, SubmissionRow] = {
    dataset: row for metric in METRICS.values() for dataset, row in metric.submissions.items()
}


def submission_rows(
    dataset: str, outputs: Sequence[ModelOutput], records: Sequence[Record], row: SubmissionRow | None = None
) -> list[Row]:
    """The objects of a dataset's leaderboard file, in the order of the records.

    Args:
        dataset: its name, of those in `SUBMISSIONS` where no row is given.
        outputs, records: one a sample, of a whole split: servers refuse a part of one.
        row: as the metric makes it; None: that of `SUBMISSIONS`.

    Raises:
        ValueError: a dataset without a leaderboard file, different lengths, no records, a record whose id is not of the
            dataset's form or comes twice, or a VisDial round without a score for each option.
    """
    row = row or SUBMISSIONS.get(dataset)
    if row is None:
        raise ValueError(f"no leaderboard file is known for {dataset}; there is one for {', '.join(SUBMISSIONS)}")
    same_length("records", outputs, records)
    if not records:
        raise ValueError(f"a submission to {dataset} needs at least one record")
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise ValueError(f"record {record.id!r} of {dataset} comes twice")
        seen.add(record.id)
    return [row(output, record) for output, record in zip(outputs, records, strict=True)]


def write_submission(
    folder: Path,
    dataset: str,
    outputs: Sequence[ModelOutput],
    records: Sequence[Record],
    row: SubmissionRow | None = None,
) -> Path:
    """Write `submission.json` into the folder and return its path; errors as `submission_rows`."""
    path = folder / SUBMISSION
    write_atomically(path, json.dumps(submission_rows(dataset, outputs, records, row), ensure_ascii=False) + "\n")
    return path
