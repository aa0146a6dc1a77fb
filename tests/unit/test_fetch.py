"""prepare.py fetch=true: what a card lets be downloaded comes to the raw folder whole, once, for the splits asked for."""

import dataclasses
import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from instructblip.config.schema import PrepareConfig
from instructblip.data.cards import CARDS_FOLDER, Card, Download, all_cards, load_card
from instructblip.data.prepare import fetch as module
from instructblip.data.prepare.command import prepare
from instructblip.data.prepare.convert import check_prepared
from instructblip.data.prepare.fetch import WORK_FOLDER, fetch_raw
from instructblip.errors import UserError
from instructblip.files import read_json
from tests.kit.raw_files import write_raw
from tests.kit.servers import FileServer, file_server

ARCHIVES = {  # name on the server -> what of a raw folder of VQA 2.0 it holds
    "questions_train.zip": "v2_OpenEnded_mscoco_train2014_questions.json",
    "annotations_train.zip": "v2_mscoco_train2014_annotations.json",
    "questions_val.zip": "v2_OpenEnded_mscoco_val2014_questions.json",
    "annotations_val.zip": "v2_mscoco_val2014_annotations.json",
    "train2014.zip": "train2014",
    "val2017.tar.gz": "val2017",
    "val2014.zip": "val2014",
}


