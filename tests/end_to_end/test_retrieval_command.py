"""`evaluate.py` with models that match: retrieval and statements, twice and on ranks the same results, in table and page."""

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from instructblip.errors import UserError
from instructblip.evaluation import journal, retrieval
from instructblip.evaluation.report.table import as_text, score_table
from instructblip.evaluation.results_file import read_run
from tests.kit.runs import World, evaluate_here, run, run_ranks, start

SUITE = ("suite=retrieval", "data=synthetic", "name=retrieval", "batch_size=16")


def results(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return values


@pytest.mark.slow
def test_twice_and_on_two_ranks_the_results_are_the_same(world: World, untrained_stage1: Path, tmp_path: Path) -> None:
    shards = f"data.shards={tmp_path / 'shards'}"
    first = evaluate_here(world, untrained_stage1, tmp_path / "first", *SUITE, shards)
    second = evaluate_here(world, untrained_stage1, tmp_path / "second", *SUITE, shards)
    arguments = [*world.evaluate, *SUITE, shards, f"checkpoint={untrained_stage1}", f"output={tmp_path / 'third'}"]
    run_ranks(world, "evaluate.py", *arguments, cwd=tmp_path / "ranks")
    expected = results(first) | {"created": ""}
    assert results(second) | {"created": ""} == expected
    third = results(tmp_path / "third/retrieval") | {"created": ""}
    assert third["datasets"] == expected["datasets"]
    for dataset in ("coco_retrieval", "flickr30k_retrieval"):
        entry = expected["datasets"][dataset]
        assert entry["parts"].keys() == {f"{way}{k}" for way in ("TR", "IR") for k in ("@1", "@5", "@10", " mean")}
        assert 0 <= entry["parts"]["TR@1"]["value"] <= entry["parts"]["TR@5"]["value"] <= 100
        assert set(entry["baselines"]) == {"chance"}
    assert expected["model"]["kind"] == "BLIP2"
    assert "llm" not in expected["model"]
    text = as_text(score_table([read_run(first)]))
    for shown in ("COCO TR@1", "Flickr30K IR@10", "BLIP-2 ViT-g", "97.6", "BLIP CapFilt-L", "made-up data"):
        assert shown in text
    page = (first / "report.html").read_text()
    assert "captions found" in page
    assert "finds its image at place" in page


def die_appending(*, behind: bool) -> None:
    """A `before`: kill this process behind its first answers in the journal, or when it is to write them."""
    append = journal._append

    def dying(path: Path, lines: Any) -> None:
        if behind:
            append(path, lines)
        os.kill(os.getpid(), signal.SIGKILL)

    journal._append = dying


def die_encoding() -> None:
    """A `before`: kill this process when a file of encoded images is written and has no name yet."""
    save = retrieval.save_file

    def dying(*arguments: Any) -> None:
        save(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    retrieval.save_file = dying


@pytest.mark.slow
def test_ten_real_kills_leave_the_same_results(world: World, untrained_stage1: Path, tmp_path: Path) -> None:
    """Of processes: there are few pictures, so most of them die before they have come further than the one before."""
    shards = f"data.shards={tmp_path / 'shards'}"
    alone = evaluate_here(world, untrained_stage1, tmp_path / "alone", *SUITE, shards)
    arguments = [*world.evaluate, *SUITE, shards, f"checkpoint={untrained_stage1}", f"output={tmp_path / 'killed'}"]
    waiting, answered = partial(die_appending, behind=False), partial(die_appending, behind=True)
    for before in (die_encoding, die_encoding, *[waiting] * 3, answered, die_encoding, *[waiting] * 3):
        command = start(world, "evaluate.py", *arguments, cwd=tmp_path, before=before)
        assert command.wait() == -signal.SIGKILL, command.output
    run(world, "evaluate.py", *arguments, cwd=tmp_path)
    assert results(tmp_path / "killed/retrieval")["datasets"] == results(alone)["datasets"]


@pytest.mark.slow
def test_questions_are_not_asked_of_a_model_without_a_language_model(
    world: World, untrained_stage1: Path, tmp_path: Path
) -> None:
    says = "has no language model to rank candidates with, which easy_vqa_shape, easy_vqa_yes_no asks for"
    with pytest.raises(UserError, match=says):
        evaluate_here(
            world, untrained_stage1, tmp_path, "suite.held_in=[easy_vqa_shape,easy_vqa_yes_no]", "suite.held_out=[]"
        )


@pytest.mark.slow
def test_captions_are_written_without_a_prompt(world: World, untrained_stage1: Path, tmp_path: Path) -> None:
    shards = f"data.shards={tmp_path / 'shards'}"
    arguments = ("suite.held_in=[]", "suite.held_out=[flickr30k]", "data=synthetic", "name=captions")
    found = results(evaluate_here(world, untrained_stage1, tmp_path, *arguments, shards))
    assert found["datasets"]["flickr30k"]["metric"] == "cider"


@pytest.mark.slow
def test_an_instructblip_is_not_asked_to_retrieve(world: World, untrained_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no matching head to retrieve with, which coco_retrieval"):
        evaluate_here(world, untrained_run, tmp_path, *SUITE, f"data.shards={tmp_path / 'shards'}")


@pytest.mark.slow
def test_statements_are_judged_by_matching(world: World, untrained_stage1: Path, tmp_path: Path) -> None:
    arguments = ("suite=own", "suite.held_out=[vsr]", "mode=match", "data=synthetic", "name=statements", "batch_size=2")
    shards = f"data.shards={tmp_path / 'shards'}"
    folders = [
        evaluate_here(world, untrained_stage1, tmp_path / name, *arguments, shards, "blind_baseline=true")
        for name in ("first", "second")
    ]
    first, second = (results(folder) | {"created": ""} for folder in folders)
    assert first == second
    entry = first["datasets"]["vsr"]
    assert (entry["protocol"]["mode"], entry["protocol"]["prompt"]) == ("match", "{question}")
    assert set(entry["baselines"]) == {"images withheld", "chance"}
    assert "matching" in (folders[0] / "report.html").read_text()
    assert "\u2021" in as_text(score_table([read_run(folders[0])]))  # another protocol than the card's
    with pytest.raises(UserError, match="gqa has no statements, which are true or false of an image"):
        evaluate_here(world, untrained_stage1, tmp_path, "suite=own", "suite.held_out=[gqa]", "mode=match", "name=gqa")
