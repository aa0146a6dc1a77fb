"""Where a score stands marked beside the paper's: shards prepared otherwise, another protocol, records that are missing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from instructblip.data import cards
from instructblip.data.cards import Card, SplitCounts, all_cards, load_card
from instructblip.data.coverage import RecordCounts
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.data.records import Record
from instructblip.data.shards import MANIFEST_FORMAT, ShardWriter, shard_path
from instructblip.errors import UserError
from instructblip.evaluation.outcomes import Failure, Prediction, TaskResult, score_task
from instructblip.evaluation.protocol import Task, as_json, make_task
from instructblip.evaluation.report.content import report_row, report_section
from instructblip.evaluation.report.table import (
    OTHER_PROTOCOL,
    OTHER_SPLIT,
    SUBSET,
    ComparabilityNote,
    as_text,
    comparison_marks,
    score_table,
)
from instructblip.evaluation.results_file import read_run
from instructblip.evaluation.suite import DatasetResult, results_json
from instructblip.files import sha256_file, write_json
from tests.kit.own_data import write_card
from tests.kit.stored import entry, write_run
from tests.kit.synthetic_tasks import PICTURE, synthetic_task
from tests.kit.tiny import write_easy_vqa

RAPIDOCR = {"library": "rapidocr", "version": "9.9", "runtime": "onnxruntime 8.8", "threshold": 0.5}


def write_split(card: Card, shards: Path, records: list[Record], *, frames: int = 1, **manifest: Any) -> None:
    """The card's evaluation split, an image or video a record; `manifest` is what else it says."""
    assert card.evaluation is not None
    path = shard_path(shards / card.source / card.evaluation.split, 0)
    names = ["png"] if frames == 1 else [f"{number}.png" for number in range(frames)]
    with ShardWriter.open(path) as writer:
        for number, record in enumerate(records):
            writer.add(f"image_{number}", dict.fromkeys(names, PICTURE), str(number), [record])
    fields = {"format": MANIFEST_FORMAT, "dataset": card.source, "split": path.parent.name}
    counts = {"records_by_kind": {kind: len(records) for kind in {record.kind for record in records}}}
    shards_listed = [{"name": path.name, "sha256": sha256_file(path)}]
    write_json(path.parent / "manifest.json", {**fields, **counts, "shards": shards_listed, **manifest})


