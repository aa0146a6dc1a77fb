"""What the report says about a result: outcomes, breakdowns, sub-scores, and which samples it shows."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from instructblip.data.cards import load_card
from instructblip.data.records import Record
from instructblip.data.shards import MANIFEST_FORMAT, ShardWriter, shard_path
from instructblip.evaluation.metrics import Interval, Metric, Outcome, Score
from instructblip.evaluation.outcomes import Failure, Prediction, TaskResult, score_task
from instructblip.evaluation.protocol import make_task
from instructblip.evaluation.report.content import (
    answers_of,
    breakdowns,
    outcome,
    part_scores,
    parts,
    report_row,
    report_section,
    shown,
)
from instructblip.evaluation.report.table import OTHER_SPLIT, SUBSET
from instructblip.files import sha256_file, write_json


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def result_of(
    folder: Path,
    dataset: str,
    records: Sequence[Record],
    answers: Sequence[str | Sequence[float]],
    split: str | None = None,
) -> TaskResult:
    """A dataset's result as if a model had written these texts, or given its candidates these scores."""
    card = load_card(dataset)
    assert card.evaluation is not None
    home = folder / card.source / (split or card.evaluation.split)
    with ShardWriter.open(shard_path(home, 0)) as writer:
        for number, record in enumerate(records):
            writer.add(f"image_{number}", {"png": png(number)}, str(number), [record])
    kinds = {kind: sum(record.kind == kind for record in records) for kind in {record.kind for record in records}}
    shard = shard_path(home, 0)
    manifest = {
        "format": MANIFEST_FORMAT,
        "dataset": card.source,
        "split": home.name,
        "records_by_kind": kinds,
        "shards": [{"name": shard.name, "sha256": sha256_file(shard)}],
    }
    write_json(home / "manifest.json", manifest)
    task = make_task(card, folder, split=split)
    predictions = []
    for sample, answer in zip(task.samples, answers, strict=True):
        if isinstance(answer, str):
            predictions.append(Prediction(sample.id, sample.id, answer))
        else:
            names = task.protocol.classes or task.candidates(sample.record)
            text = names[list(answer).index(max(answer))]
            predictions.append(Prediction(sample.id, sample.id, text, tuple(answer)))
    return score_task(task, task.samples, predictions, seconds=1.0)


def question(number: int, *answers: str, weights: Sequence[float] = (), **tags: str) -> Record:
    texts = answers or ("yes",)
    return Record(str(number), "question", "is it?", texts, tuple(weights) or (10.0,) * len(texts), tags=tags)


def test_right_partly_right_and_wrong_by_vqa_accuracy(tmp_path: Path) -> None:
    records = [
        question(1, "red", weights=(10,)),
        question(2, "red", "blue", weights=(2, 8)),
        question(3, "red", "blue", weights=(9, 1)),
    ]
    result = result_of(tmp_path, "vqav2", records, ["red", "red", "green"])
    assert [outcome(result, number) for number in range(3)] == ["right", "partial", "wrong"]
    section = report_section(result, 10)
    assert [round(example.score or 0) for example in section.examples] == [100, 60, 0]
    assert section.examples[1].answers == [("red", 2), ("blue", 8)]
    assert [example.question for example in section.examples] == ["is it?"] * 3


def test_the_fewer_mistakes_the_righter(tmp_path: Path) -> None:
    result = result_of(tmp_path, "vqav2", [question(number) for number in range(3)], ["yes"] * 3)
    function = result.task.metric.function
    mistakes = Metric("mistakes", "mistakes", function, higher_is_better=False, outcome=Outcome.SCORE)
    task, score = replace(result.task, own_metric=mistakes), Score(50.0, (0.0, 50.0, 100.0), 3)
    counted = replace(result, task=task, score=score)
    assert [outcome(counted, number) for number in range(3)] == ["right", "partial", "wrong"]