def _pack(source: Path, name: str, kind: str) -> bytes:
    """A zip of a file or folder; or a compressed tar, in which it lies below a folder, as in those of GitHub."""
    buffer = io.BytesIO()
    if kind.endswith(".gz"):
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            tar.add(source / name, f"vqa-main/{name}")
        return buffer.getvalue()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in [source / name, *sorted((source / name).rglob("*"))]:
            if path.is_file():
                archive.write(path, path.relative_to(source))
    return buffer.getvalue()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """The official files of a tiny VQA 2.0; `official/` is what a person would have unpacked."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write_raw("vqav2", tmp_path / "official")
    with file_server() as running:
        for name, content in ARCHIVES.items():
            running.files[f"/{name}"] = _pack(tmp_path / "official", content, name)
        running.files["/note.txt"] = b"a note"
        yield running


def _downloads(server: FileServer) -> list[Download]:
    archives = [
        Download(f"{server.url}/{name}", (gives,), unpack=".", splits=("val" if "_val" in name else "train",))
        for name, gives in ARCHIVES.items()
        if name not in ("val2017.tar.gz", "val2014.zip")
    ]
    images = [
        Download(f"{server.url}/val2017.tar.gz", ("val2017",), unpack=".", below="vqa-main"),
        Download(f"{server.url}/val2014.zip", ("val2014",), unpack=".", splits=("val",)),
    ]
    return [*archives, *images, Download(f"{server.url}/note.txt", ("notes/note.txt",))]


@pytest.fixture
def card(server: FileServer) -> Card:
    splits = {name: load_card("vqav2").splits[name] for name in ("train", "val")}
    splits = {name: dataclasses.replace(c, images=None, records=None, records_by_kind={}) for name, c in splits.items()}
    return dataclasses.replace(load_card("vqav2"), splits=splits, fetch=tuple(_downloads(server)))


def _fetch(card: Card, raw: Path, splits: list[str] | None = None) -> str:
    console = Console(file=io.StringIO(), width=300)
    fetch_raw(card, raw, console, splits=splits or [])
    text: str = console.file.getvalue()
    return text


def _files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and WORK_FOLDER not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _wanted(official: Path, *names: str) -> dict[str, bytes]:
    files = {name: content for name, content in _files(official).items() if name.partition("/")[0] in names}
    return {**files, "notes/note.txt": b"a note"}


def test_all_files_of_all_splits_come_once(card: Card, server: FileServer, tmp_path: Path) -> None:
    text = _fetch(card, tmp_path / "raw")
    assert _files(tmp_path / "raw") == _wanted(tmp_path / "official", *ARCHIVES.values())
    assert "licence CC BY 4.0 (questions and answers); images under the terms of Flickr" in text
    assert text.count("fetched ") == 8
    assert [path.name for path in (tmp_path / "raw" / WORK_FOLDER).iterdir()] == ["lock"]
    server.requests.clear()
    assert _fetch(card, tmp_path / "raw").count(": there already") == 8
    assert server.requests == []


def test_only_what_a_split_needs_comes_and_what_is_there_stays(card: Card, server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "raw/val2014").mkdir(parents=True)
    (tmp_path / "raw/val2014/own.jpg").write_bytes(b"mine")
    text = _fetch(card, tmp_path / "raw", ["val"])
    assert "val2014: there already" in text
    names = ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json", "val2017")
    assert _files(tmp_path / "raw") == _wanted(tmp_path / "official", *names) | {"val2014/own.jpg": b"mine"}
    with pytest.raises(UserError, match="vqav2 has no split 'valid'; choose among train, val"):
        _fetch(card, tmp_path / "raw", ["valid"])


def test_unpacking_that_was_broken_off_is_done_again_without_another_download(
    card: Card, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = dataclasses.replace(card, fetch=tuple(item for item in card.fetch if item.gives == ("val2014",)))

    def killed(archive: Path, folder: Path, **options: object) -> None:
        (folder / "val2014").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "unpack", killed)
        with pytest.raises(KeyboardInterrupt):
            _fetch(card, tmp_path / "raw")
    assert "fetched val2014" in _fetch(card, tmp_path / "raw")
    assert len(server.requests) == 1
    assert len(_files(tmp_path / "raw")) == 1


def test_a_bad_archive_names_the_way_by_hand_and_is_fetched_anew(
    card: Card, server: FileServer, tmp_path: Path
) -> None:
    good, name = server.files["/val2014.zip"], "/val2014.zip"
    card = dataclasses.replace(card, fetch=tuple(item for item in card.fetch if item.gives == ("val2014",)))
    for content, words in (
        (b"<html>moved</html>", "is neither a zip nor a tar archive"),
        (_pack(tmp_path / "official", "train2014", ".zip"), "val2014.zip holds no val2014"),
        (good[:-40], "is neither a zip nor a tar archive"),
    ):
        server.files[name] = content
        with pytest.raises(UserError, match=r"or get it yourself: raw= holds the unpacked question") as caught:
            _fetch(card, tmp_path / "raw")
        assert words in str(caught.value)
        assert f"(from {server.url}{name})" in str(caught.value)
    server.files[name] = good
    assert "fetched val2014" in _fetch(card, tmp_path / "raw")
    assert (tmp_path / "raw/val2014/COCO_val2014_000000000042.jpg").is_file()


def test_a_file_that_is_gone_names_the_way_by_hand(card: Card, server: FileServer, tmp_path: Path) -> None:
    del server.files["/questions_train.zip"]
    with pytest.raises(
        UserError, match=r"questions_train\.zip cannot be fetched \(HTTP 404 .*; or get it yourself: raw="
    ):
        _fetch(card, tmp_path / "raw")


@pytest.mark.parametrize("name", ["hateful_memes", "flickr30k", "ivqa"])
def test_what_may_not_be_fetched_says_why_and_how_else(name: str, tmp_path: Path) -> None:
    card = load_card(name)
    with pytest.raises(UserError) as caught:
        prepare(PrepareConfig(dataset=name, fetch=True, raw=str(tmp_path)), Console(file=io.StringIO()))
    assert f"{name} is not fetched: {card.not_fetched}; get it yourself: {card.how_to_get[:20]}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_command_fetches_and_converts(
    card: Card, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (CARDS_FOLDER / "vqav2.yaml").read_text()
    values = yaml.safe_load(text)
    values["splits"] = {name: {**values["splits"][name], "images": None, "records": None} for name in ("train", "val")}
    for counts in values["splits"].values():
        del counts["records_by_kind"]
    values["fetch"] = [
        {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(item).items()}
        for item in _downloads(server)
    ]
    values["name"] = "my_vqa"  # that of an official card is not taken for one of one's own
    (tmp_path / "my_vqa.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    console = Console(file=io.StringIO(), width=300)
    config = PrepareConfig(dataset=str(tmp_path / "my_vqa.yaml"), fetch=True, out="shards", split="val")
    assert prepare(config, console) == 0
    assert (tmp_path / "data/raw/my_vqa/val2014").is_dir()
    assert not (tmp_path / "data/raw/my_vqa/train2014").exists()
    assert check_prepared(tmp_path / "shards/my_vqa") == []
    assert read_json(tmp_path / "shards/my_vqa/val/manifest.json")["records"] == 1


def test_every_card_says_how_its_files_come_and_downloads_give_what_readers_look_for() -> None:
    cards = [card for card in all_cards() if card.view_of is None]
    assert sum(bool(card.fetch) for card in cards) >= 14
    for card in cards:
        for item in card.fetch:
            for split in item.splits or card.splits:
                places = {place for found in card.splits[split].files.values() for place in found}
                wanted = [gives for gives in item.gives if any(_leads_to(gives, place) for place in places)]
                assert wanted, (card.name, item.url, split)
        for split, counts in card.splits.items() if card.fetch else ():
            given = [g for item in card.fetch if not item.splits or split in item.splits for g in item.gives]
            for role, places in counts.files.items():
                assert any(_leads_to(gives, place) for gives in given for place in places), (card.name, split, role)


def _leads_to(gives: str, place: str) -> bool:
    """Whether a place of the card is what a download gives, or lies in it."""
    return place == gives or place.startswith(f"{gives}/")
