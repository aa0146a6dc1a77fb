"""InstructBLIP models written as folders that transformers opens; `huggingface.py` reads them back, tensor for tensor."""

import copy
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models.eva import Eva
from torch import Tensor, nn
from transformers import (
    BlipImageProcessor,
    GenerationConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PreTrainedTokenizerBase,
)

from instructblip._transformers import quiet_transformers
from instructblip.errors import UserError
from instructblip.files import atomic_folder, write_json
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import LLM, EncoderDecoderLLM
from instructblip.models.qformer import QFormer, QFormerLayer
from instructblip.models.quantized import QuantizedLinear
from instructblip.models.vision import VisionEncoder
from instructblip.models.vocabulary import with_rows
from instructblip.weights.names import (
    HUGGINGFACE_LLM_PREFIX,
    LLM_TOKENIZER,
    SIDECAR,
    SIDECAR_FORMAT,
    backbone_state,
    foreign_names,
    pack_qkv_bias,
)
from instructblip.weights.transformers_read import kept_in_float32

logger = logging.getLogger(__name__)

_IMAGE_TOKEN = "<image>"


def save_huggingface(model: InstructBLIP, folder: Path, *, overwrite: bool = False) -> None:
    """Write a folder that transformers' `InstructBlipForConditionalGeneration` and `InstructBlipProcessor` open.

    transformers marks the places of the visual tokens by an `<image>` token. Where the language model's table has no row to
    spare, one is added to it and to the output head, the mean of the others: its logit is then their mean, which is never
    the largest.

    Tensors keep their types; transformers opens a folder of several types in float32. What trains is held in float32: it is
    written in the type of the other parts where that loses nothing, as for a model that was read from a folder of that type.

    Args:
        model: EVA-CLIP (any size), LayerNorm, instruction-aware Q-Former, an unquantised language model.
        folder: must not exist, or be empty.
        overwrite: replace a folder that was written by this function.

    Raises:
        UserError: a part that transformers' format cannot hold, something else in the folder's place, or a full disk.
    """
    _check_holdable(model)
    tokenizer = _processor_tokenizer(model.llm)
    image_token = tokenizer.get_vocab()[_IMAGE_TOKEN]
    rows = max(model.llm.embeddings.weight.shape[0], image_token + 1)
    with atomic_folder(folder, overwrite_if=SIDECAR if overwrite else None) as partial, quiet_transformers():
        target = huggingface_model(model, rows, image_token)
        config: Any = target.config
        target.generation_config = GenerationConfig.from_model_config(config.text_config)
        target.save_pretrained(partial)
        processor = _processor(model, tokenizer)
        processor.save_pretrained(partial)
        # InstructBlipVideoProcessor looks for it here, and does not find it in processor_config.json.
        processor.image_processor.save_pretrained(partial)
        model.llm.prompt_format.tokenizer.save_pretrained(partial / LLM_TOKENIZER)
        write_json(partial / SIDECAR, _sidecar(model))
        _warn_about_text(model.llm, partial)
    _warn_about_eps(model, config)


def huggingface_model(model: InstructBLIP, rows: int, image_token: int) -> InstructBlipForConditionalGeneration:
    """transformers' class with this model's tensors, shared where they keep their shape; for `save_pretrained`.

    What its constructor computes and no file holds (a language model's rotary frequencies) is on the meta device.

    Args:
        model: see `save_huggingface`.
        rows: of the token table and the output head, at least as many as there are.
        image_token: row that marks the places of visual tokens.
    """
    with torch.device("meta"):
        target = InstructBlipForConditionalGeneration(_huggingface_config(model, rows, image_token))
    state = _huggingface_state(model, rows)
    dtype = torch.promote_types(model.vision.dtype, model.llm.model.dtype)
    narrowed = _narrowed(state, dtype, kept={name for name in state if kept_in_float32(target, name)})
    # Tied tables are one tensor under several names; T5's head is tied by its class and not by FlanT5's weights.
    target.load_state_dict(state if narrowed is None else narrowed, assign=True)
    return target


def _narrowed(state: Mapping[str, Tensor], dtype: torch.dtype, *, kept: Collection[str]) -> dict[str, Tensor] | None:
    """A state dict without wider types than `dtype`, or None where that would change a value.

    Args:
        state: to be narrowed; what has another type of that width, or a narrower one, keeps it.
        dtype: the widest type of the result.
        kept: names that may stay as they are.
    """
    wide = {name: tensor for name, tensor in state.items() if tensor.dtype.itemsize > dtype.itemsize}
    narrowed = {name: tensor.to(dtype) for name, tensor in wide.items() if tensor.is_floating_point()}
    exact = {name: tensor for name, tensor in narrowed.items() if torch.equal(tensor.to(wide[name].dtype), wide[name])}
    return None if narrowed.keys() - exact.keys() - set(kept) else {**state, **exact}


