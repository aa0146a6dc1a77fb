"""Frozen weights are mapped: their files are read once on a machine, whatever the number of ranks."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from instructblip.config.schema import SourcesConfig, VisionConfig
from instructblip.distributed import Ranks
from instructblip.weights.language_model import load_language_model
from instructblip.weights.parts import load_vision
from tests.kit.ranks import on_ranks

WIDTHS = {"embed_dim": 128, "depth": 4, "num_heads": 4}


class Held(NamedTuple):
    """Of a file's weights in this process, bytes: read through calls, resident, and this process's share of those."""

    read: int
    resident: int
    share: int


def write_vision(folder: Path, dtype: torch.dtype) -> Path:
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **WIDTHS)
    save_file(backbone.to(dtype).state_dict(), str(folder / "model.safetensors"))
    return folder / "model.safetensors"


def open_vision(folder: Path) -> nn.Module:
    sources = SourcesConfig(path=str(folder / "model.safetensors"))
    config = VisionConfig(
        name="own", backbone="vit_tiny_patch16_224", image_size=32, mean=[127.0] * 3, std=[128.0] * 3, options=WIDTHS
    )
    config.sources = sources
    return load_vision(config).backbone


def write_llm(folder: Path, dtype: torch.dtype) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=2000, tie_word_embeddings=False, **sizes)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder / "model.safetensors"


def open_llm(folder: Path) -> nn.Module:
    model: nn.Module = load_language_model(
        "decoder", AutoConfig.from_pretrained(folder), dtype=torch.float32, folder=folder
    )
    return model


PARTS = {"vision": (write_vision, open_vision), "llm": (write_llm, open_llm)}


def held(ranks: Ranks, part: str, folder: Path) -> Held:
    """What a rank that has loaded a part, and used all its weights, holds of the part's file."""
    before = bytes_read()
    model = PARTS[part][1](folder)
    read = bytes_read() - before
    assert sum(float(tensor.abs().sum()) for tensor in model.parameters()) > 0
    ranks.gather(None)  # the other has used them too
    resident, share = mapped(folder / "model.safetensors")
    ranks.gather(None)  # and still holds them
    return Held(read, resident, share)


def bytes_read() -> int:
    """By this process through calls that read, not through mappings."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def mapped(file: Path) -> tuple[int, int]:
    """Bytes of a file that are in this process's memory, and its share of them: half where two processes have them."""
    sums, inside = {"Rss:": 0, "Pss:": 0}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if "-" in key:  # the first line of a mapping; its last field is a path
            inside = values[-1] == str(file)
        elif inside and key in sums:
            sums[key] += int(values[0]) * 1024
    return sums["Rss:"], sums["Pss:"]


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_two_ranks_share_the_weights_of_a_frozen_part(part: str, tmp_path: Path) -> None:
    size = PARTS[part][0](tmp_path, torch.float32).stat().st_size
    assert size > 2_000_000
    for found in on_ranks(2, held, part, tmp_path):
        assert found.read < size / 2  # most of it libraries
        assert found.resident > 0.95 * size
        assert found.share < 0.6 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_mapped_weights_are_the_files_and_training_them_leaves_it_alone(dtype: torch.dtype, tmp_path: Path) -> None:
    file = write_vision(tmp_path, dtype)
    content = file.read_bytes()
    model: Any = open_vision(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **WIDTHS).to(dtype)
    with torch.no_grad():
        kept = model.blocks[0].attn.qkv.weight.clone()
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert file.read_bytes() == content
    assert expected.blocks[0].attn.qkv.weight.shape == kept.shape
    assert torch.equal(open_vision(tmp_path).blocks[0].attn.qkv.weight, kept)
