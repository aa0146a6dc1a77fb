"""The registry of metrics: a function and an entry are all that a new metric takes; nothing else knows metrics by name."""

import ast
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

import pytest
from rich.console import Console

import instructblip
from instructblip.config.schema import MetricName
from instructblip.data.cards import all_cards, load_card
from instructblip.data.records import Record
from instructblip.errors import UserError
from instructblip.evaluation.metrics import METRICS, Interval, Metric, ModelOutput, Outcome, Score
from instructblip.evaluation.metrics.score import mean_score
from instructblip.evaluation.outcomes import Prediction, score_task
from instructblip.evaluation.protocol import chance_level, make_task
from instructblip.evaluation.report.content import breakdowns, outcome, report_row
from instructblip.evaluation.report.table import as_text, score_table
from instructblip.evaluation.results_file import read_run
from instructblip.evaluation.runner import run_task
from instructblip.evaluation.suite import DatasetResult, console_table, has_submission, results_json, write_results
from instructblip.models.instructblip import InstructBLIP
from tests.kit.synthetic_tasks import Oracle, read_number, synthetic_task

PACKAGE = Path(instructblip.__file__).parent
MODEL = {
    "llm": {"name": "tiny", "dtype": "float32", "quantization": None},
    "vision": {"name": "tiny", "dtype": "float32", "image_size": 32},
}


def edit_distance(outputs: Sequence[ModelOutput], records: Sequence[Record]) -> Score:
    """A new metric's function: characters by which the lengths of answers differ; 0 is best."""
    values = [
        float(abs(len(output.text) - len(record.answers[0]))) for output, record in zip(outputs, records, strict=True)
    ]
    return mean_score(values, metric="length error")


# A new metric's entry.
LENGTH_ERROR = Metric(
    "length_error",
    "length error",
    edit_distance,
    interval=Interval.MEAN,
    best=0.0,
    higher_is_better=False,
    outcome=Outcome.NONE,
)


@pytest.mark.slow
def test_a_new_metric_is_its_function_and_an_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(METRICS, LENGTH_ERROR.name, LENGTH_ERROR)
    card = load_card("okvqa")
    assert card.evaluation is not None
    card = dataclasses.replace(card, evaluation=dataclasses.replace(card.evaluation, metric="length_error"))
    task = synthetic_task(card, tmp_path / "shards", 8)
    perfect = run_task(
        cast(InstructBLIP, Oracle(task)), task, read_number, batch_size=4, folder=tmp_path / "a", show_progress=False
    )
    assert (perfect.value, perfect.low, perfect.high) == (0.0, None, None)  # no interval of a proportion
    texts = [sample.record.answers[0] + "!" * (number % 3) for number, sample in enumerate(task.samples)]
    predictions = [Prediction(sample.id, sample.id, text) for sample, text in zip(task.samples, texts, strict=True)]
    result = score_task(task, task.samples, predictions, seconds=1.0)
    assert result.value == pytest.approx(7 / 8) and result.low is not None
    assert {outcome(result, number) for number in range(8)} == {""}
    assert report_row(result, {}).metric == "length error"
    assert (chance_level(task), has_submission(result), breakdowns(result)) == (None, False, {})
    runs = []
    for name, found in (("best", perfect), ("worse", result)):
        item = DatasetResult(dataclasses.replace(found, predictions_sha256="-"), {})
        summary = results_json([item], checkpoint="x", fingerprint="abc", step=1, model=MODEL)
        write_results(tmp_path / name, "t", [item], summary, examples=2)
        runs.append(read_run(tmp_path / name))
        assert "length error" in (tmp_path / name / "report.html").read_text()
    table = score_table(runs)
    assert table.lower_is_better == {"okvqa"}
    assert "0.9" in as_text(table)
    console = Console(record=True, width=80)
    console.print(console_table("t", [DatasetResult(perfect, {})]))
    assert "0.0" in console.export_text()


