"""transformers' folders of InstructBLIP and BLIP-2, read into this code's models."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from instructblip.errors import UserError
from instructblip.files import read_json
from instructblip.models.blip2 import BLIP2
from instructblip.models.empty import empty_modules
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import LLM
from instructblip.models.qformer import QFormer
from instructblip.models.vision import VisionEncoder
from instructblip.models.vocabulary import resize_vocabulary
from instructblip.weights.gatekeeper import (
    MODEL_TYPES,
    WEIGHT_FILES,
    check_kind,
    check_weights,
    config_json,
    weight_files,
)
from instructblip.weights.language_model import finished_llm, language_model_class, load_language_model
from instructblip.weights.lavis import read_pth
from instructblip.weights.names import (
    HUGGINGFACE_LLM_PREFIX,
    SIDE_TENSORS,
    backbone_state,
    check_tensors,
    foreign_names,
    has_place,
    is_ignored,
    pack_clip,
    unpack_qkv_bias,
)
from instructblip.weights.transformers_layout import layout_of
from instructblip.weights.transformers_settings import (
    LLMSettings,
    Settings,
    load_llm_tokenizer,
    load_qformer_tokenizer,
    read_settings,
    read_transformers_config,
    tower_layers,
)

logger = logging.getLogger(__name__)
_LM_HEAD = "qformer.lm_head."


def is_huggingface_folder(folder: Path) -> bool:
    """Whether a folder holds a model of transformers that is read as a whole."""
    return (folder / "config.json").is_file() and config_json(folder).get("model_type") in MODEL_TYPES


def load_huggingface(folder: Path, *, llm: LLM | None = None) -> InstructBLIP | BLIP2:
    """Read a transformers folder, older (without the `<image>` token) or newer, sharded or not, safetensors or .bin.

    Frozen weights are mapped into memory and used as they lie in the files; trained ones are copied.

    Args:
        folder: of InstructBLIP, or of one of BLIP-2's stages.
        llm: a language model in place of the folder's own. Where its width differs, the projection stays new.

    Raises:
        UserError: not such a folder, a tensor that is missing, unknown or of another shape, or a part that is not that of
            the model; a language model for BLIP-2's first stage, which has none.
    """
    settings, weights = read_settings(folder), read_weights(folder)
    vision = _load_vision(settings, weights, folder)
    if settings.llm is None:
        if llm is not None:
            raise UserError(f"{folder} is BLIP-2's first stage, which has no language model; leave llm= out")
        return _load_stage1(settings, vision, weights, folder)
    config = read_transformers_config(folder)
    own_llm = llm or load_own_llm(config, settings.llm, weights, folder)
    model = InstructBLIP(
        vision=vision,
        vision_norm=nn.LayerNorm(vision.width, eps=settings.vision_norm_eps),
        qformer=QFormer(vision_width=vision.width, **settings.qformer),
        qformer_tokenizer=load_qformer_tokenizer(folder, settings),
        llm=own_llm,
        max_instruction_tokens=settings.max_text_tokens,
    )
    trained = model.part_state("qformer")
    others = {name: tensor for name, tensor in weights.items() if not name.startswith(HUGGINGFACE_LLM_PREFIX)}
    if own_llm.width != config.text_config.hidden_size:
        trained = {name: tensor for name, tensor in trained.items() if not name.startswith("projection.")}
        others = {name: tensor for name, tensor in others.items() if not name.startswith("language_projection.")}
    _fill(model, trained, others, folder)
    return model.eval()


def _load_stage1(settings: Settings, vision: VisionEncoder, weights: Mapping[str, Tensor], folder: Path) -> BLIP2:
    """BLIP-2's first stage; without its side file it has no language-model head, and the temperature of a new model."""
    side = read_side_tensors(folder)
    tokenizer = load_qformer_tokenizer(folder, settings)
    assert tokenizer is not None
    head = any(name.startswith(_LM_HEAD) for name in side)
    try:
        model = BLIP2(
            vision=vision,
            vision_norm=nn.LayerNorm(vision.width, eps=settings.vision_norm_eps),
            qformer=QFormer(vision_width=vision.width, text_outputs=True, language_model_head=head, **settings.qformer),
            tokenizer=tokenizer,
            feature_width=settings.feature_width,
            max_text_tokens=settings.max_text_tokens,
        )
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None
    trained = model.part_state("qformer")
    own = {name: tensor.shape for name, tensor in trained.items() if not has_place(name, "huggingface_blip2")}
    if side:
        check_tensors(own, side, str(folder / SIDE_TENSORS))
        model.load_state_dict(side, strict=False)
    _fill(model, {name: tensor for name, tensor in trained.items() if name not in own}, weights, folder)
    return model.eval()


