"""`python -m instructblip.features`: the file equals the model's features, and mistakes are one line."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open

from instructblip.config.schema import FeaturesConfig
from instructblip.errors import UserError
from instructblip.features import rows as command
from instructblip.features.rows import FeatureFile, features, find_pictures
from instructblip.models.blip import BLIPRetrieval
from instructblip.models.blip2 import BLIP2
from tests.kit.blip import tiny_retrieval
from tests.kit.stage1 import tiny_stage1

TEXTS = ["a dog", "two small cats on the grass", "a\u2028bus"]


@pytest.fixture(scope="module", params=[tiny_stage1, tiny_retrieval], ids=["blip2", "blip"])
def model(request: pytest.FixtureRequest) -> BLIP2 | BLIPRetrieval:
    return request.param().eval()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "my photos"
    for number, name in enumerate(("b.PNG", "a ü.jpg", "deep/er/c.webp", "d.png")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + number, 30), (60 * number, 200, 40 * number)).save(path)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(autouse=True)
def loaded(model: BLIP2 | BLIPRetrieval, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading is tested elsewhere: every checkpoint is the tiny model."""

    class Found:
        skills = BLIP2.SKILLS

    class Loaded:
        pass

    Loaded.model = model  # type: ignore[attr-defined]
    monkeypatch.setattr(command, "find_source", lambda checkpoint: Found)
    monkeypatch.setattr(command, "load_model", lambda source, **options: Loaded)


def run(**keys: object) -> None:
    features(FeaturesConfig(checkpoint="run", **keys), Console(quiet=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_rows_are_the_models_features_in_the_order_of_the_paths(
    model: BLIP2 | BLIPRetrieval, pictures: Path, tmp_path: Path, batch_size: int
) -> None:
    (tmp_path / "texts.txt").write_text("\ufeff" + "\n\n".join(TEXTS) + "\n", encoding="utf-8")
    out = tmp_path / "new/features.safetensors"
    run(images=str(pictures), texts=str(tmp_path / "texts.txt"), out=str(out), batch_size=batch_size)
    names = ["a ü.jpg", "b.PNG", "d.png", "deep/er/c.webp"]
    expected = model.features([Image.open(pictures / name) for name in names])
    with safe_open(str(out), framework="pt") as file:
        metadata = file.metadata()
        assert json.loads(metadata["images"]) == names
        assert json.loads(metadata["texts"]) == TEXTS
        torch.testing.assert_close(file.get_tensor("image"), expected.image, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(file.get_tensor("image_projected"), expected.image_projected, atol=1e-5, rtol=1e-5)
        words = model.features(texts=TEXTS).text_projected
        torch.testing.assert_close(file.get_tensor("text_projected"), words, atol=1e-5, rtol=1e-5)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_damaged_pictures_stop_it_or_are_left_out_and_named(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "c.jpg").write_bytes(b"no picture")
    out = tmp_path / "features.safetensors"
    with pytest.raises(UserError, match=r"c\.jpg.*tolerance=1"):
        run(images=str(pictures), out=str(out))
    assert list(tmp_path.iterdir()) == [pictures]
    config = FeaturesConfig(checkpoint="run", images=str(pictures), out=str(out), tolerance=1)
    features(config, Console())
    assert "left out:" in (said := capsys.readouterr().out)
    assert "4 pictures" in said
    with safe_open(str(out), framework="pt") as file:
        assert len(json.loads(file.metadata()["images"])) == len(file.get_tensor("image")) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_keeps_the_type_of_its_rows(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = torch.randn(5, 2, 3).to(dtype)
    with FeatureFile(tmp_path / "f.safetensors") as file:
        file.append({"a": rows[:2], "b": rows[:1]})
        file.append({"a": rows[2:]})
        file.finish({})
    with safe_open(str(tmp_path / "f.safetensors"), framework="pt") as opened:
        assert torch.equal(opened.get_tensor("a"), rows)
        assert torch.equal(opened.get_tensor("b"), rows[:1])


def test_mistakes_are_one_line(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="images= and texts= are both missing"):
        run()
    with pytest.raises(UserError, match="is no folder"):
        run(images=str(tmp_path / "none"))
    with pytest.raises(UserError, match="has no text in it"):
        run(texts=str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        run(texts=str(pictures / "d.png"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="has no pictures in it"):
        find_pictures(tmp_path / "bare")
