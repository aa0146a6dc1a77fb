"""Tiny BLIP models with random weights that all matter, ours and transformers' folders of them."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from instructblip.models.blip import BLIPVQA, BLIPCaption, BLIPPretrain, BLIPRetrieval
from instructblip.models.med import TextModel
from instructblip.models.vision import VisionEncoder
from tests.kit.tiny import redraw
from tests.kit.vectors import FOLDER, blip_tokenizer

CLASSES = {
    "caption": BlipForConditionalGeneration,
    "vqa": BlipForQuestionAnswering,
    "retrieval": BlipForImageTextRetrieval,
}
SIDE, VISION_WIDTH, TEXT_WIDTH, FEATURES = 32, 48, 32, 16


def tiny_vit(*, drop_path: float = 0.0) -> VisionEncoder:
    """ViT-B/16 in small, with its final norm."""
    return VisionEncoder(
        backbone="vit_base_patch16_224",
        image_size=SIDE,
        mean=[122.7709383, 116.7460125, 104.09373615],
        std=[68.5005327, 66.6321579, 70.32316305],
        options={"embed_dim": VISION_WIDTH, "depth": 2, "num_heads": 4, "drop_path_rate": drop_path},
    )


def tiny_text_model(tokenizer: PreTrainedTokenizerBase, **options: Any) -> TextModel:
    """Two layers of width 32."""
    sizes = {"width": TEXT_WIDTH, "layers": 2, "heads": 4, "hidden_width": 64, "max_text_tokens": 64, "dropout": 0.0}
    return TextModel(**{"vocab_size": len(tokenizer), "source_width": VISION_WIDTH, **sizes, **options})


def tiny_caption(seed: int = 0) -> BLIPCaption:
    """It writes captions."""
    torch.manual_seed(seed)
    tokenizer = blip_tokenizer()
    decoder = tiny_text_model(tokenizer, language_model_head=True)
    return _finished(BLIPCaption(vision=tiny_vit(), text_decoder=decoder, tokenizer=tokenizer))


def tiny_vqa(seed: int = 0, *, enc_token: bool = True) -> BLIPVQA:
    """It answers questions."""
    torch.manual_seed(seed)
    tokenizer = blip_tokenizer()
    model = BLIPVQA(
        vision=tiny_vit(),
        text_encoder=tiny_text_model(tokenizer),
        text_decoder=tiny_text_model(tokenizer, language_model_head=True, source_width=TEXT_WIDTH),
        tokenizer=tokenizer,
        enc_token=enc_token,
    )
    return _finished(model)


def tiny_retrieval(seed: int = 0, *, enc_token: bool = True, queue_size: int | None = None) -> BLIPRetrieval:
    """It contrasts and matches."""
    torch.manual_seed(seed)
    tokenizer = blip_tokenizer()
    model = BLIPRetrieval(
        vision=tiny_vit(),
        text_encoder=tiny_text_model(tokenizer),
        tokenizer=tokenizer,
        feature_width=FEATURES,
        enc_token=enc_token,
        queue_size=queue_size,
    )
    return _finished(model)


def tiny_pretrain(
    seed: int = 0, *, queue_size: int | None = 24, dropout: float = 0.0, drop_path: float = 0.0
) -> BLIPPretrain:
    """It does all of it."""
    torch.manual_seed(seed)
    tokenizer = blip_tokenizer()
    text = tiny_text_model(tokenizer, language_model_head=True, decoder_attention=True, dropout=dropout)
    model = BLIPPretrain(
        vision=tiny_vit(drop_path=drop_path),
        text_encoder=text,
        tokenizer=tokenizer,
        feature_width=FEATURES,
        queue_size=queue_size,
    )
    return _finished(model)


def write_blip(
    folder: Path, task: str, *, eps: float = 1e-5, tokens: bool = False, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Write a folder as `Salesforce/blip-image-captioning-base` and its like.

    Args:
        folder: to write.
        task: `caption`, `vqa` or `retrieval`.
        eps: of the ViT's norms; transformers' default is not the released 1e-6.
        tokens: the tokenizer has [DEC] and [ENC], which the published ones lack.
        dtype: of the weights.
    """
    tokenizer = blip_tokenizer() if tokens else BertTokenizerFast(vocab=str(FOLDER / "blip_med/vocab.txt"))
    BlipProcessor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer).save_pretrained(folder)
    rows = len(blip_tokenizer())
    config = BlipConfig(
        text_config={
            "vocab_size": rows,
            "hidden_size": VISION_WIDTH if task == "vqa" else TEXT_WIDTH,  # its class has one width of what is read
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
            "bos_token_id": rows - 2,
            "sep_token_id": tokenizer.sep_token_id,
        },
        vision_config={
            "hidden_size": VISION_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 100,  # no whole multiple of the width
            "image_size": SIDE,
            "patch_size": 16,
            "layer_norm_eps": eps,
        },
        image_text_hidden_size=FEATURES,
    )
    torch.manual_seed(0)
    model = CLASSES[task](config).eval()
    redraw(model)
    model.to(dtype).save_pretrained(folder)
    return model


def _finished(model: Any) -> Any:
    redraw(model)
    return model.eval()
