"""The same 200 examples in every form that people bring: the same records on the same pictures, nothing lost uncounted."""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from instructblip.data.cards import Card
from instructblip.data.prepare.convert import check_prepared, prepare_dataset
from instructblip.data.shards import open_split
from instructblip.errors import UserError
from tests.kit.own_tables import (
    RowOf,
    as_dialogue,
    as_messages,
    own_card,
    write_csv,
    write_jsonl,
    write_parquet,
    write_tar,
)

EXAMPLES, PICTURES = 200, 40
NAMES = tuple(
    ("straße/bild {}.JPG", "{}.png", "a b/c.d/{}.jpeg", "Ünïcode {}.webp")[number % 4].format(number)
    for number in range(PICTURES)
)
CLASSES = ("hat", "t-shirt", "Schürze")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures with folders, spaces, umlauts and four formats."""
    folder = tmp_path_factory.mktemp("own")
    for name in NAMES:
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20, 16), 80).convert("RGB").save(folder / "photos" / name)
    return folder


def _questions() -> list[RowOf]:
    """Two hundred questions about the pictures in no order, with all that a cell may hold."""
    stream = random.Random(0)
    asked = ['what is "this",\nand where?', "wie heißt es?", " spaces around ", "semicolon; tab\t, pipe|", "[1]?"]
    answers = ["yes", "3", "a, b", "0.5", "größer", '"quoted"']
    return [
        {
            "image": NAMES[stream.randrange(PICTURES)],
            "question": f"{number} {stream.choice(asked)}",
            "answer": stream.choice(answers),
        }
        for number in range(EXAMPLES)
    ]


def _prepare(card: Card, raw: Path, out: Path, **options: Any) -> dict[str, Any]:
    (path,) = prepare_dataset(card, raw, out, **{"images_per_shard": 16, "progress": False} | options)
    manifest: dict[str, Any] = json.loads(path.read_text())
    assert check_prepared(out) == []
    return manifest


def _contents(out: Path, ids: bool = True) -> list[tuple[str, list[dict[str, Any]]]]:
    """(hash of the stored picture, its records) in the order of the shards, or without ids in the order of the hashes."""
    split = open_split(out / "mine/train")
    found = []
    for shard in split.shards:
        for row in range(len(shard)):
            (picture,), records = shard.read(row)
            dicts = [record.to_dict() for record in records]
            found.append((hashlib.sha256(picture).hexdigest(), [d if ids else d | {"id": ""} for d in dicts]))
    return found if ids else sorted(found, key=lambda item: item[0])


def _files(out: Path) -> dict[str, bytes]:
    """The tars and indexes."""
    return {path.name: path.read_bytes() for path in sorted((out / "mine/train").glob("shard-*"))}


def _with_pictures(rows: Sequence[RowOf], raw: Path) -> list[RowOf]:
    return [row | {"image": {"bytes": (raw / "photos" / row["image"]).read_bytes(), "path": "a.jpg"}} for row in rows]


def _save_to_disk(path: Path, rows: Sequence[RowOf], raw: Path) -> None:
    """By Hugging Face's own library, which takes the pictures in, as a dictionary of splits."""
    import datasets

    paths = [row | {"image": str(raw / "photos" / row["image"])} for row in rows]
    data = datasets.Dataset.from_list(paths).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": data, "other": data.select([0])}).save_to_disk(
        path, num_shards={"train": 3, "other": 1}
    )


Write = Callable[[Path, list[RowOf], Path], Any]
# Form -> (how its file is written, whether it names pictures by their paths, what the card says of its columns).
FORMS: dict[str, tuple[str, Write, bool, dict[str, str]]] = {
    "jsonl": ("a.jsonl", lambda path, rows, _: write_jsonl(path, rows), True, {}),
    "json": ("a.json", lambda path, rows, _: path.write_text(json.dumps(rows)), True, {}),
    "csv": ("a.csv", lambda path, rows, _: write_csv(path, rows), True, {}),
    "semicolons": ("a.csv", lambda path, rows, _: write_csv(path, rows, ";"), True, {}),
    "tsv": ("a.tsv", lambda path, rows, _: write_csv(path, rows, "\t"), True, {}),
    "parquet": ("a.parquet", lambda path, rows, _: write_parquet(path, rows), True, {}),
    "llava": ("a.json", lambda path, rows, _: path.write_text(json.dumps([*map(as_dialogue, rows)])), True, {}),
    "messages": (
        "a.jsonl",
        lambda path, rows, _: write_jsonl(path, [*map(as_messages, rows)]),
        True,
        {"image": "images", "conversations": "messages"},
    ),
    "pictures in parquet": (
        "a.parquet",
        lambda path, rows, raw: write_parquet(path, _with_pictures(rows, raw)),
        False,
        {},
    ),
    "save_to_disk": ("hf", _save_to_disk, False, {}),
}


