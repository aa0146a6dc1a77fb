"""The four published models have the published numbers of parameters: built on the meta device, without memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, PretrainedConfig, T5Config

from instructblip.config import VisionConfig, read_config
from instructblip.model.instructblip import InstructBLIP
from instructblip.model.llm import LLM_KINDS
from instructblip.model.qformer import QFormer
from instructblip.model.vision import VisionEncoder
from tests.tiny import EOS, tiny_bert_tokenizer, tiny_llm_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"

# The last layer's text feed-forward can influence nothing: the published counts have it, training leaves it alone.
LAST_TEXT_FFN = 768 * 3072 + 3072 + 3072 * 768 + 768 + 2 * 768

VICUNA_7B: dict[str, Any] = {"vocab_size": 32001}
VICUNA_13B = VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
FLAN_T5: dict[str, Any] = {"num_layers": 24, "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}
FLAN_T5_XL = FLAN_T5 | {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_heads": 32, "decoder_start_token_id": 0}
FLAN_T5_XXL = FLAN_T5 | {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "decoder_start_token_id": 0}

PUBLISHED = {
    "vicuna_7b": (LlamaConfig(**VICUNA_7B), 188_837_376, 6_738_423_808),
    "vicuna_13b": (LlamaConfig(**VICUNA_13B), 189_624_832, 13_015_874_560),
    "flan_t5_xl": (T5Config(**FLAN_T5_XL), 187_262_464, 2_849_757_184),
    "flan_t5_xxl": (T5Config(**FLAN_T5_XXL), 188_837_376, 11_135_332_352),
}


def parameters(module: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def vision_encoder() -> VisionEncoder:
    config = read_config(CONFIGS / "vision/eva_vit_g.yaml", VisionConfig)
    return VisionEncoder(
        backbone=config.backbone,
        image_size=config.image_size,
        mean=config.mean,
        std=config.std,
        options=config.options,
        final_norm=config.final_norm,
    )


def qformer(instruction_aware: bool = True) -> QFormer:
    sizes = {"vocab_size": 30523, "width": 768, "layers": 12, "heads": 12, "hidden_width": 3072, "vision_width": 1408}
    return QFormer(**sizes, instruction_aware=instruction_aware)


def language_model(config: PretrainedConfig) -> Any:
    kind = "encoder_decoder" if config.is_encoder_decoder else "decoder"
    auto = {"decoder": AutoModelForCausalLM, "encoder_decoder": AutoModelForSeq2SeqLM}[kind]
    return LLM_KINDS[kind](auto.from_config(config), tiny_llm_tokenizer(), eos_token=EOS, pad_token=EOS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str) -> None:
    config, trained, frozen = PUBLISHED[name]
    with torch.device("meta"):
        vision = vision_encoder()
        model = InstructBLIP(
            vision=vision,
            vision_norm=nn.LayerNorm(vision.width),
            qformer=qformer(),
            qformer_tokenizer=tiny_bert_tokenizer(),
            llm=language_model(config),
        )
    assert vision.tokens == 257
    assert parameters(model.vision) == 985_894_528
    assert sum(tensor.numel() for tensor in model.trainable_state().values()) == trained
    assert parameters(model, trained=True) == trained - LAST_TEXT_FFN
    # transformers ties T5's output head to its token table until a file says otherwise, as FlanT5's does.
    head = config.vocab_size * config.d_model if config.is_encoder_decoder else 0
    assert parameters(model.llm.model) + head == frozen


def test_parts_of_the_qformer() -> None:
    with torch.device("meta"):
        aware, ablated = qformer(), qformer(instruction_aware=False)
    queries = 32 * 768
    assert queries == 24_576
    assert parameters(aware) - queries == 185_660_160
    assert parameters(aware) - parameters(aware, trained=True) == LAST_TEXT_FFN == 4_723_968
    assert parameters(ablated) - queries == 105_137_664
