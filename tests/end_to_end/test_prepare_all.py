"""All 26 datasets from hand-made raw folders in their official layout to shards: what comes out, and who can read it."""

import io
import json
from pathlib import Path

import pytest
import webdataset
from PIL import Image
from rich.console import Console

from instructblip.config.schema import PrepareConfig
from instructblip.data.cards import Card, all_cards, load_card
from instructblip.data.prepare.audit import audit_prepared
from instructblip.data.prepare.command import prepare
from instructblip.data.prepare.convert import check_prepared
from instructblip.data.records import Record
from instructblip.data.shards import open_split
from tests.kit.all_datasets import OTHERS, SOURCES, prepare_source

VIEWS = ("vqav2_question_generation", "okvqa_question_generation", "aokvqa_question_generation")


def _names() -> set[str]:
    """The cards of the paper's 26 datasets: without others, and without views that only evaluate in another way."""
    return {card.name for card in all_cards() if card.source not in OTHERS and (not card.view_of or _trains(card))}


def _trains(card: Card) -> bool:
    return card.name.endswith("question_generation")


def test_these_are_the_26() -> None:
    assert _names() == {*SOURCES, *VIEWS}
    assert len(_names()) == 26
    roles = [load_card(name).role for name in sorted(_names())]
    assert (roles.count("held-in"), roles.count("held-out")) == (13, 13)
    for name in VIEWS:
        assert load_card(name).source == name.removesuffix("_question_generation")


@pytest.mark.parametrize("name", SOURCES)
def test_what_goes_in_comes_out_or_is_counted(all_datasets: Path, name: str) -> None:
    found = {}
    for split in SOURCES[name]:
        manifest = json.loads((all_datasets / "shards" / name / split / "manifest.json").read_text())
        lost = sum(loss["records"] for loss in manifest["lost"])
        found[split] = (manifest["images"], manifest["frames"], manifest["records"], lost)
    assert found == SOURCES[name]
    assert check_prepared(all_datasets / "shards" / name) == []


@pytest.mark.parametrize("name", SOURCES)
def test_stock_webdataset_reads_the_same_in_its_secure_mode(
    all_datasets: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webdataset.utils, "enforce_security", True)
    for split in SOURCES[name]:
        folder = all_datasets / "shards" / name / split
        urls = [str(path) for path in sorted(folder.glob("*.tar"))]
        opened = open_split(folder)
        ours = [shard.read(row) for shard in opened.shards for row in range(len(shard))]
        theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
        assert len(theirs) == len(ours)
        for sample, (frames, records) in zip(theirs, ours, strict=True):
            assert [Record.from_dict(record) for record in sample["json"]["records"]] == records
            pictures = [value for value in sample.values() if isinstance(value, Image.Image)]
            assert [picture.size for picture in pictures] == [Image.open(io.BytesIO(frame)).size for frame in frames]


@pytest.mark.parametrize("name", ["vqav2", "ocr_vqa", "msvd_qa"])
def test_four_workers_write_what_one_writes(all_datasets: Path, tmp_path: Path, name: str) -> None:
    split = next(iter(SOURCES[name]))
    prepare_source(name, all_datasets / "raw" / name, tmp_path, splits=[split], workers=4)
    written = {path.name: path.read_bytes() for path in (tmp_path / name / split).iterdir()}
    assert written == {path.name: path.read_bytes() for path in (all_datasets / "shards" / name / split).iterdir()}
    assert len(written) > 4


@pytest.mark.slow
def test_all_of_them_can_be_shown_and_audited(all_datasets: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    assert prepare(PrepareConfig(show=str(all_datasets / "shards"), samples=2), console) == 0
    page = (all_datasets / "shards/samples.html").read_text()
    for name in _names():
        assert f"<h2>{name}, " in page
    audit = audit_prepared([all_datasets / "shards"])
    assert {used.cards[0].source for used in audit.trained} == {
        name for name in SOURCES if load_card(name).role == "held-in"
    }
    held_out = {used.cards[0].source for used in audit.evaluated if used.held_out}
    assert held_out == {name for name in SOURCES if load_card(name).role == "held-out"}
