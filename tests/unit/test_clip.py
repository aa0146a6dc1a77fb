"""CLIP: transformers' numbers, and folders that are none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel

from instructblip.errors import UserError
from instructblip.weights.clip import find_clip, load_clip
from tests.kit.web import write_clip

TEXTS = ["is there a circle in the image?", "a", "what color is the shape? " * 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_features_are_those_of_transformers(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    stored = Path(shutil.copytree(folder, tmp_path / "clip"))
    weights = {name: tensor.to(dtype) for name, tensor in load_file(stored / "model.safetensors").items()}
    save_file(weights, stored / "model.safetensors", {"format": "pt"})
    (stored / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2] * 3})
    )
    clip = load_clip(find_clip(str(stored)), "cpu")
    pixels = torch.randint(0, 256, (4, 3, 28, 28), dtype=torch.uint8)
    normalised = (pixels / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / 0.2
    rows = AutoTokenizer.from_pretrained(stored)(
        TEXTS, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        theirs = CLIPModel.from_pretrained(stored, dtype=torch.float32).eval()(**rows, pixel_values=normalised)
    torch.testing.assert_close(clip.encode_images(pixels), theirs.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.encode_texts(TEXTS), theirs.text_embeds, atol=1e-5, rtol=0)


def test_texts_are_padded_and_cut_behind_whatever_the_folder_says(folder: Path, tmp_path: Path) -> None:
    """A processor that was used with other sides writes them into its tokenizer's files."""
    stored = Path(shutil.copytree(folder, tmp_path / "clip"))
    file = stored / "tokenizer_config.json"
    sides = {"padding_side": "left", "truncation_side": "left"}
    file.write_text(json.dumps(json.loads(file.read_text()) | sides))
    assert AutoTokenizer.from_pretrained(stored).padding_side == "left"
    found, expected = (load_clip(find_clip(str(place)), "cpu").encode_texts(TEXTS) for place in (stored, folder))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def without_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut_short(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def of_another_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "siglip"}')


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("harm", "line"),
    [
        (without_a_tensor, r"lacks the tensor visual_projection\.weight; it is of another model, or incomplete"),
        (cut_short, r"model\.safetensors is cut short"),
        (of_another_model, "is a model of type siglip, wanted is a CLIP"),
        (without_tokenizer, r"has no tokenizer"),
        (shutil.rmtree, "is no folder and no hub id"),
    ],
)
def test_a_broken_folder_is_one_line(folder: Path, tmp_path: Path, harm: Callable[[Path], None], line: str) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "clip"))
    harm(broken)
    with pytest.raises(UserError, match=line):
        load_clip(find_clip(str(broken)), "cpu")
