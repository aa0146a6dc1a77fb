"""Folders of classes and tars of others: what they give, and what in them is refused."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from instructblip.data.cards import Card
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.data.readers.base import FileSlice, MediaRecords
from instructblip.data.shards import open_split
from instructblip.errors import UserError
from tests.kit.own_tables import own_card, read_own, write_tar


def _picture(color: str = "red", form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, form)
    return buffer.getvalue()


def _read(raw: Path, shards: str = "*.tar", **more: Any) -> tuple[list[MediaRecords], dict[str, tuple[int, int]]]:
    return read_own(raw, {"shards": shards}, "webdataset", **{"task": "captioning"} | more)[:2]


def _content(media: Any) -> bytes:
    assert isinstance(media, FileSlice)
    return media.path.read_bytes()[media.offset : media.offset + media.size]


def test_the_samples_are_those_that_the_stock_library_reads(tmp_path: Path) -> None:
    """Keys with folders and dots behind them, extensions in upper case, samples in no order of names, two tars."""
    for tar in range(2):
        members: dict[str, bytes] = {"./__meta__": b"x"}
        for number in (3, 1, 2):
            members[f"part/{number:03d}.JPG"] = _picture(("red", "lime", "blue")[number - 1])
            members[f"part/{number:03d}.txt"] = f"caption {tar} {number}".encode()
            members[f"part/{number:03d}.emb.npy"] = b"\x93NUMPY"
        write_tar(tmp_path / f"{tar}.tar", members)
    stock = list(webdataset.WebDataset([str(tmp_path / f"{tar}.tar") for tar in range(2)], shardshuffle=False))
    media, lost = _read(tmp_path)
    assert lost == {}
    assert [item.media_id for item in media] == [f"{Path(s['__url__']).stem}/{s['__key__']}" for s in stock]
    assert [_content(item.media) for item in media] == [sample["jpg"] for sample in stock]
    assert [item.records[0].answers for item in media] == [(sample["txt"].decode(),) for sample in stock]


def test_json_gives_columns_and_members_may_be_numbered_pictures_or_a_video(tmp_path: Path) -> None:
    asked = {"q": "which?", "answer": "b", "id": "own", "image": "not a column: the picture is the member"}
    members = {
        "a.json": json.dumps(asked).encode(),
        "a.1.png": _picture("lime", "PNG"),
        "a.0.png": _picture("blue", "PNG"),
        "b.mp4": b"a video",
        "b.json": json.dumps(asked | {"id": None}).encode(),
        "c.jpg": _picture(),
        "c.mask.png": _picture("white", "PNG"),
        "c.json": json.dumps(asked | {"id": "c"}).encode(),
        "d.left.png": _picture(),
        "d.right.png": _picture(),
        "d.json": json.dumps(asked).encode(),
    }
    write_tar(tmp_path / "0.tar", members)
    media, lost = _read(tmp_path, task="vqa", question="q")
    assert [(item.records[0].id, item.video) for item in media] == [("own", False), ("0/b", True), ("c", False)]
    assert [_content(part) for part in media[0].media] == [members["a.0.png"], members["a.1.png"]]
    assert _content(media[2].media) == members["c.jpg"]
    assert lost == {"sample has several files for image": (1, 1)}


def test_captions_to_train_on_keep_the_url_of_their_picture(tmp_path: Path) -> None:
    urls = {"a": "https://a.org/x?y=1 ", "b": "ftp://b.org/x", "c": 7, "d": "two https://d.org words"}
    members = {}
    for name, url in urls.items():
        members[f"{name}.jpg"] = _picture()
        members[f"{name}.json"] = json.dumps({"caption": "a text", "url": url}).encode()
    write_tar(tmp_path / "0.tar", members)
    media, lost = _read(tmp_path)
    assert lost == {}
    assert [item.records[0].tags for item in media] == [{"url": "https://a.org/x?y=1"}, {}, {}, {}]
    assert {str(item.records[0].tags) for item in _read(tmp_path, split="val")[0]} == {"{}"}


def test_nothing_but_text_and_json_is_decoded_and_no_member_is_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:

        def add(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(content), kind, link
            tar.addfile(member, io.BytesIO(content))

        add("../out.jpg", _picture())
        add("/abs.jpg", _picture())
        add("link.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add("hard.jpg", kind=tarfile.LNKTYPE, link="../out.jpg")
        add("pipe.jpg", kind=tarfile.FIFOTYPE)
        add("a.jpg", _picture())
        add("a.jpg", _picture("lime"))
        add("a.pickle", b"cos\nsystem\n(S'false'\ntR.")
        add("a.txt", b"a caption")
        add("b.jpg", _picture())
        add("b.json", b"{")
        add("c.jpg", _picture())
        add("c.txt", b"\xff")
        add("d.txt", b"no picture")
        add("e.jpg", _picture())
    media, lost = _read(tmp_path)
    assert [(item.media_id, _content(item.media)) for item in media] == [("0/a", _picture())]
    assert lost == {
        "member name leads out of its folder": (2, 0),
        "member is no regular file": (3, 0),
        "member occurs twice in its sample": (1, 0),
        "not whole JSON (line 1: Expecting property name enclosed in double quotes)": (1, 1),
        "txt is not UTF-8": (1, 1),
        "image is missing": (1, 1),
        "caption is missing": (1, 1),
    }


def test_a_tar_that_is_not_whole_or_packed_is_one_line(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": _picture(), "a.txt": b"x" * 2000})
    content = (tmp_path / "0.tar").read_bytes()
    for broken, words in (
        (content[:1800], r"0\.tar is no whole tar \(it is cut short or damaged at byte 1,536\)"),
        (content[:3000], r"0\.tar is no whole tar \(unexpected end of data\)"),
        (content[:1536] + bytes(range(256)) * 2 + content[2048:], r"cut short or damaged at byte 1,536"),
        (b"<html>" * 200, r"0\.tar is no whole tar \("),
        (gzip.compress(content), r"0\.tar is packed with gzip; unpack it"),
    ):
        (tmp_path / "0.tar").write_bytes(broken)
        with pytest.raises(UserError, match=words):
            _read(tmp_path)
    with pytest.raises(UserError, match=r"lacks 1\.tar of \{0\.\.1\}\.tar; put it there"):
        _read(tmp_path, "{0..1}.tar")


def test_tars_without_the_column_that_the_task_needs_are_one_line(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": _picture(), "a.txt": b"text"})
    with pytest.raises(
        UserError, match=r"0\.tar has no column label, which task classification needs; the columns there are:"
    ):
        _read(tmp_path, task="classification")
    assert _read(tmp_path, task="classification", label="txt")[0][0].records[0].answers == ("text",)


def test_a_picture_that_is_damaged_is_named_by_its_member(tmp_path: Path) -> None:
    members = {"a.jpg": _picture(), "a.txt": b"a", "b.jpg": b"<html>", "b.txt": b"b"}
    write_tar(tmp_path / "0.tar", members)
    card = own_card(tmp_path, {"train": {"shards": "0.tar"}}, "webdataset", "captioning")
    (path,) = prepare_dataset(card, tmp_path, tmp_path / "out", progress=False)
    lost = json.loads(path.read_text())["lost"]
    assert lost == [{"reason": "file is not an image", "count": 1, "records": 1, "examples": ["0.tar: b.jpg"]}]
    assert open_split(tmp_path / "out/mine/train").read(0, 0)[0] == (members["a.jpg"],)


# --- folders ---------------------------------------------------------------------------------------------------------


def _folders(raw: Path, *names: str) -> Card:
    for name in names:
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_bytes(_picture(form="PNG" if name.lower().endswith("png") else "JPEG"))
    return own_card(raw, {"train": {"folder": "photos"}}, "folders", "classification")


def test_links_to_folders_of_classes_are_followed_and_hidden_files_left_alone(tmp_path: Path) -> None:
    systems = ("photos/hat/Thumbs.db", "photos/desktop.ini", "photos/__MACOSX/hat/._a.jpg", "photos/.DS_Store")
    card = _folders(tmp_path, *systems, "photos/hat/a.jpg", "photos/hat/.b.jpg", "photos/.git/c.jpg", "elsewhere/d.JPG")
    (tmp_path / "photos/scho\u0308n").symlink_to(tmp_path / "elsewhere")
    (path,) = prepare_dataset(card, tmp_path, tmp_path / "out", progress=False)
    assert json.loads(path.read_text())["lost"] == []
    shard = open_split(tmp_path / "out/mine/train").shards[0]
    records = [shard.read(row)[1][0] for row in range(len(shard))]
    assert [(record.id, record.answers) for record in records] == [("hat/a.jpg", ("hat",)), ("schön/d.JPG", ("schön",))]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), "lacks photos"),
        (("photos/a.jpg",), "must be a folder with a folder for each"),
        (("photos/.git/a.jpg",), "must be a folder with a folder for each"),
        (
            ("photos/test/hat/a.jpg", "photos/train/hat/b.jpg"),
            r"called test, train, which would be classes; .* in the card: splits: {test: {folder: photos/test}}",
        ),
    ],
)
def test_a_folder_without_classes_is_one_line(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        prepare_dataset(_folders(tmp_path, *names), tmp_path, tmp_path / "out", progress=False)


def test_one_class_alone_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepare_dataset(_folders(tmp_path, "photos/hat/a.jpg"), tmp_path, tmp_path / "out", progress=False)
    assert "split train has one class alone, hat: nothing can be told apart" in caplog.text
    caplog.clear()
    prepare_dataset(_folders(tmp_path, "photos/train/b.jpg"), tmp_path, tmp_path / "out", progress=False)
    assert caplog.text == "", "a class may be called train among others"


def test_ids_that_repeat_are_counted_by_prepare(tmp_path: Path) -> None:
    _folders(tmp_path, "a.jpg")
    (tmp_path / "a.csv").write_text("id,image,label\n1,a.jpg,x\n1,a.jpg,y\n2,a.jpg,z\n")
    card = own_card(tmp_path, {"train": {"records": "a.csv"}}, task="classification")
    (path,) = prepare_dataset(card, tmp_path, tmp_path / "out", progress=False)
    manifest = json.loads(path.read_text())
    lost = [(loss["reason"], loss["records"], loss["examples"]) for loss in manifest["lost"]]
    assert (manifest["records"], lost) == (2, [("record id occurs twice", 1, ["1"])])
