"""Connectors that are no Q-Former: what they compute, that only they train, and that no batching changes a result."""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from instructblip.config.schema import ConnectorConfig, ConnectorKind
from instructblip.errors import UserError
from instructblip.models.connector import Patches, Resampler, rectangles
from instructblip.models.llava import LLaVA
from instructblip.training.optim import make_adamw
from instructblip.weights.modules import make_connector
from tests.kit.connectors import KINDS, SIZES, tiny_clip, tiny_connector_model
from tests.kit.losses import term_of
from tests.kit.tiny import tiny_encoder_decoder_llm, tiny_images, tiny_vision

PROMPTS = ["what color is the shape?", "Q: is there a red circle in the image? A:", "shape", ""]
TARGETS = ["red", "yes, there is a red circle", "a long answer", "no"]


# --- what they compute -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_resampler_is_that_of_idefics() -> None:
    """transformers' class on the same weights, whose media are as wide as its latents."""
    torch.manual_seed(0)
    vision = tiny_clip()
    own = Resampler(Patches(vision), vision_width=32, llm_width=24, tokens=5, depth=2, heads=4)
    config = IdeficsConfig(vision_config={"embed_dim": 32}, perceiver_config={"qk_layer_norms_perceiver": False})
    theirs = IdeficsPerceiverResampler(config, embed_dim=32, depth=2, n_heads=4, head_dim=8, n_latents=5)
    theirs.latents.copy_(own.latents)
    for block, (attention, ffn) in zip(own.blocks, theirs.blocks, strict=True):
        pairs = {
            "media_norm": attention.context_layer_norm,
            "latent_norm": attention.latents_layer_norm,
            "query": attention.q_proj,
            "key": attention.k_proj,
            "value": attention.v_proj,
            "out": attention.output_proj,
            "ffn_norm": ffn.ln,
            "up": ffn.fc,
            "down": ffn.c_proj,
        }
        for name, module in pairs.items():
            module.load_state_dict(block.get_submodule(name).state_dict())
    tokens = torch.randn(3, 5, 32)  # [CLS] and four patches, of which the patches are read
    torch.testing.assert_close(own(tokens), own.output(theirs(tokens[:, 1:])), atol=1e-5, rtol=1e-5)


def test_patches_are_read_without_the_class_token_or_with_it() -> None:
    vision, tokens = tiny_clip(), torch.randn(2, 5, 32)
    assert torch.equal(Patches(vision)(tokens), tokens[:, 1:])
    assert torch.equal(Patches(vision, class_token=True)(tokens), tokens)
    few = Patches(vision, class_token=True, tokens=3)  # 1 x 2 of the 2 x 2 patches
    assert torch.equal(few(tokens)[:, 0], tokens[:, 0])
    torch.testing.assert_close(few(tokens)[:, 1:], torch.stack([tokens[:, [1, 3]], tokens[:, [2, 4]]], 1).mean(2))


