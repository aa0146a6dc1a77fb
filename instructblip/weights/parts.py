"""From a validated configuration to a model: three parts by name, put together in the open.

The only place that reads the `vision`, `qformer` and `llm` sections.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import AddedToken
from torch import Tensor, nn

from instructblip.config.schema import LLMConfig, QFormerConfig, Quantization, VisionConfig, VisionNorm
from instructblip.errors import UserError
from instructblip.fetch.parts import part_folder, sources
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import LLM
from instructblip.models.qformer import QFormer
from instructblip.models.quantized import QuantizedLinear, quantize_linears
from instructblip.models.vision import ChannelNorm, VisionEncoder
from instructblip.models.vocabulary import resize_vocabulary
from instructblip.weights.bert import (
    draw_query_tokens_near,
    initialize_like_bert,
    names_unknown_to_bert,
    qformer_state_from_bert,
)
from instructblip.weights.gatekeeper import (
    check_content,
    check_kind,
    check_language_model,
    check_vocabulary,
    check_weight_file,
    config_json,
    open_config,
    open_tokenizer,
    reason,
)
from instructblip.weights.language_model import finished_llm, load_language_model
from instructblip.weights.lavis import read_blip2, read_pth
from instructblip.weights.modules import make_qformer, override_settings, vision_encoder
from instructblip.weights.names import check_tensors
from instructblip.weights.position import resize_position_embedding

logger = logging.getLogger(__name__)

VISION_NORMS: dict[VisionNorm, Callable[[int, float], nn.Module]] = {
    "layer": lambda width, eps: nn.LayerNorm(width, eps=eps),
    "channel": lambda width, _eps: ChannelNorm(width),
}


def build_model(
    vision: VisionConfig,
    qformer: QFormerConfig,
    llm: LLMConfig,
    *,
    seed: int,
    trained: Collection[str] = ("qformer",),
) -> InstructBLIP:
    """Fetch the three parts and assemble them; what is new starts from `seed`, and `trained` parts are to train.

    Raises:
        UserError: a part cannot be fetched, or its settings do not fit its files.
    """
    encoder = load_vision(vision)
    language = load_llm(llm)
    torch.manual_seed(seed)
    trainable, tokenizer = load_qformer(qformer, vision_width=encoder.width)
    norm = VISION_NORMS[vision.norm](encoder.width, vision.norm_eps)
    projection: dict[str, Tensor] = {}
    if qformer.init == "blip2":
        projection = _start_from_blip2(qformer, trainable, norm, llm_width=language.width, llm=llm)
    model = InstructBLIP(
        vision=encoder,
        vision_norm=norm,
        qformer=trainable,
        qformer_tokenizer=tokenizer,
        llm=language,
        max_instruction_tokens=qformer.max_instruction_tokens,
    )
    train_parts(model, trained)
    if projection:
        model.projection.load_state_dict(projection)
    return model


def train_parts(model: InstructBLIP, trained: Collection[str]) -> None:
    """Choose what trains. It is held in float32: half precision would round small updates away.

    Raises:
        UserError: a language model whose weights are rounded is to train.
    """
    if "llm" in trained and any(isinstance(module, QuantizedLinear) for module in model.llm.modules()):
        raise UserError(
            "train.llm=full needs the LLM's own weights; leave llm.quantization out, or set train.llm=frozen"
        )
    model.choose_trained(trained)
    for part in trained:
        for module in model.part_modules(part):
            module.float()


# --- vision ----------------------------------------------------------------------------------------------------------


def load_vision(config: VisionConfig) -> VisionEncoder:
    """The frozen image encoder with its weights: those of a folder's model.safetensors, or of a file under timm's names.

    Positions are resized to the configured image size. A file may hold more than is built: its classification head, the
    last norm where `final_norm` is false, and the blocks past `options.depth`.
    """
    file, encoder = _vision_file(config), vision_encoder(config)
    weights = _vision_weights(file)
    _fit_positions(encoder.backbone, weights)
    load_exactly(encoder.backbone, weights, str(file), surplus_ok=_not_built(encoder.backbone, config))
    return encoder


def _vision_file(config: VisionConfig) -> Path:
    path = None if config.sources.path is None else Path(config.sources.path).expanduser()
    if path is not None and path.suffix in (".safetensors", ".pth"):
        return path
    return part_folder(sources(config.name, config.sources), setting="vision.sources.path") / "model.safetensors"


def _vision_weights(file: Path) -> dict[str, Tensor]:
    if file.is_file():
        check_content(file)
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read ({reason(error)}); give a .safetensors or .pth file") from None
    found = read_pth(file)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{file} is no state dict; give the weights alone, under timm's names")
    return found


def _fit_positions(backbone: Any, weights: dict[str, Tensor]) -> None:
    """Resize the file's position embedding to the backbone's patches, where that is what they differ in."""
    own, found = getattr(backbone, "pos_embed", None), weights.get("pos_embed")
    if own is None or found is None or own.ndim != 3 or found.ndim != 3 or own.shape == found.shape:
        return
    patches = tuple(backbone.patch_embed.grid_size)
    prefix = own.shape[1] - patches[0] * patches[1]
    weights["pos_embed"] = resize_position_embedding(found, patches, prefix_tokens=prefix)


def _not_built(backbone: Any, config: VisionConfig) -> tuple[str, ...]:
    """Beginnings of the names of tensors that a file of the whole model has and the backbone, as configured, has not."""
    heads = backbone.default_cfg.get("classifier") or ()
    names = [heads] if isinstance(heads, str) else list(heads)
    if not config.final_norm:
        names += ["norm", "fc_norm"]
    if "depth" in config.options:
        # No ViT has as many blocks as a thousand.
        names += [f"blocks.{index}" for index in range(config.options["depth"], 1000)]
    return tuple(f"{name}." for name in names)


# --- Q-Former --------------------------------------------------------------------------------------------------------


def load_qformer(config: QFormerConfig, *, vision_width: int) -> tuple[QFormer, Any]:
    """The trainable Q-Former and its tokenizer.

    With `init=bert` the text branch and both feed-forwards of each layer start from BERT's weights, and only the query
    tokens and the cross-attention are new; with `scratch` everything is drawn. With `blip2` it is left as constructed:
    those weights come together with the vision norm's and the projection's.
    """
    folder = part_folder(sources(config.name, config.sources), setting="qformer.sources.path")
    bert = config_json(folder)
    tokenizer = open_tokenizer(folder, f"qformer={config.name}: ", truncation_side="left")
    _add_tokens(tokenizer, config.extra_tokens)
    rows = max(bert["vocab_size"], _rows_needed(tokenizer))
    qformer = make_qformer(config, bert, rows=rows, vision_width=vision_width, where=str(folder))
    if config.init == "bert":
        check_weight_file(folder / "model.safetensors")
        weights = load_file(folder / "model.safetensors")
        state = qformer_state_from_bert(weights, qformer)
        load_exactly(qformer, state, f"{folder}/model.safetensors", new=names_unknown_to_bert(qformer))
        if config.query_init == "cls":
            draw_query_tokens_near(qformer, weights, token=tokenizer.cls_token_id)
    elif config.init == "scratch":
        initialize_like_bert(qformer)
    return qformer, tokenizer


def _start_from_blip2(
    config: QFormerConfig, qformer: QFormer, norm: nn.Module, *, llm_width: int, llm: LLMConfig
) -> dict[str, Tensor]:
    """Load BLIP-2's Q-Former and vision norm; return its projection, empty where it does not fit this language model."""
    if config.stage1 is None:
        raise UserError(
            "qformer.init=blip2 needs LAVIS's files: give qformer.stage1=FOLDER/blip2_pretrained.pth "
            "and qformer.stage2=FOLDER/blip2_pretrained_<llm>.pth"
        )
    parts = {"qformer": qformer, "vision_norm": norm, "projection": nn.Linear(qformer.width, llm_width, device="meta")}
    expected = {
        f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()
    }
    stage2 = None if config.stage2 is None else Path(config.stage2).expanduser()
    start = read_blip2(Path(config.stage1).expanduser(), stage2, expected)
    found = {
        part: {
            name.removeprefix(f"{part}."): tensor
            for name, tensor in start.tensors.items()
            if name.startswith(f"{part}.")
        }
        for part in parts
    }
    qformer.load_state_dict(found["qformer"])
    norm.load_state_dict(found["vision_norm"])
    fits = bool(found["projection"])
    trained_with = config.aligned_to or "another LLM"
    if start.projection is not None and llm.lavis_projection not in (None, start.projection):
        trained_with = f"an LLM of LAVIS's {start.projection}"
    if stage2 is not None and (trained_with != llm.name or not fits):
        warn_aligned(trained_with, llm.name, projection_fits=fits)
    return found["projection"]


