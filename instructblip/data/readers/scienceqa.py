"""ScienceQA (Lu et al. 2022), its problems with an image: multiple choice over school subjects.

Raw files: `problems.json`, an object keyed by problem number; `pid_splits.json`, the numbers of each split; the images as
`images/<split>/<number>/<name that the problem gives>`, beside which other pictures may lie. The hint, where there is
one, is the context of the question; lecture and solution explain the answer and are not read.
"""

from collections.abc import Iterator
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.common import (
    existing_image,
    image_folders,
    in_number_order,
    media_key,
    split_ids,
    text_tags,
)
from instructblip.data.readers.files import (
    load_object,
)
from instructblip.data.records import Record
from instructblip.data.typed import (
    Fields,
    WrongValueError,
    is_text,
)

TAGS = ("subject", "topic", "grade")


def read_scienceqa_img(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the problems of a split that have an image, one `multiple_choice` record each, in ascending order.

    Raises:
        UserError: a file or folder is missing, cut short or of another form.
    """
    problems = load_object(source.path("problems"))
    listed = split_ids(source.path("pid_splits"), source.split)
    folders = image_folders(source)
    claimed = {pid for pid, values in problems.items() if _split(values) == source.split}
    for pid in in_number_order(listed | claimed):
        with losses.counting(pid):
            if pid not in problems:
                raise WrongValueError("problem is not in problems.json")
            fields = Fields.of(problems[pid], "problem")
            if pid not in listed or pid not in claimed:
                raise WrongValueError("problem's split is not that of pid_splits.json", repr(fields.get("split")))
            if not fields.has("image"):
                continue
            record, name = _record(pid, fields), fields.file_name("image")
            media = existing_image([folder / pid for folder in folders], name)
            yield MediaRecords(media_key("scienceqa_img", pid), pid, media, [record])


def _split(values: Any) -> Any:
    return values.get("split") if isinstance(values, dict) else None


def _record(pid: str, fields: Fields) -> Record:
    question, choices, hint = fields.verbatim("question"), fields.texts("choices"), fields.get("hint")
    return Record(
        id=pid,
        kind="multiple_choice",
        question=question,
        choices=choices,
        label=fields.whole("answer", high=len(choices) - 1),
        context=hint.strip() if is_text(hint) else None,
        tags=text_tags(fields, TAGS),
    )


READERS = {"scienceqa_img": Reader(read_scienceqa_img, needs=("problems", "pid_splits", "images"))}