@pytest.mark.parametrize("facts", [{"higher_is_better": False}, {"interval": Interval.MEAN}])
def test_on_a_scale_without_an_end_nothing_is_partly_right(facts: dict[str, Any], tmp_path: Path) -> None:
    result = result_of(tmp_path, "vqav2", [question(number) for number in range(3)], ["yes"] * 3)
    counting = Metric("counted", "counted", result.task.metric.function, **facts)
    task, score = replace(result.task, own_metric=counting), Score(53.0, (0.0, 3.0, 156.0), 3)
    counted = replace(result, task=task, score=score)
    assert {outcome(counted, number) for number in range(3)} == {""}


def test_the_score_of_each_sample_is_looked_up_once(tmp_path: Path) -> None:
    """Anew for every sample it would make a report of 200,000 questions take hours."""
    result = result_of(tmp_path, "vqav2", [question(number, "no") for number in range(3)], ["no", "yes", "no"])
    looked_up = 0

    class Scores(tuple[float, ...]):
        def __iter__(self) -> Iterator[float]:
            nonlocal looked_up
            looked_up += 1
            return super().__iter__()

    assert result.score is not None
    counted = replace(result, score=replace(result.score, per_sample=Scores(result.score.per_sample)))
    assert [outcome(counted, number) for number in range(3)] == [outcome(result, number) for number in range(3)]
    assert looked_up == 1


def test_auroc_and_visdial_are_right_by_what_was_chosen(tmp_path: Path) -> None:
    memes = [Record(str(n), "meme", "text", answers=(("no", "yes")[n % 2],), label=n % 2) for n in range(4)]
    rules = load_card("hateful_memes").evaluation
    assert rules is not None
    texts = sum(len(texts) for texts in rules.verbalizers.values())
    flat = [[float(-(place + number) % texts) for place in range(texts)] for number in range(4)]
    result = result_of(tmp_path / "a", "hateful_memes", memes, flat)
    chosen = [prediction.prediction for prediction in result.predictions]
    assert [outcome(result, n) for n in range(4)] == [
        "right" if text == ("no", "yes")[n % 2] else "wrong" for n, text in enumerate(chosen)
    ]
    assert breakdowns(result) == {}  # AUROC is no mean over samples

    rounds = [
        Record(f"{n}-1", "dialog", "and?", ("b",), choices=("a", "b"), label=1, relevance=(0.0, 1.0)) for n in range(4)
    ]
    result = result_of(tmp_path / "b", "visdial", rounds, [[-1.0, -2.0]] + [[-2.0, -1.0]] * 3)
    assert [outcome(result, n) for n in range(4)] == ["wrong", "right", "right", "right"]
    assert result.per_sample == (50.0, 100.0, 100.0, 100.0)
    found = part_scores(result)
    assert found.keys() == {"r@1", "r@5", "r@10", "ndcg"}
    assert (found["r@1"]["value"], found["r@1"]["count"]) == (75.0, 4)
    assert found["ndcg"]["low"] <= found["ndcg"]["value"] <= found["ndcg"]["high"]
    told = {name: (value, interval) for name, value, interval in parts(result)}
    assert told["r@1"] == ("75.0", f"{found['r@1']['low']:.1f} to {found['r@1']['high']:.1f}")
    assert told["mean rank"] == ("1.250", "")


def test_captions_know_no_right_and_wrong_and_are_broken_down_by_domain(tmp_path: Path) -> None:
    texts = ["a red bus in a street", "two dogs on grass", "a man eats soup", "a cat", "boats at sea", "an old clock"]
    records = [
        Record(str(n), "captions", captions=(text, f"{text} today"), tags={"domain": "near" if n < 4 else "out"})
        for n, text in enumerate(texts)
    ]
    result = result_of(tmp_path, "nocaps", records, ["a red bus", "dogs on grass", "soup", "a dog", "boats", "a clock"])
    assert {outcome(result, n) for n in range(6)} == {""}
    assert result.score is not None
    found = breakdowns(result)["domain"]
    assert [(label, count) for label, count, _ in found] == [("near", 4), ("out", 2)]
    assert found[0][2] == result.score.parts["near"].table_value
    names = [name for name, _, _ in parts(result)]
    assert {"near", "out", "Bleu 4", "ROUGE L", "tokenizer"} <= set(names)
    assert "groups" not in names
    assert report_section(result, 2).examples[0].answers[0] in [(text, 1) for text in texts]


