"""Samples that share a row compute what they compute alone, in every decoder-only family, and the rows are nearly full."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from instructblip.build import load_llm
from instructblip.model import llm as llm_module
from instructblip.model.instructblip import InstructBLIP
from instructblip.model.llm import LLM
from instructblip.model.packing import isolated, lay_out, pack_rows
from tests.families import SLIDING_WINDOW, llm_config, write_llm
from tests.tiny import tiny_encoder_decoder_llm, tiny_images, tiny_llm, tiny_model

# The tiny models are so narrow that attention in longer rows would cost more than it saves: rows are made as for a wide one.
WIDE = 4096
PROMPTS = [
    "what color is the shape? Short answer:",
    "red",
    "is there a circle in the image? Question: what color is the shape in the image? Short answer:",
    "is there a circle?",
    "blue green teal gray",
]
TARGETS = ["red", "a long answer with blue green teal gray", "no", "yes no", "teal"]
# Llama with rotary positions, Mistral whose every layer slides, Gemma 3 with local and global layers, OPT with learned
# positions, Qwen 3 and SmolLM2.
DECODERS = ["vicuna_7b", "mistral_7b", "gemma_3_4b", "opt_2_7b", "qwen3_8b", "smollm2_135m"]


@pytest.fixture(autouse=True)
def wide_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(lengths: Sequence[int], *, width: int) -> list[list[int]]:
        return pack_rows(lengths, width=WIDE)

    monkeypatch.setattr(llm_module, "pack_rows", rows)


def load(name: str, folder: Path) -> LLM:
    write_llm(name, folder)
    options = {"sliding_window": SLIDING_WINDOW} if name == "mistral_7b" else {}
    return load_llm(llm_config(name, folder, dtype="float32", options=options))


def step(
    model: InstructBLIP, images: Tensor, batches: Sequence[Sequence[int]], *, packed: bool
) -> tuple[float, dict[str, Tensor], list[Tensor]]:
    """Mean loss a token, its gradients, and each batch's losses a sample, of one step over micro-batches."""
    model.zero_grad()
    total, tokens, per_sample = 0.0, 0, []
    for rows in batches:
        loss = model(images[list(rows)], [PROMPTS[k] for k in rows], [TARGETS[k] for k in rows], packed=packed)
        loss.total.backward()
        total, tokens = total + loss.total.item(), tokens + int(loss.tokens_per_sample.sum())
        per_sample.append(loss.per_sample)
    gradients = {name: p.grad / tokens for name, p in model.named_parameters() if p.grad is not None}
    return total / tokens, gradients, per_sample


def differences(model: InstructBLIP, images: Tensor, batches: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Of packed batches from one sample a row: in the loss a token, relative, and in the gradients, of the largest entry."""
    alone, expected, _ = step(model, images, [[k] for k in range(len(PROMPTS))], packed=False)
    together, found, _ = step(model, images, batches, packed=True)
    assert found.keys() == expected.keys() and len(found) > 20
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    worst = max(float((found[name] - gradient).abs().max()) for name, gradient in expected.items())
    return abs(together - alone) / alone, worst / largest


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("name", DECODERS)
def test_packed_rows_compute_what_one_sample_a_row_computes(name: str, frames: int, tmp_path: Path) -> None:
    model, images = tiny_model(llm=load(name, tmp_path)), tiny_images(len(PROMPTS), frames=frames)
    rows = pack_rows([model.sample_length()(p, t, frames) for p, t in zip(PROMPTS, TARGETS, strict=True)], width=WIDE)
    assert len(rows) <= 2
    loss, gradient = differences(model, images, [range(len(PROMPTS))])
    assert loss < 1e-6
    assert gradient < 1e-5