# --- language model --------------------------------------------------------------------------------------------------


def load_llm(config: LLMConfig) -> LLM:
    """The frozen language model with its tokenizer and text conventions, measured.

    Raises:
        UserError: a folder that is no whole, plain language model of that kind, or settings that do not fit it.
    """
    where = f"llm={config.name}: "
    folder = part_folder(sources(config.name, config.sources), setting="llm.sources.path")
    check_language_model(folder, where)
    settings = open_config(folder, where)
    check_kind(settings, config.kind, where)
    override_settings(settings.get_text_config(), config.options)
    dtype = getattr(torch, config.dtype)
    tokenizer = _llm_tokenizer(config, folder)
    model = load_language_model(config.kind, settings, dtype=dtype, folder=folder, where=where)
    check_vocabulary(tokenizer, len(model.get_input_embeddings().weight), where)
    if _rows_needed(tokenizer) > len(model.get_input_embeddings().weight):
        resize_vocabulary(model, _rows_needed(tokenizer))
    if config.quantization is not None:
        _quantize(model, config.quantization)
    conventions = {
        "eos_token": config.eos_token,
        "pad_token": config.pad_token,
        "bos_token": config.bos_token,
        "image_prefix": config.image_prefix,
        "prompt_prefix": config.prompt_prefix,
        "prompt_suffix": config.prompt_suffix,
        "answer_prefix": config.answer_prefix,
        "max_prompt_tokens": config.max_prompt_tokens,
        "max_target_tokens": config.max_target_tokens,
    }
    return finished_llm(config.kind, model, tokenizer, conventions, where)


