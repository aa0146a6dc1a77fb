"""What an evaluation leaves: baselines by hand, results.json, the examples of the report, the table."""

import dataclasses
import io
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from instructblip.data.cards import Card, load_card
from instructblip.data.records import Record
from instructblip.data.shards import MANIFEST_FORMAT, ShardWriter, shard_path
from instructblip.errors import UserError
from instructblip.evaluation import suite as results
from instructblip.evaluation.metrics import METRICS, Metric, accuracy
from instructblip.evaluation.outcomes import Failure, Prediction, TaskResult, score_task
from instructblip.evaluation.protocol import Task, make_task
from instructblip.evaluation.suite import (
    BLIND,
    CHANCE,
    MAJORITY,
    DatasetResult,
    baselines,
    console_table,
    has_submission,
    log_scores,
    results_json,
    seen_in_training,
    write_results,
)
from instructblip.files import sha256_file, write_json
from instructblip.tracking import TrackedSample
from tests.unit.test_report_data import result_of as any_result

PNG = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x02\x00\x00\x00\x90wS\xde"
    b"\x00\x00\x00\x0cIDATx\x9cc\xf8\xcf\xc0\x00\x00\x03\x01\x01\x00\xc9\xfe\x92\xef\x00\x00\x00\x00IEND\xaeB`\x82"
)

MODEL = {
    "sha256": "cd",
    "llm": {
        "name": "vicuna_7b",
        "source": "lmsys/vicuna-7b-v1.1",
        "kind": "decoder",
        "dtype": "bfloat16",
        "quantization": "int8",
        "sha256": "ef",
    },
    "vision": {
        "name": "eva_vit_g",
        "source": "vision.pth",
        "dtype": "float32",
        "image_size": 224,
        "sha256": "01",
    },
}


def write_split(folder: Path, rows: list[tuple[str, str]]) -> None:
    """One image per (question, answer), all of kind `color`."""
    with ShardWriter.open(shard_path(folder, 0)) as writer:
        for number, (question, answer) in enumerate(rows):
            record = Record(id=f"{folder.name}-{number}", kind="color", question=question, answers=(answer,))
            writer.add(f"image_{number}", {"png": PNG}, str(number), [record])
    shard = shard_path(folder, 0)
    manifest = {
        "format": MANIFEST_FORMAT,
        "dataset": "easy_vqa",
        "split": folder.name,
        "records_by_kind": {"color": len(rows)},
        "shards": [{"name": shard.name, "sha256": sha256_file(shard)}],
    }
    write_json(folder / "manifest.json", manifest)


