"""The page of samples shows what a model gets: squashed frames, rendered instructions, escaped, from one file alone."""

import base64
import dataclasses
import hashlib
import io
import json
import re
from html import unescape
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from instructblip.config.schema import PrepareConfig
from instructblip.data.cards import Card, load_card
from instructblip.data.prepare import show
from instructblip.data.prepare.command import prepare
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.data.prepare.show import write_samples
from instructblip.data.records import Record
from instructblip.data.shards import ShardWriter, shard_path
from instructblip.errors import UserError
from tests.kit.own_data import write_own_data


def _png(size: tuple[int, int], color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def _write(folder: Path, split: str, records: list[Record], frames: dict[str, bytes]) -> None:
    path = shard_path(folder / "tiny" / split, 0)
    with ShardWriter.open(path) as writer:
        for number, record in enumerate(records):
            writer.add(f"k{number}", frames, f"{number}", [record])
    kinds = {record.kind: sum(other.kind == record.kind for other in records) for record in records}
    shards = [{"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}]
    manifest = {"format": 1, "dataset": "tiny", "split": split, "shards": shards, "images": len(records)}
    (path.parent / "manifest.json").write_text(json.dumps(manifest | {"records_by_kind": kinds}))


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[Card]:
    """A held-in dataset and a held-out view of it."""
    tiny = dataclasses.replace(load_card("easy_vqa"), name="tiny", kinds=("question",), templates="bare")
    view = dataclasses.replace(load_card("easy_vqa_statements"), name="tiny_view", view_of="tiny", kinds=("statement",))
    monkeypatch.setattr(show, "all_cards", lambda: [tiny, view])
    return [tiny, view]


def _texts(page: str, name: str) -> list[str]:
    return [unescape(text) for text in re.findall(rf'<dd class="{name}">(.*?)</dd>', page, re.DOTALL)]


def _pictures(page: str) -> list[Image.Image]:
    found = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


QUESTION = Record("1", "question", "<b>red</b> & 'green'?", answers=('"<script>alert(1)</script>"',))


def test_training_is_shown_as_rendered_and_escaped(tmp_path: Path, cards: list[Card]) -> None:
    _write(tmp_path, "train", [QUESTION], {"png": _png((40, 20), "red")})
    path = write_samples(tmp_path, samples=5, seed=0, image_size=16)
    page = path.read_text()
    assert path == tmp_path / "samples.html"
    assert _texts(page, "instruction") == ["<b>red</b> & 'green'?"]
    assert _texts(page, "target") == ['"<script>alert(1)</script>"']
    assert _texts(page, "id") == ["tiny/1 (40 x 20)"]
    assert "<script" not in page and "<b>red" not in page
    assert [picture.size for picture in _pictures(page)] == [(16, 16)]
    assert "1 of 1 records (question), 1 images; templates bare" in page


@pytest.mark.slow
def test_a_page_names_what_was_lost_and_the_pictures_of_records_that_have_numbers(tmp_path: Path) -> None:
    card = write_own_data(tmp_path, 2)
    rows = (tmp_path / "train.jsonl").read_text()
    gone = json.dumps({"image": "<b>.png", "question": "what?", "answer": "red"})
    (tmp_path / "train.jsonl").write_text(f"{rows}{gone}\n{{broken\n")
    prepare_dataset(load_card(card), tmp_path, tmp_path / "shards", progress=False)
    page = write_samples(tmp_path / "shards", samples=5, seed=0, image_size=8, own=[load_card(card)]).read_text()
    assert [unescape(text) for text in re.findall(r'<li class="lost">(.*?)</li>', page)] == [
        "1 x image file is missing: train.jsonl line 3: <b>.png",
        "1 x line is not JSON: train.jsonl line 4",
    ]
    assert _texts(page, "id") == ["mine/0 (40 x 30)", "mine/1 (40 x 31)"] * 2
    assert _texts(page, "file") == [f"{split} {number}.png" for split in ("train", "val") for number in (0, 1)]


def test_the_page_fetches_nothing(tmp_path: Path, cards: list[Card]) -> None:
    _write(tmp_path, "train", [QUESTION], {"png": _png((4, 4), "red")})
    page = write_samples(tmp_path, samples=1, seed=0, image_size=8).read_text()
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'" in unescape(page)
    assert re.findall(r"https?://|url\(|<link|<script", page) == []


def test_evaluation_is_shown_as_asked_with_what_counts_as_right(tmp_path: Path, cards: list[Card]) -> None:
    records = [
        Record("1", "question", "red?", answers=("no", "never"), answer_weights=(7.0, 3.0)),
        Record("2", "question", "hidden?"),
        Record("3", "statement", "It is red.", answers=("true",), label=1),
    ]
    _write(tmp_path, "test", records, {"png": _png((4, 4), "red")})
    page = write_samples(tmp_path, samples=5, seed=0, image_size=8).read_text()
    assert _texts(page, "instruction") == [
        "red?",
        "hidden?",
        'Based on the image, is this statement true or false? "It is red." Answer:',
    ]
    assert [text.replace('<span class="none">', "") for text in _texts(page, "target")] == [
        "no | never",
        "none: not public</span>",
        "true",
    ]
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["tiny, test", "tiny_view, test"]


def test_a_question_that_a_card_cleans_is_shown_cleaned(tmp_path: Path, cards: list[Card]) -> None:
    rules, blip = cards[1].evaluation, load_card("vqav2_blip").evaluation
    assert rules is not None and blip is not None
    asked = dataclasses.replace(rules, prompt=blip.prompt, text_processor=blip.text_processor)
    match = dataclasses.replace(rules, mode="match", verbalizers={})
    for evaluation, shown in ((asked, "is this really red?"), (match, "Is THIS (really) red?")):
        card = dataclasses.replace(cards[1], evaluation=evaluation)
        show.all_cards = [card].copy  # the fixture puts it back
        statement = Record("1", "statement", "Is THIS (really) red?", answers=("true",), label=1)
        _write(tmp_path, rules.split, [statement], {"png": _png((40, 20), "red")})
        page = write_samples(tmp_path, samples=5, seed=0, image_size=16).read_text()
        assert _texts(page, "instruction") == [blip.prompt.format(question=shown) if evaluation is asked else shown]


def test_what_is_only_trained_on_is_shown_of_the_train_split_only(tmp_path: Path, cards: list[Card]) -> None:
    cards[0] = dataclasses.replace(cards[0], evaluation=None)
    show.all_cards = lambda: cards[:1]  # the fixture puts it back
    for split in ("test", "train"):
        _write(tmp_path, split, [QUESTION], {"png": _png((4, 4), "red")})
    page = write_samples(tmp_path, samples=5, seed=0, image_size=8).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["tiny, train"]


def test_a_video_is_shown_frame_by_frame(tmp_path: Path, cards: list[Card]) -> None:
    frames = {f"{number}.png": _png((6, 4), color) for number, color in enumerate(("red", "lime", "blue"))}
    _write(tmp_path, "train", [QUESTION], frames)
    page = write_samples(tmp_path, samples=1, seed=0, image_size=8).read_text()
    shades = [max(range(3), key=lambda band: picture.getpixel((4, 4))[band]) for picture in _pictures(page)]
    assert shades == [0, 1, 2]
    assert _texts(page, "id") == ["tiny/1 (6 x 4, 3 frames)"]


def test_the_seed_decides_which_samples(tmp_path: Path, cards: list[Card]) -> None:
    records = [Record(str(number), "question", f"{number}?", answers=("yes",)) for number in range(50)]
    _write(tmp_path, "train", records, {"png": _png((4, 4), "red")})

    def ids(seed: int) -> list[str]:
        return _texts(write_samples(tmp_path, samples=6, seed=seed, image_size=4).read_text(), "id")

    assert ids(1) == ids(1) != ids(2)
    assert len(set(ids(1))) == 6


def test_dataset_and_split_choose_and_nothing_left_is_one_line(tmp_path: Path, cards: list[Card]) -> None:
    with pytest.raises(UserError, match="no prepared samples of any dataset below"):
        write_samples(tmp_path, samples=1, seed=0, image_size=8)
    statement = Record("3", "statement", "It is red.", answers=("true",), label=1)
    for split in ("train", "test"):
        _write(tmp_path, split, [QUESTION, statement], {"png": _png((4, 4), "red")})
    for dataset, split, titles in (
        ("tiny", None, ["tiny, test", "tiny, train"]),
        ("tiny_view", "test", ["tiny_view, test"]),
        (None, "train", ["tiny, train", "tiny_view, train"]),
    ):
        path = write_samples(tmp_path, samples=1, seed=0, image_size=8, dataset=dataset, split=split)
        assert re.findall(r"<h2>(.*?)</h2>", path.read_text()) == titles
    with pytest.raises(UserError, match="no prepared samples of tiny and dev below"):
        write_samples(tmp_path, samples=1, seed=0, image_size=8, dataset="tiny", split="dev")
    with pytest.raises(UserError, match="must be 1 or more"):
        write_samples(tmp_path, samples=0, seed=0, image_size=8)


def test_the_command_names_the_page(tmp_path: Path, cards: list[Card]) -> None:
    _write(tmp_path, "train", [QUESTION], {"png": _png((4, 4), "red")})
    console = Console(file=io.StringIO(), width=300)
    assert prepare(PrepareConfig(show=str(tmp_path)), console) == 0
    assert console.file.getvalue() == f"wrote {tmp_path / 'samples.html'}\n"
