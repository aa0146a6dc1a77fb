"""CLIP: transformers' numbers, and folders that are none."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

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


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 61.0, 62.0]},
        {"rescale_factor": 1 / 127.5},
        {"size": 28, "do_pad": True},
    ],
)
def test_pixels_are_those_of_the_folders_own_image_processor(
    folder: Path, tmp_path: Path, said: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    stored = Path(shutil.copytree(folder, tmp_path / "clip"))
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(stored)
    file = stored / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    picture = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
    pixels = CLIPImageProcessor.from_pretrained(stored)(picture, return_tensors="pt")["pixel_values"].float()
    clip = load_clip(find_clip(str(stored)), "cpu")
    torch.testing.assert_close((picture - clip.mean) / clip.std, pixels[0], atol=1e-5, rtol=1e-5)
    assert not caplog.records


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"size": {"shortest_edge": 32}}, r"resizes to \{'shortest_edge': 32\} before it cuts the middle out"),
        ({"do_center_crop": False}, "does not cut the middle out, this code cuts the middle out of a picture"),
        ({"size": {"height": 28, "width": 28}}, "squashes a picture to a square, this code cuts the middle out"),
        ({"resample": 2}, "resizes by Pillow's filter 2"),
    ],
)
def test_another_way_of_fitting_is_said(
    folder: Path, tmp_path: Path, said: dict[str, Any], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    stored = Path(shutil.copytree(folder, tmp_path / "clip"))
    CLIPImageProcessor(**({"size": {"shortest_edge": 28}, "crop_size": 28} | said)).save_pretrained(stored)
    load_clip(find_clip(str(stored)), "cpu")
    assert re.search(line, caplog.text)


def test_an_image_processor_of_another_size_is_refused(folder: Path, tmp_path: Path) -> None:
    stored = Path(shutil.copytree(folder, tmp_path / "clip"))
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=32).save_pretrained(stored)
    with pytest.raises(UserError, match=r"gives images of .*32.*, the vision part takes 28 pixels"):
        load_clip(find_clip(str(stored)), "cpu")


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