@pytest.fixture
def card() -> Card:
    return load_card("easy_vqa_color")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three question texts in training, of which "sky" is answered blue twice and red once; four test questions."""
    training = [("sky?", "red"), ("sky?", "blue"), ("sky?", "blue"), ("rose?", "red"), ("leaf?", "red")]
    write_split(tmp_path / "easy_vqa/train", training)
    write_split(tmp_path / "easy_vqa/test", [("sky?", "blue"), ("sky?", "red"), ("rose?", "red"), ("new?", "red")])
    return tmp_path


def result_of(task: Task, answers: list[str]) -> TaskResult:
    """A result as if a model had given these answers."""
    candidates = task.protocol.candidates
    predictions = tuple(
        Prediction(str(number), sample.id, text, tuple(-1.0 if other == text else -3.0 for other in candidates))
        for number, (sample, text) in enumerate(zip(task.samples, answers, strict=True))
    )
    score = accuracy(answers, [sample.record.answers for sample in task.samples])
    return TaskResult(task, task.samples, predictions, score, 10.0, 90.0, 1.0)


def rendered(table: Table) -> str:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_baselines_equal_those_counted_by_hand(card: Card, shards: Path) -> None:
    task = make_task(card, shards)
    blind = result_of(task, ["blue", "blue", "blue", "red"])
    # By majority: sky -> blue (right, wrong), rose -> red (right), never seen -> red, the commonest of all (right).
    assert baselines(task, shards, blind) == {BLIND: 50.0, MAJORITY: 75.0, CHANCE: pytest.approx(100 / 13)}


def test_a_metric_that_reads_scores_has_no_majority(card: Card, shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    auroc = dataclasses.replace(make_task(card, shards), own_metric=METRICS["auroc"])
    assert baselines(auroc, shards, None).keys() == {CHANCE}
    (shards / "mine.py").write_text("def sure(outputs, records):\n    return [max(o.scores) for o in outputs]\n")
    assert card.evaluation is not None
    rules = dataclasses.replace(card.evaluation, metric=f"{shards}/mine.py:sure")
    own = make_task(dataclasses.replace(card, evaluation=rules), shards)
    assert baselines(own, shards, None) == {}
    assert "easy_vqa_color has no baseline 'majority per question': metric mine.py:sure fails (" in caplog.text


@pytest.mark.parametrize("ranked", [(), (0, 1)])  # as of few candidates, and of more than are kept
def test_what_was_chosen_counts_as_it_stands(card: Card, shards: Path, ranked: tuple[int, ...]) -> None:
    task = make_task(card, shards)
    scores = (-1.0, -2.0) if ranked else (-1.0,) * len(task.protocol.candidates)
    texts = [sample.record.answers[0].title() for sample in task.samples]
    pairs = zip(task.samples, texts, strict=True)
    chosen = [Prediction(sample.id, sample.id, text, scores, ranked) for sample, text in pairs]
    assert score_task(task, task.samples, chosen, seconds=1.0).value == 0.0
    written = [dataclasses.replace(item, scores=(), ranked=()) for item in chosen]
    assert score_task(task, task.samples, written, seconds=1.0).value == 100.0


def test_an_error_rate_has_no_chance_of_right_answers(card: Card, shards: Path) -> None:
    errors = Metric("errors", "errors", METRICS["accuracy"].function, higher_is_better=False)
    task = dataclasses.replace(make_task(card, shards), own_metric=errors)
    assert CHANCE not in baselines(task, shards, None)


def test_a_held_out_dataset_has_no_majority_of_its_training_answers(card: Card, shards: Path) -> None:
    task = make_task(dataclasses.replace(card, role="held-out"), shards)
    assert baselines(task, shards, None).keys() == {CHANCE}


def test_chance_is_among_classes_not_texts(card: Card, shards: Path) -> None:
    statements = load_card("easy_vqa_statements").evaluation
    two = dataclasses.replace(card, evaluation=statements, role="held-out")
    assert baselines(make_task(two, shards), shards, None) == {CHANCE: 50.0}
    assert CHANCE not in baselines(make_task(two, shards, mode="generate"), shards, None)


def test_results_json_says_what_a_score_needs_to_be_trusted(card: Card, shards: Path) -> None:
    task = make_task(card, shards)
    item = DatasetResult(result_of(task, ["blue", "red", "red", "blue"]), {CHANCE: 7.7})
    summary = results_json([item], checkpoint="outputs/x", fingerprint="abc", step=12, model=MODEL)
    assert summary["checkpoint"] == {"path": "outputs/x", "trainable_sha256": "abc", "step": 12}
    assert summary["model"] == MODEL
    assert summary["versions"].keys() >= {"python", "torch", "transformers", "timm"}
    assert summary["machine"]["torch_threads"] >= 1
    found = summary["datasets"]["easy_vqa_color"]
    assert (found["value"], found["low"], found["high"], found["count"]) == (75.0, 10.0, 90.0, 4)
    assert (found["metric"], found["baselines"]) == ("accuracy", {CHANCE: 7.7})
    assert found["protocol"]["sha256"] == task.protocol.sha256()
    assert found["protocol"]["candidates"] == task.protocol.candidates
    assert found["protocol"]["samples_sha256"] == task.protocol.samples_sha256
    assert json.loads(json.dumps(summary))["datasets"]["easy_vqa_color"]["protocol"]["prompt"] == card.evaluation.prompt


def test_written_files_are_those_named(card: Card, shards: Path, tmp_path: Path) -> None:
    task = make_task(card, shards)
    item = DatasetResult(result_of(task, ["blue", "red", "red", "blue"]), {CHANCE: 7.7})
    summary = results_json([item], checkpoint="outputs/x", fingerprint="abc", step=12, model=MODEL)
    written = write_results(tmp_path / "out", "a title", [item], summary, examples=3)
    names = ["results.json", "report.html", "easy_vqa_color/predictions.jsonl"]
    assert written == [tmp_path / "out" / name for name in names]
    assert json.loads(written[0].read_text())["datasets"].keys() == {"easy_vqa_color"}
    page = written[1].read_text()
    model = "LLM vicuna_7b (bfloat16, int8), image encoder eva_vit_g (float32, 224 px)"
    for text in ("a title", "outputs/x", "sky?", "new?", "75.0", "7.7", model):
        assert text in page


def test_an_earlier_report_does_not_stand_beside_other_scores(
    card: Card, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = DatasetResult(result_of(make_task(card, shards), ["blue", "red", "red", "blue"]), {})
    summaries = [
        results_json([item], checkpoint=name, fingerprint="abc", step=12, model=MODEL) for name in ("first", "second")
    ]
    write_results(tmp_path / "out", "a title", [item], summaries[0], examples=0)
    assert "first" in (tmp_path / "out/report.html").read_text()

    def interrupted(path: Path, report: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "write_report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_results(tmp_path / "out", "a title", [item], summaries[1], examples=0)
    assert json.loads((tmp_path / "out/results.json").read_text())["checkpoint"]["path"] == "second"
    assert not (tmp_path / "out/report.html").exists()


def test_the_table_shows_every_score_beside_its_baselines(card: Card, shards: Path) -> None:
    task = make_task(card, shards)
    items = [
        DatasetResult(result_of(task, ["blue", "red", "red", "blue"]), {BLIND: 50.0, CHANCE: 7.7}),
        DatasetResult(
            result_of(make_task(dataclasses.replace(card, role="held-out"), shards), ["red"] * 4), {CHANCE: 7.7}
        ),
    ]
    text = rendered(console_table("scores", items))
    assert "easy_vqa_color " in text  # whole, even on a narrow terminal
    assert "held out: easy_vqa_color" in " ".join(text.split()) and "this run's data" not in text
    told = " ".join(rendered(console_table("scores", items, trained_on=[])).split())
    assert "held out, not in this run's data: easy_vqa_color" in told
    told = " ".join(rendered(console_table("scores", items, trained_on=["easy_vqa_color"])).split())
    assert "trained on here, so no zero-shot scores: easy_vqa_color" in told and "this run's data" not in told
    assert text.count("75.0") == 2
    assert BLIND.split()[0] in text
    assert "10.0-" in text


def test_a_held_out_dataset_that_a_run_was_finetuned_on_is_told(card: Card, shards: Path, tmp_path: Path) -> None:
    task = make_task(dataclasses.replace(card, role="held-out"), shards)
    items = [DatasetResult(result_of(task, ["red"] * 4), {})]
    checkpoint = tmp_path / "run/checkpoints/step_00000001"
    checkpoint.mkdir(parents=True)
    for trained, found in (("easy_vqa_color", {"easy_vqa_color"}), ("easy_vqa_shape", set()), ("gone.yaml", set())):
        (tmp_path / "run/config.yaml").write_text(f"mixture: {{datasets: [{{name: {trained}}}]}}")
        assert seen_in_training(str(checkpoint), items) == found
    (tmp_path / "run/config.yaml").write_text("model: {kind: instructblip}")  # as of weights that were converted
    assert [seen_in_training(place, items) for place in (str(checkpoint), str(tmp_path), "Salesforce/some")] == [
        None
    ] * 3


def test_what_the_runs_before_were_trained_on_counts(
    card: Card, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not of one that is damaged, or gone."""
    task = make_task(dataclasses.replace(card, role="held-out"), shards)
    items = [DatasetResult(result_of(task, ["red"] * 4), {})]
    runs = [tmp_path / name / "checkpoints/step_00000001" for name in "abc"]
    before = [
        f"init_from: [{runs[2]}]",
        f"qformer: {{stage1: {tmp_path / 'a'}}}",
        f"init_from: [x/y, {tmp_path / 'b'}]",
    ]
    for run, trained, start in zip(runs, ("color", "shape", "yes_no"), before, strict=True):
        run.mkdir(parents=True)
        mixture = f"mixture: {{datasets: [{{name: easy_vqa_{trained}}}]}}"
        (run.parents[1] / "config.yaml").write_text(f"{mixture}\n{start}\n")
    assert [seen_in_training(str(run), items) for run in runs] == [{"easy_vqa_color"}] * 3
    (tmp_path / "a/config.yaml").write_text("no: [yaml")
    assert seen_in_training(str(runs[2]), items) == set()
    assert "what that run was trained on is not told: " in caplog.text
    shutil.rmtree(tmp_path / "a")
    assert seen_in_training(str(runs[2]), items) == set()


