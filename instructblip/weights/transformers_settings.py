"""All that a transformers folder says of a model besides its weights.

It cannot say everything: one eps serves all norms of its vision part, its processor knows no text around the visual tokens
and no limits, its token table may have grown by `<image>`. A folder that `transformers_write.py` wrote has
`instructblip.json` and the plain tokenizers beside transformers' files, so that it is read back as it was, tensor for
tensor. One without them is read with the released models' values.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from PIL.Image import Resampling
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from instructblip.config.schema import LLMKind, ModelKind
from instructblip.errors import UserError
from instructblip.files import read_json
from instructblip.models.llm import LLM
from instructblip.weights.gatekeeper import check_settings, open_config, open_tokenizer
from instructblip.weights.names import LLM_TOKENIZER, QFORMER_TOKENIZER, SIDECAR, SIDECAR_FORMAT
from instructblip.weights.transformers_layout import layout_of

logger = logging.getLogger(__name__)

BACKBONE = "eva_giant_patch14_clip_224"  # the architecture; sizes come from the folder
_MAX_TEXT_TOKENS: dict[ModelKind, int] = {"instructblip": 128, "blip2": 128, "blip2_stage1": 32}  # as released


class LLMSettings(NamedTuple):
    """What a folder says of its language model.

    Attributes:
        kind: of the language model.
        conventions: of its text, arguments of that class.
        rows: rows of the token table that belong to it; `<image>` may have been added behind them.
    """

    kind: LLMKind
    conventions: dict[str, Any]
    rows: int


class Settings(NamedTuple):
    """What a transformers folder says besides its weights.

    Attributes:
        kind: of the model.
        vision: arguments of `VisionEncoder`.
        vision_norm_eps: of `ln_vision`. transformers gives it the eps of all its vision norms, 1e-6 in the released folders,
            where LAVIS has 1e-5; a folder's weights were checked with the former, so it is kept.
        qformer: arguments of `QFormer`.
        max_text_tokens: limit of the Q-Former's text.
        feature_width: of the features that image and text are contrasted by; of BLIP-2's first stage.
        llm: None for BLIP-2's first stage.
    """

    kind: ModelKind
    vision: dict[str, Any]
    vision_norm_eps: float
    qformer: dict[str, Any]
    max_text_tokens: int
    feature_width: int
    llm: LLMSettings | None


def read_transformers_config(folder: Path) -> Any:
    """A folder's config.json.

    Raises:
        UserError: it is missing, of another model, or of a folder that is not whole and plain.
    """
    layout_of(folder)
    check_settings(folder)
    return open_config(folder)


def read_settings(folder: Path) -> Settings:
    """All that a folder says besides its weights; `instructblip.json` counts where it is there.

    Raises:
        UserError: a part that is not that of InstructBLIP or BLIP-2, or files that are missing.
    """
    config, kind = read_transformers_config(folder), layout_of(folder).kind
    said = read_json(folder / SIDECAR) if (folder / SIDECAR).is_file() else None
    if said is not None and said["format"] != SIDECAR_FORMAT:
        raise UserError(f"{folder / SIDECAR} is of format {said['format']}, this code reads {SIDECAR_FORMAT}")
    limit = min(_MAX_TEXT_TOKENS[kind], config.qformer_config.max_position_embeddings)
    statistics = said["vision"] if said else image_statistics(folder, config)
    return Settings(
        kind=kind,
        vision=_vision_arguments(config.vision_config, statistics, folder),
        vision_norm_eps=said["vision"]["norm_eps"] if said else config.vision_config.layer_norm_eps,
        qformer=_qformer_arguments(config, kind, folder),
        max_text_tokens=said["max_text_tokens"] if said else limit,
        feature_width=getattr(config, "image_text_hidden_size", 0),
        llm=None if kind == "blip2_stage1" else _llm_settings(folder, config, kind, said),
    )


def load_qformer_tokenizer(folder: Path, settings: Settings) -> PreTrainedTokenizerBase | None:
    """The Q-Former's tokenizer; None where it reads no text.

    InstructBLIP's cuts long instructions on the left. That of BLIP-2's first stage is the folder's own, unless
    `save_huggingface` wrote another.

    Raises:
        UserError: there is none.
    """
    inside = folder / QFORMER_TOKENIZER
    if settings.kind == "blip2":
        return None
    if settings.kind == "instructblip" and not inside.is_dir():
        raise UserError(f"{folder} has no {QFORMER_TOKENIZER}/; fetch the whole model, subfolders too")
    if settings.kind == "instructblip":
        return _padding_behind(open_tokenizer(inside, truncation_side="left"))
    own = open_tokenizer(inside if inside.is_dir() else folder)
    return _padding_behind(_of_rows(own, settings.qformer["vocab_size"]))


def _padding_behind(tokenizer: Any) -> PreTrainedTokenizerBase:
    """A text's tokenizer as it is written again: a processor that pads prompts on the left may have marked it so."""
    if tokenizer.padding_side != "right":
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right"
    return tokenizer


