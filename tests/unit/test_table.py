"""The paper's table with rows of one's own: order, marks, text, CSV, HTML, and files that are none."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from instructblip.data.cards import all_cards, load_card
from instructblip.errors import UserError
from instructblip.evaluation.report.table import (
    HELD_IN,
    HELD_OUT,
    INSTRUCTBLIP,
    OTHER_PRECISION,
    OTHER_PROTOCOL,
    OTHER_SPLIT,
    SUBSET,
    as_csv,
    as_html,
    as_text,
    comparison_marks,
    main,
    score_table,
)
from instructblip.evaluation.results_file import read_run
from tests.kit.stored import JAVA, PYTHON, entry, write_run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two evaluations that share some datasets; one was scored on a subset, one on test without answers."""
    first = {
        "vsr": entry("vsr", 54.0, samples=100),
        "coco_caption": entry("coco_caption", 140.0),
        "gqa": entry("gqa", 48.0),
        "nocaps": entry("nocaps", 121.04),
        "easy_vqa_color": entry("easy_vqa_color", 99.0),
    }
    second = {"gqa": entry("gqa", 50.0, num_beams=1), "vizwiz": entry("vizwiz", None, split="test")}
    return [write_run(tmp_path / "one/eval", first), write_run(tmp_path / "two/eval", second)]


@pytest.mark.slow
def test_every_column_of_the_paper_is_a_card_with_its_numbers() -> None:
    cards = {card.name: card for card in all_cards()}
    assert len(HELD_OUT) == 13
    for name in HELD_OUT:
        assert cards[name].role == "held-out"
        assert cards[name].paper.keys() == INSTRUCTBLIP.keys()
    assert all(cards[name].role == "held-in" for name in HELD_IN)
    assert [cards[name].paper["vicuna_7b"] for name in HELD_OUT] == [
        123.1, 82.4, 49.2, 54.3, 43.1, 50.1, 45.2, 59.6, 34.5, 60.5, 41.8, 22.1, 52.2,
    ]  # fmt: skip


def test_columns_stand_in_the_papers_order_and_its_rows_below(runs: list[Path]) -> None:
    table = score_table([read_run(folder) for folder in runs])
    assert table.datasets == ["nocaps", "gqa", "vsr", "vizwiz", "coco_caption", "easy_vqa_color"]
    assert [row.name for row in table.rows] == ["one/eval", "two/eval", *INSTRUCTBLIP.values()]
    paper = {row.name: {name: cell.value for name, cell in row.cells.items()} for row in table.rows[2:]}
    assert paper["InstructBLIP Vicuna-7B"] == {"nocaps": 123.1, "gqa": 49.2, "vsr": 54.3, "vizwiz": 34.5}
    own = table.rows[0].cells["vsr"]
    assert (own.value, own.low, own.high, own.symbols) == (54.0, 52.5, 55.25, "*")
    assert table.rows[1].cells["vizwiz"].value is None


@pytest.mark.parametrize(
    ("dataset", "changed", "expected"),
    [
        ("gqa", {}, {}),
        ("gqa", {"samples": 50}, {SUBSET: "50 samples"}),
        ("gqa", {"split": "val"}, {OTHER_SPLIT: "val, the paper: testdev"}),
        ("vizwiz", {}, {OTHER_SPLIT: "val, the paper: test-dev"}),
        ("gqa", {"num_beams": 1}, {OTHER_PROTOCOL: "num_beams 1 in place of 5"}),
        ("gqa", {"images": "withheld"}, {OTHER_PROTOCOL: "images withheld"}),
        ("gqa", {"precision": "fp32"}, {}),
        ("gqa", {"precision": "bf16"}, {OTHER_PRECISION: "bf16"}),
        ("gqa", {"metric": "x", "samples": 9}, {SUBSET: "9 samples", OTHER_PROTOCOL: None}),
    ],
)
def test_marks_say_why_a_score_is_not_like_the_papers(
    dataset: str, changed: dict[str, Any], expected: dict[Any, str | None]
) -> None:
    found = comparison_marks(load_card(dataset), entry(dataset, 50.0, **changed)["protocol"])
    assert found.keys() == expected.keys()
    assert all(text in (None, found[mark]) for mark, text in expected.items())


