"""Tiny BLIP-2 models of both stages with random weights that all matter, ours and transformers' folders of them."""

from pathlib import Path

import torch
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipImageProcessor,
)

from instructblip.models.blip2 import BLIP2
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import LLM
from instructblip.models.vision import VisionEncoder
from tests.kit.tiny import (
    WIDTH,
    huggingface_llm_config,
    huggingface_tokenizer,
    redraw,
    tiny_llm,
    tiny_qformer,
    write_redrawn,
)
from tests.kit.vectors import bert_tokenizer

SIDE, FEATURES = 28, 16  # pixels, width of projected features
NEWLINE = "Ċ"  # as byte-level vocabularies write it
_VISION = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_QFORMER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def tiny_eva(image_size: int = SIDE) -> VisionEncoder:
    """EVA-CLIP in small, without its final norm."""
    return VisionEncoder(
        backbone="eva_giant_patch14_clip_224",
        image_size=image_size,
        mean=[120.0, 125.0, 130.0],
        std=[60.0, 61.0, 62.0],
        options={"embed_dim": WIDTH, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5},
        final_norm=False,
    )


def tiny_stage1(seed: int = 0, *, norm_eps: float = 1e-5, captions: bool = True) -> BLIP2:
    """BLIP-2's first stage, with a language-model head where it is to caption."""
    torch.manual_seed(seed)
    tokenizer = bert_tokenizer()
    model = BLIP2(
        vision=tiny_eva(),
        vision_norm=nn.LayerNorm(WIDTH, eps=norm_eps),
        qformer=tiny_qformer(
            vision_width=WIDTH, text_outputs=True, language_model_head=captions, vocab_size=len(tokenizer)
        ),
        tokenizer=tokenizer,
        feature_width=FEATURES,
    )
    redraw(model)
    return model.eval()


def tiny_stage2(seed: int = 0, *, llm: LLM | None = None, norm_eps: float = 1e-5) -> InstructBLIP:
    """BLIP-2's second stage around a language model, by default `tiny_llm()`."""
    torch.manual_seed(seed)
    model = InstructBLIP(
        vision=tiny_eva(),
        vision_norm=nn.LayerNorm(WIDTH, eps=norm_eps),
        qformer=tiny_qformer(vision_width=WIDTH, instruction_aware=False),
        qformer_tokenizer=None,
        llm=llm or tiny_llm(),
    )
    for part in (model.vision, model.vision_norm, model.qformer, model.projection):
        redraw(part)
    return model.eval()


def write_retrieval(folder: Path, *, image_token: bool = False) -> Blip2ForImageTextRetrieval:
    """Write a folder as `Salesforce/blip2-itm-vit-g`; with `image_token` its class reads texts behind marks of queries."""
    tokenizer = bert_tokenizer()
    rows = len(tokenizer)
    processor = Blip2Processor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer)  # adds <image>
    processor.save_pretrained(folder)
    config = Blip2Config(
        vision_config={**_VISION, "image_size": SIDE},
        qformer_config={**_QFORMER, "vocab_size": rows, "use_qformer_text_input": True},
        num_query_tokens=4,
        image_text_hidden_size=FEATURES,
        image_token_index=rows if image_token else None,
    )
    return write_redrawn(Blip2ForImageTextRetrieval, config, folder)


def write_captioner(folder: Path, llm: str = "opt", *, image_token: bool = True) -> Blip2ForConditionalGeneration:
    """Write a folder as `Salesforce/blip2-opt-2.7b` and its like.

    Args:
        folder: to write.
        llm: `opt`, whose captions end with a newline by the configuration alone, `llama` or `t5`.
        image_token: the newer form, whose tokenizer and token table have `<image>`.
    """
    tokenizer = huggingface_tokenizer(ends_prompts=llm == "t5")
    images = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    if image_token:  # which the processor adds to the tokenizer
        Blip2Processor(images, tokenizer, num_query_tokens=4).save_pretrained(folder)
    else:
        for part in (images, tokenizer):
            part.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids(NEWLINE) if llm == "opt" else tokenizer.eos_token_id
    config = Blip2Config(
        vision_config={**_VISION, "image_size": SIDE},
        qformer_config=_QFORMER,
        text_config=huggingface_llm_config(llm, tokenizer, end).to_dict(),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>") if image_token else None,
    )
    return write_redrawn(Blip2ForConditionalGeneration, config, folder, untied=llm == "t5")
