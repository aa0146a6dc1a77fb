"""Tiny models whose connector is no Q-Former, and transformers' folders of LLaVA, with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from instructblip.config.schema import ConnectorConfig, ConnectorKind
from instructblip.models.llava import LLaVA
from instructblip.models.llm import LLM
from instructblip.models.vision import VisionEncoder
from instructblip.weights.modules import make_connector
from tests.kit.families import sentencepiece
from tests.kit.runs import World
from tests.kit.tiny import EOS, PAD, WIDTH, redraw, tiny_llm, tiny_llm_tokenizer, tiny_vision, write_redrawn

KINDS: tuple[ConnectorKind, ...] = ("mlp", "linear", "resampler")
# Sizes that suit the tiny parts; of the resampler, which has no default that does.
SIZES: dict[str, dict[str, Any]] = {"mlp": {}, "linear": {}, "resampler": {"tokens": 4, "width": 32, "depth": 2}}
LLAVA_LLMS = ("llama", "qwen2", "spaced")
_TOWER = {"embed_dim": WIDTH, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5, "patch_size": 14}
# In the form of the released folders: `USER` is made of the role.
_LLAVA_1_5 = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tiny_connector_model(kind: ConnectorKind, seed: int = 0, *, llm: LLM | None = None, **sizes: Any) -> LLaVA:
    """A whole model in evaluation mode between the tiny CNN and `tiny_llm()`, drawn from `seed`."""
    torch.manual_seed(seed)
    vision, llm = tiny_vision(), llm or tiny_llm()
    connector = make_connector(ConnectorConfig(kind=kind, **(SIZES[kind] | sizes)), vision, llm.width)
    return LLaVA(vision=vision, vision_norm=nn.LayerNorm(vision.width), connector=connector, llm=llm).eval()


def tiny_clip(*, quick: bool = True, final_norm: bool = False) -> VisionEncoder:
    """CLIP's ViT on images of 28 pixels, four patches."""
    backbone = "vit_large_patch14_clip_quickgelu_224" if quick else "vit_large_patch14_clip_224"
    vision = VisionEncoder(
        backbone=backbone,
        image_size=28,
        mean=[120.0, 125.0, 130.0],
        std=[60.0, 61.0, 62.0],
        options=_TOWER,
        final_norm=final_norm,
    )
    redraw(vision)
    return vision


def tiny_llava(seed: int = 0, *, llm: LLM | None = None, quick: bool = True, **connector: Any) -> LLaVA:
    """A LLaVA of the released parts' kinds: CLIP without its last norm, no norm behind it, an MLP."""
    torch.manual_seed(seed)
    vision, llm = tiny_clip(quick=quick), llm or tiny_llm()
    made = make_connector(ConnectorConfig(kind="mlp", **connector), vision, llm.width)
    model = LLaVA(vision=vision, vision_norm=nn.Identity(), connector=made, llm=llm)
    redraw(model.connector)
    return model.eval()


def write_llava(
    folder: Path,
    llm: str = "llama",
    *,
    layer: int = -2,
    strategy: str = "default",
    template: bool = True,
    seed: int = 0,
) -> LlavaForConditionalGeneration:
    """Write a LLaVA folder of transformers with random weights that all matter; return the model.

    Args:
        folder: to write.
        llm: one of `LLAVA_LLMS`; `llama` begins each text with the token that ends it, `qwen2` ties its tables and has none;
            `spaced` is a llama whose tokenizer puts a space in front of a text, and of none that follows an image.
        layer, strategy: `vision_feature_layer` and `vision_feature_select_strategy`.
        template: LLaVA-1.5's chat template stands beside it.
        seed: of every weight.
    """
    tokenizer = _llava_tokenizer(llm)
    size = {"height": 28, "width": 28}
    images = CLIPImageProcessor(size=size, crop_size=size)
    LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy=strategy, num_additional_image_tokens=1
    ).save_pretrained(folder)
    images.save_pretrained(folder)
    if template:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": _LLAVA_1_5}))
    config = LlavaConfig(
        vision_config=_tower_config("gelu" if llm == "qwen2" else "quick_gelu").to_dict(),
        text_config=_text_config(llm, tokenizer).to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4 + (strategy == "full"),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    return write_redrawn(LlavaForConditionalGeneration, config, folder, seed=seed)


def _llava_tokenizer(llm: str) -> PreTrainedTokenizerFast:
    """With `<image>`, padding on the left."""
    tokenizer = tiny_llm_tokenizer()
    if llm == "spaced":
        special = [EOS, "<unk>"]
        tokenizer = sentencepiece(special, leading_space=True)
        tokenizer.add_special_tokens({"eos_token": EOS, "bos_token": EOS, "unk_token": "<unk>"})
    # The last one is every Qwen's, whose class of tokenizers would add it.
    tokenizer.add_special_tokens({"pad_token": PAD, "additional_special_tokens": ["<image>", "<|endoftext|>"]})
    if llm != "qwen2":
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{EOS} $A", special_tokens=[(EOS, tokenizer.eos_token_id)]
        )
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    return tokenizer


def _tower_config(activation: str) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        hidden_act=activation,
    )


def _text_config(llm: str, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return Qwen2Config(**sizes, tie_word_embeddings=True) if llm == "qwen2" else LlamaConfig(**sizes)


def connector_overrides(world: World, kind: ConnectorKind, *more: str) -> list[str]:
    """What `train_here` is given to train another connector in a world that was made for a Q-Former."""
    sizes = [f"connector.{name}={value}" for name, value in SIZES[kind].items()]
    return [f"connector={kind}", *sizes, *more]