@pytest.mark.slow
def test_nothing_but_the_registry_knows_metrics_by_name() -> None:
    datasets = {card.name for card in all_cards()}
    names = METRICS.keys() - datasets - {"accuracy", "exact_match"}  # words that mean other things as well
    knowing = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found = {
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
        }
        # `__all__` of the package names its functions, which are called alike.
        if found and path.parent.name != "metrics":
            knowing[str(path.relative_to(PACKAGE))] = sorted(found)
    assert knowing == {"config/schema.py": sorted(names)}  # the choices that a card has
    assert get_args(MetricName) == tuple(METRICS)


def test_entries_agree_with_their_functions() -> None:
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.fewest_annotators <= (metric.annotators or 1)
        assert metric.title and metric.best > 0 and metric.higher_is_better
    assert {name for name, metric in METRICS.items() if metric.interval is Interval.PAIRS} == {
        "auroc",
        "retrieval_recall",
    }
    assert METRICS["visdial"].chance(3) == pytest.approx(100 * (1 + 1 / 2 + 1 / 3) / 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_stops_the_evaluation(
    value: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = dataclasses.replace(
        METRICS["vqa_accuracy"], function=lambda outputs, _: mean_score([value] * len(outputs), metric="x")
    )
    monkeypatch.setitem(METRICS, "vqa_accuracy", broken)
    task = synthetic_task(load_card("okvqa"), tmp_path / "shards", 4)
    with pytest.raises(UserError, match=rf"^okvqa: vqa_accuracy cannot be computed .*the score is {value}"):
        run_task(
            cast(InstructBLIP, Oracle(task)),
            task,
            read_number,
            batch_size=4,
            folder=tmp_path / "a",
            show_progress=False,
        )
    assert not (tmp_path / "a/predictions.jsonl").exists()


class Broken(Oracle):
    """A model whose weights are NaN."""

    def rank(self, *arguments: object, **options: object) -> list:
        """One of the log-likelihoods is no number."""
        rows = super().rank(*arguments, **options)  # type: ignore[arg-type]
        rows[-1][0] = float("nan")
        return rows


def test_log_likelihoods_that_are_not_finite_stop_the_evaluation_and_reach_no_file(tmp_path: Path) -> None:
    task = synthetic_task(load_card("vsr"), tmp_path / "shards", 6)
    with pytest.raises(UserError, match=r"^vsr/5: the model's log-likelihoods are not finite"):
        run_task(
            cast(InstructBLIP, Broken(task)),
            task,
            read_number,
            batch_size=6,
            folder=tmp_path / "a",
            show_progress=False,
        )
    assert not any("NaN" in path.read_text() for path in (tmp_path / "a").glob("*.jsonl"))


def test_nan_in_a_journal_of_before_is_answered_anew(tmp_path: Path) -> None:
    task = synthetic_task(load_card("vsr"), tmp_path / "shards", 6)

    def run() -> float | None:
        oracle = cast(InstructBLIP, Oracle(task))
        return run_task(oracle, task, read_number, batch_size=6, folder=tmp_path / "a", show_progress=False).value

    assert run() == 100
    path = tmp_path / "a/predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2]["scores"][0] = float("nan")
    lines[2]["prediction"] = "false" if lines[2]["prediction"] == "true" else "true"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run() == 100
    assert "NaN" not in path.read_text()


def test_made_up_data_are_marked_in_every_table(tmp_path: Path) -> None:
    card = load_card("okvqa")
    task = dataclasses.replace(synthetic_task(card, tmp_path / "shards", 4), made_up=True)
    result = run_task(cast(InstructBLIP, Oracle(task)), task, read_number, batch_size=4, show_progress=False)
    item = DatasetResult(dataclasses.replace(result, predictions_sha256="-"), {})
    summary = results_json([item], checkpoint="x", fingerprint="abc", step=1, model=MODEL)
    assert summary["datasets"]["okvqa"]["made_up"] is True
    write_results(tmp_path / "run", "t", [item], summary, examples=1)
    assert "made-up data: the score means nothing" in (tmp_path / "run/report.html").read_text()
    console = Console(record=True, width=100)
    console.print(console_table("t", [item]))
    assert "made-up data" in console.export_text()
    table = score_table([read_run(tmp_path / "run")])
    assert "§ made-up data: the score means nothing" in as_text(table)
    assert not make_task(card, tmp_path / "shards").made_up  # its manifest says nothing of it
