"""A killed evaluation goes on where it stopped, counts every sample once, and trusts no journal but its own."""

import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from instructblip.errors import UserError
from instructblip.evaluation import journal, suite
from instructblip.evaluation.outcomes import TaskResult
from instructblip.evaluation.protocol import Task
from instructblip.evaluation.report.compare import compare_runs
from instructblip.evaluation.results_file import read_run
from instructblip.models.instructblip import InstructBLIP
from instructblip.weights.checkpoint import checkpoint_folders
from tests.kit.runs import DATASETS, FINAL_SAMPLES, World, evaluate_here, predictions, read_lines, run, scores, start

ANSWERS = FINAL_SAMPLES * len(DATASETS)
OVERRIDES = (f"samples={FINAL_SAMPLES}", "batch_size=4")


@pytest.fixture(scope="module")
def whole(world: World, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an evaluation that nothing interrupted."""
    return evaluate_here(world, finished_run, tmp_path_factory.mktemp("whole"), *OVERRIDES)


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts that the model is asked while the test runs."""
    asked: list[str] = []
    rank = InstructBLIP.rank

    def counting(model: InstructBLIP, images: Any, prompts: Sequence[str], *rest: Any, **options: Any) -> Any:
        asked.extend(prompts)
        return rank(model, images, prompts, *rest, **options)

    monkeypatch.setattr(InstructBLIP, "rank", counting)
    return asked


def assert_same_evaluation(found: Path, expected: Path) -> None:
    assert scores(found) == scores(expected)
    for name in DATASETS:
        file = f"{name}/predictions.jsonl"
        assert (found / file).read_bytes() == (expected / file).read_bytes()


@pytest.mark.slow
def test_a_cut_line_is_answered_again(
    world: World, finished_run: Path, whole: Path, answered: list[str], tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "demo")
    journal = tmp_path / "demo/easy_vqa_shape/predictions.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:6]) + lines[6][: len(lines[6]) // 2])
    found = evaluate_here(world, finished_run, tmp_path, *OVERRIDES)
    # The batch that was cut is asked whole, so that every answer is computed beside the same others as before.
    assert len(answered) == FINAL_SAMPLES - 4
    assert scores(found) == scores(whole)
    assert predictions(found) == predictions(whole)


@pytest.mark.slow
def test_a_finished_evaluation_asks_nothing_again(
    world: World, finished_run: Path, whole: Path, answered: list[str], tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "demo")
    assert_same_evaluation(evaluate_here(world, finished_run, tmp_path, *OVERRIDES), whole)
    assert answered == []


@pytest.mark.slow
def test_another_checkpoint_answers_for_itself(
    world: World, finished_run: Path, whole: Path, answered: list[str], tmp_path: Path
) -> None:
    older = checkpoint_folders(finished_run / "checkpoints")[1]
    expected = evaluate_here(world, older, tmp_path / "fresh", *OVERRIDES)
    assert len(answered) == ANSWERS
    shutil.copytree(whole, tmp_path / "used/demo")
    with pytest.raises(UserError, match=rf"used/demo holds the results of .*step_\d+ \(asked for is {older}\); give"):
        evaluate_here(world, older, tmp_path / "used", *OVERRIDES)
    (tmp_path / "used/demo/results.json").unlink()  # what was answered stays
    found = evaluate_here(world, older, tmp_path / "used", *OVERRIDES)
    assert len(answered) == 2 * ANSWERS
    assert_same_evaluation(found, expected)
    # And its answers are not the newer one's, or the test would show nothing.
    assert (found / "easy_vqa_shape/predictions.jsonl").read_bytes() != (
        whole / "easy_vqa_shape/predictions.jsonl"
    ).read_bytes()


@pytest.mark.slow
def test_scores_are_not_compared_by_answers_that_a_later_evaluation_left_when_it_died(
    world: World, finished_run: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_task, more = suite.run_task, ("samples=12", "batch_size=4")
    folder = Path(shutil.copytree(whole, tmp_path / "demo"))
    assert len(compare_runs(read_run(whole), read_run(folder))) == len(DATASETS)
    for name in DATASETS:
        (folder / name / "submission.json").write_text("of fewer answers")

    def dying_in_the_third(model: InstructBLIP, task: Task, *arguments: Any, **options: Any) -> TaskResult:
        if task.card.name == "easy_vqa_color" and task.protocol.images == "withheld":
            raise KeyboardInterrupt
        return run_task(model, task, *arguments, **options)

    monkeypatch.setattr(suite, "run_task", dying_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate_here(world, finished_run, tmp_path, *more, "blind_baseline=true")
    assert (folder / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    with pytest.raises(
        UserError, match=r"/predictions\.jsonl is not what the score in .*results\.json was computed from"
    ):
        compare_runs(read_run(whole), read_run(folder))
    # What was made of the answers that were replaced is gone, and nothing else.
    left = {name for name in DATASETS if (folder / name / "submission.json").exists()}
    assert left == {"easy_vqa_statements"}
    monkeypatch.setattr(suite, "run_task", run_task)
    evaluate_here(world, finished_run, tmp_path, *more)  # ended, it is whole again
    assert len(compare_runs(read_run(folder), read_run(folder))) == len(DATASETS)


@pytest.mark.slow
def test_what_an_earlier_evaluation_left_does_not_stay(world: World, finished_run: Path, tmp_path: Path) -> None:
    folder = evaluate_here(world, finished_run, tmp_path, "samples=2", "blind_baseline=true")
    for name in DATASETS:
        assert (folder / name / "images_withheld/predictions.jsonl").is_file()
        (folder / name / "submission.json").write_text("an earlier one")
    evaluate_here(world, finished_run, tmp_path, "samples=2")
    left = {path.name for name in DATASETS for path in (folder / name).iterdir()}
    assert left.isdisjoint({"submission.json", "images_withheld"})


@pytest.mark.slow
def test_another_protocol_answers_for_itself(
    world: World, finished_run: Path, whole: Path, answered: list[str], tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "demo")
    with pytest.raises(UserError, match=r"\(easy_vqa_yes_no with images shown, asked for is withheld\)"):
        evaluate_here(world, finished_run, tmp_path, *OVERRIDES, "withhold_images=true")
    (tmp_path / "demo/results.json").unlink()
    found = evaluate_here(world, finished_run, tmp_path, *OVERRIDES, "withhold_images=true")
    asked = [{line["prompt"] for line in read_lines(found / name / "predictions.jsonl")} for name in DATASETS]
    assert len(answered) == sum(len(prompts) for prompts in asked)  # one picture for all: each prompt once
    assert predictions(found) != predictions(whole)


def die_while_writing_the_third_batch() -> None:
    """Kill this process when half of a batch of answers has reached the disk."""
    append = journal._append
    batches = 0

    def dying(path: Path, lines: Sequence[str]) -> None:
        nonlocal batches
        batches += 1
        append(path, lines)
        if batches == 3:
            os.truncate(path, path.stat().st_size - 100)
            os.kill(os.getpid(), signal.SIGKILL)

    journal._append = dying


@pytest.mark.slow
def test_a_killed_process_is_continued_by_another(
    world: World, finished_run: Path, whole: Path, tmp_path: Path
) -> None:
    arguments = [*world.evaluate, f"checkpoint={finished_run}", f"output={tmp_path}", *OVERRIDES]
    command = start(world, "evaluate.py", *arguments, cwd=tmp_path, before=die_while_writing_the_third_batch)
    assert command.wait() == -signal.SIGKILL
    assert not (tmp_path / "demo/results.json").exists()
    run(world, "evaluate.py", *arguments, cwd=tmp_path)
    assert scores(tmp_path / "demo") == scores(whole)
    assert predictions(tmp_path / "demo") == predictions(whole)
