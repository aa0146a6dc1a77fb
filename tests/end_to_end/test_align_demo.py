"""The demo's parts aligned by BLIP-2's two stages, then tuned: the experiments. `study=alignment` compares their runs."""

from pathlib import Path

import pytest
from rich.console import Console

from instructblip.config.schema import TrainConfig
from instructblip.data.cards import load_card
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.training.planned import print_plan
from instructblip.training.run import train
from tests.kit.own_data import write_own_data
from tests.kit.runs import World, compose, one_thread, read_lines

STAGES = ("align_demo_stage1", "align_demo_stage2", "align_demo")


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_planned_and_names_the_one_before(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = compose("train", TrainConfig, [f"experiment={name}", "plan=true"])
    assert print_plan(config, Console()) == 0
    assert "It fits" in capsys.readouterr().out
    before = dict(zip(STAGES[1:], STAGES, strict=False)).get(name)
    assert config.init_from == ([] if before is None else [f"outputs/train/{before}"])


@pytest.mark.slow
def test_photos_of_ones_own_take_the_pictures_place(world: World, tmp_path: Path) -> None:
    card = write_own_data(tmp_path, task="captioning", columns={"captions": "answer"})
    prepare_dataset(load_card(card), tmp_path, tmp_path / "shards", progress=False)
    parts = [text for text in world.train if text.startswith(("vision.", "qformer."))]
    own = ["mixture=own", f"mixture.datasets=[{{name: {card}}}]", "mixture.templates=caption_alone", "suite=none"]
    place = [f"data.shards={tmp_path / 'shards'}", f"output={tmp_path / 'out'}", "recipe.phases.align.steps=2"]
    config = compose("train", TrainConfig, ["experiment=align_demo_stage1", *own, *place, *parts])
    with world.here(), one_thread():
        assert train(config, Console(quiet=True)).status == 0
    lines = read_lines(tmp_path / "out/align_demo_stage1/metrics.jsonl")
    assert {name.partition("/")[0] for line in lines for name in line["sample_ids"]} == {"mine"}
