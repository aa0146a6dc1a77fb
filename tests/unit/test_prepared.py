"""Prepared shards are had before they are used: fetched where that is allowed, asked for where it is not."""

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from instructblip.config.schema import DataConfig, SourcesConfig
from instructblip.data.cards import Card, load_card, load_cards
from instructblip.data.prepare.command import Needed, ensure_prepared, shards_folder
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.errors import UserError
from tests.kit.tiny import write_easy_vqa


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_easy_vqa(tmp_path / "raw", images=12)
    return tmp_path / "raw"


def _ensure(card: Card, shards: Path, fetchable: dict[str, SourcesConfig]) -> str:
    console = Console(file=io.StringIO(), width=200)
    assert ensure_prepared([card], shards, fetchable, console) == {}
    text: str = console.file.getvalue()
    return text


def test_what_may_be_fetched_is_prepared_whole(raw: Path, tmp_path: Path) -> None:
    card, shards = load_card("easy_vqa"), tmp_path / "shards"
    fetchable = {"easy_vqa": SourcesConfig(path=str(raw))}
    prepare_dataset(card, raw, shards, splits=["test"], progress=False)
    assert "preparing easy_vqa in" in _ensure(card, shards, fetchable)
    assert all((shards / "easy_vqa" / split / "manifest.json").is_file() for split in card.splits)
    assert _ensure(card, shards, fetchable) == ""
    assert _ensure(load_card("easy_vqa_color"), shards, {}) == ""  # a view has its parent's shards


def test_what_only_the_user_can_get_may_be_prepared_in_part(raw: Path, tmp_path: Path) -> None:
    card, shards = dataclasses.replace(load_card("easy_vqa"), source_part=None), tmp_path / "shards"
    data, console = DataConfig(shards=str(shards)), Console(quiet=True)
    command = rf"python prepare\.py dataset=easy_vqa out={shards} raw=FOLDER, with"
    words = rf"easy_vqa \(test\) is not prepared in .*; run {command}"
    with pytest.raises(UserError, match=words):
        shards_folder([Needed(card, frozenset({"test"}))], data, console)
    view = Needed(load_card("okvqa_question_generation"), frozenset({"train"}))
    with pytest.raises(
        UserError, match=r"run python prepare\.py dataset=okvqa out=\S+ fetch=true, or python prepare\.py"
    ):
        shards_folder([view], data, console)
    prepare_dataset(card, raw, shards, splits=["test"], progress=False)
    assert _ensure(card, shards, {}) == ""
    assert shards_folder([Needed(card, frozenset({"test"}))], data, console) == shards


def test_all_cards_that_do_not_exist_are_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        load_cards(["easy_vga", "gqa", "okvga", "easy_vga"])
    assert str(caught.value).count("no dataset card") == 2
    assert "did you mean 'easy_vqa'" in str(caught.value)
    assert "did you mean 'okvqa'" in str(caught.value)
