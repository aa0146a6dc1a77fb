"""A dataset of a known format is one file, its card: made-up data of it is prepared, trained on and evaluated."""

import json
from pathlib import Path

import pytest

from instructblip.data import cards
from instructblip.data.cards import CARDS_FOLDER
from tests.kit.runs import World, evaluate_here, read_lines, train_here


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of cards with one more: A-OKVQA's under another name, to train on and to be scored."""
    folder = tmp_path / "datasets"
    folder.mkdir()
    for path in CARDS_FOLDER.glob("*.yaml"):
        (folder / path.name).symlink_to(path)
    text = (CARDS_FOLDER / "aokvqa.yaml").read_text()
    (folder / "mine.yaml").write_text(text.replace("name: aokvqa", "name: mine", 1))
    monkeypatch.setattr(cards, "CARDS_FOLDER", folder)
    return tmp_path


@pytest.mark.slow
def test_a_copied_card_is_prepared_trained_and_evaluated(world: World, mine: Path) -> None:
    data = ("data=synthetic", f"data.shards={mine / 'shards'}")
    mixture = ("mixture.datasets=[{name: mine, multiplier: 1.0}]", "suite.held_in=[mine]", "suite.held_out=[]")
    run = train_here(world, mine / "train", *data, *mixture)
    drawn = {sample.split("/")[0] for entry in read_lines(run / "metrics.jsonl") for sample in entry["sample_ids"]}
    assert drawn == {"mine"}
    folder = evaluate_here(world, run, mine / "evaluate", *data, "suite.held_in=[]", "suite.held_out=[mine]")
    found = json.loads((folder / "results.json").read_text())["datasets"]
    assert found.keys() == {"mine"}
    assert found["mine"]["count"] == 4