def _llm_tokenizer(config: LLMConfig, folder: Path) -> Any:
    tokenizer = open_tokenizer(folder, f"llm={config.name}: ")
    _add_tokens(tokenizer, config.added_tokens)
    tokens = {
        "bos_token": config.bos_token,
        "eos_token": config.eos_token,
        "pad_token": config.pad_token,
        "unk_token": config.unk_token,
    }
    for role, token in tokens.items():
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise UserError(
                f"llm={config.name}: the tokenizer has no token {token!r}; name one of its own as {role} in the llm config"
            )
        setattr(tokenizer, role, token)
    return tokenizer


def _quantize(model: Any, kind: Quantization) -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a CPU kernel that is not used here
    try:
        quantize_linears(model, kind, keep=model.get_output_embeddings())
    except ImportError as error:
        raise UserError(
            f"llm.quantization={kind} needs a package that is not installed ({error}); "
            "pip install -r requirements-quantization.txt, or use int8"
        ) from None
    except ValueError as error:
        raise UserError(f"llm.quantization={kind}: {error}") from None


def _add_tokens(tokenizer: Any, tokens: list[str]) -> None:
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)


def _rows_needed(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def warn_aligned(trained_with: str, llm: str, *, projection_fits: bool) -> None:
    """Say in one line that Q-Former and projection speak to another language model than the one that is loaded."""
    remark = "" if projection_fits else ", and the projection, into another width, starts anew"
    logger.warning("Q-Former and projection were aligned to %s; llm=%s needs them trained%s", trained_with, llm, remark)


def load_exactly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    where: str,
    *,
    surplus_ok: tuple[str, ...] = (),
    new: Collection[str] = (),
) -> None:
    """Load a state dict and stop on a missing, surplus or misshapen tensor, naming it.

    Args:
        module: what is loaded into.
        state: tensors by name.
        where: they come from, for the message.
        surplus_ok: beginnings of names that the module may lack.
        new: names that the module has and `state` must not have; they stay as they are.
    """
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items() if name not in new}
    known = {name: state[name] for name in state if not (surplus_ok and name.startswith(surplus_ok))}
    check_tensors(shapes, known, where)
    module.load_state_dict({name: state[name] for name in shapes}, strict=not new)