def _check_holdable(model: InstructBLIP) -> None:
    reason = None
    backbone, norm = model.vision.backbone, model.vision_norm
    if not isinstance(backbone, Eva) or model.vision.layers or backbone.rope is not None:
        reason = f"the vision part is {type(backbone).__name__}, it holds EVA-CLIP's ViT and its last tokens only"
    elif not isinstance(norm, nn.LayerNorm):
        reason = f"the vision norm is {type(norm).__name__}, it holds a LayerNorm only"
    elif not model.qformer.instruction_aware:
        reason = "the Q-Former is not instruction-aware, it holds one with its text branch only"
    elif any(isinstance(module, QuantizedLinear) for module in model.llm.modules()):
        reason = "the language model is quantised; load it with llm.quantization=null"
    elif not hasattr(model.llm.model.config, "hidden_size") or not hasattr(model.llm.model.config, "vocab_size"):
        reason = f"{type(model.llm.model).__name__} is no plain language model for its configuration"
    if reason is not None:
        raise UserError(f"transformers' InstructBLIP format cannot hold this model: {reason}")


def _huggingface_config(model: InstructBLIP, rows: int, image_token: int) -> Any:
    llm, qformer = model.llm, model.qformer
    text = copy.deepcopy(llm.model.config)
    text.vocab_size = rows
    text.eos_token_id, text.pad_token_id = llm.prompt_format.eos_id, llm.prompt_format.pad_id
    if llm.prompt_format.bos_ids:
        text.bos_token_id = llm.prompt_format.bos_ids[0]
    return InstructBlipConfig(
        vision_config=_vision_config(model.vision),
        qformer_config=qformer_config(qformer, model.qformer_tokenizer.pad_token_id),
        text_config=text.to_dict() | {"decoder_start_token_id": text.decoder_start_token_id}
        if isinstance(llm, EncoderDecoderLLM)
        else text.to_dict(),
        num_query_tokens=qformer.query_tokens.shape[1],
        image_token_index=image_token,
    )


