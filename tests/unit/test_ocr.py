"""OCR tokens made on the images: in the records, in the manifest, the same from any number of workers.

Most tests put a module `rapidocr` in the library's place, which "reads" the colours of an image; worker processes find it
as they would find the library. One test uses the library itself, where it is installed.
"""

import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw, ImageFont

from instructblip.data.cards import load_card
from instructblip.data.prepare import ocr as module
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.data.prepare.ocr import ocr_options, ocr_tokens
from instructblip.data.shards import open_split
from instructblip.errors import UserError
from tests.kit.raw_files import write_raw

INSTALLED = importlib.util.find_spec("rapidocr") is not None
FAKE = """
class Output:
    def __init__(self, txts):
        self.txts = txts


class RapidOCR:
    def __init__(self, params):
        assert params["EngineConfig.onnxruntime.intra_op_num_threads"] == 1
        self.threshold = params["Global.text_score"]

    def __call__(self, image):
        assert image.mode == "RGB"
        if image.getextrema()[0][0] > 250:  # all white
            return Output(None)
        return Output((f"size {image.width}x{image.height}", f"mark {image.getpixel((0, 0))[0]}"))
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for RapidOCR, version 9.9, and for onnxruntime, version 8.8."""
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "rapidocr.py").write_text(FAKE)
    for name, version in (("rapidocr", "9.9"), ("onnxruntime", "8.8")):
        (folder / f"{name}-{version}.dist-info").mkdir()
        (folder / f"{name}-{version}.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(folder))
    genuine = sys.modules.pop("rapidocr", None)
    module._recogniser.cache_clear()
    yield
    module._recogniser.cache_clear()
    del sys.modules["rapidocr"]
    if genuine is not None:
        sys.modules["rapidocr"] = genuine


def _prepare(name: str, raw: Path, out: Path, **options: Any) -> dict[str, Any]:
    (path,) = prepare_dataset(load_card(name), raw, out, **{"ocr": "rapidocr", "progress": False} | options)
    manifest: dict[str, Any] = json.loads(path.read_text())
    return manifest


def _tokens(folder: Path) -> dict[str, tuple[str, ...]]:
    split = open_split(folder)
    return {
        record.id: record.ocr_tokens
        for shard in split.shards
        for row in range(len(shard))
        for record in shard.read(row)[1]
    }


def _mark(path: Path) -> str:
    return str(Image.open(path).convert("RGB").getpixel((0, 0))[0])


@pytest.mark.usefixtures("library")
def test_every_record_of_an_image_has_the_tokens_found_in_it(tmp_path: Path) -> None:
    write_raw("ocr_vqa", tmp_path / "raw")
    Image.new("RGB", (20, 16), "white").save(tmp_path / "raw/images/000.jpg")
    manifest = _prepare("ocr_vqa", tmp_path / "raw", tmp_path / "out", splits=["train"])
    read = ("size", "20x16", "mark", _mark(tmp_path / "raw/images/0761183272.jpg"))
    assert _tokens(tmp_path / "out/ocr_vqa/train") == {
        "0761183272-0": read,
        "0761183272-1": read,
        "000-0": (),
        "000-1": (),
    }
    chosen = {"library": "rapidocr", "version": "9.9", "runtime": "onnxruntime 8.8", "threshold": 0.5}
    assert manifest["options"]["ocr"] == chosen


@pytest.mark.usefixtures("library")
def test_workers_and_a_second_run_give_the_same_bytes_and_no_ocr_other_ones(tmp_path: Path) -> None:
    write_raw("ocr_vqa", tmp_path / "raw")

    def shards(out: str, **options: Any) -> dict[str, bytes]:
        _prepare("ocr_vqa", tmp_path / "raw", tmp_path / out, splits=["train"], images_per_shard=1, **options)
        return {path.name: path.read_bytes() for path in (tmp_path / out / "ocr_vqa/train").iterdir()}

    one = shards("one")
    assert len(one) == 5
    assert shards("two", workers=2) == one
    assert shards("one") == one
    without = shards("one", ocr=None)
    assert without["shard-000000.tar"] != one["shard-000000.tar"]
    assert set(_tokens(tmp_path / "one/ocr_vqa/train").values()) == {()}


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("name", ["textcaps", "textvqa"])
def test_official_tokens_are_replaced_only_when_asked_and_their_files_may_then_be_missing(
    tmp_path: Path, name: str
) -> None:
    write_raw(name, tmp_path / "raw")
    official = _prepare(name, tmp_path / "raw", tmp_path / "out", splits=["val"], ocr=None)
    assert official["options"]["ocr"] is None
    before = _tokens(tmp_path / f"out/{name}/val")
    for path in (tmp_path / "raw").glob("TextVQA_Rosetta_OCR_*.json"):
        path.unlink()
    with pytest.raises(UserError, match=r"lacks TextVQA_Rosetta_OCR_v0\.2_val\.json"):
        _prepare(name, tmp_path / "raw", tmp_path / "out", splits=["val"], ocr=None)
    manifest = _prepare(name, tmp_path / "raw", tmp_path / "out", splits=["val"])
    after = _tokens(tmp_path / f"out/{name}/val")
    assert after.keys() == before.keys()
    assert all(tokens[:3] == ("size", "20x16", "mark") for tokens in after.values())
    assert not any(tokens[:1] == ("size",) for tokens in before.values())
    assert not [loss for loss in manifest["lost"] if "OCR" in loss["reason"]]


@pytest.mark.usefixtures("library")
def test_a_word_of_several_frames_is_one_token(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    write_raw("msvd_qa", tmp_path / "raw")
    _prepare("msvd_qa", tmp_path / "raw", tmp_path / "out", splits=["val"], frames=3)
    for tokens in _tokens(tmp_path / "out/msvd_qa/val").values():
        assert tokens[0] == "size"
        assert len(set(tokens)) == len(tokens)


def test_a_library_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise module.importlib.metadata.PackageNotFoundError(name)

    write_raw("ocr_vqa", tmp_path / "raw")
    monkeypatch.setattr(module.importlib.metadata, "version", missing)
    with pytest.raises(
        UserError, match=r"ocr=rapidocr needs rapidocr; install it with: pip install -r requirements-ocr"
    ):
        _prepare("ocr_vqa", tmp_path / "raw", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not INSTALLED, reason="RapidOCR is not installed: requirements-ocr.txt")
def test_rapidocr_reads_drawn_text() -> None:
    image = Image.new("RGB", (480, 240), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=40)
    draw.text((30, 30), "Moby Dick", fill="black", font=font)
    draw.text((30, 130), "Herman Melville", fill="navy", font=font)
    buffer, empty = io.BytesIO(), io.BytesIO()
    image.save(buffer, "PNG")
    Image.new("RGB", (60, 40), "gray").save(empty, "PNG")
    options = ocr_options("rapidocr")
    read = [ocr_tokens([buffer.getvalue()], options, "drawn") for _ in range(2)]
    assert read == [("Moby", "Dick", "Herman", "Melville")] * 2
    assert ocr_tokens([empty.getvalue()], options, "empty") == ()