@pytest.mark.slow
def test_the_text_is_cut_into_blocks_that_fit(runs: list[Path]) -> None:
    table = score_table([read_run(folder) for folder in runs])
    wide, narrow = as_text(table, 200), as_text(table, 60)
    assert max(map(len, narrow.splitlines())) <= 60
    first = [line.split() for line in wide.splitlines()]
    assert first[0] == ["NoCaps", "GQA", "VSR", "VizWiz", "COCO", "easy_vqa_color"]
    assert first[1] == ["one/eval", "121.0", "48.0", "54.0*", "140.0", "99.0"]
    assert first[2] == ["119.5-122.3", "46.5-49.2", "52.5-55.2", "138.5-141.2", "97.5-100.2"]
    assert first[3] == ["two/eval", "50.0‡", "not", "public"]
    assert first[4] == ["48.5-51.2"]
    assert first[5] == ["InstructBLIP", "FlanT5-XL", "119.9", "48.4", "64.8", "32.7"]
    for text in (wide, narrow):
        assert [line[0] for line in text.splitlines()[-3:-1]] == ["*", "‡"]
        for number in ("121.0", "140.0", "99.0", "138.5-141.2"):
            assert number in text
    # Right ends of a column stand below each other, symbols aside.
    lines = wide.splitlines()
    assert lines[1].index("54.0*") + 4 == lines[2].index("52.5-55.2") + 9 == lines[5].index("64.8") + 4


@pytest.mark.slow
def test_the_csv_reads_back(runs: list[Path]) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(score_table([read_run(folder) for folder in runs])))))
    assert len(rows) == 6
    own = rows[0]
    assert (own["nocaps"], own["nocaps_low"], own["nocaps_high"]) == ("121.04", "119.54", "122.29")
    assert (own["vsr_marks"], own["vizwiz"], rows[1]["vizwiz"], rows[1]["gqa_marks"]) == ("*", "", "", "‡")
    assert (rows[4]["row"], rows[4]["gqa"], rows[4]["gqa_low"]) == ("InstructBLIP Vicuna-7B", "49.2", "")


def test_the_source_names_the_language_model(runs: list[Path]) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(score_table([read_run(folder) for folder in runs])))))
    assert rows[0]["source"] == f"{runs[0]}, checkpoint outputs/train/x, LLM vicuna"


@pytest.mark.slow
def test_the_legend_names_the_tokenizer_of_captions(runs: list[Path], tmp_path: Path) -> None:
    one = score_table([read_run(folder) for folder in runs])
    assert one.notes == [f"Captions tokenised by {JAVA}."]
    other = entry("nocaps", 120.0) | {"metric_details": {"tokenizer": PYTHON}}
    several = score_table([read_run(runs[0]), read_run(write_run(tmp_path / "three/eval", {"nocaps": other}))])
    told = (
        f"Captions tokenised by {PYTHON} (NoCaps of three/eval) and by {JAVA} (COCO of one/eval, NoCaps of one/eval): "
        "these scores are not comparable with each other."
    )
    assert several.notes == [told]
    for text in (as_text(several, 80), as_html(several)):
        assert told in " ".join(text.split())
    without = score_table([read_run(write_run(tmp_path / "four", {"gqa": entry("gqa", 48.0)}))])
    assert without.notes == []