def _vision_config(vision: VisionEncoder) -> dict[str, Any]:
    backbone = vision.backbone
    block = backbone.blocks[0]
    return {
        "hidden_size": vision.width,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(backbone.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": vision.image_size,
        "patch_size": backbone.patch_embed.patch_size[0],
        "layer_norm_eps": block.norm1.eps,
        "qkv_bias": block.attn.q_bias is not None,
    }


def qformer_config(qformer: QFormer, pad_token: int | None) -> dict[str, Any]:
    """The sizes of a Q-Former as transformers' configuration has them, without the width of what it looks at."""
    layers = [layer for layer in qformer.layers if isinstance(layer, QFormerLayer)]
    crossed = [index for index, layer in enumerate(layers) if layer.cross_attention is not None]
    return {
        "vocab_size": qformer.word_embeddings.num_embeddings,
        "hidden_size": qformer.width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": layers[0].self_attention.heads,
        "intermediate_size": layers[0].query_ffn.up.out_features,
        "hidden_dropout_prob": qformer.dropout,
        "attention_probs_dropout_prob": qformer.dropout,
        "max_position_embeddings": qformer.max_text_tokens,
        "layer_norm_eps": qformer.norm.eps,
        "pad_token_id": pad_token,
        "cross_attention_frequency": crossed[1] if len(crossed) > 1 else len(layers),
    }


def _huggingface_state(model: InstructBLIP, rows: int) -> dict[str, Tensor]:
    """Every tensor under transformers' name, the token tables filled up to `rows`."""
    own = {**backbone_state(model.vision), **model.part_state("qformer")}
    names = foreign_names(own, "huggingface")
    state = pack_qkv_bias({names[name]: tensor for name, tensor in own.items()})
    old = model.llm.embeddings.weight.shape[0]
    filled: dict[int, Tensor] = {}  # tied tables stay one tensor
    head = model.llm.model.get_output_embeddings()
    tables = {id(parameter) for part in (model.llm.embeddings, head) for parameter in part.parameters()}
    for name, parameter in model.llm.model.state_dict(keep_vars=True).items():
        if id(parameter) in tables and rows > old:
            parameter = filled.setdefault(id(parameter), with_rows(parameter, rows))
        state[HUGGINGFACE_LLM_PREFIX + name] = parameter.detach()  # whoever loads it must not unfreeze it
    return state


def _processor_tokenizer(llm: LLM) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer that puts the special tokens around a text by itself, with `<image>` added."""
    tokenizer = copy.deepcopy(llm.prompt_format.tokenizer)
    vocabulary = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    tokenizer.pad_token, tokenizer.eos_token = (
        vocabulary[llm.prompt_format.pad_id],
        vocabulary[llm.prompt_format.eos_id],
    )
    if llm.prompt_format.bos_ids:
        tokenizer.bos_token = vocabulary[llm.prompt_format.bos_ids[0]]
    decoder_only = not isinstance(llm, EncoderDecoderLLM)
    tokenizer.padding_side = "left" if decoder_only else "right"
    # Of the side what stands in init_kwargs is saved; what a class does by itself (LLaMA's) need not stand there, and does
    # better not: the processor hands it on to the Q-Former's tokenizer too.
    tokenizer.init_kwargs.pop("padding_side", None)
    if type(tokenizer).padding_side != tokenizer.padding_side:
        tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side
    if tokenizer("a photo")["input_ids"] != _plain_prompt_ids(llm):
        tokenizer.add_bos_token, tokenizer.add_eos_token = bool(llm.prompt_format.bos_ids), not decoder_only
    tokenizer.add_special_tokens({"additional_special_tokens": [_IMAGE_TOKEN]})
    return tokenizer


def _plain_prompt_ids(llm: LLM) -> list[int]:
    """Token ids of a prompt without `prompt_prefix` and `prompt_suffix`."""
    plain = llm.prompt_format.tokenizer("a photo", add_special_tokens=False)["input_ids"]
    return [
        *llm.prompt_format.bos_ids,
        *plain,
        *([llm.prompt_format.eos_id] if isinstance(llm, EncoderDecoderLLM) else []),
    ]


def _processor(model: InstructBLIP, tokenizer: PreTrainedTokenizerBase) -> InstructBlipProcessor:
    size = model.vision.image_size
    images = BlipImageProcessor(
        size={"height": size, "width": size},
        image_mean=[value / 255 for value in model.vision.mean.flatten().tolist()],
        image_std=[value / 255 for value in model.vision.std.flatten().tolist()],
    )
    return InstructBlipProcessor(
        images, tokenizer, model.qformer_tokenizer, num_query_tokens=model.qformer.query_tokens.shape[1]
    )


def _sidecar(model: InstructBLIP) -> dict[str, Any]:
    vision, llm, norm = model.vision, model.llm, model.vision_norm
    assert isinstance(norm, nn.LayerNorm)
    vocabulary = {token_id: token for token, token_id in llm.prompt_format.tokenizer.get_vocab().items()}
    return {
        "format": SIDECAR_FORMAT,
        "vision": {
            "mean": vision.mean.flatten().tolist(),
            "std": vision.std.flatten().tolist(),
            "norm_eps": norm.eps,
        },
        "max_instruction_tokens": model.max_instruction_tokens,
        "llm_rows": llm.embeddings.weight.shape[0],
        "llm": {
            "eos_token": vocabulary[llm.prompt_format.eos_id],
            "pad_token": vocabulary[llm.prompt_format.pad_id],
            "bos_token": vocabulary[llm.prompt_format.bos_ids[0]] if llm.prompt_format.bos_ids else None,
            "image_prefix": llm.prompt_format.image_prefix,
            "prompt_prefix": llm.prompt_format.prompt_prefix,
            "prompt_suffix": llm.prompt_format.prompt_suffix,
            "answer_prefix": llm.prompt_format.answer_prefix,
            "max_prompt_tokens": llm.prompt_format.max_prompt_tokens,
            "max_target_tokens": llm.prompt_format.max_target_tokens,
        },
    }


def _warn_about_text(llm: LLM, folder: Path) -> None:
    if llm.prompt_format.image_prefix or llm.prompt_format.prompt_prefix or llm.prompt_format.prompt_suffix:
        logger.warning(
            "transformers' processor puts no text around the visual tokens and the prompt: there, write %r before and %r "
            "after the image tokens and %r after the prompt yourself",
            llm.prompt_format.image_prefix,
            llm.prompt_format.prompt_prefix,
            llm.prompt_format.prompt_suffix,
        )
    processor = InstructBlipProcessor.from_pretrained(folder, trust_remote_code=False)
    if processor(text=["a", "a photo"], padding=True)["qformer_attention_mask"][0][0] == 0:
        logger.warning(
            "transformers' processor pads the Q-Former's text on the left as it does the prompts, which moves its "
            "positions: there, before prompts of unequal lengths, call processor.tokenizer.init_kwargs.pop('padding_side')"
        )
    found = processor.tokenizer("a photo")["input_ids"]
    if found != _plain_prompt_ids(llm):
        logger.warning(
            "transformers' processor gives a prompt the token ids %s where this model takes %s: there, set them yourself",
            found,
            _plain_prompt_ids(llm),
        )


def _warn_about_eps(model: InstructBLIP, config: Any) -> None:
    eps = config.vision_config.layer_norm_eps
    assert isinstance(model.vision_norm, nn.LayerNorm)
    if model.vision_norm.eps != eps:
        logger.warning(
            "transformers computes ln_vision with an eps of %g, this model with %g: its outputs differ by that",
            eps,
            model.vision_norm.eps,
        )
