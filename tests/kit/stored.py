"""Evaluations as evaluate.py leaves them, made up: results.json and predictions.jsonl."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instructblip.data.cards import load_card
from instructblip.data.coverage import RecordCounts
from instructblip.evaluation.metrics.captions import TOKENIZERS
from instructblip.evaluation.results_file import FORMAT
from instructblip.files import sha256_file, write_json

JAVA, PYTHON = (name for name, _ in TOKENIZERS.values())
PROTOCOL_KEYS = ("split", "prompt", "mode", "metric", "num_beams", "max_new_tokens", "length_penalty")


def entry(dataset: str, value: float | None, **protocol: Any) -> dict[str, Any]:
    """A dataset's entry of results.json under its card's protocol, but for what `protocol` says."""
    rules = load_card(dataset).evaluation
    assert rules is not None
    chosen = {key: getattr(rules, key) for key in PROTOCOL_KEYS}
    chosen |= {"samples": None, "samples_sha256": "5a", "sha256": "ab", "images": "shown", **protocol}
    interval = (None, None) if value is None else (value - 1.5, value + 1.25)
    return {
        "value": value,
        "low": interval[0],
        "high": interval[1],
        "count": 0 if value is None else 200,
        "metric": rules.metric,
        "metric_details": {"tokenizer": JAVA} if rules.metric == "cider" else {},
        "protocol": chosen,
        "records": RecordCounts(expected=200, prepared=200, lost=0, answered=200, scored=200).to_json(),
        "predictions_sha256": "",
    }


def write_run(folder: Path, datasets: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write results.json, of the predictions that are there, and return the folder."""
    entries = {name: dict(found) for name, found in datasets.items()}
    for name, found in entries.items():
        predictions = folder / name / "predictions.jsonl"
        if predictions.is_file():
            found["predictions_sha256"] = sha256_file(predictions)
    head = {
        "format": FORMAT,
        "checkpoint": {"path": "outputs/train/x", "step": 7},
        "model": {"llm": {"name": "vicuna"}},
    }
    write_json(folder / "results.json", {**head, "datasets": entries})
    return folder


def read_results(folder: Path) -> dict[str, Any]:
    """What results.json of an evaluation holds."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found


def write_predictions(folder: Path, dataset: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a dataset's predictions.jsonl."""
    path = folder / dataset / "predictions.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def scored_run(
    folder: Path,
    dataset: str,
    scores: Sequence[float | None],
    *,
    images: Sequence[object] | None = None,
    answers: Sequence[str] | None = None,
    **protocol: Any,
) -> Path:
    """A run with one dataset whose samples have these scores, on the table's scale."""
    counted = [score for score in scores if score is not None]
    found = entry(dataset, sum(counted) / len(counted), **protocol) | {"count": len(counted)}
    rows = [
        {
            "id": f"{dataset}/{number}",
            "image": str(number if images is None else images[number]),
            "answers": ["yes" if answers is None else answers[number]],
            "prediction": "yes",
            "score": score,
        }
        for number, score in enumerate(scores)
    ]
    write_predictions(folder, dataset, rows)
    return write_run(folder, {dataset: found})
