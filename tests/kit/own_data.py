"""A small dataset of one's own: pictures of one colour, questions about them as JSON lines, and a short card beside them.

card = write_own_data(tmp_path / "data")            # data/mine.yaml, data/train.jsonl, data/val.jsonl, data/photos/
card = write_own_data(tmp_path / "data", name="other", evaluation={"metric": "./my_metric.py:score"})
"""

import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

COLORS = ("red", "blue", "teal")


def short_card(**values: Any) -> dict[str, Any]:
    """The short card of what `write_own_data` writes, with `values` in it; the value `...` takes a key out."""
    card: dict[str, Any] = {
        "name": "mine",
        "reader": "records",
        "task": "vqa",
        "splits": {split: {"records": f"{split}.jsonl", "images": "photos"} for split in ("train", "val")},
    }
    return {key: value for key, value in (card | values).items() if value is not ...}


def write_card(folder: Path, file: str = "mine.yaml", **values: Any) -> Path:
    """Write `short_card(**values)` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file
    path.write_text(yaml.safe_dump(short_card(**values), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def write_own_data(folder: Path, count: int = 6, *, file: str = "mine.yaml", **values: Any) -> Path:
    """Write `count` pictures and questions a split, and the card; return the card's path."""
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        rows = []
        for number in range(count):
            color, name = COLORS[number % len(COLORS)], f"{split} {number}.png"
            Image.new("RGB", (40, 30 + number), color).save(folder / "photos" / name)
            rows.append({"image": name, "question": f"what color is picture {number}?", "answer": color})
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return write_card(folder, file, **values)
