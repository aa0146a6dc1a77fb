"""Where the queries look: the weights of transformers' Q-Formers, and a gaze at one patch lands on it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Blip2ForImageTextRetrieval

from instructblip.errors import UserError
from instructblip.models.attention import ImageAttention
from instructblip.models.base import Model
from instructblip.models.instructblip import InstructBLIP
from instructblip.weights.transformers_read import load_huggingface
from tests.kit.blip import tiny_caption
from tests.kit.blip2 import tiny_stage1, write_captioner
from tests.kit.connectors import tiny_connector_model
from tests.kit.tiny import tiny_bert_tokenizer, tiny_huggingface, tiny_images, tiny_model

PROMPTS = ["what color is the shape?", "is there a circle in the image?"]
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def pictures(side: int = 28) -> Tensor:
    return torch.randint(0, 256, (2, 1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def pixels(model: Model) -> Tensor:
    return (pictures()[:, 0].float() - model.vision.mean) / model.vision.std


def their_cross_attentions(theirs: Any, **inputs: Tensor) -> tuple[Tensor, ...]:
    """Of the Q-Former in transformers' class: one (B, H, Q, P) for each layer that has cross-attention."""
    theirs.qformer.set_attn_implementation("eager")  # other kernels keep no weights
    given: list[dict[str, Any]] = []
    theirs.qformer.register_forward_pre_hook(lambda module, args, named: given.append(named), with_kwargs=True)
    theirs(**inputs)
    return theirs.qformer(**given[0], output_attentions=True).cross_attentions


def assert_same(ours: ImageAttention, theirs: tuple[Tensor, ...], queries: int = 4) -> None:
    assert list(ours.weights) == [0, 2]
    for mine, other in zip(ours.weights.values(), theirs, strict=True):
        assert mine.shape == (2, 1, 4, queries, 5)  # [CLS] and four patches
        torch.testing.assert_close(mine[:, 0], other[:, :, :queries], **CLOSE)
    assert (ours.weights[0].amax(dim=-1) > 0.3).any()  # not even everywhere
    assert not torch.allclose(ours.weights[0], ours.weights[2], atol=1e-2)


@pytest.mark.slow
@torch.no_grad()
def test_instructblip(tmp_path: Path) -> None:
    theirs = tiny_huggingface(tmp_path)
    ours = load_huggingface(tmp_path)
    text = tiny_bert_tokenizer()(PROMPTS, padding="longest", return_tensors="pt")
    marks = torch.full((2, 4), theirs.config.image_token_index)
    found = their_cross_attentions(
        theirs,
        pixel_values=pixels(ours),
        qformer_input_ids=text["input_ids"],
        qformer_attention_mask=text["attention_mask"],
        input_ids=marks,
    )
    attention = ours.attention(pictures(), PROMPTS)
    assert_same(attention, found)
    other = ours.attention(pictures(), PROMPTS[::-1])  # the prompt moves the gaze
    assert not torch.allclose(other.weights[2], attention.weights[2], atol=1e-3)


@torch.no_grad()
def test_blip2_second_stage(tmp_path: Path) -> None:
    theirs = write_captioner(tmp_path)
    ours = load_huggingface(tmp_path)
    marks = torch.full((2, 4), theirs.config.image_token_index)
    assert_same(ours.attention(pictures()), their_cross_attentions(theirs, pixel_values=pixels(ours), input_ids=marks))


@pytest.mark.slow
@torch.no_grad()
def test_blip2_first_stage_with_a_text_and_without(tmp_path: Path) -> None:
    ours = tiny_stage1(norm_eps=1e-6)
    ours.save_huggingface(tmp_path / "out")
    texts = ["a man riding a horse on the grass", "two dogs"]
    for head, given in ((True, texts), (False, None)):
        theirs = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "out").eval()
        ids_BT, mask_BT = ours.tokenize(texts)
        found = their_cross_attentions(
            theirs,
            pixel_values=pixels(ours),
            input_ids=ids_BT,
            attention_mask=mask_BT,
            use_image_text_matching_head=head,
        )
        assert_same(ours.attention(pictures(), given), found)


@torch.no_grad()
def test_a_gaze_at_one_patch_lands_on_it() -> None:
    """Keys that are long where one patch is, whatever the query: row 2, column 1 of a grid of 4."""
    model = tiny_model()
    tokens = torch.zeros(1, 1, 16, model.vision.width)
    tokens[0, 0, 2 * 4 + 1] = torch.randn(model.vision.width)
    for layer in model.qformer.layers:
        if layer.cross_attention is not None:
            layer.cross_attention.key.bias.zero_()
            layer.cross_attention.key.weight.mul_(100)
    maps = model.attention(tokens, ["a?"]).maps()
    assert maps.shape == (2, 1, 1, 4, 4, 4)
    torch.testing.assert_close(maps.sum(dim=(-1, -2)), torch.ones(2, 1, 1, 4))
    elsewhere = maps.flatten(-2).clone()
    elsewhere[..., 9] = elsewhere[..., 0]
    assert (elsewhere.amax(-1) - elsewhere.amin(-1)).max() < 1e-6  # all others are alike
    assert (maps[..., 2, 1] - elsewhere.amax(-1)).abs().max() > 0.1


def test_frames_are_looked_at_one_by_one_and_the_model_is_as_before() -> None:
    model = tiny_model()
    clip = tiny_images(1, frames=3)
    whole = model.attention(clip, ["a?"]).weights[2]
    single = model.attention(clip[0][:, None], ["a?"] * 3).weights[2]
    torch.testing.assert_close(whole[0], single[:, 0], **CLOSE)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("make", [tiny_caption, lambda: tiny_connector_model("resampler")])
def test_a_model_without_a_qformer_says_so(make: Any) -> None:
    with pytest.raises(UserError, match="has no Q-Former whose queries look at an image"):
        make().attention(tiny_images(1), ["a?"])


def test_wrong_arguments_are_named() -> None:
    model: InstructBLIP = tiny_model()
    with pytest.raises(ValueError, match="prompts has 2 entries for 1 images"):
        model.attention(tiny_images(1), ["a?", "b?"])
    with pytest.raises(ValueError, match="this Q-Former reads them"):
        model.attention(tiny_images(1))
