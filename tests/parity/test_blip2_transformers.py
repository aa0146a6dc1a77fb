"""BLIP-2's first stage equals transformers' classes of it: matching, contrast and features, from pixels on."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2TextModelWithProjection,
    Blip2VisionConfig,
    Blip2VisionModelWithProjection,
    OPTConfig,
    PreTrainedModel,
)

from instructblip.models.blip2 import BLIP2, similarities
from instructblip.models.vision import VisionEncoder
from instructblip.weights.names import foreign_names, pack_qkv_bias
from tests.kit.tiny import redraw, tiny_qformer
from tests.kit.vectors import bert_tokenizer

SIDE, VISION_WIDTH, EPS = 28, 32, 1e-6  # one eps serves all norms of transformers' vision part
TEXTS = ["a man riding a horse on the grass", "two dogs", "a cat."]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def model() -> BLIP2:
    torch.manual_seed(0)
    vision = VisionEncoder(
        backbone="eva_giant_patch14_clip_224",
        image_size=SIDE,
        mean=[120.0, 125.0, 130.0],
        std=[60.0, 61.0, 62.0],
        options={"embed_dim": VISION_WIDTH, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5},
        final_norm=False,
    )
    tokenizer = bert_tokenizer()
    built = BLIP2(
        vision=vision,
        vision_norm=nn.LayerNorm(VISION_WIDTH, eps=EPS),
        qformer=tiny_qformer(
            vision_width=VISION_WIDTH, text_outputs=True, language_model_head=True, vocab_size=len(tokenizer)
        ),
        tokenizer=tokenizer,
        feature_width=16,
    )
    redraw(built)
    return built.eval()


def theirs(model: BLIP2, kind: type[PreTrainedModel]) -> PreTrainedModel:
    """A class of transformers with our weights."""
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=VISION_WIDTH,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=14,
            layer_norm_eps=EPS,
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            vocab_size=len(model.tokenizer),
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
            encoder_hidden_size=VISION_WIDTH,
            use_qformer_text_input=True,
        ).to_dict(),
        text_config=OPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8).to_dict(),
        num_query_tokens=4,
        image_text_hidden_size=16,
    )
    built = kind(config).eval()
    own = {name: tensor for name, tensor in model.state_dict().items() if ".lm_head." not in name}
    del own["temperature"]
    names = foreign_names(own, "huggingface_blip2")
    state = pack_qkv_bias({names[name]: tensor for name, tensor in own.items()})
    expected = built.state_dict().keys()
    # Of the two halves each has its own part of the tensors, and nothing else.
    assert expected <= state.keys()
    built.load_state_dict({name: state[name] for name in expected})
    return built


def inputs(model: BLIP2) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Pictures, their pixels as transformers takes them, token ids with their mask."""
    pictures = torch.randint(
        0, 256, (3, 1, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pixels = (pictures[:, 0].float() - model.vision.mean) / model.vision.std
    ids_BT, mask_BT = model.tokenize(TEXTS)
    return pictures, pixels, {"input_ids": ids_BT, "attention_mask": mask_BT}


@torch.no_grad()
def test_retrieval_model(model: BLIP2) -> None:
    other = theirs(model, Blip2ForImageTextRetrieval)
    pictures, pixels, text = inputs(model)
    matching = other(pixel_values=pixels, **text, use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(model.match(pictures, TEXTS), matching.softmax(dim=1)[:, 1], **CLOSE)
    cosines = other(pixel_values=pixels, **text, use_image_text_matching_head=False).logits_per_image
    torch.testing.assert_close(model.match(pictures, TEXTS, head="itc"), cosines.diagonal(), **CLOSE)
    features = model.features(pictures, TEXTS)
    torch.testing.assert_close(similarities(features.image_projected, features.text_projected), cosines, **CLOSE)
    assert matching.softmax(dim=1)[:, 1].std() > 1e-3  # they differ at all


@torch.no_grad()
def test_both_halves(model: BLIP2) -> None:
    pictures, pixels, text = inputs(model)
    features = model.features(pictures, TEXTS)
    images = theirs(model, Blip2VisionModelWithProjection)(pixel_values=pixels).image_embeds
    torch.testing.assert_close(features.image_projected, images, **CLOSE)
    output = theirs(model, Blip2TextModelWithProjection)(**text)
    torch.testing.assert_close(features.text_projected, output.text_embeds[:, 0], **CLOSE)
    real = features.text_mask.bool()
    torch.testing.assert_close(features.text[real], output.last_hidden_state[real], **CLOSE)