def test_a_file_above_the_folder_of_a_model_that_others_made_is_not_read(
    card: Card, shards: Path, tmp_path: Path
) -> None:
    items = [DatasetResult(result_of(make_task(card, shards), ["red"] * 4), {})]
    (tmp_path / "config.yaml").write_text("nav: !!python/name:some.function")
    (model := tmp_path / "models/blip2").mkdir(parents=True)
    assert seen_in_training(str(model), items) is None


def test_a_leaderboards_file_is_written_for_a_whole_split_only(tmp_path: Path) -> None:
    records = [Record(f"VizWiz_test_{n:08d}", "question", "what?") for n in range(3)]
    result = any_result(tmp_path / "shards", "vizwiz", records, ["a", "b", "c"], split="test")
    item = DatasetResult(result, {})
    summary = results_json([item], checkpoint="outputs/x", fingerprint="abc", step=12, model=MODEL)
    written = write_results(tmp_path / "out", "a title", [item], summary, examples=3)
    assert written[-1] == tmp_path / "out/vizwiz/submission.json"
    rows = json.loads(written[-1].read_text())
    assert rows == [{"image": f"{record.id}.jpg", "answer": text} for record, text in zip(records, "abc", strict=True)]
    found = json.loads(written[0].read_text())["datasets"]["vizwiz"]
    assert (found["value"], found["low"], found["high"], found["note"]) == (None, None, None, "answers not public")
    assert "not public" in rendered(console_table("scores", [item]))

    task = result.task
    part = dataclasses.replace(task, protocol=dataclasses.replace(task.protocol, samples=3))
    blind = dataclasses.replace(task, protocol=dataclasses.replace(task.protocol, images="withheld"))
    lost = dataclasses.replace(result, failures=(Failure("k", "vizwiz/9", "no image"),))
    assert has_submission(result)
    assert not has_submission(dataclasses.replace(result, task=part))
    assert not has_submission(dataclasses.replace(result, task=blind))
    assert not has_submission(lost)


