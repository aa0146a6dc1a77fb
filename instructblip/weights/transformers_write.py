"""Models written as folders that transformers opens; `transformers_read.py` reads them back, tensor for tensor."""

import copy
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models.eva import Eva
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipImageProcessor,
    GenerationConfig,
    InstructBlipConfig,
    InstructBlipProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from instructblip._transformers import quiet_transformers
from instructblip.errors import UserError
from instructblip.files import atomic_folder, write_json
from instructblip.models.adapters import plain_state, without_adapters
from instructblip.models.base import Model
from instructblip.models.blip import BLIP
from instructblip.models.blip2 import BLIP2
from instructblip.models.empty import empty_modules
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llava import LLaVA
from instructblip.models.llm import LLM, EncoderDecoderLLM
from instructblip.models.qformer import QFormer, QFormerLayer
from instructblip.models.quantized import QuantizedLinear
from instructblip.models.vision import VisionEncoder
from instructblip.models.vocabulary import with_rows
from instructblip.weights.names import (
    HUGGINGFACE_LLM_PREFIX,
    LLM_TOKENIZER,
    QFORMER_TOKENIZER,
    SIDE_TENSORS,
    SIDECAR,
    SIDECAR_FORMAT,
    backbone_state,
    foreign_names,
    pack_qkv_bias,
)
from instructblip.weights.peft_format import ADAPTER_FOLDER, whole_folder
from instructblip.weights.transformers_blip import check_blip, write_blip_folder
from instructblip.weights.transformers_layout import beside, layout_for
from instructblip.weights.transformers_llava import (
    around_image,
    check_llava,
    llava_config,
    llava_image_processor,
    llava_tensors,
    start_of,
)
from instructblip.weights.transformers_read import kept_in_float32
from instructblip.weights.transformers_settings import llm_conventions

logger = logging.getLogger(__name__)

_IMAGE_TOKEN = "<image>"


def save_huggingface(model: Model, folder: Path, *, overwrite: bool = False, merge: bool = True) -> None:
    """Write a folder that transformers' class of this model and its processor open (`transformers_layout.py`).

    transformers marks the places of the visual tokens by an `<image>` token. Where the language model's table has no row to
    spare, one is added to it and to the output head, the mean of the others: its logit is then their mean, which is never
    the largest. What the class has no place for, of BLIP-2's first stage the language-model head and the temperature, goes
    into `instructblip.safetensors` beside it.

    Tensors keep their types; transformers opens a folder of several types in float32. What trains is held in float32: it is
    written in the type of the other parts where that loses nothing, as for a model that was read from a folder of that type.

    Adapters are merged, the sums in float32. Weights that they were trained over are written as they were computed with:
    those of an int8 or nf4 language model expanded, in float32.

    Args:
        model: EVA-CLIP (any size), LayerNorm, a language model that has adapters or is not quantised; or BLIP with a
            plain ViT; or LLaVA with CLIP.
        folder: must not exist, or be empty.
        overwrite: replace a folder that was written by this function.
        merge: False writes adapters into `adapter/`, in peft's format, for `PeftModel.from_pretrained` around the class.

    Raises:
        UserError: a part that transformers' format cannot hold, something else in the folder's place, or a full disk.
    """
    if isinstance(model, BLIP):
        check_blip(model)
        with atomic_folder(folder, overwrite_if=SIDECAR if overwrite else None) as partial, quiet_transformers():
            write_blip_folder(model, partial, merge=merge)
            _write_adapters(model, partial, merge=merge)
        return
    if isinstance(model, LLaVA):
        check_llava(model)
        _check_llm(model)
        if model.adapters and not merge:
            raise UserError(
                "the adapters of a LLaVA go out merged; leave --adapters out, or give peft a checkpoint's adapters/llm"
            )
        with atomic_folder(folder, overwrite_if=SIDECAR if overwrite else None) as partial, quiet_transformers():
            _write_llava(model, partial)
        return
    assert isinstance(model, InstructBLIP | BLIP2)
    _check_holdable(model)
    with atomic_folder(folder, overwrite_if=SIDECAR if overwrite else None) as partial, quiet_transformers():
        if isinstance(model, BLIP2):
            target = retrieval_model(model, merge=merge)
            _write_retrieval(model, target, partial)
        else:
            tokenizer = _processor_tokenizer(model.llm)
            image_token = tokenizer.get_vocab()[_IMAGE_TOKEN]
            rows = max(model.llm.embeddings.weight.shape[0], image_token + 1)
            target = huggingface_model(model, rows, image_token, merge=merge)
            _write_with_llm(model, target, tokenizer, partial)
        _write_adapters(model, partial, merge=merge)
    _warn_about_eps(model, target.config)


