"""All 26 datasets from hand-made raw folders in their official layout to shards: what comes out, and who can read it."""

import importlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image
from rich.console import Console

from instructblip.config import PrepareConfig
from instructblip.data.audit import audit_prepared
from instructblip.data.cards import Card, all_cards, load_card
from instructblip.data.prepare import check_prepared, prepare_dataset
from instructblip.data.sample import Record
from instructblip.data.shards import open_split
from instructblip.prepared import prepare

# dataset -> (module that writes its raw folder, split -> (images, frames, records, records lost))
SOURCES: dict[str, tuple[str, dict[str, tuple[int, int, int, int]]]] = {
    "coco_caption": ("coco_caption", {"train": (2, 2, 3, 0), "val": (1, 1, 3, 0), "test": (1, 1, 1, 0)}),
    "web_capfilt": ("web_capfilt", {"train": (2, 2, 4, 3)}),
    "textcaps": ("textcaps", {"train": (2, 2, 3, 0), "val": (1, 1, 6, 0), "test": (1, 1, 1, 0)}),
    "vqav2": ("vqa", {"train": (2, 2, 3, 0), "val": (1, 1, 1, 0), "test-dev": (1, 1, 1, 0), "test": (2, 2, 2, 0)}),
    "okvqa": ("vqa", {"train": (1, 1, 1, 0), "val": (1, 1, 1, 0)}),
    "aokvqa": ("aokvqa", {"train": (2, 2, 2, 0), "val": (1, 1, 1, 0), "test": (1, 1, 1, 0)}),
    "ocr_vqa": ("ocr_vqa", {"train": (2, 2, 4, 0), "val": (1, 1, 2, 0), "test": (1, 1, 2, 0)}),
    "llava_conversation": ("llava", {"train": (2, 2, 5, 0)}),
    "llava_detail": ("llava", {"train": (1, 1, 1, 0)}),
    "llava_reasoning": ("llava", {"train": (1, 1, 1, 0)}),
    "nocaps": ("nocaps", {"val": (2, 2, 2, 0), "test": (1, 1, 1, 0)}),
    "flickr30k": ("flickr30k", {"train": (1, 1, 5, 5), "val": (1, 1, 1, 0), "test": (1, 1, 1, 0)}),
    "gqa": ("gqa", {"testdev": (2, 2, 3, 0), "test": (1, 1, 1, 0)}),
    "vsr": ("vsr", {"zeroshot_test": (2, 2, 3, 0), "random_test": (1, 1, 1, 0)}),
    "iconqa": ("iconqa", {"test": (2, 2, 2, 0)}),
    "textvqa": ("textvqa", {"val": (2, 2, 3, 0), "test": (1, 1, 1, 0)}),
    "visdial": ("visdial", {"train": (2, 2, 2, 0), "val": (1, 1, 3, 0), "test": (1, 1, 1, 0)}),
    "hateful_memes": ("hateful_memes", {"dev_seen": (2, 2, 2, 0), "test_unseen": (1, 1, 1, 0)}),
    "vizwiz": ("vizwiz", {"val": (2, 2, 2, 0), "test": (1, 1, 1, 0)}),
    "scienceqa_img": ("scienceqa", {"train": (1, 1, 1, 0), "test": (2, 2, 2, 0)}),
    "msvd_qa": ("video_qa", {"train": (2, 8, 3, 0), "val": (1, 4, 1, 0), "test": (1, 4, 1, 0)}),
    "msrvtt_qa": ("video_qa", {"train": (2, 8, 2, 0), "val": (1, 4, 1, 0), "test": (1, 4, 2, 0)}),
    "ivqa": ("ivqa", {"train": (1, 4, 1, 0), "val": (1, 4, 1, 0), "test": (3, 12, 3, 0)}),
}
VIEWS = ("vqav2_question_generation", "okvqa_question_generation", "aokvqa_question_generation")


def _write_raw(name: str, raw: Path) -> None:
    raw.mkdir(parents=True, exist_ok=True)
    getattr(importlib.import_module(f"tests.unit.test_reader_{SOURCES[name][0]}"), f"write_{name}")(raw)


def _prepare(name: str, raw: Path, out: Path, **options: Any) -> list[Path]:
    options = {"splits": list(SOURCES[name][1]), "progress": False, "images_per_shard": 1} | options
    return prepare_dataset(load_card(name), raw, out, **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`raw/<dataset>` and `shards/<dataset>/<split>` of all 23 that have files of their own."""
    folder = tmp_path_factory.mktemp("datasets")
    logging.disable(logging.WARNING)  # the counts are those of the real files
    for name in SOURCES:
        _write_raw(name, folder / "raw" / name)
        _prepare(name, folder / "raw" / name, folder / "shards")
    logging.disable(logging.NOTSET)
    return folder


def _names() -> set[str]:
    """The cards of the paper's 26 datasets: without easy-VQA, and without views that only evaluate in another way."""
    return {card.name for card in all_cards() if card.source != "easy_vqa" and (not card.view_of or _trains(card))}


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
def test_what_goes_in_comes_out_or_is_counted(world: Path, name: str) -> None:
    found = {}
    for split in SOURCES[name][1]:
        manifest = json.loads((world / "shards" / name / split / "manifest.json").read_text())
        lost = sum(loss["records"] for loss in manifest["lost"])
        found[split] = (manifest["images"], manifest["frames"], manifest["records"], lost)
    assert found == SOURCES[name][1]
    assert check_prepared(world / "shards" / name) == []


@pytest.mark.parametrize("name", SOURCES)
def test_stock_webdataset_reads_the_same_in_its_secure_mode(
    world: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webdataset.utils, "enforce_security", True)
    for split in SOURCES[name][1]:
        folder = world / "shards" / name / split
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
def test_four_workers_write_what_one_writes(world: Path, tmp_path: Path, name: str) -> None:
    split = next(iter(SOURCES[name][1]))
    _prepare(name, world / "raw" / name, tmp_path, splits=[split], workers=4)
    written = {path.name: path.read_bytes() for path in (tmp_path / name / split).iterdir()}
    assert written == {path.name: path.read_bytes() for path in (world / "shards" / name / split).iterdir()}
    assert len(written) > 4


def test_all_of_them_can_be_shown_and_audited(world: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    assert prepare(PrepareConfig(show=str(world / "shards"), samples=2), console) == 0
    page = (world / "shards/samples.html").read_text()
    for name in _names():
        assert f"<h2>{name}, " in page
    audit = audit_prepared([world / "shards"])
    assert {used.cards[0].source for used in audit.trained} == {
        name for name in SOURCES if load_card(name).role == "held-in"
    }
    held_out = {used.cards[0].source for used in audit.evaluated if used.held_out}
    assert held_out == {name for name in SOURCES if load_card(name).role == "held-out"}