def test_sub_scores_have_intervals_of_their_own(tmp_path: Path) -> None:
    rounds = [Record(f"{n}-1", "dialog", "?", ("b",), choices=("a", "b"), label=1) for n in range(4)]
    result = any_result(tmp_path, "visdial", rounds, [[-1.0, -2.0]] + [[-2.0, -1.0]] * 3)
    summary = results_json([DatasetResult(result, {})], checkpoint="x", fingerprint="abc", step=1, model=MODEL)
    found = summary["datasets"]["visdial"]
    assert found["value"] == 87.5
    assert found["parts"]["r@1"]["value"] == 75.0
    assert found["parts"]["r@1"]["low"] < 75.0 < found["parts"]["r@1"]["high"]
    assert found["metric_details"]["mean_rank"] == 1.25


def test_ids_that_no_leaderboard_takes_are_told_in_one_line(tmp_path: Path) -> None:
    records = [Record(f"mine-{n}", "question", "?", ("a",), (10.0,)) for n in (1, 2)]
    item = DatasetResult(any_result(tmp_path / "shards", "vqav2", records, ["a", "b"]), {})
    summary = results_json([item], checkpoint="x", fingerprint="abc", step=1, model=MODEL)
    with pytest.raises(UserError, match=r"vqav2 has no form that its leaderboard takes .*'mine-1'.*whole numbers"):
        write_results(tmp_path / "out", "t", [item], summary, examples=1)
    assert (tmp_path / "out/results.json").exists()  # the scores are not lost with it


