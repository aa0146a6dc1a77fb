"""Leaderboard files, as the servers take them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from instructblip.data.records import Record
from instructblip.evaluation.metrics import METRICS, Metric, ModelOutput
from instructblip.evaluation.submissions import SUBMISSIONS, submission_rows, write_submission
from instructblip.evaluation.suite import DatasetResult, results_json, write_results
from tests.unit.test_report_data import result_of
from tests.unit.test_results import MODEL

OPTIONS = ("yes", "no", "maybe")


def rows(dataset: str, record_id: str, output: ModelOutput, choices: tuple[str, ...] = ()) -> list[dict[str, object]]:
    return submission_rows(dataset, [output], [Record(record_id, "question", choices=choices)])


def test_rows_of_every_leaderboard() -> None:
    found = {
        "vqav2": rows("vqav2", "262148000", ModelOutput("down")),
        "vqav2_blip": rows("vqav2_blip", "7", ModelOutput("up")),
        "textvqa": rows("textvqa", "34602", ModelOutput("nokia")),
        "vizwiz": rows("vizwiz", "VizWiz_test_00000003", ModelOutput("unanswerable")),
        "nocaps": rows("nocaps", "0", ModelOutput("a baby in a bath")),
        "visdial": rows("visdial", "185565-10", ModelOutput("no", OPTIONS, (-2.0, -1.0, -2.0)), OPTIONS),
    }
    assert found == {
        "vqav2": [{"question_id": 262148000, "answer": "down"}],
        "vqav2_blip": [{"question_id": 7, "answer": "up"}],
        "textvqa": [{"question_id": 34602, "answer": "nokia"}],
        "vizwiz": [{"image": "VizWiz_test_00000003.jpg", "answer": "unanswerable"}],
        "nocaps": [{"image_id": 0, "caption": "a baby in a bath"}],
        "visdial": [{"image_id": 185565, "round_id": 10, "ranks": [2, 1, 3]}],
    }
    assert found.keys() == SUBMISSIONS.keys()


def test_a_metric_of_one_s_own_may_serve_a_leaderboard(tmp_path: Path) -> None:
    def row(output: ModelOutput, record: Record) -> dict[str, object]:
        return {"key": record.id, "said": output.text}

    metric = Metric("mine", "mine", METRICS["accuracy"].function, submissions={"vqav2": row})
    question = Record("7", "question", "?", answers=("red",), answer_weights=(10.0,))
    result = result_of(tmp_path, "vqav2", [question], ["red"])
    item = DatasetResult(replace(result, task=replace(result.task, own_metric=metric)), {})
    summary = results_json([item], checkpoint="x", fingerprint="abc", step=1, model=MODEL)
    *_, written = write_results(tmp_path / "out", "t", [item], summary, examples=0)
    assert json.loads(written.read_text()) == [{"key": "7", "said": "red"}]


def test_the_file_is_one_json_list_in_the_order_of_the_records(tmp_path: Path) -> None:
    records = [Record("7", "question"), Record("3", "question")]
    path = write_submission(tmp_path, "vqav2", [ModelOutput("caf\u00e9"), ModelOutput("2")], records)
    assert path == tmp_path / "submission.json"
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"question_id": 7, "answer": "caf\u00e9"},
        {"question_id": 3, "answer": "2"},
    ]


@pytest.mark.parametrize(
    ("dataset", "ids", "message"),
    [
        ("gqa", ["1"], "no leaderboard file is known for gqa; there is one for vqav2, vqav2_blip, textvqa"),
        ("vqav2", ["1", "1"], "'1' of vqav2 comes twice"),
        ("vqav2", ["12a"], "'12a': the leaderboard needs whole numbers"),
        ("nocaps", [], "needs at least one record"),
        ("visdial", ["12-1"], "'12-1' has 0 options but 0 scores"),
    ],
)
def test_bad_input_is_told_in_one_line(dataset: str, ids: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        submission_rows(dataset, [ModelOutput("x")] * len(ids), [Record(name, "question") for name in ids])


def test_outputs_and_records_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="1 predictions for 0 records"):
        submission_rows("vqav2", [ModelOutput("x")], [])