@pytest.fixture(scope="module")
def expected(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of the examples as JSON lines."""
    out = tmp_path_factory.mktemp("expected")
    write_jsonl(raw / "expected.jsonl", _questions())
    card = own_card(raw, {"train": {"records": "expected.jsonl", "images": "photos"}})
    manifest = _prepare(card, raw, out)
    assert (manifest["records_by_kind"], manifest["lost"]) == ({"question": EXAMPLES}, [])
    return out


def test_the_records_are_what_the_rows_say_in_the_order_of_first_rows(raw: Path, expected: Path) -> None:
    rows, by_image = _questions(), dict[str, list[dict[str, Any]]]()
    for number, row in enumerate(rows):
        record = {
            "id": str(number),
            "kind": "question",
            "question": row["question"].strip(),
            "answers": (row["answer"],),
        }
        by_image.setdefault(row["image"], []).append(record)
    found = _contents(expected)
    assert [records for _, records in found] == list(by_image.values())
    ids = [
        shard.read_encoded(row)[1] for shard in open_split(expected / "mine/train").shards for row in range(len(shard))
    ]
    assert [json.loads(text)["image_id"] for text in ids] == list(by_image)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_records(form: str, raw: Path, expected: Path, tmp_path: Path) -> None:
    """By four workers what one made of the first form, to the byte where pictures are the same files."""
    file, write, by_path, columns = FORMS[form]
    write(raw / file, _questions(), raw)
    card = own_card(tmp_path, {"train": {"records": file, "images": "photos"}}, columns=columns)
    manifest = _prepare(card, raw, tmp_path / "out", workers=4)
    assert (manifest["images"], manifest["records"], manifest["lost"]) == (len(_contents(expected)), EXAMPLES, [])
    assert _contents(tmp_path / "out") == _contents(expected)
    if by_path:
        assert _files(tmp_path / "out") == _files(expected)


# --- one label a picture: also as folders and as tars -----------------------------------------------------------------


def _labels() -> list[RowOf]:
    """A class for each picture."""
    stream = random.Random(1)
    return [{"image": name, "label": stream.choice(CLASSES)} for name in NAMES]


def _as_folders(raw: Path) -> dict[str, Any]:
    for row in _labels():
        path = raw / "classes" / row["label"] / row["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((raw / "photos" / row["image"]).read_bytes())
    return {"reader": "folders", "splits": {"train": {"folder": "classes"}}}


def _as_tars(raw: Path) -> dict[str, Any]:
    """As img2dataset writes: numbered samples in several tars, with members that nobody reads between them."""
    for tar in range(2):
        members = {}
        for number, row in list(enumerate(_labels()))[tar::2]:
            key, extension = f"{number:09d}", row["image"].rpartition(".")[2]
            members[f"{key}.cls"] = row["label"].encode()
            members[f"{key}.{extension}"] = (raw / "photos" / row["image"]).read_bytes()
            members[f"{key}.json"] = json.dumps({"url": "https://example.org/a.jpg", "status": "success"}).encode()
            members[f"{key}.pickle"] = b"cos\nsystem\n(S'false'\ntR."
        write_tar(raw / f"tars/{tar:05d}.tar", members)
    return {"reader": "webdataset", "splits": {"train": {"shards": "tars/{00000..00001}.tar"}}}


def _as_class_numbers(raw: Path) -> dict[str, Any]:
    """By Hugging Face's own library, which keeps names of classes beside their numbers."""
    import datasets

    features = datasets.Features({"image": datasets.Value("string"), "label": datasets.ClassLabel(names=list(CLASSES))})
    rows = [row | {"label": CLASSES.index(row["label"])} for row in _labels()]
    data = datasets.Dataset.from_list(rows, features=features)
    data.to_parquet(raw / "classes.parquet")
    return {"splits": {"train": {"records": "classes.parquet", "images": "photos"}}}


def _as_table(raw: Path) -> dict[str, Any]:
    write_csv(raw / "labels.csv", _labels())
    return {"splits": {"train": {"records": "labels.csv", "images": "photos"}}}


@pytest.mark.slow
@pytest.mark.parametrize("write", [_as_table, _as_class_numbers, _as_folders, _as_tars])
def test_classes_are_the_same_from_tables_folders_and_tars(
    write: Callable[[Path], dict[str, Any]], raw: Path, tmp_path: Path
) -> None:
    card = own_card(tmp_path, task="classification", **write(raw))
    manifest = _prepare(card, raw, tmp_path / "out")
    assert (manifest["records_by_kind"], manifest["lost"]) == ({"classification": PICTURES}, [])
    assert _prepare(card, raw, tmp_path / "by four", workers=4) == manifest
    assert _files(tmp_path / "by four") == _files(tmp_path / "out")
    wanted = _prepare(own_card(tmp_path, task="classification", **_as_table(raw)), raw, tmp_path / "wanted")
    assert wanted["records"] == PICTURES
    assert _contents(tmp_path / "out", ids=False) == _contents(tmp_path / "wanted", ids=False)
    assert {records[0]["answers"] for _, records in _contents(tmp_path / "out")} == {(name,) for name in CLASSES}


# --- what prepare promises of every dataset --------------------------------------------------------------------------


@pytest.mark.slow
def test_four_workers_write_the_bytes_of_one_where_pictures_stand_in_cells(raw: Path, tmp_path: Path) -> None:
    write_parquet(raw / "pictures.parquet", _with_pictures(_questions(), raw))
    card = own_card(tmp_path, {"train": {"records": "pictures.parquet"}})
    manifests = [
        _prepare(card, raw, tmp_path / f"{workers}", workers=workers, images_per_shard=4) for workers in (1, 4)
    ]
    assert manifests[0] == manifests[1]
    assert _files(tmp_path / "1") == _files(tmp_path / "4")
    assert len(_files(tmp_path / "1")) == 20
    for out in ("1", "4"):
        assert {path.name for path in (tmp_path / out).iterdir()} == {"mine", ".mine.lock"}


def test_a_second_run_keeps_the_shards_and_removes_what_a_killed_one_left(raw: Path, tmp_path: Path) -> None:
    write_parquet(raw / "pictures.parquet", _with_pictures(_questions(), raw))
    card = own_card(tmp_path, {"train": {"records": "pictures.parquet"}})
    _prepare(card, raw, tmp_path / "out")
    before = {path: path.stat().st_ino for path in (tmp_path / "out/mine/train").glob("shard-*")}
    (tmp_path / "out/.mine.scratch").mkdir()
    (tmp_path / "out/.mine.scratch/pictures_x").write_bytes(b"half")
    _prepare(card, raw, tmp_path / "out")
    assert {path: path.stat().st_ino for path in (tmp_path / "out/mine/train").glob("shard-*")} == before
    assert not (tmp_path / "out/.mine.scratch").exists()


def test_several_pictures_stand_together_in_a_shard_and_are_lost_together(raw: Path, tmp_path: Path) -> None:
    asked = {"question": "what differs?", "answer": "all"}
    (raw / "photos/broken.png").write_bytes(b"<html>")
    write_jsonl(
        raw / "several.jsonl", [asked | {"image": [NAMES[1], NAMES[0]]}, asked | {"image": [NAMES[1], "broken.png"]}]
    )
    card = own_card(tmp_path, {"train": {"records": "several.jsonl", "images": "photos"}})
    manifest = _prepare(card, raw, tmp_path / "out")
    assert (manifest["images"], manifest["frames"], manifest["records"]) == (1, 2, 1)
    assert [(loss["reason"], loss["records"], loss["examples"]) for loss in manifest["lost"]] == [
        ("file is not an image", 1, [f"photos/{NAMES[1]} + photos/broken.png"])
    ]
    shard = open_split(tmp_path / "out/mine/train").shards[0]
    assert shard.extensions == ["0.png", "1.jpg"]
    assert shard.read(0)[0] == tuple((raw / "photos" / name).read_bytes() for name in (NAMES[1], NAMES[0]))


@pytest.mark.parametrize("reader", ["records", "folders", "webdataset"])
def test_what_is_wrong_with_one_split_is_said_before_another_is_converted(
    reader: str, raw: Path, tmp_path: Path
) -> None:
    good = {"records": _as_table, "folders": _as_folders, "webdataset": _as_tars}[reader](raw)["splits"]["train"]
    write_csv(raw / "bad.csv", [{"image": NAMES[0], "class": "hat"}])
    write_tar(raw / "bad.tar", {"1.jpg": b"x"})
    ((role, _), *_) = good.items()
    bad = good | {role: {"records": "bad.csv", "folder": "photos/straße", "shards": "bad.tar"}[role]}
    card = own_card(tmp_path, {"train": good, "val": bad}, reader, "classification")
    with pytest.raises(UserError, match=r"has no column label|must be a folder with a folder for each class"):
        prepare_dataset(card, raw, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_broken_rows_and_missing_pictures_are_counted_with_their_places(form: str, raw: Path, tmp_path: Path) -> None:
    rows = _questions()
    gone, empty = rows[0]["image"], rows[1]["image"]
    folder = tmp_path / "raw"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"" if name == empty else (raw / "photos" / name).read_bytes())
    (folder / gone).unlink()
    path = folder / f"a.{form}"
    (write_csv if form == "csv" else write_jsonl)(path, [row for row in rows if "\n" not in row["question"]])
    lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    lines[21] = "x.png,a question, with too many, cells\n" if form == "csv" else '{"image": "x.p\n'
    path.write_text("".join(lines), encoding="utf-8")
    manifest = _prepare(own_card(folder, {"train": {"records": path.name}}), folder, tmp_path / "out")
    lost = {loss["reason"]: loss for loss in manifest["lost"]}
    reason = {"csv": "row has more cells than the table has columns", "jsonl": "line is not JSON"}[form]
    assert lost.keys() == {reason, "image file is missing", "image file is empty"}
    assert lost[reason]["examples"][0].startswith(f"a.{form} line 22")
    assert lost["image file is missing"]["examples"] == [f"a.{form} line {2 if form == 'csv' else 1}: {gone}"]
    assert manifest["records"] + sum(loss["records"] for loss in manifest["lost"]) == len(lines) - (form == "csv")
    kept = {record["id"] for _, records in _contents(tmp_path / "out") for record in records}
    number = 20 if form == "csv" else 21
    assert str(number) not in kept
    assert str(len(lines) - 1 - (form == "csv")) in kept, "rows after the broken one keep their numbers"
