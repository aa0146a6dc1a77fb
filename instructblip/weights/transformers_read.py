"""InstructBLIP folders of transformers, read into this code's model.

A transformers folder cannot say everything: one eps serves all norms of its vision part, its processor knows no text around
the visual tokens and no limits, its token table may have grown by `<image>`. A folder that `huggingface_export.py` wrote has
`instructblip.json` and the language model's plain tokenizer (`llm_tokenizer/`) beside transformers' files, so that it is
read back as it was, tensor for tensor. One without them is read with the released model's values.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from instructblip.config.schema import LLMKind
from instructblip.errors import UserError
from instructblip.files import read_json
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import LLM
from instructblip.models.qformer import QFormer
from instructblip.models.vision import VisionEncoder
from instructblip.models.vocabulary import resize_vocabulary
from instructblip.weights.gatekeeper import (
    WEIGHT_FILES,
    check_kind,
    check_settings,
    check_weights,
    config_json,
    open_config,
    open_tokenizer,
    weight_files,
)
from instructblip.weights.language_model import finished_llm, language_model_class, load_language_model
from instructblip.weights.lavis import read_pth
from instructblip.weights.names import (
    HUGGINGFACE_LLM_PREFIX,
    LLM_TOKENIZER,
    SIDECAR,
    SIDECAR_FORMAT,
    backbone_state,
    check_tensors,
    foreign_names,
    is_ignored,
    unpack_qkv_bias,
)

logger = logging.getLogger(__name__)
BACKBONE = "eva_giant_patch14_clip_224"  # the architecture; sizes come from the folder
_QFORMER_TOKENIZER = "qformer_tokenizer"
_MAX_INSTRUCTION_TOKENS = 128  # as released


class Settings(NamedTuple):
    """What a transformers folder says besides its weights.

    Attributes:
        vision: arguments of `VisionEncoder`.
        vision_norm_eps: of `ln_vision`. transformers gives it the eps of all its vision norms, 1e-6 in the released folders,
            where LAVIS has 1e-5; a folder's weights were checked with the former, so it is kept.
        qformer: arguments of `QFormer`.
        max_instruction_tokens: limit of the Q-Former's text.
        llm_kind: of the language model.
        llm: text conventions, arguments of that class.
        llm_rows: rows of the token table that belong to the language model; `<image>` may have been added behind them.
    """

    vision: dict[str, Any]
    vision_norm_eps: float
    qformer: dict[str, Any]
    max_instruction_tokens: int
    llm_kind: LLMKind
    llm: dict[str, Any]
    llm_rows: int


def is_huggingface_folder(folder: Path) -> bool:
    """Whether a folder holds an InstructBLIP model of transformers."""
    return (folder / "config.json").is_file() and config_json(folder).get("model_type") == "instructblip"


def load_huggingface(folder: Path, *, llm: LLM | None = None) -> InstructBLIP:
    """Read a transformers folder, older (without the `<image>` token) or newer, sharded or not, safetensors or .bin.

    Frozen weights are mapped into memory and used as they lie in the files; trained ones are copied.

    Args:
        folder: the folder.
        llm: a language model in place of the folder's own. Where its width differs, the projection stays new.

    Raises:
        UserError: not such a folder, a tensor that is missing, unknown or of another shape, or a part that is not
            InstructBLIP's.
    """
    config, settings = read_transformers_config(folder), read_settings(folder)
    weights = read_weights(folder)
    vision = _load_vision(settings, weights, folder)
    own_llm = llm or _load_llm(config, settings, weights, folder)
    model = InstructBLIP(
        vision=vision,
        vision_norm=nn.LayerNorm(vision.width, eps=settings.vision_norm_eps),
        qformer=QFormer(vision_width=vision.width, **settings.qformer),
        qformer_tokenizer=load_qformer_tokenizer(folder),
        llm=own_llm,
        max_instruction_tokens=settings.max_instruction_tokens,
    )
    trained = model.part_state("qformer")
    others = {name: tensor for name, tensor in weights.items() if not name.startswith(HUGGINGFACE_LLM_PREFIX)}
    if own_llm.width != config.text_config.hidden_size:
        trained = {name: tensor for name, tensor in trained.items() if not name.startswith("projection.")}
        others = {name: tensor for name, tensor in others.items() if not name.startswith("language_projection.")}
    expected = foreign_names({**backbone_state(vision), **trained}, "huggingface")
    shapes = {name: tensor.shape for name, tensor in {**backbone_state(vision), **trained}.items()}
    check_tensors({expected[name]: shape for name, shape in shapes.items()}, others, str(folder))
    model.load_state_dict({name: others[expected[name]] for name in trained}, strict=False)
    return model.eval()


def read_transformers_config(folder: Path) -> Any:
    """A folder's config.json.

    Raises:
        UserError: it is missing, of another model, or of a folder that is not whole and plain.
    """
    if not is_huggingface_folder(folder):
        raise UserError(f"{folder} has no config.json of an InstructBLIP model; give a transformers folder or a hub id")
    check_settings(folder)
    return open_config(folder)


def read_settings(folder: Path) -> Settings:
    """All that a folder says besides its weights; `instructblip.json` counts where it is there.

    Raises:
        UserError: a part that is not InstructBLIP's, or files that are missing.
    """
    config = read_transformers_config(folder)
    said = read_json(folder / SIDECAR) if (folder / SIDECAR).is_file() else None
    if said is not None and said["format"] != SIDECAR_FORMAT:
        raise UserError(f"{folder / SIDECAR} is of format {said['format']}, this code reads {SIDECAR_FORMAT}")
    conventions = said["llm"] if said else _llm_conventions(folder, config)
    limit = min(_MAX_INSTRUCTION_TOKENS, config.qformer_config.max_position_embeddings)
    statistics = said["vision"] if said else _image_statistics(folder, config)
    return Settings(
        vision=_vision_arguments(config.vision_config, statistics, folder),
        vision_norm_eps=said["vision"]["norm_eps"] if said else config.vision_config.layer_norm_eps,
        qformer=_qformer_arguments(config, folder),
        max_instruction_tokens=said["max_instruction_tokens"] if said else limit,
        llm_kind="decoder" if config.use_decoder_only_language_model else "encoder_decoder",
        llm=conventions,
        llm_rows=said["llm_rows"] if said else config.text_config.vocab_size,
    )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder under transformers' names, mapped into memory; what means nothing here is left out.

    The vision part's `qkv.bias` comes in two pieces, `[query]` and `[value]`.

    Raises:
        UserError: no weights, a file that is missing or damaged, or one that lacks what the index says it has.
    """
    check_weights(folder)
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        weights |= _read_file(file)
    index = next(folder / name for name in WEIGHT_FILES if (folder / name).is_file())
    wanted = read_json(index)["weight_map"] if index.suffix == ".json" else {}
    lost = [tensor for tensor in wanted if tensor not in weights]
    if lost:
        raise UserError(f"{folder}: {index.name} names the tensor {lost[0]}, which no file has; fetch the whole model")
    return unpack_qkv_bias({name: tensor for name, tensor in weights.items() if not is_ignored(name, "huggingface")})