class Tracker:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.logged: list[object] = []

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self.logged.append((dict(metrics), step))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        self.logged.append((name, columns, rows, step))

    def log_samples(self, name: str, samples: Iterable[TrackedSample], step: int) -> None:
        self.logged.append((name, [(item.picture.size, item.text) for item in samples], step))

    def finish(self) -> None:
        raise AssertionError("the run may have more to say")


def test_a_tracker_gets_the_scores_and_the_table(card: Card, shards: Path, tmp_path: Path) -> None:
    rounds = [Record(f"{n}-1", "dialog", "?", ("b",), choices=("a", "b"), label=1) for n in range(4)]
    dialogs = any_result(tmp_path / "d", "visdial", rounds, [[-1.0, -2.0]] + [[-2.0, -1.0]] * 3)
    unscored = [Record(f"VizWiz_test_{n:08d}", "question", "what?") for n in range(2)]
    hidden = any_result(tmp_path / "h", "vizwiz", unscored, ["a", "b"], split="test")
    colors = result_of(make_task(card, shards), ["blue", "red", "red", "blue"])
    tracker = Tracker()
    items = [DatasetResult(colors, {CHANCE: 7.7}), DatasetResult(dialogs, {}), DatasetResult(hidden, {})]
    log_scores(tracker, items, 12, samples=2)
    (numbers, step), (name, columns, rows, table_step), *pictures = tracker.logged
    assert (step, table_step, name) == (12, 12, "evaluation/table")
    assert numbers["evaluation"].keys() == {"easy_vqa_color", "visdial"}
    assert numbers["evaluation"]["easy_vqa_color"] == {"value": 75.0, "low": 10.0, "high": 90.0}
    assert numbers["evaluation"]["visdial"]["r@1"] == 75.0
    assert columns == ["dataset", "value", "low", "high", "count", "metric", "made_up", CHANCE]
    assert rows == [
        ["easy_vqa_color", 75.0, 10.0, 90.0, 4, "accuracy", False, 7.7],
        ["visdial", 87.5, dialogs.low, dialogs.high, 4, "visdial", False, None],
    ]
    assert [name for name, _, _ in pictures] == [
        f"evaluation_samples/{name}" for name in ("easy_vqa_color", "visdial", "vizwiz")
    ]
    (_, shown, step), *_ = pictures
    assert (len(shown), step) == (2, 12)
    for (_, text), number in zip(shown, (0, 2), strict=True):  # spread evenly
        sample = colors.samples[number]
        asked, answered, right, score = text.splitlines()
        assert asked == f"asked: {sample.prompt}"
        assert answered == f"answered: {colors.predictions[number].prediction}"
        assert right == f"right: {sample.record.answers[0]}"
        assert score == f"score: {colors.per_sample[number]:g}"
