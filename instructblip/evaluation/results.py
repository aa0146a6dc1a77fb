"""What an evaluation leaves behind: results.json, report.html, leaderboard files, and a table on the screen."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from instructblip.errors import UserError
from instructblip.evaluation.metrics import METRICS, ModelOutput
from instructblip.evaluation.outcomes import TaskResult
from instructblip.evaluation.protocol import Task, chance_level, majority_answers
from instructblip.evaluation.report import Report, write_report
from instructblip.evaluation.report_data import part_scores, report_row, report_section
from instructblip.evaluation.stored import FORMAT, PREDICTIONS, RESULTS
from instructblip.evaluation.submissions import SUBMISSIONS, write_submission
from instructblip.files import errors_for_users, write_json
from instructblip.training.loggers import Logger

_VERSIONS = ("torch", "torchvision", "timm", "transformers")
BLIND = "images withheld"
MAJORITY = "majority per question"
CHANCE = "chance"


@dataclass(frozen=True)
class DatasetResult:
    """A task's result and what to hold it against: scores of baselines by name, in the metric's scale."""

    result: TaskResult
    baselines: dict[str, float]


def baselines(task: Task, shards: Path, blind: TaskResult | None) -> dict[str, float]:
    """What can be had without understanding the image.

    * `images withheld`: the same model on the same questions with a grey picture for every image.
    * `majority per question`: always the commonest training answer to the question's very words; only for datasets that
      may be trained on.
    * `chance`: a class drawn uniformly from the candidates.
    """
    found = {}
    if blind is not None and blind.value is not None:
        found[BLIND] = blind.value
    asked = task.card.role == "held-in" and task.protocol.candidates_from != "choices" and task.answers_public
    if majority := majority_answers(task.card, shards) if asked else {}:
        records = [sample.record for sample in task.samples]
        guesses = [ModelOutput(majority.get(record.question or "", majority[""])) for record in records]
        found[MAJORITY] = METRICS[task.protocol.metric](guesses, records).table_value
    chance = chance_level(task)
    if chance is not None:
        found[CHANCE] = chance
    return found


def results_json(
    results: Sequence[DatasetResult], *, checkpoint: str, fingerprint: str, step: int, model: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything a score needs to be trusted: the model, the machine, the versions, and each frozen protocol."""
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": {"path": checkpoint, "trainable_sha256": fingerprint, "step": step},
        "model": dict(model),
        "machine": {"platform": platform.platform(), "torch_threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}},
        "datasets": {item.result.task.card.name: _entry(item) for item in results},
    }


def write_results(
    folder: Path, title: str, results: Sequence[DatasetResult], summary: Mapping[str, Any], examples: int
) -> list[Path]:
    """Write results.json, report.html and what leaderboards take; return the paths of everything the evaluation left.

    Args:
        examples: samples shown for each dataset, half of them wrong ones.

    Raises:
        UserError: a damaged image, a record that a leaderboard's file has no place for, or a disk that is full.
    """
    page = folder / "report.html"
    with errors_for_users(page):
        page.unlink(missing_ok=True)  # should this end here, an earlier one must not stand beside other scores
    write_json(folder / RESULTS, summary)
    report = Report(
        title=title,
        checkpoint=f"{summary['checkpoint']['path']} (step {summary['checkpoint']['step']})",
        model=_model_line(summary["model"]),
        created=summary["created"],
        summary=[report_row(item.result, item.baselines) for item in results],
        sections=[report_section(item.result, examples) for item in results],
    )
    write_report(page, report)
    written = [folder / RESULTS, page]
    for item in results:
        home = folder / item.result.task.card.name
        written.append(home / PREDICTIONS)
        if has_submission(item.result):
            written.append(_write_submission(home, item.result))
    return written


def _model_line(model: Mapping[str, Any]) -> str:
    """The frozen parts of `results_json`'s model."""
    llm, vision = model["llm"], model["vision"]
    held = ", ".join(filter(None, (llm["dtype"], llm["quantization"])))
    return f"LLM {llm['name']} ({held}), image encoder {vision['name']} ({vision['dtype']}, {vision['image_size']} px)"


def has_submission(result: TaskResult) -> bool:
    """Whether a public leaderboard takes this result: it refuses a part of a split, and blind answers are not meant."""
    protocol = result.task.protocol
    whole = protocol.samples is None and not result.failures and protocol.images == "shown"
    return result.task.card.name in SUBMISSIONS and whole


def score_table(title: str, results: Sequence[DatasetResult]) -> Table:
    """Scores with their 95% intervals beside the baselines, for the terminal."""
    held_out = [item.result.task.card.name for item in results if item.result.task.card.role == "held-out"]
    caption = f"held out, never trained on: {', '.join(held_out)}" if held_out else None
    # Narrow enough for a terminal of 80 columns.
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = list(dict.fromkeys(name for item in results for name in item.baselines))
    table.add_column("dataset", no_wrap=True)
    for name in ("score", "95%", *names, "samples"):
        table.add_column(name, justify="right")
    for item in results:
        result = item.result
        others = [f"{item.baselines[name]:.1f}" if name in item.baselines else "" for name in names]
        value, interval = "-", "not public"
        if result.value is not None:
            value, interval = f"{result.value:.1f}", f"{result.low:.1f}-{result.high:.1f}"
        table.add_row(result.task.card.name, value, interval, *others, str(len(result.samples)))
    return table


def _write_submission(folder: Path, result: TaskResult) -> Path:
    name, records = result.task.card.name, [sample.record for sample in result.samples]
    try:
        return write_submission(folder, name, result.outputs, records)
    except ValueError as error:
        raise UserError(
            f"{name} has no form that its leaderboard takes ({error}); prepare the official files"
        ) from None


def log_scores(logger: Logger, results: Sequence[DatasetResult], step: int) -> None:
    """Give an experiment tracker what results.json says: each score with its interval, and all of them as a table.

    Scores of splits without public answers are in neither.
    """
    entries = {item.result.task.card.name: _entry(item) for item in results if item.result.value is not None}
    columns = ("value", "low", "high", "count", "metric")
    baselines = list(dict.fromkeys(name for entry in entries.values() for name in entry["baselines"]))
    numbers = {
        name: {key: entry[key] for key in ("value", "low", "high")}
        | {part: score["value"] for part, score in entry["parts"].items()}
        for name, entry in entries.items()
    }
    rows = [
        [name, *(entry[key] for key in columns), *(entry["baselines"].get(key) for key in baselines)]
        for name, entry in entries.items()
    ]
    logger.log({"evaluation": numbers}, step)
    logger.log_table("evaluation/table", ["dataset", *columns, *baselines], rows, step)


def _entry(item: DatasetResult) -> dict[str, Any]:
    return {**item.result.to_json(), "parts": part_scores(item.result), "baselines": item.baselines}
