"""The Q-Former's four passes of BLIP-2's first stage equal LAVIS's, given its weights and inputs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from instructblip.models.qformer import QFormer
from instructblip.models.transformer import KeyValueCache
from tests.kit.vectors import TOLERANCE, case, read, stage1_qformer, tensors

WEIGHTS = tensors("blip2_stage1/weights")
IDS = read("blip2_stage1/config")["sizes"]


def image_tokens(vectors: dict[str, Any], ln_vision: Tensor = WEIGHTS["ln_vision.weight"]) -> Tensor:
    image_BPU = vectors["inputs"]["image_tokens"]
    return F.layer_norm(image_BPU, image_BPU.shape[-1:], ln_vision, WEIGHTS["ln_vision.bias"])


def text(vectors: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return vectors["inputs"]["input_ids"], vectors["inputs"]["attention_mask"]


def head(name: str, hidden: Tensor) -> Tensor:
    return F.linear(hidden, WEIGHTS[f"{name}.weight"], WEIGHTS[f"{name}.bias"])


def projected(name: str, hidden: Tensor) -> Tensor:
    return F.normalize(head(name, hidden), dim=-1)


def close(found: Tensor, expected: Tensor | float) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected), **TOLERANCE)


def caption_ids(ids_BT: Tensor) -> Tensor:
    """Captions as the language model reads them: [DEC] in the place of [CLS]."""
    return torch.cat([torch.full_like(ids_BT[:, :1], IDS["dec_token_id"]), ids_BT[:, 1:]], dim=1)


def caption_loss(logits_BTW: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    labels_BT = ids_BT.masked_fill(mask_BT == 0, -100)
    return F.cross_entropy(logits_BTW[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), label_smoothing=0.1)


def caption_logits(qformer: QFormer, image_BPU: Tensor, ids_BT: Tensor, mask_BT: Tensor, *, cached: bool) -> Tensor:
    """In one pass over queries and text, or in two: the text's attends to the kept keys and values of the queries'."""
    cache = None
    if cached:
        cache = KeyValueCache()
        qformer(image_BPU, cache=cache)
    image = None if cached else image_BPU
    return qformer.logits(qformer(image, ids_BT, mask_BT, mask="unilm", text_states=True, cache=cache).text_BTD)


@torch.no_grad()
def test_queries_alone_give_the_image_features() -> None:
    vectors = case("blip2_stage1", "features")
    query_BQD, text_BTD = stage1_qformer()(image_tokens(vectors))
    close(query_BQD, vectors["expected"]["image_embeds"])
    close(projected("vision_proj", query_BQD), vectors["expected"]["image_embeds_proj"])
    assert text_BTD.shape == (6, 0, 32)


@torch.no_grad()
def test_text_alone_gives_the_text_features() -> None:
    vectors = case("blip2_stage1", "features")
    ids_BT, mask_BT = text(vectors)
    query_BQD, text_BTD = stage1_qformer()(None, ids_BT, mask_BT, text_states=True)
    real = mask_BT.bool()
    close(text_BTD[real], vectors["expected"]["text_embeds"][real])
    close(projected("text_proj", text_BTD)[real], vectors["expected"]["text_embeds_proj"][real])
    assert query_BQD.shape == (6, 0, 32)


@torch.no_grad()
def test_both_alone_give_the_contrastive_similarities() -> None:
    vectors = case("blip2_stage1", "losses")
    qformer, (ids_BT, mask_BT) = stage1_qformer(), text(vectors)
    image_BQE = projected("vision_proj", qformer(image_tokens(vectors)).query_BQD)
    text_BE = projected("text_proj", qformer(None, ids_BT, mask_BT, text_states=True).text_BTD[:, 0])
    similarity_BC = torch.einsum("bqe,ce->bcq", image_BQE, text_BE).amax(dim=2) / WEIGHTS["temp"]
    close(similarity_BC, vectors["expected"]["sim_i2t"])
    close(similarity_BC.T, vectors["expected"]["sim_t2i"])


@torch.no_grad()
@pytest.mark.parametrize("text_states", [False, True])
def test_image_and_text_together_give_the_matching_logits(text_states: bool) -> None:
    """Whether the last layer computes its text or leaves it out, the queries are the same."""
    qformer, features, vectors = stage1_qformer(), case("blip2_stage1", "features"), case("blip2_stage1", "losses")
    output = qformer(image_tokens(features), *text(features), text_states=text_states)
    close(output.query_BQD, features["expected"]["multimodal_embeds"])
    assert output.text_BTD.shape == (6, 26 if text_states else 0, 32)
    image_BPU, (ids_BT, mask_BT) = image_tokens(vectors), text(vectors)
    others_of_text = torch.tensor(vectors["draw"]["negative_image_of_text"])
    others_of_image = torch.tensor(vectors["draw"]["negative_text_of_image"])
    image_NPU = torch.cat([image_BPU, image_BPU[others_of_text], image_BPU])
    ids_NT, mask_NT = (torch.cat([rows, rows, rows[others_of_image]]) for rows in (ids_BT, mask_BT))
    query_NQD = qformer(image_NPU, ids_NT, mask_NT, text_states=text_states).query_BQD
    close(head("itm_head", query_NQD).mean(dim=1), vectors["expected"]["itm_logits"])


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
def test_text_after_the_queries_gives_the_caption_loss(cached: bool) -> None:
    vectors = case("blip2_stage1", "losses")
    ids_BT, mask_BT = text(vectors)
    ids_BT = caption_ids(ids_BT)
    logits_BTW = caption_logits(stage1_qformer(), image_tokens(vectors), ids_BT, mask_BT, cached=cached)
    close(caption_loss(logits_BTW, ids_BT, mask_BT), vectors["expected"]["loss_lm"])


@pytest.mark.parametrize("cached", [False, True])
def test_gradients_of_the_caption_loss(cached: bool) -> None:
    """They reach query tokens, cross-attention and the vision norm through the cached keys and values too."""
    vectors, expected = case("blip2_stage1", "losses"), case("blip2_stage1", "gradients")["expected"]
    qformer, ln_vision = stage1_qformer(), WEIGHTS["ln_vision.weight"].clone().requires_grad_()
    ids_BT, mask_BT = text(vectors)
    ids_BT = caption_ids(ids_BT)
    logits_BTW = caption_logits(qformer, image_tokens(vectors, ln_vision), ids_BT, mask_BT, cached=cached)
    caption_loss(logits_BTW, ids_BT, mask_BT).backward()
    gradients = {
        "query_tokens": qformer.query_tokens.grad,
        "ln_vision.weight": ln_vision.grad,
        "Qformer.bert.encoder.layer.0.crossattention.self.key.weight": qformer.layers[
            0
        ].cross_attention.key.weight.grad,
        "Qformer.bert.encoder.layer.0.intermediate.dense.weight": qformer.layers[0].text_ffn.up.weight.grad,
    }
    for name, gradient in gradients.items():
        close(gradient, expected[f"full.loss_lm.{name}"])
    # The last layer's queries influence no text.
    assert all(
        parameter.grad is None or not parameter.grad.any() for parameter in qformer.layers[-1].query_ffn.parameters()
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["generate_greedy", "generate_greedy_min1"])
def test_captions_decoded_token_by_token(name: str) -> None:
    vectors = case("blip2_stage1", name)
    qformer, expected_BT, settings = stage1_qformer(), vectors["expected"]["ids"], vectors["settings"]
    cache = KeyValueCache()
    qformer(image_tokens(vectors), cache=cache)
    ids_BT = torch.full_like(expected_BT[:, :1], IDS["dec_token_id"])
    ended_B = torch.zeros(len(ids_BT), dtype=torch.bool)
    for length in range(1, settings["max_length"]):
        last_B1 = ids_BT[:, -1:]
        states = qformer(None, last_B1, torch.ones_like(last_B1), mask="unilm", text_states=True, cache=cache)
        logits_BW = qformer.logits(states.text_BTD[:, -1])
        if length < settings["min_length"]:
            logits_BW[:, IDS["sep_token_id"]] = -torch.inf
        next_B = logits_BW.argmax(dim=1).masked_fill(ended_B, IDS["pad_token_id"])
        ended_B |= next_B == IDS["sep_token_id"]
        ids_BT = torch.cat([ids_BT, next_B[:, None]], dim=1)
    assert torch.equal(ids_BT, expected_BT)