def test_scores_by_tags_but_not_by_what_names_or_joins_all(tmp_path: Path) -> None:
    kinds = ["color", "shape", "color", "color"]
    records = [question(n, question_type=kinds[n], same="x", own=str(n)) for n in range(4)]
    result = result_of(tmp_path, "vqav2", records, ["yes", "yes", "no", "yes"])
    (name,) = breakdowns(result)
    assert name == "question type"
    rows = breakdowns(result)[name]
    full = result.per_sample[0]
    assert rows == [("color", 3, pytest.approx(2 * (full or 0) / 3)), ("shape", 1, full)]


def test_a_split_without_public_answers_has_predictions_only(tmp_path: Path) -> None:
    records = [Record(f"VizWiz_test_{n:08d}", "question", "what?") for n in range(3)]
    result = result_of(tmp_path, "vizwiz", records, ["a", "b", "c"], split="test")
    assert (result.value, part_scores(result), parts(result), breakdowns(result)) == (None, {}, [], {})
    section = report_section(result, 2)
    assert section.notes == ["The answers of this split are not public: the leaderboard scores submission.json."]
    assert [(example.outcome, example.answers) for example in section.examples] == [("", []), ("", [])]
    row = report_row(result, {})
    assert (row.value, row.low, row.count, row.paper["vicuna_7b"]) == (None, None, 3, 34.5)
    assert row.marks == {}  # there is nothing to compare
    scored = result_of(tmp_path, "vizwiz", [question(n) for n in range(2)], ["yes", "no"])
    assert report_row(scored, {}).marks == {
        SUBSET: "2 of 4,319 records (2 prepared)",
        OTHER_SPLIT: "val, the paper: test-dev",
    }


def test_left_out_and_failed_samples_are_told(tmp_path: Path) -> None:
    records = [
        Record(
            str(n),
            "question",
            "?",
            ("x",),
            (10.0,),
            choices=("x", "y"),
            label=0,
            tags={"difficult_direct_answer": text},
        )
        for n, text in enumerate(["true", "false", "false"])
    ]
    result = result_of(tmp_path, "aokvqa", records, ["x", "x", "y"])
    failures = tuple(Failure(str(n), f"aokvqa/{n}", "no image") for n in range(7))
    result = score_task(result.task, result.samples, result.predictions, seconds=1.0, failures=failures)
    first, second = report_section(result, 0).notes
    assert first == "The metric leaves out 1 of 3 samples."
    assert second.startswith("7 samples failed (aokvqa/0: no image; aokvqa/1: ")
    assert second.endswith("aokvqa/4: no image; 2 more).")


def test_answers_of_multiple_choice_records() -> None:
    assert answers_of(Record("1", "k", choices=("a", "b"), label=1)) == [("b", 1)]
    assert answers_of(Record("1", "k", choices=("a", "b"))) == []


@pytest.mark.parametrize(
    ("good", "limit", "expected"),
    [
        ("rrrrwwww", 4, [0, 2, 4, 6]),  # half of them wrong, spread over the split
        ("rrrrrrrw", 4, [0, 2, 4, 7]),  # too few wrong ones: right ones fill the rest
        ("wwwwwwwr", 4, [0, 2, 4, 7]),
        ("wrwrwr", 6, [0, 1, 2, 3, 4, 5]),
        ("wr", 10, [0, 1]),
        ("rrr", 2, [0, 1]),
        ("www", 2, [0, 1]),
        ("rwrw", 0, []),
    ],
)
def test_half_of_the_examples_are_wrong_ones(good: str, limit: int, expected: list[int]) -> None:
    assert shown([letter == "r" for letter in good], limit) == expected