def _of_rows(tokenizer: Any, rows: int) -> PreTrainedTokenizerBase:
    """Without the tokens that a table of so many rows has none for: `Blip2Processor` adds `<image>` to any tokenizer."""
    surplus = {token for token, token_id in tokenizer.get_vocab().items() if token_id >= rows}
    if not surplus:
        return tokenizer
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] not in surplus]
    roles = {role: token for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), **roles)


def load_llm_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The language model's tokenizer: without the `<image>` token where that was added by `save_huggingface`."""
    own = folder / LLM_TOKENIZER
    return open_tokenizer(own if own.is_dir() else folder)


def _vision_arguments(config: Any, said: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    image_size, patch_size = one_number(config.image_size), one_number(config.patch_size)
    if image_size is None or patch_size is None or config.hidden_act != "gelu":
        raise UserError(f"{folder}: vision_config is not that of a ViT on square images with gelu; it is another model")
    width = config.hidden_size
    options = {
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": ratio_of(width, config.intermediate_size),
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


def tower_layers(config: Any, folder: Path) -> int:
    """How many layers of its CLIP a LLaVA reads: those up to `vision_feature_layer`, which counts the embeddings as 0.

    Raises:
        UserError: it reads several, or one that is not there.
    """
    chosen, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    read = chosen + layers + 1 if isinstance(chosen, int) and chosen < 0 else chosen
    if not isinstance(read, int) or not 1 <= read <= layers:
        raise UserError(
            f"{folder}: vision_feature_layer={chosen} is no single one of CLIP's {layers} layers; such a model is not read"
        )
    return read


def ratio_of(width: int, hidden_width: int) -> float:
    """The ratio from which timm makes a feed-forward of that hidden width."""
    ratio = hidden_width / width
    # timm takes the whole part of width * ratio, which a quotient rounded down would miss by one.
    return ratio if int(width * ratio) == hidden_width else math.nextafter(ratio, math.inf)


def one_number(size: Any) -> int | None:
    """The side of a square, which transformers writes as a number or a pair."""
    sides = {size} if isinstance(size, int) else set(size)
    return sides.pop() if len(sides) == 1 else None


def image_processor_settings(folder: Path) -> dict[str, Any]:
    """What a folder says of its image processor, of two files in that which transformers takes: the newer one first.

    Empty where there is none. A null is nothing said, but of what is done: there it is a no, as for transformers.
    """
    for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        said = read_json(folder / name) if (folder / name).is_file() else {}
        if found := said if key is None else said.get(key):
            return {name: value for name, value in found.items() if value is not None or name.startswith("do_")}
    return {}


def image_statistics(
    folder: Path, config: Any, *, crops: bool = False, usual: Mapping[str, Sequence[float]] = MappingProxyType({})
) -> dict[str, list[float]]:
    """Mean and deviation on the 0..255 scale, from the image processor's file.

    Args:
        folder, config: a folder, and its config.json.
        crops: the middle is cut out of pictures here; else they are squashed.
        usual: `image_mean` and `image_std` where the file says none.

    Raises:
        UserError: neither says any, or images of another size are prepared.
    """
    found = {**usual, **image_processor_settings(folder)}
    normalises = found.get("do_normalize", True)
    if normalises and not {"image_mean", "image_std"} <= found.keys():
        raise UserError(
            f"{folder} does not say how images are normalised (preprocessor_config.json); fetch the whole model"
        )
    _check_fit(folder, found, one_number(config.vision_config.image_size), crops=crops)
    if (resample := found.get("resample", Resampling.BICUBIC)) != Resampling.BICUBIC:
        logger.warning(
            "%s: its image processor resizes by Pillow's filter %s, this code by the bicubic one: answers may differ",
            folder,
            resample,
        )
    mean, std = (found["image_mean"], found["image_std"]) if normalises else ([0.0] * 3, [1.0] * 3)
    # In float32, as transformers does it, to the last bit.
    levels = 1 / found.get("rescale_factor", 1 / 255) if found.get("do_rescale", True) else 1.0
    return {"mean": (torch.tensor(mean) * levels).tolist(), "std": (torch.tensor(std) * levels).tolist()}


def _check_fit(folder: Path, found: Mapping[str, Any], wanted: int | None, *, crops: bool) -> None:
    """Refuse images of another size than the vision part's, and say how else a processor comes to such ones."""
    size = found.get("size", {})
    cuts = found.get("do_center_crop", crops)
    given = found.get("crop_size", {}) if cuts else size
    if _sides(given, wanted) != {wanted}:
        raise UserError(f"{folder}: the image processor gives images of {given}, the vision part takes {wanted} pixels")
    here = "cuts the middle out of a picture" if crops else "squashes a picture to a square"
    others = {
        f"resizes to {size} before it cuts the middle out": cuts and _sides(size, wanted) != {wanted},
        "does not cut the middle out": crops and not cuts,
        "squashes a picture to a square": crops and cuts and _squashes(size),
        "pads a picture": found.get("do_pad", False) and _pads(found),
    }
    for other, applies in others.items():
        if applies:
            logger.warning("%s: its image processor %s, this code %s: answers may differ", folder, other, here)


def _squashes(size: Any) -> bool:
    """Whether both sides are named: a number is the shorter one of a processor that cuts."""
    return not isinstance(size, int) and (not isinstance(size, dict) or {"height", "width"} <= size.keys())


def _pads(found: Mapping[str, Any]) -> bool:
    """Whether padding would show: LLaVA's makes a square; others' makes those of a batch alike, as resizing has."""
    return "pad_size" in found or str(found.get("image_processor_type")).startswith("LlavaImageProcessor")


def _sides(size: Any, wanted: int | None) -> set[int | None]:
    """Those that a processor's size names, or its one edge; `wanted` where it names none."""
    if not isinstance(size, dict):
        return {one_number(size)}
    edge = size.get("shortest_edge", wanted)
    return {size.get("height", edge), size.get("width", edge)}


def _qformer_arguments(config: Any, kind: ModelKind, folder: Path) -> dict[str, Any]:
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
        "instruction_aware": kind != "blip2",
    }


def _llm_settings(folder: Path, config: Any, kind: ModelKind, said: Mapping[str, Any] | None) -> LLMSettings:
    return LLMSettings(
        kind="decoder" if config.use_decoder_only_language_model else "encoder_decoder",
        conventions=said["llm"] if said else _llm_conventions(folder, config, kind),
        rows=said["llm_rows"] if said else config.text_config.vocab_size,
    )


def _llm_conventions(folder: Path, config: Any, kind: ModelKind) -> dict[str, Any]:
    """Special tokens as the folder's own tokenizer sets them: `</s>` before a text for Vicuna and OPT, none for T5."""
    tokenizer = open_tokenizer(folder)
    plain = tokenizer("a photo", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a photo")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
    if tokenizer.eos_token is None or start is None or start > 1:
        raise UserError(f"{folder}: the tokenizer must have an EOS token and put at most one token before a text")
    conventions = {
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token or tokenizer.eos_token,
        "bos_token": tokenizer.convert_ids_to_tokens(whole[0]) if start else None,
    }
    if kind == "blip2":
        # BLIP-2's OPT models end a caption with a newline, which their configuration alone says.
        end = config.text_config.eos_token_id
        known = isinstance(end, int) and end < len(tokenizer)
        conventions["eos_token"] = tokenizer.convert_ids_to_tokens(end) if known else tokenizer.eos_token
        conventions["answer_prefix"] = between_words(tokenizer)
    return conventions


def between_words(tokenizer: Any) -> str:
    """What has to stand before a text that continues another: a space, unless the tokenizer puts one before every text."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return "" if ids("a photo") == ids("a") + ids("photo") else " "


def llm_conventions(llm: LLM) -> dict[str, Any]:
    """The text conventions of a language model, as arguments of its class."""
    form = llm.prompt_format
    vocabulary = {token_id: token for token, token_id in form.tokenizer.get_vocab().items()}
    return {
        "eos_token": vocabulary[form.eos_id],
        "pad_token": vocabulary[form.pad_id],
        "bos_token": vocabulary[form.bos_ids[0]] if form.bos_ids else None,
        "image_prefix": form.image_prefix,
        "prompt_prefix": form.prompt_prefix,
        "prompt_suffix": form.prompt_suffix,
        "answer_prefix": form.answer_prefix,
        "image_in_text": form.image_in_text,
        "supervise_bos": form.supervise_bos,
        "max_prompt_tokens": form.max_prompt_tokens,
        "max_target_tokens": form.max_target_tokens,
    }
