"""transformers' folders of BLIP, read into this code's models and written from them.

Three classes hold its three tasks. What they leave out or do otherwise (models/blip.py has it as released):

* Matching and questions begin with [CLS] where BLIP was trained with [ENC]: `model.enc_token = False` does as they do.
* A captioner's `generate` begins with [DEC] alone; give it the prompt, or this model `prompts=[""]`.
* The class for questions reads their padding, as `attend_padding=True` does here. Its decoder reads states as wide as the
  vision encoder's: ViT-L beside BERT-base cannot be held.
* A configuration that does not say so has 8 heads, norms of the ViT with an eps of 1e-5, no dropout, no label smoothing.
* The temperature, momentum copies and the queue have no place: `instructblip.safetensors` beside its files holds them.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import BlipConfig, BlipImageProcessor, BlipProcessor

from instructblip.config.checks import BLIP_KINDS
from instructblip.config.schema import ModelKind
from instructblip.errors import UserError
from instructblip.files import read_json, write_json
from instructblip.models.adapters import plain_state, without_adapters
from instructblip.models.blip import (
    BLIP,
    BLIPVQA,
    BLIPCaption,
    BLIPPretrain,
    BLIPRetrieval,
)
from instructblip.models.empty import empty_modules
from instructblip.models.med import BLIP_TOKENS, TextLayer, TextModel
from instructblip.models.vision import VisionEncoder
from instructblip.models.vocabulary import add_tokens
from instructblip.weights.blip import MAX_TEXT_TOKENS
from instructblip.weights.gatekeeper import check_settings, open_config, open_tokenizer
from instructblip.weights.names import SIDE_TENSORS, SIDECAR, SIDECAR_FORMAT, check_tensors, foreign_names, has_place
from instructblip.weights.transformers_layout import layout_for, layout_of
from instructblip.weights.transformers_read import read_side_tensors, read_weights, widest
from instructblip.weights.transformers_settings import image_statistics, one_number, ratio_of

logger = logging.getLogger(__name__)

BACKBONE = "vit_base_patch16_224"  # the architecture; sizes come from the folder
_LABEL_SMOOTHING = 0.1  # of all text losses, as released
_TIED = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}


class BlipSettings(NamedTuple):
    """What a folder says besides its weights.

    Attributes:
        kind: of the model.
        vision: arguments of `VisionEncoder`.
        text: arguments of `TextModel`.
        feature_width: of the features that image and text are contrasted by.
        options: arguments of the model: the length of its texts, its prompt, how a text that reads an image begins.
    """

    kind: ModelKind
    vision: dict[str, Any]
    text: dict[str, Any]
    feature_width: int
    options: dict[str, Any]


def is_blip_folder(folder: Path) -> bool:
    """Whether a transformers folder is of BLIP.

    Raises:
        UserError: as `layout_of`.
    """
    return layout_of(folder).kind in BLIP_KINDS


def read_blip_settings(folder: Path) -> BlipSettings:
    """All that a folder says besides its weights; `instructblip.json` counts where it is there.

    Raises:
        UserError: it is not BLIP's, or files are missing.
    """
    check_settings(folder)
    config, kind = open_config(folder), layout_of(folder).kind
    said = read_json(folder / SIDECAR) if (folder / SIDECAR).is_file() else None
    if said is not None and said["format"] != SIDECAR_FORMAT:
        raise UserError(f"{folder / SIDECAR} is of format {said['format']}, this code reads {SIDECAR_FORMAT}")
    text = config.text_config
    if (
        text.hidden_act != "gelu"
        or text.hidden_dropout_prob != text.attention_probs_dropout_prob
        or not text.is_decoder
    ):
        raise UserError(f"{folder}: text_config has not BERT's gelu, cross-attention and one rate of dropout")
    limit = min(MAX_TEXT_TOKENS[kind], text.max_position_embeddings)
    options: dict[str, Any] = said["blip"] if said else {"max_text_tokens": limit}
    return BlipSettings(
        kind=kind,
        vision=_vision_arguments(config, said["vision"] if said else image_statistics(folder, config), folder),
        text={
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "layers": text.num_hidden_layers,
            "heads": text.num_attention_heads,
            "hidden_width": text.intermediate_size,
            "max_text_tokens": text.max_position_embeddings,
            "dropout": text.hidden_dropout_prob,
            "norm_eps": text.layer_norm_eps,
        },
        feature_width=config.image_text_hidden_size,
        options=options,
    )


def load_blip_folder(folder: Path) -> BLIP:
    """Read a folder of one of the three classes, in the type that its weights are in.

    Raises:
        UserError: a tensor is missing, unknown or of another shape, or the tokenizer is another model's.
    """
    settings, weights, side = read_blip_settings(folder), read_weights(folder), read_side_tensors(folder)
    model = empty_blip(settings, load_blip_tokenizer(folder, settings), side)
    state = model.state_dict()
    own = {name: tensor for name, tensor in state.items() if has_place(name, "huggingface_blip")}
    names = foreign_names(own, "huggingface_blip")
    check_tensors({names[name]: tensor.shape for name, tensor in own.items()}, weights, str(folder))
    if side:
        lacking = {name: tensor.shape for name, tensor in state.items() if name not in own}
        check_tensors(lacking, side, str(folder / SIDE_TENSORS))
    model.load_state_dict({name: weights[names[name]] for name in own} | side, strict=False)
    model.held_parts |= {"vision"}  # which no other file has
    return model.to(widest(weights.values())).eval()


def empty_blip(settings: BlipSettings, tokenizer: Any, side: Mapping[str, Tensor]) -> BLIP:
    """The model that a folder says, with new weights; `side` tells whether it has momentum copies."""
    vision, sizes = VisionEncoder(**settings.vision), settings.text
    width = vision.width
    if settings.kind == "blip_caption":
        decoder = TextModel(source_width=width, language_model_head=True, **sizes)
        return BLIPCaption(vision=vision, text_decoder=decoder, tokenizer=tokenizer, **settings.options)
    encoder = TextModel(source_width=width, **sizes)
    if settings.kind == "blip_vqa":
        decoder = TextModel(source_width=width, language_model_head=True, **sizes)
        return BLIPVQA(
            vision=vision, text_encoder=encoder, text_decoder=decoder, tokenizer=tokenizer, **settings.options
        )
    queue = side.get("momentum.image_queue")
    return BLIPRetrieval(
        vision=vision,
        text_encoder=encoder,
        tokenizer=tokenizer,
        feature_width=settings.feature_width,
        queue_size=None if queue is None else queue.shape[1],
        **settings.options,
    )


def load_blip_tokenizer(folder: Path, settings: BlipSettings) -> Any:
    """A folder's tokenizer, with `[DEC]` and `[ENC]`, which the published ones lack though their tables have rows for them.

    Raises:
        UserError: they do not stand where the configuration says.
    """
    tokenizer, text = open_tokenizer(folder, truncation_side="right"), open_config(folder).text_config
    add_tokens(tokenizer, BLIP_TOKENS)
    start, reads = (tokenizer.get_vocab()[token] for token in BLIP_TOKENS)
    if (
        start != text.bos_token_id
        or max(start, reads) >= text.vocab_size
        or tokenizer.sep_token_id != text.sep_token_id
    ):
        raise UserError(
            f"{folder}: the tokenizer has [DEC], [ENC], [SEP] as {start}, {reads}, {tokenizer.sep_token_id}, where the "
            f"configuration has {text.vocab_size} tokens, [DEC] as {text.bos_token_id} and [SEP] as {text.sep_token_id}; it "
            "is another model's"
        )
    return tokenizer


def write_blip_folder(model: BLIP, folder: Path, *, merge: bool = True) -> None:
    """Write a model as the folder of its class, which can hold it, into one that is there; `merge` as `save_huggingface`."""
    layout = layout_for(model)
    transformers_blip(model, merge=merge).save_pretrained(folder)
    BlipProcessor(_image_processor(model.vision), model.tokenizer).save_pretrained(folder)
    write_json(folder / SIDECAR, _sidecar(model))
    state = without_adapters(model.state_dict())
    side = {name: tensor for name, tensor in state.items() if not has_place(name, layout.names)}
    if side:
        save_file({name: tensor.contiguous() for name, tensor in side.items()}, folder / SIDE_TENSORS)
        what = "the temperature" + (", momentum copies and queue" if len(side) > 1 else "")
        logger.warning("transformers' %s has no place for %s: %s holds them", layout.title, what, SIDE_TENSORS)
    if layout.kind != "blip_caption" and model.enc_token:
        logger.warning(
            "transformers' %s begins texts with [CLS], this model those that read an image with [ENC]: there, set the first "
            "of input_ids to %d",
            layout.title,
            model.enc_id,
        )


def transformers_blip(model: BLIP, *, merge: bool = True) -> Any:
    """transformers' class with this model's tensors; for `save_pretrained`."""
    layout = layout_for(model)
    plain = plain_state(model, merge=merge)
    own = {name: tensor.detach() for name, tensor in plain.items() if has_place(name, layout.names)}
    names = foreign_names(own, layout.names)
    state = {names[name]: tensor for name, tensor in own.items()}
    state |= {copy: state[name] for copy, name in _TIED.items() if name in state}
    with empty_modules():
        target = layout.model(_config(model))
    target.load_state_dict(state, assign=True)
    return target


def check_blip(model: BLIP) -> None:
    """Refuse a model that no class can hold.

    Raises:
        UserError: says what it cannot hold.
    """
    reason, backbone = None, model.vision.backbone
    if isinstance(model, BLIPPretrain):
        reason = "it has no class for pre-training; write --to lavis, or start a model=blip_retrieval from it"
    elif (
        not isinstance(backbone, VisionTransformer)
        or model.vision.layers
        or not isinstance(backbone.norm, nn.LayerNorm)
    ):
        reason = f"the vision part is {type(backbone).__name__}, it holds a plain ViT and its last tokens only"
    elif isinstance(model, BLIPVQA) and model.vision.width != model.text_encoder.width:
        reason = (
            f"its decoder reads states as wide as the vision encoder's ({model.vision.width}), this model's reads those of "
            f"its text encoder ({model.text_encoder.width})"
        )
    if reason is not None:
        title = "BLIP classes" if isinstance(model, BLIPPretrain) else layout_for(model).title
        raise UserError(f"transformers' {title} cannot hold this model: {reason}")


def _config(model: BLIP) -> BlipConfig:
    vision = model.vision.backbone
    block, text = vision.blocks[0], model.text_models()[0]
    layer = text.layers[0]
    assert isinstance(layer, TextLayer)
    feature_width = model.text_projection.out_features if isinstance(model, BLIPRetrieval) else 256
    return BlipConfig(
        text_config={
            "vocab_size": text.word_embeddings.num_embeddings,
            "hidden_size": text.width,
            "intermediate_size": layer.ffn.up.out_features,
            "num_hidden_layers": len(text.layers),
            "num_attention_heads": layer.self_attention.heads,
            "max_position_embeddings": text.max_text_tokens,
            "layer_norm_eps": text.norm.eps,
            "hidden_dropout_prob": text.dropout,
            "attention_probs_dropout_prob": text.dropout,
            "bos_token_id": model.start_id,
            "eos_token_id": model.tokenizer.sep_token_id,
            "sep_token_id": model.tokenizer.sep_token_id,
            "pad_token_id": model.tokenizer.pad_token_id,
            "label_smoothing": _LABEL_SMOOTHING,
        },
        vision_config={
            "hidden_size": model.vision.width,
            "intermediate_size": block.mlp.fc1.out_features,
            "num_hidden_layers": len(vision.blocks),
            "num_attention_heads": block.attn.num_heads,
            "image_size": model.vision.image_size,
            "patch_size": vision.patch_embed.patch_size[0],
            "layer_norm_eps": block.norm1.eps,
        },
        image_text_hidden_size=feature_width,
        label_smoothing=_LABEL_SMOOTHING,
    )


def _vision_arguments(config: Any, said: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    vision = config.vision_config
    image_size, patch_size = one_number(vision.image_size), one_number(vision.patch_size)
    if image_size is None or patch_size is None or vision.hidden_act != "gelu":
        raise UserError(f"{folder}: vision_config is not that of a ViT on square images with gelu; it is another model")
    return {
        "backbone": BACKBONE,
        "image_size": image_size,
        "mean": said["mean"],
        "std": said["std"],
        "options": {
            "patch_size": patch_size,
            "embed_dim": vision.hidden_size,
            "depth": vision.num_hidden_layers,
            "num_heads": vision.num_attention_heads,
            "mlp_ratio": ratio_of(vision.hidden_size, vision.intermediate_size),
        },
        "norm_eps": vision.layer_norm_eps,
    }


def _image_processor(vision: VisionEncoder) -> BlipImageProcessor:
    return BlipImageProcessor(
        size={"height": vision.image_size, "width": vision.image_size},
        image_mean=[value / 255 for value in vision.mean.flatten().tolist()],
        image_std=[value / 255 for value in vision.std.flatten().tolist()],
    )


def _sidecar(model: BLIP) -> dict[str, Any]:
    options: dict[str, Any] = {"max_text_tokens": model.max_text_tokens}
    if isinstance(model, BLIPCaption):
        options["prompt"] = model.prompt
    else:
        options["enc_token"] = model.enc_token
    return {
        "format": SIDECAR_FORMAT,
        "vision": {"mean": model.vision.mean.flatten().tolist(), "std": model.vision.std.flatten().tolist()},
        "blip": options,
    }
