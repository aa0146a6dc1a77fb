"""Data of one's own in every form that is read: the same rows as tables, folders of Hugging Face, dialogues and tars."""

import csv
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instructblip.data.cards import Card, load_card
from instructblip.data.readers import READERS, Losses, MediaRecords, RawSplit
from tests.kit.own_data import write_card

RowOf = Mapping[str, Any]


def own_card(folder: Path, splits: Mapping[str, Any], reader: str = "records", task: str = "vqa", **more: Any) -> Card:
    """A short card `mine.yaml` in a folder, loaded."""
    return load_card(write_card(folder, reader=reader, task=task, splits=splits, **more))


def read_own(
    raw: Path,
    files: Mapping[str, str],
    reader: str = "records",
    task: str = "vqa",
    split: str = "train",
    **columns: str,
) -> tuple[list[MediaRecords], dict[str, tuple[int, int]], list[str]]:
    """What a reader makes of a raw folder: media, reason -> (count, records) of losses, and the examples of these."""
    losses, places = Losses(), {role: (place,) for role, place in files.items()}
    options = {"dataset": "mine", "task": task, "columns": columns}
    media = list(READERS[reader](RawSplit(raw, split, places, options, raw), losses))
    lost = losses.to_list()
    counts = {loss["reason"]: (loss["count"], loss["records"]) for loss in lost}
    return media, counts, [example for loss in lost for example in loss["examples"]]


# --- the same rows in every form -------------------------------------------------------------------------------------


def write_jsonl(path: Path, rows: Sequence[RowOf]) -> None:
    """One object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_csv(path: Path, rows: Sequence[RowOf], delimiter: str = ",") -> None:
    """As spreadsheets write it; lists as JSON."""
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow(json.dumps(cell) if isinstance(cell, list) else cell for cell in row.values())


def write_parquet(path: Path, rows: Sequence[RowOf]) -> None:
    """With several row groups."""
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path, row_group_size=70)


def as_dialogue(row: RowOf) -> dict[str, Any]:
    """A question and its answer as LLaVA writes them, with an id that repeats."""
    turns = [{"from": "human", "value": f"<image>\n{row['question']}"}, {"from": "gpt", "value": str(row["answer"])}]
    return {"id": "000000033471", "image": row["image"], "conversations": turns}


def as_messages(row: RowOf) -> dict[str, Any]:
    """A question and its answer as chat models are trained on them."""
    asked = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": str(row["answer"])}]
    return {"images": [row["image"]], "messages": turns}


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    """A tar of files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
