"""A killed evaluation goes on where it stopped, counts every sample once, and trusts no journal but its own."""

import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from instructblip.evaluation import journal
from instructblip.model.instructblip import InstructBLIP
from instructblip.training.checkpoint import checkpoint_folders
from tests.runs import DATASETS, FINAL_SAMPLES, World, evaluate_here, predictions, read_lines, run, scores, start

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


def test_a_finished_evaluation_asks_nothing_again(
    world: World, finished_run: Path, whole: Path, answered: list[str], tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "demo")
    assert_same_evaluation(evaluate_here(world, finished_run, tmp_path, *OVERRIDES), whole)
    assert answered == []


def test_another_checkpoint_answers_for_itself(
    world: World, finished_run: Path, whole: Path, answered: list[str], tmp_path: Path
) -> None:
    older = checkpoint_folders(finished_run / "checkpoints")[1]
    expected = evaluate_here(world, older, tmp_path / "fresh", *OVERRIDES)
    assert len(answered) == ANSWERS
    shutil.copytree(whole, tmp_path / "used/demo")
    found = evaluate_here(world, older, tmp_path / "used", *OVERRIDES)
    assert len(answered) == 2 * ANSWERS
    assert_same_evaluation(found, expected)
    # And its answers are not the newer one's, or the test would show nothing.
    assert (found / "easy_vqa_shape/predictions.jsonl").read_bytes() != (
        whole / "easy_vqa_shape/predictions.jsonl"
    ).read_bytes()


def test_another_protocol_answers_for_itself(
    world: World, finished_run: Path, whole: Path, answered: list[str], tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "demo")
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
