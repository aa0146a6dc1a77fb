"""What an evaluation leaves behind: results.json, report.html, and a table on the screen."""

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

from instructblip.evaluation.metrics import METRICS, ModelOutput
from instructblip.evaluation.outcomes import TaskResult
from instructblip.evaluation.protocol import Task, chance_level, majority_answers
from instructblip.evaluation.report import Report, ReportExample, ReportRow, ReportSection, write_report
from instructblip.files import write_json

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


def results_json(results: Sequence[DatasetResult], *, checkpoint: str, fingerprint: str, step: int) -> dict[str, Any]:
    """Everything a score needs to be trusted: the model, the machine, the versions, and each frozen protocol."""
    return {
        "format": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": {"path": checkpoint, "trainable_sha256": fingerprint, "step": step},
        "machine": {"platform": platform.platform(), "torch_threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}},
        "datasets": {
            item.result.task.card.name: {**item.result.to_json(), "baselines": item.baselines} for item in results
        },
    }


def write_results(
    folder: Path, title: str, results: Sequence[DatasetResult], summary: Mapping[str, Any], examples: int
) -> list[Path]:
    """Write results.json and report.html; return the paths of everything the evaluation left.

    Args:
        examples: samples shown for each dataset, wrong and right ones in turn.
    """
    write_json(folder / "results.json", summary)
    report = Report(
        title=title,
        checkpoint=f"{summary['checkpoint']['path']} (step {summary['checkpoint']['step']})",
        created=summary["created"],
        summary=[_row(item) for item in results if item.result.score is not None],
        sections=[_section(item, examples) for item in results if item.result.score is not None],
    )
    write_report(folder / "report.html", report)
    predictions = [folder / item.result.task.card.name / "predictions.jsonl" for item in results]
    return [folder / "results.json", folder / "report.html", *predictions]


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
        value, interval = "", ""
        if result.value is not None:
            value, interval = f"{result.value:.1f}", f"{result.low:.1f}-{result.high:.1f}"
        table.add_row(result.task.card.name, value, interval, *others, str(len(result.samples)))
    return table


def _row(item: DatasetResult) -> ReportRow:
    result = item.result
    return ReportRow(
        dataset=result.task.card.name,
        title=result.task.card.title,
        task=result.task.card.task_group + (", held out" if result.task.card.role == "held-out" else ""),
        mode="ranking" if result.task.protocol.mode == "rank" else "open generation",
        metric=f"{result.task.protocol.metric} %",
        count=len(result.samples),
        value=result.value or 0.0,
        low=result.low or 0.0,
        high=result.high or 0.0,
        baselines=item.baselines,
    )


def _section(item: DatasetResult, examples: int) -> ReportSection:
    result = item.result
    by_answer: dict[str, list[bool]] = {}
    correct = [(value or 0) > 0 for value in result.per_sample]
    for sample, right in zip(result.samples, correct, strict=True):
        if sample.record.answers:
            by_answer.setdefault(sample.record.answers[0], []).append(right)
    breakdown = [
        (answer, len(rights), 100.0 * sum(rights) / len(rights)) for answer, rights in sorted(by_answer.items())
    ]
    return ReportSection(
        dataset=result.task.card.name,
        protocol=result.task.protocol.describe(),
        breakdowns={"answer": breakdown},
        examples=[_example(result, number) for number in _shown(correct, examples)],
    )


def _shown(correct: Sequence[bool], limit: int) -> list[int]:
    """At most `limit` samples, half of them wrong ones where there are as many, in the order of the split."""
    wrong = [number for number, right in enumerate(correct) if not right]
    right = [number for number, right in enumerate(correct) if right]
    few_wrong = wrong[: max(limit // 2, limit - len(right))]
    return sorted(few_wrong + right[: limit - len(few_wrong)])


def _example(result: TaskResult, number: int) -> ReportExample:
    sample, prediction = result.samples[number], result.predictions[number]
    frames, _ = sample.shard.read(sample.row)
    return ReportExample(
        image=frames[0],
        question=sample.record.question or "",
        instruction=sample.prompt,
        answer=" | ".join(sample.record.answers or sample.record.captions),
        prediction=prediction.prediction,
        correct=(result.per_sample[number] or 0) > 0,
        scores=result.candidate_scores(number),
    )