def _write_adapters(model: Model, folder: Path, *, merge: bool) -> None:
    if model.adapters and not merge:
        whole_folder(model, layout_for(model).names).write(folder / ADAPTER_FOLDER)


def _write_with_llm(model: InstructBLIP, target: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    target.generation_config = GenerationConfig.from_model_config(target.config.text_config)
    target.save_pretrained(folder)
    processor = _processor(model, tokenizer)
    processor.save_pretrained(folder)
    # InstructBlipVideoProcessor looks for it here, and does not find it in processor_config.json.
    processor.image_processor.save_pretrained(folder)
    model.llm.prompt_format.tokenizer.save_pretrained(folder / LLM_TOKENIZER)
    said = {"llm_rows": model.llm.embeddings.weight.shape[0], "llm": llm_conventions(model.llm)}
    write_json(folder / SIDECAR, _sidecar(model, model.max_instruction_tokens) | said)
    _warn_about_text(model, folder)


def _write_llava(model: LLaVA, folder: Path) -> None:
    llm, tokenizer = model.llm, _llava_tokenizer(model.llm)
    image_token = tokenizer.get_vocab()[_IMAGE_TOKEN]
    rows = max(llm.embeddings.weight.shape[0], image_token + 1)
    target = llava_model(model, rows, image_token)
    target.generation_config = GenerationConfig.from_model_config(target.config.text_config)
    target.save_pretrained(folder)
    images, config = llava_image_processor(model.vision), target.config
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # [CLS], which the strategy may take away again
    ).save_pretrained(folder)
    images.save_pretrained(folder)
    llm.prompt_format.tokenizer.save_pretrained(folder / LLM_TOKENIZER)
    statistics = {"mean": model.vision.mean.flatten().tolist(), "std": model.vision.std.flatten().tolist()}
    conventions = llm_conventions(llm)
    said = {"llm_rows": llm.embeddings.weight.shape[0], "llm": conventions}
    write_json(folder / SIDECAR, {"format": SIDECAR_FORMAT, "vision": statistics, **said})
    logger.warning(
        "transformers' processor puts no text around the image and the prompt: there, write %r before <image>, %r after it "
        "and %r after the prompt yourself",
        *(around := around_image(tokenizer, conventions)),
    )
    _warn_about_ids(llm, tokenizer, around)


def _warn_about_ids(llm: LLM, tokenizer: PreTrainedTokenizerBase, around: tuple[str, str, str]) -> None:
    """Of a tokenizer that cuts a text with an image in it otherwise than its pieces."""
    before, after, behind = around
    found = tokenizer(f"{before}{_IMAGE_TOKEN}{after}a photo{behind}")["input_ids"]
    mark, form = tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN), llm.prompt_format
    own = [*form.image_prefix_ids, mark, *form.prompt_ids("a photo")]
    if found != own:
        logger.warning(
            "transformers' processor gives such a text the token ids %s where this model takes %s: there, set them "
            "yourself, or train with llm.image_in_text=true",
            found,
            own,
        )


def llava_model(model: LLaVA, rows: int, image_token: int) -> Any:
    """transformers' class with this model's tensors; arguments as of `huggingface_model`."""
    with empty_modules():
        target = LlavaForConditionalGeneration(llava_config(model, _text_config(model.llm, rows), image_token))
    tensors = llava_tensors(model, _llm_tensors(model.llm, rows, merge=True))
    return _filled(target, tensors, model.vision, model.llm.model.dtype)