def _fill(
    model: InstructBLIP | BLIP2, trained: Mapping[str, Tensor], others: Mapping[str, Tensor], folder: Path
) -> None:
    """Copy trained tensors from a folder's, after all but the language model's were compared one to one."""
    own = {**backbone_state(model.vision), **trained}
    expected = foreign_names(own, layout_of(folder).names)
    check_tensors({expected[name]: tensor.shape for name, tensor in own.items()}, others, str(folder))
    model.load_state_dict({name: others[expected[name]] for name in trained}, strict=False)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder under transformers' names, mapped into memory; what means nothing here is left out.

    The `qkv.bias` of an EVA-CLIP comes in two pieces, `[query]` and `[value]`.

    Raises:
        UserError: no weights, a file that is missing or damaged, or one that lacks what the index says it has.
    """
    check_weights(folder)
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        weights |= _read_file(file)
    index = next(folder / name for name in WEIGHT_FILES if (folder / name).is_file())
    wanted = read_json(index)["weight_map"] if index.suffix == ".json" else {}
    form = layout_of(folder).names
    lost = [tensor for tensor in wanted if tensor not in weights]
    if lost:
        raise UserError(f"{folder}: {index.name} names the tensor {lost[0]}, which no file has; fetch the whole model")
    if form == "huggingface_llava":
        weights = _of_layers(pack_clip(weights), tower_layers(read_transformers_config(folder), folder))
        return {name: tensor for name, tensor in weights.items() if not is_ignored(name, form)}
    known = {name: tensor for name, tensor in weights.items() if not is_ignored(name, form)}
    return known if form == "huggingface_blip" else unpack_qkv_bias(known)  # a plain ViT has a key bias


def _of_layers(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Without the layers of a tower behind the last that is read."""
    number = re.compile(r"vision_tower\.encoder\.layers\.(\d+)\.")
    found = ((name, tensor, number.match(name)) for name, tensor in weights.items())
    return {name: tensor for name, tensor, layer in found if layer is None or int(layer[1]) < layers}


def read_side_tensors(folder: Path) -> dict[str, Tensor]:
    """What `save_huggingface` wrote beside transformers' own files, under this code's names; empty where there is nothing.

    Raises:
        UserError: a damaged file.
    """
    file = folder / SIDE_TENSORS
    return _read_file(file) if file.is_file() else {}


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".bin":
        return read_pth(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a handle, not a dict
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it again") from None


def load_own_vision(values: Mapping[str, Any], weights: Mapping[str, Tensor], folder: Path) -> VisionEncoder:
    """The vision encoder of a folder, built without memory of its own: its parameters are the file's.

    Args:
        values: arguments of `VisionEncoder`; `mean` and `std` are copied again, since buffers lose theirs on the way.
        weights: of the folder, by its own names.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    with empty_modules():
        vision = VisionEncoder(**values)
    state = backbone_state(vision)
    names = foreign_names(state, layout_of(folder).names)
    found = {name: weights[name] for name in names.values() if name in weights}
    check_tensors({names[name]: tensor.shape for name, tensor in state.items()}, found, str(folder))
    vision.to_empty(device="cpu")
    vision.load_state_dict({name.removeprefix("vision."): found[names[name]] for name in state}, assign=True)
    for module in vision.modules():
        if isinstance(module, EvaAttention) and module.k_bias is not None:
            module.k_bias.zero_()  # a buffer that no file has
    vision.mean.copy_(torch.tensor(values["mean"]).view_as(vision.mean))
    vision.std.copy_(torch.tensor(values["std"]).view_as(vision.std))
    return vision.to(widest(found.values()))  # buffers with the weights


def _load_vision(settings: Settings, weights: Mapping[str, Tensor], folder: Path) -> VisionEncoder:
    vision = load_own_vision(settings.vision, weights, folder)
    eps = read_transformers_config(folder).vision_config.layer_norm_eps
    if vision.backbone.blocks[0].norm1.eps != eps:
        raise UserError(
            f"{folder}: vision norms with an eps of {eps}; EVA-CLIP's is {vision.backbone.blocks[0].norm1.eps}"
        )
    return vision


def load_own_llm(config: Any, settings: LLMSettings, weights: Mapping[str, Tensor], folder: Path) -> LLM:
    """The language model of a folder.

    Raises:
        UserError: it is missing, or of another kind than it is said to be.
    """
    state = {
        name.removeprefix(HUGGINGFACE_LLM_PREFIX): tensor
        for name, tensor in weights.items()
        if name.startswith(HUGGINGFACE_LLM_PREFIX)
    }
    if not state:
        raise UserError(f"{folder} has no {HUGGINGFACE_LLM_PREFIX}* tensors; fetch the whole model")
    check_kind(config.text_config, settings.kind, f"{folder}: ")
    model = load_language_model(
        settings.kind,
        config.text_config,
        state,
        dtype=_llm_dtype(language_model_class(settings.kind, config.text_config), state),
        folder=folder,
        prefix=HUGGINGFACE_LLM_PREFIX,
    )
    if settings.rows < model.get_input_embeddings().weight.shape[0]:
        resize_vocabulary(model, settings.rows)
    llm = finished_llm(settings.kind, model, load_llm_tokenizer(folder), settings.conventions, f"{folder}: ")
    llm.abilities = replace(llm.abilities, embedding_factor=1.0)  # transformers' class looks prompts up without it
    return llm


def _llm_dtype(kind: Any, state: Mapping[str, Tensor]) -> torch.dtype:
    """The type to hold a language model in: that of its tensors, besides those that transformers keeps in float32."""
    others = widest(tensor for name, tensor in state.items() if not kept_in_float32(kind, name))
    # In any other type transformers would round what it keeps in float16's company.
    return others if others == torch.float16 else widest(state.values())


def kept_in_float32(kind: Any, name: str) -> bool:
    """Whether transformers holds a tensor of this class in float32 where the model is in float16: T5's `wo`, for one."""
    # Like transformers, which takes any part of a name: beside a T5 the Q-Former's word_embeddings stay as well.
    return any(part in name for part in kind._keep_in_fp32_modules or ())


def widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The narrowest type that holds every value of all floating-point tensors."""
    return reduce(
        torch.promote_types, {tensor.dtype for tensor in tensors if tensor.is_floating_point()} or {torch.float32}
    )