def test_fewer_tokens_are_means_of_rectangles_of_patches() -> None:
    vision = tiny_vision()  # 4 x 4
    tokens = torch.randn(2, 16, vision.width)
    pooled = Patches(vision, tokens=8)(tokens)  # 2 x 4
    expected = tokens.unflatten(1, (2, 2, 4)).mean(dim=2).flatten(1, 2)
    torch.testing.assert_close(pooled, expected)
    assert rectangles((4, 4))[8] == (2, 4)
    assert rectangles((4, 4))[4] == (2, 2)
    assert 5 not in rectangles((4, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_visual_tokens_start_as_large_as_the_llms_embeddings(kind: ConnectorKind) -> None:
    model = tiny_connector_model(kind)
    with torch.no_grad():
        visual = model.visual_prompt(model.image_tokens(tiny_images(8)), [""] * 8)
    assert visual.std() == pytest.approx(float(model.llm.embedding_deviation()), rel=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_read_alone_and_stand_one_after_the_other(kind: ConnectorKind) -> None:
    model, clip = tiny_connector_model(kind), tiny_images(2, frames=3)
    with torch.no_grad():
        together = model.visual_prompt(model.image_tokens(clip), PROMPTS[:2])
        alone = [model.visual_prompt(model.image_tokens(clip[:, [f]]), PROMPTS[:2]) for f in range(3)]
    assert together.shape == (2, 3 * model.frame_tokens, model.llm.width)
    torch.testing.assert_close(together, torch.cat(alone, dim=1))
    assert model.sample_length()("", "a", 3) - model.sample_length()("", "a", 1) == 2 * model.frame_tokens


# --- training --------------------------------------------------------------------------------------------------------


def gradients(
    model: LLaVA, split: Sequence[Sequence[int]], *, objective: str, packed: bool = False
) -> dict[str, Tensor]:
    """Of the summed loss over micro-batches."""
    model.zero_grad()
    for rows in split:
        texts = [PROMPTS[row] for row in rows], [TARGETS[row] for row in rows]
        term_of(model, tiny_images(4)[list(rows)], *texts, objective=objective, packed=packed).total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_like(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert max(float((found[name] - gradient).abs().max()) for name, gradient in expected.items()) < 1e-5 * largest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", ["language_modeling", "alignment"])
def test_any_micro_batches_and_packed_rows_give_the_same_gradient(kind: ConnectorKind, objective: str) -> None:
    model = tiny_connector_model(kind).train()
    whole = gradients(model, [range(4)], objective=objective)
    assert whole.keys() == {
        name for name, _ in model.named_parameters() if name.startswith(("connector", "vision_norm"))
    }
    assert all(bool(gradient.any()) for gradient in whole.values())
    assert_like(gradients(model, [[2], [3, 0], [1]], objective=objective), whole)
    if objective == "language_modeling":
        assert_like(gradients(model, [[0, 1, 2], [3]], objective=objective, packed=True), whole)
    assert model.uses_every_weight({"answer_logits"})


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_connector_trains(kind: ConnectorKind) -> None:
    model = tiny_connector_model(kind).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make_adamw(model.named_parameters(), weight_decay=0.05, betas=(0.9, 0.999), part_of=model.part_of)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    gradients(model, [range(4)], objective="language_modeling")
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(model.held_state())
    assert {model.part_of(name) for name in changed} == {"connector"}
    assert not model.vision.training
    assert not model.llm.training
    free = [id(p) for group in optimizer.param_groups for p in group["params"] if not group["weight_decay"]]
    assert kind != "resampler" or id(model.connector.latents) in free


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_answers_as_its_samples_alone(kind: ConnectorKind) -> None:
    model, images = tiny_connector_model(kind), tiny_images(4, frames=2)
    lists = [["red", "yes, there is"], ["no"], ["a shape", "red", ""], ["blue"]]
    ranked = model.rank(images, PROMPTS, lists)
    alone = [model.rank(images[[i]], PROMPTS[i : i + 1], lists[i : i + 1])[0] for i in range(4)]
    for one, other in zip(ranked, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)
    small = model.rank(images, PROMPTS, lists, token_budget=20)
    for one, other in zip(ranked, small, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)
    for beams in (1, 3):
        texts = model.generate(images, PROMPTS, num_beams=beams, max_new_tokens=5)
        one_by_one = [
            model.generate(images[[i]], PROMPTS[i : i + 1], num_beams=beams, max_new_tokens=5)[0] for i in range(4)
        ]
        assert texts == one_by_one
    assert model.generate(images) == model.generate(images, [""] * 4)


def test_a_likelihood_is_the_sum_over_the_answers_tokens() -> None:
    model = tiny_connector_model("mlp")
    loss = term_of(model, tiny_images(4), PROMPTS, TARGETS).per_sample
    ranked = torch.cat(model.rank(tiny_images(4), PROMPTS, [[target] for target in TARGETS]))
    torch.testing.assert_close(ranked, -loss.detach(), atol=1e-4, rtol=1e-5)


def test_an_encoder_decoder_reads_any_connector() -> None:
    model = tiny_connector_model("resampler", llm=tiny_encoder_decoder_llm())
    loss = term_of(model, tiny_images(4), PROMPTS, TARGETS).per_sample
    ranked = torch.cat(model.rank(tiny_images(4), PROMPTS, [[target] for target in TARGETS]))
    torch.testing.assert_close(ranked, -loss.detach(), atol=1e-4, rtol=1e-5)


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "sizes", "words"),
    [
        ("mlp", {"tokens": 7}, "connector.tokens=7: no rectangle within 4 x 4 patches has so many; set it to 6 or 8"),
        ("linear", {"tokens": 17}, "no rectangle within 4 x 4 patches has so many; set it to 12 or 16"),
        ("linear", {"class_token": True}, "connector.class_token=true: this vision encoder has no class token"),
        ("resampler", {"heads": 5}, "connector.heads=5 does not divide the resampler's width of 32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kind: ConnectorKind, sizes: dict[str, object], words: str) -> None:
    settings = SIZES[kind] | sizes
    with pytest.raises(UserError, match=words) as error:
        make_connector(ConnectorConfig(kind=kind, **settings), tiny_vision(), 32)
    assert "\n" not in str(error.value)


def test_the_power_behind_gelu_is_that_of_a_normal_input() -> None:
    grid = torch.linspace(-9, 9, 100_001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi)
    power = torch.trapezoid(F.gelu(grid).square() * density, grid)
    assert tiny_connector_model("mlp").connector.output_power == pytest.approx(float(power), abs=1e-4)