def _llava_tokenizer(llm: LLM) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer that begins a text as the image prefix does, or with nothing, with `<image>` added."""
    tokenizer = copy.deepcopy(llm.prompt_format.tokenizer)
    vocabulary = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    tokenizer.pad_token = vocabulary[llm.prompt_format.pad_id]
    tokenizer.eos_token = vocabulary[llm.prompt_format.eos_id]
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    start, form = start_of(tokenizer), llm.prompt_format
    begins = [*form.image_prefix_ids, *form.prompt_ids("a photo")][:1]
    if start and begins != tokenizer.convert_tokens_to_ids([start]):
        tokenizer.add_bos_token = tokenizer.add_eos_token = False
    tokenizer.add_special_tokens({"additional_special_tokens": [_IMAGE_TOKEN]})
    return tokenizer


def _write_retrieval(model: BLIP2, target: Any, folder: Path) -> None:
    target.save_pretrained(folder)
    # Its constructor adds <image> to a tokenizer, for which the model has no row: it gets a copy, ours stands beside.
    Blip2Processor(_image_processor(model.vision), copy.deepcopy(model.tokenizer)).save_pretrained(folder)
    model.tokenizer.save_pretrained(folder / QFORMER_TOKENIZER)
    write_json(folder / SIDECAR, _sidecar(model, model.max_text_tokens))
    side = beside(without_adapters(model.part_state("qformer")), layout_for(model))
    save_file({name: tensor.contiguous() for name, tensor in side.items()}, folder / SIDE_TENSORS)
    logger.warning(
        "transformers' %s has no place for %s: %s beside its own files holds them",
        Blip2ForImageTextRetrieval.__name__,
        " and ".join(["the language-model head"] * (model.qformer.lm_head is not None) + ["the temperature"]),
        SIDE_TENSORS,
    )


def huggingface_model(model: InstructBLIP, rows: int, image_token: int, *, merge: bool = True) -> Any:
    """transformers' class with this model's tensors, shared where they keep their shape; for `save_pretrained`.

    What its constructor computes and no file holds (a language model's rotary frequencies) is on the meta device.

    Args:
        model: see `save_huggingface`.
        rows: of the token table and the output head, at least as many as there are.
        image_token: row that marks the places of visual tokens.
        merge: adapters into the weights; else they are left out.
    """
    with empty_modules():
        target = layout_for(model).model(_huggingface_config(model, rows, image_token))
    state = _own_tensors(model, merge=merge) | _llm_tensors(model.llm, rows, merge=merge)
    return _filled(target, state, model.vision, model.llm.model.dtype)


def retrieval_model(model: BLIP2, *, merge: bool = True) -> Any:
    """transformers' class of BLIP-2's first stage with this model's tensors, `merge` as above; for `save_pretrained`."""
    with empty_modules():
        target = Blip2ForImageTextRetrieval(_retrieval_config(model))
    return _filled(target, _own_tensors(model, merge=merge), model.vision, model.vision.dtype)


def _filled(target: Any, state: dict[str, Tensor], vision: VisionEncoder, dtype: torch.dtype) -> Any:
    """The empty model with these tensors, none wider than the frozen parts where that loses nothing."""
    dtype = torch.promote_types(vision.dtype, dtype)
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


def _check_holdable(model: InstructBLIP | BLIP2) -> None:
    reason = None
    backbone, norm = model.vision.backbone, model.vision_norm
    if not isinstance(backbone, Eva) or model.vision.layers or backbone.rope is not None:
        reason = f"the vision part is {type(backbone).__name__}, it holds EVA-CLIP's ViT and its last tokens only"
    elif not isinstance(norm, nn.LayerNorm):
        reason = f"the vision norm is {type(norm).__name__}, it holds a LayerNorm only"
    elif isinstance(model, InstructBLIP):
        reason = _unholdable_llm(model.llm, adapted="llm" in model.adapters)
    if reason is not None:
        raise UserError(f"transformers' {layout_for(model).title} cannot hold this model: {reason}")


def _check_llm(model: LLaVA) -> None:
    if (reason := _unholdable_llm(model.llm, adapted="llm" in model.adapters)) is not None:
        raise UserError(f"transformers' {layout_for(model).title} cannot hold this model: {reason}")


def _unholdable_llm(llm: LLM, *, adapted: bool) -> str | None:
    if not adapted and any(isinstance(module, QuantizedLinear) for module in llm.modules()):
        return "the language model is quantised; load it with llm.quantization=null"
    name, config = type(llm.model).__name__, llm.model.config
    if not hasattr(config, "hidden_size") or not hasattr(config, "vocab_size"):
        return f"{name} is no plain language model for its configuration"
    if config.hidden_size != llm.width:
        return (
            f"its visual tokens are as wide as the language model's layers ({config.hidden_size}), and this {name}'s "
            f"embeddings are not ({llm.width}); keep it as a run (--to native)"
        )
    return None


def _huggingface_config(model: InstructBLIP, rows: int, image_token: int) -> Any:
    qformer, reader = model.qformer, model.qformer_tokenizer
    config = InstructBlipConfig if qformer.instruction_aware else Blip2Config
    return config(
        vision_config=_vision_config(model.vision),
        qformer_config=qformer_config(qformer, None if reader is None else reader.pad_token_id),
        text_config=_text_config(model.llm, rows),
        num_query_tokens=qformer.query_tokens.shape[1],
        image_token_index=image_token,
    )


def _text_config(llm: LLM, rows: int) -> dict[str, Any]:
    text = copy.deepcopy(llm.model.config)
    text.vocab_size = rows
    text.eos_token_id, text.pad_token_id = llm.prompt_format.eos_id, llm.prompt_format.pad_id
    if llm.prompt_format.bos_ids:
        text.bos_token_id = llm.prompt_format.bos_ids[0]
    if isinstance(llm, EncoderDecoderLLM):
        return text.to_dict() | {"decoder_start_token_id": text.decoder_start_token_id}
    return text.to_dict()


def _retrieval_config(model: BLIP2) -> Any:
    """Without an `<image>` token: what the class reads are the texts alone."""
    qformer = qformer_config(model.qformer, model.tokenizer.pad_token_id)
    return Blip2Config(
        vision_config=_vision_config(model.vision),
        qformer_config=qformer | {"use_qformer_text_input": True},
        num_query_tokens=model.qformer.query_tokens.shape[1],
        image_text_hidden_size=model.vision_projection.out_features,
        image_token_index=None,
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
    reads = {"vocab_size": qformer.word_embeddings.num_embeddings} if qformer.instruction_aware else {}
    return {
        **reads,
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


def _own_tensors(model: InstructBLIP | BLIP2, *, merge: bool) -> dict[str, Tensor]:
    """All tensors but the language model's under transformers' names, those that it has a place for."""
    layout = layout_for(model)
    own = without_adapters({**backbone_state(model.vision), **model.part_state("qformer")})
    for prefix, module in {"vision.backbone": model.vision.backbone, "qformer": model.qformer}.items():
        own |= {f"{prefix}.{name}": tensor.detach() for name, tensor in plain_state(module, merge=merge).items()}
    side = beside(without_adapters(model.part_state("qformer")), layout)
    own = {name: tensor for name, tensor in own.items() if name not in side}
    names = foreign_names(own, layout.names)
    return pack_qkv_bias({names[name]: tensor for name, tensor in own.items()})


def _llm_tensors(llm: LLM, rows: int, *, merge: bool) -> dict[str, Tensor]:
    """The language model's tensors under transformers' names, the token tables filled up to `rows`."""
    state, old = {}, llm.embeddings.weight.shape[0]
    filled: dict[int, Tensor] = {}  # tied tables stay one tensor
    head = llm.model.get_output_embeddings()
    tables = {id(parameter) for part in (llm.embeddings, head) for parameter in part.parameters()}
    for name, parameter in plain_state(llm.model, merge=merge).items():
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


def _image_processor(vision: VisionEncoder) -> BlipImageProcessor:
    size = vision.image_size
    return BlipImageProcessor(
        size={"height": size, "width": size},
        image_mean=[value / 255 for value in vision.mean.flatten().tolist()],
        image_std=[value / 255 for value in vision.std.flatten().tolist()],
    )


def _processor(model: InstructBLIP, tokenizer: PreTrainedTokenizerBase) -> Any:
    tokenizers = (tokenizer,) if model.qformer_tokenizer is None else (tokenizer, model.qformer_tokenizer)
    queries = model.qformer.query_tokens.shape[1]
    return layout_for(model).processor(_image_processor(model.vision), *tokenizers, num_query_tokens=queries)


def _sidecar(model: InstructBLIP | BLIP2, max_text_tokens: int) -> dict[str, Any]:
    vision, norm = model.vision, model.vision_norm
    assert isinstance(norm, nn.LayerNorm)
    return {
        "format": SIDECAR_FORMAT,
        "vision": {
            "mean": vision.mean.flatten().tolist(),
            "std": vision.std.flatten().tolist(),
            "norm_eps": norm.eps,
        },
        "max_text_tokens": max_text_tokens,
    }


def _warn_about_text(model: InstructBLIP, folder: Path) -> None:
    llm = model.llm
    if llm.prompt_format.image_prefix or llm.prompt_format.prompt_prefix or llm.prompt_format.prompt_suffix:
        logger.warning(
            "transformers' processor puts no text around the visual tokens and the prompt: there, write %r before and %r "
            "after the image tokens and %r after the prompt yourself",
            llm.prompt_format.image_prefix,
            llm.prompt_format.prompt_prefix,
            llm.prompt_format.prompt_suffix,
        )
    processor = layout_for(model).processor.from_pretrained(folder, trust_remote_code=False)
    padded = processor(text=["a", "a photo"], padding=True)
    if isinstance(processor, InstructBlipProcessor) and padded["qformer_attention_mask"][0][0] == 0:
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


def _warn_about_eps(model: InstructBLIP | BLIP2, config: Any) -> None:
    eps = config.vision_config.layer_norm_eps
    assert isinstance(model.vision_norm, nn.LayerNorm)
    if model.vision_norm.eps != eps:
        logger.warning(
            "transformers computes ln_vision with an eps of %g, this model with %g: its outputs differ by that",
            eps,
            model.vision_norm.eps,
        )
