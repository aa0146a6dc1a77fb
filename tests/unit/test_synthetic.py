"""Made-up files of all datasets: what the cards expect of the official ones' layout, nothing lost, nothing in common."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from instructblip.data import cards
from instructblip.data.cards import CARDS_FOLDER, Card, load_card
from instructblip.data.prepare.audit import audit_prepared
from instructblip.data.prepare.command import ensure_synthetic
from instructblip.data.prepare.convert import check_prepared, prepare_dataset
from instructblip.data.readers import READERS
from instructblip.data.records import Record
from instructblip.data.shards import open_split, read_manifest
from instructblip.data.synthetic import MADE_UP, SCENES, WRITERS, first_number, write_synthetic
from instructblip.data.synthetic.scenes import COLORS, SIDES, draw_scene, make_scenes
from instructblip.errors import UserError
from tests.kit.all_datasets import official_cards

CARDS = official_cards()
_DETAIL = next(card for card in CARDS if card.name == "llava_detail")  # of the layout of COCO's own caption files too
SOURCES = sorted({card.source for card in CARDS})


def _ensure(shards: Path, *names: str) -> str:
    console = Console(file=io.StringIO(), width=200)
    ensure_synthetic([load_card(name) for name in names], shards, console)
    printed: str = console.file.getvalue()
    return printed


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "shards"
    _ensure(folder, *(card.name for card in CARDS))
    return folder


def test_there_are_files_of_every_format() -> None:
    """Of every published one: what people bring themselves is never made up."""
    official = {card.reader for card in CARDS}  # own data is never made up
    assert WRITERS.keys() == {name for name, reader in READERS.items() if not reader.tasks} | official


@pytest.mark.parametrize("name", SOURCES)
def test_no_record_is_lost_in_any_split(shards: Path, name: str) -> None:
    for split in load_card(name).splits:
        manifest = read_manifest(shards / name / split)
        assert (manifest["lost"], manifest["differences"], manifest["licence"]) == ([], [], MADE_UP)
        assert (manifest["images"], manifest["noted"]) == (SCENES, [])
        assert manifest["records"] >= manifest["images"]


def _records(folder: Path, kinds: tuple[str, ...]) -> list[Record]:
    rows = [shard.read(row)[1] for shard in open_split(folder).shards for row in range(len(shard))]
    return [record for records in rows for record in records if not kinds or record.kind in kinds]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_records_have_what_is_trained_on_and_scored(shards: Path, card: Card) -> None:
    splits = [("train", card.kinds)] if card.role == "held-in" else []
    splits += [(card.evaluation.split, card.evaluation.kinds or card.kinds)] if card.evaluation else []
    assert splits
    for split, kinds in splits:
        records = _records(shards / card.source / split, kinds)
        assert records
        assert all(record.captions or record.answers or record.label is not None for record in records)


@pytest.mark.slow
def test_the_shards_are_whole_and_held_out_pictures_are_no_training_data(shards: Path) -> None:
    assert check_prepared(shards) == []
    audit = audit_prepared([shards])
    assert audit.evaluated and audit.trained
    assert audit.leaks() == []


def test_they_are_written_once_and_the_same_each_time(shards: Path, tmp_path: Path) -> None:
    before = (shards / "vsr/zeroshot_test/manifest.json").stat().st_mtime_ns
    assert "made up" in _ensure(shards, "vsr")
    assert (shards / "vsr/zeroshot_test/manifest.json").stat().st_mtime_ns == before
    for name in ("vqav2", "msvd_qa", "ocr_vqa"):
        write_synthetic(load_card(name), tmp_path / name)
        files = {path.relative_to(tmp_path): path.read_bytes() for path in sorted((tmp_path / name).rglob("*.*"))}
        assert files == {path: (shards / "raw" / path).read_bytes() for path in files}
        assert len(files) > 6


def test_a_missing_split_is_prepared_again(tmp_path: Path) -> None:
    _ensure(tmp_path, "okvqa_question_generation")  # a view has its parent's files
    manifest = tmp_path / "okvqa/val/manifest.json"
    found = json.loads(manifest.read_text())
    manifest.unlink()
    _ensure(tmp_path, "okvqa")
    assert json.loads(manifest.read_text()) == found


def test_official_and_made_up_files_are_not_mixed(tmp_path: Path) -> None:
    card = load_card("okvqa")
    write_synthetic(card, tmp_path / "downloaded")
    bare = {
        name: dataclasses.replace(counts, images=None, records=None, records_by_kind={})
        for name, counts in card.splits.items()
    }
    prepare_dataset(
        dataclasses.replace(card, splits=bare), tmp_path / "downloaded", tmp_path / "shards", progress=False
    )
    with pytest.raises(UserError, match="holds okvqa from its official files; give made-up ones another"):
        _ensure(tmp_path / "shards", "okvqa")


@pytest.mark.parametrize("reader", WRITERS)
def test_a_card_of_a_known_format_under_another_name_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """One file among the official cards: nothing but the card says that there is such a dataset."""
    monkeypatch.setattr(cards, "CARDS_FOLDER", tmp_path)
    source = next((card for card in CARDS if card.reader == reader and card.view_of is None), _DETAIL)
    text = (CARDS_FOLDER / f"{source.name}.yaml").read_text().replace(f"name: {source.name}", "name: mine", 1)
    path = tmp_path / "mine.yaml"
    if reader != source.reader:
        text = text.replace(f"reader: {source.reader}", f"reader: {reader}").replace(", first_turn_only: false", "")
    path.write_text(text)
    ensure_synthetic([load_card(path)], tmp_path / "shards", Console(quiet=True))
    folders = sorted((tmp_path / "shards/mine").iterdir())
    assert sorted(source.splits) == [folder.name for folder in folders]
    assert all(read_manifest(folder)["lost"] == [] and read_manifest(folder)["images"] == SCENES for folder in folders)


def test_a_card_of_ones_own_has_none(tmp_path: Path) -> None:
    text = (CARDS_FOLDER / "vsr.yaml").read_text().replace("name: vsr", "name: mine", 1)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"mine.yaml is a card of your own, and only official files have made-up ones"):
        ensure_synthetic([load_card(tmp_path / "mine.yaml")], tmp_path / "shards", Console(quiet=True))
    assert not (tmp_path / "shards/mine").exists()


def test_no_two_datasets_have_a_picture_in_common() -> None:
    numbers = [first_number(name) for name in SOURCES]
    assert len(set(numbers)) == len(numbers)
    assert all(1000 <= number < 9_999_000 and number % 1000 == 0 for number in numbers)


def test_a_format_without_made_up_files_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(WRITERS, "vsr")
    with pytest.raises(UserError, match=r"vsr has no made-up files \(none of reader vsr\); leave out data=synthetic"):
        _ensure(tmp_path, "vsr")


def test_a_picture_shows_what_is_said_of_it() -> None:
    for scene in make_scenes(1, 20):
        picture, color = draw_scene(scene), COLORS[scene.color]
        width, height = picture.size
        columns = [x for x in range(width) for y in range(height) if picture.getpixel((x, y)) == color]
        assert SIDES[int(sum(columns) / len(columns) > width / 2)] == scene.side
        answers = dict(scene.asked("color", "count", "side"))
        assert list(answers.values()) == [scene.color, str(scene.count), "yes" if scene.side == "left" else "no"]
        assert scene.side in scene.statement(true=True) and scene.other_side in scene.statement(true=False)
        assert len(set(scene.captions(10))) == 10