def test_the_page_is_whole_escaped_and_loads_nothing(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'&"
    folder = write_run(
        tmp_path / hostile.replace("/", "_"), {"gqa": entry("gqa", 48.0, num_beams=1), hostile: entry("gqa", 1.0)}
    )
    page = as_html(score_table([read_run(folder)]))
    assert page.count("<script") == 1  # the page's own, which its policy admits by its hash
    assert not re.search(r"""(src|href)\s*=""", page)
    assert "num_beams 1 in place of 5" in page
    for text in ("48.0", "46.5\u201349.2", "49.2", "InstructBLIP Vicuna-7B", "&lt;script&gt;"):
        assert text in page


@pytest.mark.slow
def test_the_command_writes_what_it_prints(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, values = tmp_path / "t/table.html", tmp_path / "t/table.csv"
    assert main([*map(str, runs), "--csv", str(values), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(as_text(score_table([read_run(folder) for folder in runs])))
    assert f"wrote {values}\nwrote {page}\n" in out
    assert values.read_text().startswith("row,source,nocaps,")
    assert page.read_text().startswith("<!doctype html>")


def test_what_has_no_score_has_a_column_and_a_mark(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"gqa": entry("gqa", 48.0)})
    values = json.loads((run / "results.json").read_text())
    values["not_evaluated"] = {"vsr": {"why": "missing", "reason": "not prepared in a < b"}}
    (run / "results.json").write_text(json.dumps(values))
    made = score_table([read_run(run)])
    assert made.datasets == ["gqa", "vsr"]
    text = as_text(made)
    assert [line.split()[:3] for line in text.splitlines() if line.startswith("run")] == [["run", "48.0", "-¶"]]
    assert "¶ no score: it was not prepared, or failed" in text
    assert '-<abbr class="mark" title="no score: it was not prepared, or failed: not prepared in a &lt; b">' in as_html(
        made
    )
    assert next(csv.DictReader(io.StringIO(as_csv(made))))["vsr_marks"] == "¶"


@pytest.mark.slow
def test_a_metric_of_ones_own_may_be_better_lower(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / name, {"gqa": entry("gqa", value) | {"metric": "mine.py:errors"} | facts}))
        for name, value, facts in (("a", 3.0, {"higher_is_better": False}), ("b", 2.0, {"higher_is_better": False}))
    ]
    assert score_table(runs).lower_is_better == {"gqa"}


def test_a_training_runs_own_evaluation_is_found(tmp_path: Path) -> None:
    write_run(tmp_path / "evaluation", {"gqa": entry("gqa", 48.0)})
    assert read_run(tmp_path).scores["gqa"].value == 48.0


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "is missing"),
        ("", "is not whole JSON"),
        ('{"datasets": {', "is not whole JSON"),
        (b"\xff\xfe{", "is not whole JSON"),
        ("[]", "holds no evaluation"),
        ('{"format": 3, "datasets": {}}', "holds no evaluation"),
        ('{"format": 2, "datasets": {"gqa": {}}}', "has format 2, this version reads 3"),
        ('{"results": {"gqa": 48}}', "holds no evaluation"),
        ({"checkpoint": None}, "names no checkpoint"),
        ({"model": {"llm": "x"}}, r"names no model: model\.llm\.name is None"),
        ({"gqa": 3}, r"datasets\.gqa is not a score"),
        ({"value": "48"}, r"datasets\.gqa\.value is '48', not a number"),
        ({"value": float("nan")}, r"datasets\.gqa\.value is nan"),
        ({"low": None}, "half an interval"),
        ({"count": "many"}, r"datasets\.gqa\.count is 'many'"),
        ({"metric": None}, r"datasets\.gqa\.metric is None"),
        ({"predictions_sha256": None}, r"datasets\.gqa\.predictions_sha256 is None"),
        ({"metric_details": {"tokenizer": 3}}, r"metric_details\.tokenizer is 3"),
        ({"protocol": {"split": "val"}}, r"datasets\.gqa\.protocol is not whole"),
        ({"not_evaluated": []}, r"not_evaluated is no object of datasets"),
        ({"not_evaluated": {"vsr": 3}}, r"not_evaluated\.vsr does not say why"),
        ({"not_evaluated": {"vsr": {"why": "lost", "reason": ""}}}, r"not_evaluated\.vsr does not say why"),
        ({"not_evaluated": {"vsr": {"why": "failed"}}}, r"not_evaluated\.vsr does not say why"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_line(tmp_path: Path, content: Any, told: str) -> None:
    file = tmp_path / "results.json"
    if isinstance(content, dict):
        write_run(tmp_path, {"gqa": entry("gqa", 48.0)})
        values = json.loads(file.read_text())
        (key,) = content
        head = ("checkpoint", "model", "not_evaluated")
        place = values if key in head else values["datasets"]
        place = values["datasets"]["gqa"] if key not in (*head, "gqa") else place
        place.update(content)
        file.write_text(json.dumps(values))
    elif content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=told) as error:
        read_run(tmp_path)
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)


@pytest.mark.slow
def test_jobs_of_a_sweep_are_called_by_what_differs(tmp_path: Path) -> None:
    names = ["held_out-llm_vicuna_7b-samples_4", "held_out-llm_opt_2_7b-samples_4"]
    runs = [write_run(tmp_path / name, {"gqa": entry("gqa", 48.0)}) for name in names]
    table = score_table([read_run(folder) for folder in runs])
    assert [row.name for row in table.rows if not row.is_paper] == ["llm_vicuna_7b-samples_4", "llm_opt_2_7b-samples_4"]
    alone = score_table([read_run(runs[0])])
    assert alone.rows[0].name == names[0]
    whole = write_run(tmp_path / "held_out-", {"gqa": entry("gqa", 48.0)})  # would have no name left
    assert [row.name for row in score_table([read_run(run) for run in (whole, runs[0])]).rows][:2] == [
        "held_out-",
        names[0],
    ]
