"""BLIP's own protocols through evaluate.py, with folders of transformers: a list of answers, statements, captions."""

from pathlib import Path

import pytest

from instructblip.errors import UserError
from instructblip.files import read_json, write_json
from tests.kit.blip import write_blip
from tests.kit.runs import World, evaluate_here, read_lines

COLORS = ["red", "green", "blue", "yellow", "black", "white", "1", "2", "3", "left", "right"]


def evaluated(world: World, model: Path, output: Path, name: str, *arguments: str) -> Path:
    shards = f"data.shards={output / 'shards'}"
    chosen = ("suite=own", f"suite.held_in=[{name}]", "suite.held_out=[]", "data=synthetic", f"name={name}")
    return evaluate_here(world, model, output, *chosen, shards, *arguments)


@pytest.mark.slow
def test_a_list_of_answers_is_ranked_in_both_presets_and_asked_for_where_it_is_missing(
    world: World, tmp_path: Path
) -> None:
    write_blip(tmp_path / "vqa", "vqa")
    write_json(tmp_path / "answer_list.json", COLORS)
    given = f"answers={tmp_path / 'answer_list.json'}"
    for preset in ("paper", "lavis"):
        folder = evaluated(world, tmp_path / "vqa", tmp_path / preset, "vqav2_blip", given, f"preset={preset}")
        entry = read_json(folder / "results.json")["datasets"]["vqav2_blip"]
        protocol = entry["protocol"]
        assert (protocol["mode"], protocol["candidates_from"], protocol["vocabulary_size"]) == (
            "rank",
            "answer_list",
            11,
        )
        assert entry["metric"] == {"paper": "vqa_accuracy", "lavis": "vqa_accuracy_lavis"}[preset]
        lines = read_lines(folder / "vqav2_blip/predictions.jsonl")
        assert {line["prediction"] for line in lines} <= set(COLORS)
    with pytest.raises(UserError, match=r"vqav2_blip ranks a list of answers; fetch https://\S+/answer_list\.json and"):
        evaluated(world, tmp_path / "vqa", tmp_path / "without", "vqav2_blip")
    written = evaluated(world, tmp_path / "vqa", tmp_path / "written", "vqav2_blip", "mode=generate")
    assert read_json(written / "results.json")["datasets"]["vqav2_blip"]["protocol"]["mode"] == "generate"


@pytest.mark.slow
def test_a_published_retrieval_model_judges_statements_and_a_captioner_captions(world: World, tmp_path: Path) -> None:
    write_blip(tmp_path / "itm", "retrieval")
    folder = evaluated(world, tmp_path / "itm", tmp_path, "vsr", "mode=match")
    lines = read_lines(folder / "vsr/predictions.jsonl")
    assert lines and {line["prediction"] for line in lines} <= {"true", "false"}
    with pytest.raises(
        UserError, match=r"which vsr asks for; let evaluate\.py judge its statements with mode=match, or"
    ):
        evaluated(world, tmp_path / "itm", tmp_path / "ranked", "vsr")
    write_blip(tmp_path / "caption", "caption")
    captions = evaluated(world, tmp_path / "caption", tmp_path, "nocaps_blip")
    entry = read_json(captions / "results.json")["datasets"]["nocaps_blip"]
    assert (entry["protocol"]["max_new_tokens"], entry["metric"]) == (16, "cider")
