"""Comparing two runs: right numbers, and refusal of what must not be compared."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from instructblip.errors import UserError
from instructblip.evaluation.metrics import auroc
from instructblip.evaluation.metrics.retrieval import retrieval_recall
from instructblip.evaluation.report.compare import compare_runs, main
from instructblip.evaluation.report.table import main as table_main
from instructblip.evaluation.results_file import read_run
from instructblip.evaluation.statistics import MCNEMAR, PERMUTATION, compare_paired
from tests.kit.stored import JAVA, PYTHON, entry, scored_run, write_run


def compared(first: Path, second: Path) -> list:
    return compare_runs(read_run(first), read_run(second))


def test_scores_are_paired_by_sample_and_images_drawn_together(tmp_path: Path) -> None:
    ours, theirs, images = [100.0, 30.0, 0.0, 60.0, 100.0], [100.0, 60.0, 90.0, 60.0, 0.0], ["a", "a", "b", "c", "c"]
    first = scored_run(tmp_path / "a", "okvqa", ours, images=images)
    second = scored_run(tmp_path / "b", "okvqa", theirs, images=images)
    lines = (second / "okvqa/predictions.jsonl").read_text().splitlines(keepends=True)
    (second / "okvqa/predictions.jsonl").write_text("".join(reversed(lines)))  # the order of lines says nothing
    write_run(second, json.loads((second / "results.json").read_text())["datasets"])
    (found,) = compared(first, second)
    assert (found.dataset, found.count, found.images) == ("okvqa", 5, 3)
    assert (found.first, found.second) == (58.0, 62.0)
    assert found.paired == compare_paired(ours, theirs, images)
    assert (found.paired.difference, found.paired.test) == (4.0, PERMUTATION)


def test_samples_that_the_metric_leaves_out_are_not_compared(tmp_path: Path) -> None:
    first = scored_run(tmp_path / "a", "gqa", [100.0, None, 0.0, 0.0])
    second = scored_run(tmp_path / "b", "gqa", [100.0, None, 100.0, 0.0])
    (found,) = compared(first, second)
    assert (found.count, found.paired.test, found.paired.p) == (3, MCNEMAR, 1.0)


def test_auroc_is_compared_by_placement_values(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    labels = (generator.random(300) < 0.3).astype(int)
    runs, scores = [], []
    for number, skill in enumerate((0.05, 0.25)):
        probabilities = np.clip(generator.normal(0.4 + skill * labels, 0.2), 0, 1)
        score = auroc(probabilities.tolist(), labels.tolist())
        answers = [("no", "yes")[label] for label in labels]
        folder = scored_run(
            tmp_path / str(number), "hateful_memes", [100 * v for v in score.per_sample], answers=answers
        )
        data = json.loads((folder / "results.json").read_text())
        data["datasets"]["hateful_memes"]["value"] = score.table_value  # not the mean over samples
        (folder / "results.json").write_text(json.dumps(data))
        runs.append(folder)
        scores.append(score)
    (found,) = compared(*runs)
    assert found.paired.difference == pytest.approx(scores[1].table_value - scores[0].table_value)
    # The standard error by DeLong's formula for two curves on the same samples.
    differences = np.array(scores[1].per_sample) - np.array(scores[0].per_sample)
    variance = sum(differences[labels == label].var(ddof=1) / (labels == label).sum() for label in (0, 1))
    assert found.paired.high - found.paired.low == pytest.approx(100 * 3.92 * variance**0.5, rel=0.1)
    assert found.paired.p < 0.01


def test_recall_of_retrieval_is_compared_by_what_each_image_adds(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    captions = generator.integers(1, 6, 150).tolist()
    runs, scores = [], []
    for number, spread in enumerate((9.0, 6.0)):
        ranks = [generator.exponential(spread, 1 + count).astype(int).tolist() for count in captions]
        score = retrieval_recall([row[0] for row in ranks], [row[1:] for row in ranks])
        answers = [f"the caption of {image}" for image in range(len(captions))]  # each image has its own
        runs.append(scored_run(tmp_path / str(number), "flickr30k_retrieval", score.per_sample, answers=answers))
        scores.append(score)
    (found,) = compared(*runs)
    assert found.paired.difference == pytest.approx(scores[1].value - scores[0].value)
    # The statistic itself on resampled images.
    times = generator.multinomial(150, np.full(150, 1 / 150), size=2000)
    low, high = np.percentile(scores[1].resampled(times) - scores[0].resampled(times), [2.5, 97.5])
    assert found.paired.high - found.paired.low == pytest.approx(high - low, rel=0.1)
    assert found.paired.p < 0.01


def test_a_line_of_predictions_ends_where_json_lines_end(tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        folder = scored_run(tmp_path / name, "okvqa", [100.0, 0.0])
        path = folder / "okvqa/predictions.jsonl"
        rows = [json.loads(line) for line in path.read_text().split("\n") if line]
        said = [row | {"prediction": "one\u2028two\u2029three\x85four"} for row in rows]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in said), encoding="utf-8")
        runs.append(write_run(folder, json.loads((folder / "results.json").read_text())["datasets"]))
    assert [found.count for found in compared(*runs)] == [2]


def test_signs_that_the_terminal_has_not_are_printed_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = [str(scored_run(tmp_path / name, "okvqa", [100.0, 0.0])) for name in ("Müller", "rün")]
    for number, command in enumerate((main, table_main)):
        with open(tmp_path / str(number), "w", encoding="ascii") as terminal:
            monkeypatch.setattr(sys, "stdout", terminal)
            assert command(runs) == 0
        assert "r\\xfcn" in (tmp_path / str(number)).read_text()


def test_a_run_in_another_precision_is_compared_and_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = scored_run(tmp_path / "a", "okvqa", [0.0, 100.0])  # of before precisions were stated
    second = scored_run(tmp_path / "b", "okvqa", [100.0, 100.0], sha256="cd", precision="bf16")
    (found,) = compared(first, second)
    assert (found.precisions, found.paired.difference) == (("fp32", "bf16"), 50.0)
    assert main([str(first), str(second)]) == 0
    printed = capsys.readouterr().out
    assert "okvqa ‖" in printed
    assert "‖ A computed in fp32, B in bf16" in printed
    third = scored_run(tmp_path / "c", "okvqa", [0.0, 0.0], sha256="ef", precision="bf16", num_beams=1)
    with pytest.raises(UserError, match=r"differ in num_beams \(5 and 1\), precision"):
        compared(first, third)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"sha256": "cd", "prompt": "Q: {question} A:"},
            r"okvqa: .* differ in prompt \('Question: \{question\}.* and 'Q: ",
        ),
        ({"sha256": "cd", "samples": 100, "samples_sha256": "6b"}, r"differ in samples \(None and 100\);"),
        ({"sha256": "cd", "samples_sha256": "6b"}, r"differ in samples_sha256 \('5a' and '6b'\)"),
        ({"sha256": "cd", "num_beams": 1, "split": "x"}, r"differ in num_beams \(5 and 1\), split \('val' and 'x'\)"),
    ],
)
def test_other_protocols_are_refused_by_name(tmp_path: Path, changed: dict[str, object], told: str) -> None:
    first = scored_run(tmp_path / "a", "okvqa", [0.0, 100.0])
    second = scored_run(tmp_path / "b", "okvqa", [0.0, 100.0], **changed)
    with pytest.raises(UserError, match=told):
        compared(first, second)


def test_other_samples_and_nothing_in_common_are_refused(tmp_path: Path) -> None:
    first = scored_run(tmp_path / "a", "okvqa", [0.0, 100.0])
    other = scored_run(tmp_path / "b", "gqa", [0.0, 100.0])
    with pytest.raises(UserError, match=r"a \(okvqa\) and .*b \(gqa\) have no scored dataset in common"):
        compared(first, other)
    hidden = write_run(tmp_path / "c", {"okvqa": entry("okvqa", None)})
    with pytest.raises(UserError, match="have no scored dataset in common"):
        compared(first, hidden)
    renamed = scored_run(tmp_path / "d", "okvqa", [0.0, 100.0])
    lines = (renamed / "okvqa/predictions.jsonl").read_text()
    (renamed / "okvqa/predictions.jsonl").write_text(lines.replace("okvqa/1", "okvqa/7"))
    write_run(renamed, json.loads((renamed / "results.json").read_text())["datasets"])
    with pytest.raises(UserError, match="has okvqa/1; evaluate both again"):
        compared(first, renamed)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("{}\n", "line 1 is not a prediction"),
        ('{"id": "a", "image": "b", "answers": [], "score": 1}\n{"id"', "line 2 is not a prediction"),
        ('{"id": "a", "image": "b", "answers": [], "score": 1}\n', "is not what the score in .* was computed from"),
        ("\udcff", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_damaged_predictions_are_refused_in_one_line(tmp_path: Path, lines: str | None, told: str) -> None:
    first = scored_run(tmp_path / "a", "okvqa", [0.0, 100.0])
    second = scored_run(tmp_path / "b", "okvqa", [0.0, 100.0])
    path = second / "okvqa/predictions.jsonl"
    path.unlink()
    if lines is not None:
        path.write_bytes(lines.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=told) as error:
        compared(first, second)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_predictions_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    first = scored_run(tmp_path / "a", "okvqa", [0.0, 100.0])
    second, later = scored_run(tmp_path / "b", "okvqa", [0.0, 60.0]), scored_run(tmp_path / "c", "okvqa", [60.0, 0.0])
    path = second / "okvqa/predictions.jsonl"
    # As if another checkpoint's evaluation into the same folder had died before its results.json: as many scores as before.
    path.write_bytes((later / "okvqa/predictions.jsonl").read_bytes())
    with pytest.raises(
        UserError, match=r"is not what the score in .*results\.json was computed from.*evaluate again"
    ) as error:
        compared(first, second)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_captions_cut_into_words_differently_are_refused(tmp_path: Path) -> None:
    first, second = (scored_run(tmp_path / name, "nocaps", [80.0, 100.0]) for name in "ab")
    assert len(compared(first, second)) == 1
    data = json.loads((second / "results.json").read_text())["datasets"]
    data["nocaps"]["metric_details"]["tokenizer"] = PYTHON
    write_run(second, data)
    with pytest.raises(UserError) as error:
        compared(first, second)
    told = f"nocaps: captions were tokenised by {JAVA} in {first} and by {PYTHON} in {second}; evaluate both again"
    assert str(error.value).startswith(told)
    assert "\n" not in str(error.value)


def test_the_command_prints_a_line_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(5)
    ours, theirs = ((generator.random(400) < share) * 100.0 for share in (0.4, 0.6))
    first, second = scored_run(tmp_path / "a", "vsr", ours.tolist()), scored_run(tmp_path / "b", "vsr", theirs.tolist())
    assert main([str(first), str(second / "results.json")]) == 0
    out = capsys.readouterr().out
    row = next(line.split() for line in out.splitlines() if line.strip().startswith("vsr"))
    assert row[:4] == ["vsr", f"{ours.mean():.1f}", f"{theirs.mean():.1f}", f"{theirs.mean() - ours.mean():+.1f}"]
    assert row[-2:] == ["<0.001", "400"]
    assert "p: two-sided, exact McNemar." in out
    assert out.startswith(f"A  {first}, checkpoint outputs/train/x, LLM vicuna\n")
    assert main([str(first), str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