def load_qformer_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The Q-Former's tokenizer, which cuts long instructions on the left."""
    if not (folder / _QFORMER_TOKENIZER).is_dir():
        raise UserError(f"{folder} has no {_QFORMER_TOKENIZER}/; fetch the whole model, subfolders too")
    return open_tokenizer(folder / _QFORMER_TOKENIZER, truncation_side="left")


def load_llm_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The language model's tokenizer: without the `<image>` token where that was added by `save_huggingface`."""
    own = folder / LLM_TOKENIZER
    return open_tokenizer(own if own.is_dir() else folder)


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".bin":
        return read_pth(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a handle, not a dict
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it again") from None


def _vision_arguments(config: Any, said: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    image_size, patch_size = _one_number(config.image_size), _one_number(config.patch_size)
    if image_size is None or patch_size is None or config.hidden_act != "gelu":
        raise UserError(f"{folder}: vision_config is not that of a ViT on square images with gelu; it is another model")
    width, hidden_width = config.hidden_size, config.intermediate_size
    ratio = hidden_width / width
    options = {
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        # timm takes the whole part of width * ratio, which a quotient rounded down would miss by one.
        "mlp_ratio": ratio if int(width * ratio) == hidden_width else math.nextafter(ratio, math.inf),
    }
    if not config.qkv_bias:
        options["qkv_bias"] = False
    return {
        "backbone": BACKBONE,
        "image_size": image_size,
        "mean": said["mean"],
        "std": said["std"],
        "options": options,
        "final_norm": False,
    }


def _one_number(size: Any) -> int | None:
    sides = {size} if isinstance(size, int) else set(size)
    return sides.pop() if len(sides) == 1 else None


def _image_statistics(folder: Path, config: Any) -> dict[str, list[float]]:
    """Mean and deviation on the 0..255 scale, from the image processor's file."""
    if (folder / "preprocessor_config.json").is_file():
        found = read_json(folder / "preprocessor_config.json")
    else:
        found = read_json(folder / "processor_config.json").get("image_processor", {})
    if not {"image_mean", "image_std"} <= found.keys():
        raise UserError(
            f"{folder} does not say how images are normalised (preprocessor_config.json); fetch the whole model"
        )
    size, wanted = found.get("size", {}), _one_number(config.vision_config.image_size)
    if {size.get("height", wanted), size.get("width", wanted)} != {wanted}:
        raise UserError(f"{folder}: the image processor gives images of {size}, the vision part takes {wanted} pixels")
    # In float32, as transformers does it, to the last bit.
    levels = 1 / found.get("rescale_factor", 1 / 255)
    return {
        "mean": (torch.tensor(found["image_mean"]) * levels).tolist(),
        "std": (torch.tensor(found["image_std"]) * levels).tolist(),
    }


def _qformer_arguments(config: Any, folder: Path) -> dict[str, Any]:
    qformer = config.qformer_config
    if qformer.hidden_act != "gelu" or qformer.hidden_dropout_prob != qformer.attention_probs_dropout_prob:
        raise UserError(f"{folder}: qformer_config has not BERT's gelu and one rate of dropout; it is another model")
    return {
        "vocab_size": qformer.vocab_size,
        "width": qformer.hidden_size,
        "layers": qformer.num_hidden_layers,
        "heads": qformer.num_attention_heads,
        "hidden_width": qformer.intermediate_size,
        "queries": config.num_query_tokens,
        "cross_attention_every": qformer.cross_attention_frequency,
        "max_text_tokens": qformer.max_position_embeddings,
        "dropout": qformer.hidden_dropout_prob,
        "norm_eps": qformer.layer_norm_eps,
    }


def _llm_conventions(folder: Path, config: Any) -> dict[str, Any]:
    """Special tokens as the folder's own tokenizer sets them: `</s>` before a text for Vicuna, none for T5."""
    tokenizer = open_tokenizer(folder)
    plain = tokenizer("a photo", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a photo")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
    if tokenizer.eos_token is None or start is None or start > 1:
        raise UserError(f"{folder}: the tokenizer must have an EOS token and put at most one token before a text")
    return {
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token or tokenizer.eos_token,
        "bos_token": tokenizer.convert_ids_to_tokens(whole[0]) if start else None,
    }


def _load_vision(settings: Settings, weights: Mapping[str, Tensor], folder: Path) -> VisionEncoder:
    """Built without memory of its own; its parameters are the file's."""
    with torch.device("meta"):
        vision = VisionEncoder(**settings.vision)
    state = backbone_state(vision)
    names = foreign_names(state, "huggingface")
    found = {name: weights[name] for name in names.values() if name in weights}
    check_tensors({names[name]: tensor.shape for name, tensor in state.items()}, found, str(folder))
    vision.to_empty(device="cpu")
    vision.load_state_dict({name.removeprefix("vision."): found[names[name]] for name in state}, assign=True)
    for module in vision.modules():
        if isinstance(module, EvaAttention) and module.k_bias is not None:
            module.k_bias.zero_()  # a buffer that no file has
    vision.mean.copy_(torch.tensor(settings.vision["mean"]).view_as(vision.mean))
    vision.std.copy_(torch.tensor(settings.vision["std"]).view_as(vision.std))
    vision.to(_widest(found.values()))  # buffers with the weights
    eps = read_transformers_config(folder).vision_config.layer_norm_eps
    if vision.backbone.blocks[0].norm1.eps != eps:
        raise UserError(
            f"{folder}: vision norms with an eps of {eps}; EVA-CLIP's is {vision.backbone.blocks[0].norm1.eps}"
        )
    return vision


def _load_llm(config: Any, settings: Settings, weights: Mapping[str, Tensor], folder: Path) -> LLM:
    state = {
        name.removeprefix(HUGGINGFACE_LLM_PREFIX): tensor
        for name, tensor in weights.items()
        if name.startswith(HUGGINGFACE_LLM_PREFIX)
    }
    if not state:
        raise UserError(f"{folder} has no {HUGGINGFACE_LLM_PREFIX}* tensors; fetch the whole model")
    check_kind(config.text_config, settings.llm_kind, f"{folder}: ")
    model = load_language_model(
        settings.llm_kind,
        config.text_config,
        state,
        dtype=_llm_dtype(language_model_class(settings.llm_kind, config.text_config), state),
        folder=folder,
        prefix=HUGGINGFACE_LLM_PREFIX,
    )
    if settings.llm_rows < model.get_input_embeddings().weight.shape[0]:
        resize_vocabulary(model, settings.llm_rows)
    llm = finished_llm(settings.llm_kind, model, load_llm_tokenizer(folder), settings.llm, f"{folder}: ")
    llm.abilities = replace(llm.abilities, embedding_factor=1.0)  # transformers' class looks prompts up without it
    return llm


def _llm_dtype(kind: Any, state: Mapping[str, Tensor]) -> torch.dtype:
    """The type to hold a language model in: that of its tensors, besides those that transformers keeps in float32."""
    others = _widest(tensor for name, tensor in state.items() if not kept_in_float32(kind, name))
    # In any other type transformers would round what it keeps in float16's company.
    return others if others == torch.float16 else _widest(state.values())


def kept_in_float32(kind: Any, name: str) -> bool:
    """Whether transformers holds a tensor of this class in float32 where the model is in float16: T5's `wo`, for one."""
    # Like transformers, which takes any part of a name: beside a T5 the Q-Former's word_embeddings stay as well.
    return any(part in name for part in kind._keep_in_fp32_modules or ())


def _widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The narrowest type that holds every value of all floating-point tensors."""
    return reduce(
        torch.promote_types, {tensor.dtype for tensor in tensors if tensor.is_floating_point()} or {torch.float32}
    )
