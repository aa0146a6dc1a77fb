"""ScienceQA (Lu et al. 2022), its problems with an image: multiple choice over school subjects.

Raw files: `problems.json`, an object keyed by problem number; `pid_splits.json`, the numbers of each split; the images as
`images/<split>/<number>/<name that the problem gives>`, beside which other pictures may lie. The hint, where there is
one, is the context of the question; lecture and solution explain the answer and are not read.
"""

from collections.abc import Iterator
from typing import Any

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit
from instructblip.data.readers.common import (
    MISSING_IMAGE,
    clean_text,
    file_name,
    find_image,
    image_folders,
    in_number_order,
    is_text,
    load_object,
    split_ids,
    texts,
)
from instructblip.data.records import Record

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
        values = problems.get(pid)
        if not isinstance(values, dict):
            losses.add("problem is not in problems.json", pid)
        elif pid not in listed or pid not in claimed:
            losses.add("problem's split is not that of pid_splits.json", f"{pid}: {_split(values)!r}")
        elif values.get("image") is not None and (record := _record(pid, values, losses)):
            name = file_name(values["image"])
            media = find_image([folder / pid for folder in folders], [name]) if name else None
            if media is None:
                losses.add(MISSING_IMAGE, f"{source.split}/{pid}/{values['image']}")
            else:
                yield MediaRecords(f"scienceqa_img_{pid}", pid, media, [record])


def _split(values: Any) -> Any:
    return values.get("split") if isinstance(values, dict) else None


def _record(pid: str, values: dict[str, Any], losses: Losses) -> Record | None:
    question, choices, label = values.get("question"), texts(values.get("choices")), values.get("answer")
    if not is_text(question) or not choices:
        losses.add("problem lacks question or choices", pid)
        return None
    if type(label) is not int or not 0 <= label < len(choices):
        losses.add("answer is not the index of a choice", f"{pid}: {label!r}")
        return None
    hint = values.get("hint")
    return Record(
        id=pid,
        kind="multiple_choice",
        question=question.strip(),
        choices=choices,
        label=label,
        context=hint.strip() if is_text(hint) else None,
        tags={tag: text for tag in TAGS if (text := clean_text(values.get(tag))) is not None},
    )
