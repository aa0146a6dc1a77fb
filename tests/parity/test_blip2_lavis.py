"""BLIP-2's first stage equals LAVIS's: features, matching, captions, and the numbers of its losses and of retrieval."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from instructblip.models.blip2 import BLIP2
from instructblip.models.pairs import similarities
from tests.kit.vectors import TOLERANCE, case, read, stage1_model


@pytest.fixture(scope="module")
def model() -> BLIP2:
    return stage1_model()


def close(found: Tensor, expected: Tensor | float) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected), **TOLERANCE)


def images(vectors: dict[str, dict[str, Tensor]]) -> Tensor:
    """Image tokens (B, 1, P, U), as a model takes them in the place of pictures."""
    return vectors["inputs"]["image_tokens"][:, None]


def text(vectors: dict[str, dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    return vectors["inputs"]["input_ids"], vectors["inputs"]["attention_mask"]


def test_features(model: BLIP2) -> None:
    vectors = case("blip2_stage1", "features")
    expected = vectors["expected"]
    features = model.features(images(vectors), vectors["texts"])
    real = features.text_mask.bool()
    close(features.image, expected["image_embeds"])
    close(features.image_projected, expected["image_embeds_proj"])
    close(features.text[real], expected["text_embeds"][real])
    close(features.text_projected, expected["text_embeds_proj"][:, 0])
    close(features.multimodal, expected["multimodal_embeds"])
    assert torch.equal(features.text_mask, vectors["inputs"]["attention_mask"])


def test_match_of_pairs(model: BLIP2) -> None:
    vectors, texts = case("blip2_stage1", "match"), case("blip2_stage1", "losses")["texts"]
    image_rows, text_rows = zip(*vectors["pairs"], strict=True)
    chosen = images(vectors)[list(image_rows)], [texts[row] for row in text_rows]
    close(model.match(*chosen), vectors["expected"]["itm_probability"][:, 1])
    close(model.match(*chosen, head="itc"), vectors["expected"]["itc_score"][:, 0])


@pytest.mark.parametrize("draw", ["losses", "losses_second_draw", "losses_image_ids", "losses_image_ids_second_draw"])
def test_outputs_that_the_losses_are_made_of(model: BLIP2, draw: str) -> None:
    vectors = case("blip2_stage1", draw)
    expected, (ids_BT, mask_BT) = vectors["expected"], text(vectors)
    with torch.no_grad():
        image, words = model.encode_images(model.image_tokens(images(vectors))), model.encode_texts(ids_BT, mask_BT)
        caption = model.encode_captions(image.cache, ids_BT, mask_BT)
        image_rows = torch.tensor(vectors["draw"]["negative_image_of_text"])
        text_rows = torch.tensor(vectors["draw"]["negative_text_of_image"])
        image_NPU = torch.cat([image.tokens_BPU, image.tokens_BPU[image_rows], image.tokens_BPU])
        ids_NT, mask_NT = (torch.cat([rows, rows, rows[text_rows]]) for rows in (ids_BT, mask_BT))
        pairs = model.encode_pairs(image_NPU, ids_NT, mask_NT)
        scaled = similarities(image.projected_BQE, words.projected_BE) / model.temperature
    if "sim_i2t" in expected:
        close(scaled, expected["sim_i2t"])
        close(scaled.T, expected["sim_t2i"])
    close(pairs.logits_B2, expected["itm_logits"])
    close(F.cross_entropy(caption.logits_NW, caption.targets_N, label_smoothing=0.1), expected["loss_lm"])
    assert caption.tokens_B.tolist() == (mask_BT.sum(dim=1) - 1).tolist()
    assert image.cache.text == 0  # and may be gone on from again


def test_scores_of_retrieval(model: BLIP2) -> None:
    vectors = case("retrieval", "retrieval")
    expected, (ids_CT, mask_CT) = vectors["expected"], text(vectors)
    for found, padded in zip(model.tokenize(vectors["texts"], max_tokens=35), (ids_CT, mask_CT), strict=True):
        assert torch.equal(F.pad(found, (0, 35 - found.shape[1])), padded)
    with torch.no_grad():
        image, words = model.encode_images(model.image_tokens(images(vectors))), model.encode_texts(ids_CT, mask_CT)
        logits = [
            model.encode_pairs(tokens.expand(len(ids_CT), -1, -1), ids_CT, mask_CT).logits_B2[:, 1]
            for tokens in image.tokens_BPU
        ]
    close(image.projected_BQE, expected["image_feats"])
    close(words.projected_BE, expected["text_feats"])
    close(similarities(image.projected_BQE, words.projected_BE), expected["sims_i2t"])
    close(torch.stack(logits), expected["itm_logit_all_pairs"])


@pytest.mark.parametrize("name", [name for name in read("blip2_stage1/cases") if name.startswith("generate_")])
def test_captions(model: BLIP2, name: str) -> None:
    vectors = case("blip2_stage1", name)
    settings = vectors["settings"]
    captions = model.generate(
        images(vectors),
        num_beams=settings["num_beams"],
        max_new_tokens=settings["max_length"] - 1,  # LAVIS counts the start token
        min_new_tokens=settings["min_length"] - 1,
    )
    assert captions == vectors["expected"]["captions"]
    if name == "generate_beam5_defaults_min10_max30":
        assert captions == model.generate(images(vectors), num_beams=5)


def test_texts_become_the_token_ids_of_lavis(model: BLIP2) -> None:
    vectors = case("blip2_stage1", "features")
    for found, expected in zip(model.tokenize(vectors["texts"]), text(vectors), strict=True):
        assert torch.equal(found, expected)
    ids_BT, mask_BT = model.tokenize(vectors["texts"], max_tokens=8)
    assert torch.equal(ids_BT[:, :7], vectors["inputs"]["input_ids"][:, :7])
    assert ids_BT[:, 7].tolist() == [102, 0, 102, 0, 102, 102]
    assert mask_BT.sum(dim=1).tolist() == [8, 5, 8, 5, 8, 8]