def stored(task: Task) -> dict[str, Any]:
    """A protocol as results.json gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(as_json(task.protocol)))
    return found


def protocol_marks(card: Card, task: Task) -> dict[ComparabilityNote, str]:
    return {mark: text for mark, text in comparison_marks(card, stored(task)).items() if mark != OTHER_SPLIT}


@pytest.mark.slow
def test_a_cards_own_protocol_is_never_another_one(tmp_path: Path) -> None:
    for card in all_cards():
        if card.evaluation is not None:
            task = synthetic_task(card, tmp_path, 8)
            expected = replace(task, protocol=replace(task.protocol, frames=card.evaluation.frames))
            assert protocol_marks(card, expected) == {}, card.name


@pytest.mark.parametrize("name", ["ivqa", "msvd_qa", "msrvtt_qa"])
def test_videos_of_other_frames_than_the_papers_are_another_protocol(tmp_path: Path, name: str) -> None:
    card = load_card(name)
    assert card.evaluation is not None
    open_ended = replace(card, evaluation=replace(card.evaluation, mode="generate", candidates_from=None))
    records = [Record("1", "video_question", "what is it?", ("cat",), (5.0,))]
    for frames, expected in [(4, {}), (1, {OTHER_PROTOCOL: "frames 1 in place of 4"})]:
        write_split(card, tmp_path / str(frames), records, frames=frames)
        assert protocol_marks(open_ended, make_task(open_ended, tmp_path / str(frames))) == expected


@pytest.mark.parametrize("name", ["textvqa", "textcaps"])
def test_ocr_tokens_of_another_system_are_another_protocol(tmp_path: Path, name: str) -> None:
    card, captions = load_card(name), ("a sign that says exit",) * 5
    kind = "captions" if name == "textcaps" else "question"
    record = Record("1", kind, "what?", ("exit",), (10.0,), captions=captions, ocr_tokens=("exit",))
    for made_by, symbols in [(None, []), (RAPIDOCR, [OTHER_PROTOCOL])]:
        write_split(card, tmp_path, [record], options={"ocr": made_by})
        task = make_task(card, tmp_path)
        found = protocol_marks(card, task)
        assert list(found) == symbols
    assert found[OTHER_PROTOCOL].startswith("ocr 'rapidocr 9.9 on onnxruntime 8.8, lines of score 0.5 and above, the ")
    assert "in place of \"the dataset's own, the first" in found[OTHER_PROTOCOL]


def test_no_ocr_system_is_another_than_one_that_nobody_knows(tmp_path: Path) -> None:
    card = load_card("ocr_vqa")
    record = Record("1", "question", "who wrote it?", ("him",), ocr_tokens=("him",))
    write_split(card, tmp_path, [record], options={"ocr": RAPIDOCR})
    assert protocol_marks(card, make_task(card, tmp_path)) == {}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"verbalizers": {"false": ("no",), "true": ("yes",)}}, "other candidates; other classes; other verbalizers"),
        ({"verbalizers": {"true": ("no", "false"), "false": ("yes", "true")}}, "other classes; other verbalizers"),
        ({"verbalizers": {}, "candidates": ("false", "true")}, "other candidates; other classes; other verbalizers"),
        ({"aggregate": "max"}, "aggregate 'max' in place of 'sum'"),
    ],
)
def test_other_candidates_are_another_protocol(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    card = load_card("vsr")
    assert card.evaluation is not None
    synthetic_task(card, tmp_path, 8)
    other = make_task(replace(card, evaluation=replace(card.evaluation, **changed)), tmp_path)
    assert protocol_marks(card, other) == {OTHER_PROTOCOL: told}


def test_another_mode_is_told_without_what_follows_from_it(tmp_path: Path) -> None:
    card = load_card("vsr")
    written = synthetic_task(card, tmp_path, 8, mode="generate")
    assert protocol_marks(card, written) == {OTHER_PROTOCOL: "mode 'generate' in place of 'rank'"}


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("textvqa", "  ocr: rosetta\n", "evaluation.ocr=rosetta is none of own, null"),
        ("vqav2", "  ocr: own\n", "evaluation.ocr is said where the prompt shows no {ocr_tokens}"),
        ("vqav2", "  frames: 0\n", "evaluation.frames=0 is too small; give 1 or more"),
    ],
)
def test_a_card_cannot_name_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, told: str
) -> None:
    monkeypatch.setattr(cards, "CARDS_FOLDER", tmp_path)
    content = (Path("datasets") / f"{name}.yaml").read_text().replace("  ocr: own  # Rosetta's\n", "")
    (tmp_path / f"{name}.yaml").write_text(content.replace("evaluation:\n", f"evaluation:\n{text}"))
    with pytest.raises(UserError) as error:
        load_card(tmp_path / f"{name}.yaml")
    assert told in str(error.value)


# --- records that are missing ----------------------------------------------------------------------------------------


def test_rows_of_train_that_could_not_be_read_mark_no_score_on_ones_own_data(tmp_path: Path) -> None:
    train = RecordCounts(None, prepared=98, lost=2, answered=98)
    records = RecordCounts(None, prepared=60, lost=0, answered=60, scored=60, vocabulary=train)
    own = load_card(write_card(tmp_path, evaluation={"mode": "rank"}))
    assert comparison_marks(own, {"split": "val"}, records) == {}
    official = comparison_marks(load_card("msvd_qa"), {"split": "test"}, replace(records, expected=60))
    assert official == {OTHER_PROTOCOL: "candidates from 98 of 100 records (98 prepared, 2 lost in preparing) of train"}


def flickr30k(expected: int | None) -> Card:
    """Flickr30K of whose test split so many records are expected."""
    card = load_card("flickr30k")
    return replace(card, splits=card.splits | {"test": SplitCounts(expected, expected)})


def captions(count: int) -> list[Record]:
    texts = ["a red bus in a street", "two dogs on grass", "a man eats soup", "an old clock", "boats at sea"]
    return [Record(str(number), "captions", captions=(texts[number],) * 5) for number in range(count)]


def answered(task: Task, failed: int = 0) -> TaskResult:
    """A result whose last `failed` samples could not be read."""
    done = task.samples[: len(task.samples) - failed]
    predictions = [Prediction(sample.id, sample.id, (sample.record.captions or ("yes",))[0]) for sample in done]
    failures = [Failure(sample.id, sample.id, "damaged") for sample in task.samples[len(done) :]]
    return score_task(task, done, predictions, seconds=1.0, failures=failures)


@pytest.mark.parametrize(
    ("expected", "prepared", "lost", "samples", "failed", "told"),
    [
        (5, 5, 0, None, 0, None),
        (3, 5, 0, None, 0, None),  # more than the card knows of
        (1000, 1, 999, None, 0, "1 of 1,000 records (1 prepared, 999 lost in preparing)"),
        (6, 5, 0, None, 0, "5 of 6 records (5 prepared)"),  # raw files that never had the sixth
        (5, 5, 0, None, 2, "3 of 5 records (2 failed)"),
        (None, 5, 0, None, 0, None),
        (None, 5, 2, None, 0, "5 of 7 records (5 prepared, 2 lost in preparing)"),
        (5, 5, 0, 2, 0, "2 samples; 2 of 5 records"),
        (6, 5, 1, 4, 1, "4 samples; 3 of 6 records (5 prepared, 1 failed, 1 lost in preparing)"),
    ],
)
def test_fewer_records_than_the_card_expects_are_marked_and_counted(
    tmp_path: Path, expected: int | None, prepared: int, lost: int, samples: int | None, failed: int, told: str | None
) -> None:
    card = flickr30k(expected)
    reasons = [{"reason": "image file is missing", "count": lost, "records": lost, "examples": ["1.jpg"]}]
    write_split(card, tmp_path, captions(prepared), lost=reasons if lost else [])
    result = answered(make_task(card, tmp_path, samples=samples), failed)
    done = (samples or prepared) - failed
    numbers = {"expected": expected, "prepared": prepared, "lost": lost, "failed": failed, "answered": done}
    assert result.to_json()["records"] == numbers | {"scored": done, "vocabulary": None}
    assert report_row(result, {}).marks == ({} if told is None else {SUBSET: told})
    known = "not known how many are" if expected is None else f"{expected:,}"
    steps = f"{prepared} prepared, {lost} lost in preparing, {failed} failed, {done} answered, {done} scored"
    assert report_section(result, 0).protocol["records"] == f"{known} expected, {steps}"


def test_what_a_metric_leaves_out_by_its_rules_is_not_missing(tmp_path: Path) -> None:
    card = load_card("aokvqa")
    card = replace(card, splits=card.splits | {"val": SplitCounts(3, 3)})
    tags = [{"difficult_direct_answer": text} for text in ("true", "false", "false")]
    records = [Record(str(number), "question", "?", ("yes",) * 10, tags=tags[number]) for number in range(3)]
    write_split(card, tmp_path, records)
    result = answered(make_task(card, tmp_path))
    assert (result.records.answered, result.records.scored) == (3, 2)
    assert report_row(result, {}).marks == {}


@pytest.mark.slow
def test_raw_files_that_lack_images_leave_a_mark_in_the_table(tmp_path: Path) -> None:
    card = load_card("easy_vqa_color")
    write_easy_vqa(tmp_path / "raw", images=24)
    lost = sorted((tmp_path / "raw").rglob("test/images/*.png"))[0]
    lost.unlink()
    prepare_dataset(load_card("easy_vqa"), tmp_path / "raw", tmp_path / "shards", progress=False)
    task = make_task(card, tmp_path / "shards")
    predictions = [Prediction(sample.id, sample.id, "red") for sample in task.samples]
    result = score_task(task, task.samples, predictions, seconds=1.0)
    records = result.records
    assert (records.expected, records.prepared, records.answered) == (1280, len(task.samples), len(task.samples))
    assert records.lost > 0
    entries = results_json([DatasetResult(result, {})], checkpoint="x", fingerprint="a", step=1, model={})["datasets"]
    (found,) = entries.values()
    run = read_run(write_run(tmp_path / "run", {card.name: found | {"predictions_sha256": "ab"}}))
    assert run.scores[card.name].records == records
    table = score_table([run])
    ((mark, text),) = table.rows[0].cells[card.name].marks
    assert (mark, text) == (SUBSET, records.shortfall())
    assert f"{found['value']:.1f}*" in as_text(table)
    assert f"\n{SUBSET.symbol} {SUBSET.meaning}\n" in as_text(table)


@pytest.mark.parametrize(
    ("expected", "told"), [(8, None), (10, "candidates from 8 of 10 records (8 prepared) of train")]
)
def test_candidates_from_a_part_of_the_train_split_are_another_protocol(
    tmp_path: Path, expected: int, told: str | None
) -> None:
    card = load_card("msvd_qa")
    counts = {"train": SplitCounts(expected, expected), "test": SplitCounts(8, 8)}
    task = synthetic_task(replace(card, splits=card.splits | counts), tmp_path, 8)
    task = replace(task, protocol=replace(task.protocol, frames=4))
    predictions = [Prediction(sample.id, sample.id, "cat") for sample in task.samples]
    result = score_task(task, task.samples, predictions, seconds=1.0)
    assert report_row(result, {}).marks == ({} if told is None else {OTHER_PROTOCOL: told})
    shown = report_section(result, 0).protocol["records"]
    assert shown.endswith(f"8 scored; candidates from 8 of {expected} records of train")
    assert RecordCounts.from_json(json.loads(json.dumps(result.to_json()))["records"]) == result.records


def test_a_split_that_the_card_does_not_know_has_no_expected_number(tmp_path: Path) -> None:
    card = flickr30k(5)
    write_split(card, tmp_path, captions(2))
    other = replace(card, splits={"train": SplitCounts(9, 9)})
    assert make_task(other, tmp_path).records == RecordCounts(None, 2, 0)


@pytest.mark.parametrize(
    ("records", "told"),
    [
        (None, "not whole; it needs expected, prepared, lost, failed, answered, scored, vocabulary"),
        ({"expected": 5}, "not whole; it needs expected"),
        ({"prepared": "5"}, "not whole: prepared is '5'"),
        ({"answered": None}, "not whole: answered is None"),
        ({"lost": True}, "not whole: lost is True"),
        ({"failed": -1}, "not whole: failed is -1"),
        ({"vocabulary": 3}, "not whole; it needs expected"),
    ],
)
def test_damaged_counts_are_one_line(tmp_path: Path, records: dict[str, Any] | None, told: str) -> None:
    found = entry("gqa", 48.0)
    whole = {} if records is None or "expected" in records else found["records"]
    write_run(tmp_path, {"gqa": found | {"records": records if records is None else whole | records}})
    with pytest.raises(UserError) as error:
        read_run(tmp_path)
    assert f"results.json: datasets.gqa.records is {told}" in str(error.value)
    assert "\n" not in str(error.value)
