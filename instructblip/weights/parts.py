"""From a validated configuration to a model: parts by name, put together in the open.

The only place that reads the `model`, `vision`, `connector`, `qformer`, `text` and `llm` sections. A kind of model is a
function here and a class in `MODELS`.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from instructblip.config.checks import check_rounding
from instructblip.config.schema import (
    LLMConfig,
    ModelConfig,
    ModelKind,
    QFormerConfig,
    Quantization,
    TextConfig,
    VisionConfig,
    VisionNorm,
)
from instructblip.errors import UserError
from instructblip.fetch.parts import part_folder, sources
from instructblip.models.adapters import Adapter, choose_layers, inject, require_peft, short_names, unused_layers
from instructblip.models.base import Model
from instructblip.models.blip import (
    BLIP,
    BLIPVQA,
    BLIPCaption,
    BLIPPretrain,
    BLIPRetrieval,
)
from instructblip.models.blip2 import BLIP2
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llava import LLaVA
from instructblip.models.llm import LLM
from instructblip.models.med import BLIP_TOKENS, TextModel
from instructblip.models.qformer import QFormer
from instructblip.models.quantized import QuantizedLinear, quantize_linears
from instructblip.models.vision import ChannelNorm, VisionEncoder
from instructblip.models.vocabulary import add_tokens, resize_vocabulary
from instructblip.weights.bert import (
    draw_query_tokens_near,
    has_language_model_head,
    initialize_like_bert,
    names_unknown_to_bert,
    qformer_state_from_bert,
    text_model_state_from_bert,
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
from instructblip.weights.lavis import read_pth
from instructblip.weights.modules import (
    bert_settings,
    check_computes_as_bert,
    check_instructions,
    check_length,
    check_temperature,
    make_connector,
    make_qformer,
    make_text_model,
    override_settings,
    settle_first_stage,
    vision_encoder,
)
from instructblip.weights.names import check_tensors
from instructblip.weights.position import resize_position_embedding

logger = logging.getLogger(__name__)

VISION_NORMS: dict[VisionNorm, Callable[[int, float], nn.Module]] = {
    "layer": lambda width, eps: nn.LayerNorm(width, eps=eps),
    "channel": lambda width, _eps: ChannelNorm(width),
    "none": lambda _width, _eps: nn.Identity(),
}


def build_model(
    config: ModelConfig,
    *,
    trained: Collection[str] | None = None,
    adapters: Mapping[str, Adapter] = MappingProxyType({}),
) -> Model:
    """Fetch the parts and assemble them; what is new starts from the seed, and `trained` parts are to train.

    None trains what the class trains: the Q-Former or other connector, all of BLIP. Of those with `adapters` they alone do.

    Raises:
        UserError: a part cannot be fetched, or its settings do not fit its files.
    """
    build = _BUILDERS[config.model.kind] if config.connector.kind == "qformer" else build_llava
    model = build(config)
    if isinstance(model, BLIP):
        model.vision_norm = VISION_NORMS[config.vision.norm](model.vision.width, config.vision.norm_eps)
    train_parts(model, model.trained_parts if trained is None else trained, adapters, seed=config.seed)
    return model


def build_instructblip(config: ModelConfig) -> InstructBLIP:
    """InstructBLIP or BLIP-2's second stage, its Q-Former trained and the rest frozen; as `build_model`."""
    encoder = load_vision(config.vision)
    language = load_llm(config.language_model())
    torch.manual_seed(config.seed)
    qformer = config.q_former()
    trainable, tokenizer = load_qformer(qformer, vision_width=encoder.width)
    check_instructions(qformer, trainable.max_text_tokens)
    norm = VISION_NORMS[config.vision.norm](encoder.width, config.vision.norm_eps)
    return InstructBLIP(
        vision=encoder,
        vision_norm=norm,
        qformer=trainable,
        qformer_tokenizer=tokenizer,
        llm=language,
        max_instruction_tokens=qformer.max_instruction_tokens,
    )


def build_llava(config: ModelConfig) -> LLaVA:
    """A model whose connector is no Q-Former, its connector trained and the rest frozen; as `build_model`."""
    encoder = load_vision(config.vision)
    language = load_llm(config.language_model())
    torch.manual_seed(config.seed)
    return LLaVA(
        vision=encoder,
        vision_norm=VISION_NORMS[config.vision.norm](encoder.width, config.vision.norm_eps),
        connector=make_connector(config.connector, encoder, language.width),
        llm=language,
    )


def build_blip2_stage1(config: ModelConfig) -> BLIP2:
    """BLIP-2's first stage, its Q-Former and heads trained and the vision encoder frozen; as `build_model`."""
    encoder = load_vision(config.vision)
    torch.manual_seed(config.seed)
    qformer = config.q_former()
    trainable, tokenizer = load_qformer(qformer, vision_width=encoder.width, reads_and_writes=True)
    assert tokenizer is not None
    settle_first_stage(config.model, trainable)
    try:
        return BLIP2(
            vision=encoder,
            vision_norm=VISION_NORMS[config.vision.norm](encoder.width, config.vision.norm_eps),
            qformer=trainable,
            tokenizer=tokenizer,
            feature_width=config.model.feature_width,
            max_text_tokens=config.model.max_text_tokens,
            temperature=config.model.temperature,
        )
    except ValueError as error:
        raise UserError(f"qformer={qformer.name} does not fit model=blip2_stage1: {error}") from None


def build_blip_caption(config: ModelConfig) -> BLIPCaption:
    """BLIP for captions, all of it trained; as `build_model`, and so are the next."""
    vision = _blip_vision(config)
    decoder, tokenizer = load_text_model(config.text_model(), source_width=vision.width, language_model_head=True)
    check_length(config.model, decoder.max_text_tokens)
    try:
        return BLIPCaption(
            vision=vision,
            text_decoder=decoder,
            tokenizer=tokenizer,
            max_text_tokens=config.model.max_text_tokens,
            prompt=config.model.prompt,
        )
    except ValueError as error:
        raise UserError(f"model.prompt: {error}, or raise model.max_text_tokens") from None


def build_blip_vqa(config: ModelConfig) -> BLIPVQA:
    """BLIP for questions; its decoder reads the states of the questions."""
    vision = _blip_vision(config)
    encoder, tokenizer = load_text_model(config.text_model(), source_width=vision.width)
    check_length(config.model, encoder.max_text_tokens)
    decoder, _ = load_text_model(config.text_model(), source_width=encoder.width, language_model_head=True)
    return BLIPVQA(
        vision=vision,
        text_encoder=encoder,
        text_decoder=decoder,
        tokenizer=tokenizer,
        max_text_tokens=config.model.max_text_tokens,
        enc_token=config.model.enc_token,
    )


def build_blip_retrieval(config: ModelConfig) -> BLIPRetrieval:
    """BLIP for retrieval, or for pre-training, whose text model also writes."""
    vision, writes = _blip_vision(config), config.model.kind == "blip_pretrain"
    encoder, tokenizer = load_text_model(
        config.text_model(), source_width=vision.width, language_model_head=writes, decoder_attention=writes
    )
    check_length(config.model, encoder.max_text_tokens)
    check_temperature(config.model.temperature)
    kind = BLIPPretrain if writes else BLIPRetrieval
    return kind(
        vision=vision,
        text_encoder=encoder,
        tokenizer=tokenizer,
        feature_width=config.model.feature_width,
        max_text_tokens=config.model.max_text_tokens,
        enc_token=config.model.enc_token,
        temperature=config.model.temperature,
        queue_size=config.model.queue_size,
    )


def _blip_vision(config: ModelConfig) -> VisionEncoder:
    torch.manual_seed(config.seed)
    return load_vision(config.vision)


# By kind of model: its class, and the function that builds it.
MODELS: dict[ModelKind, type[Model]] = {
    "instructblip": InstructBLIP,
    "blip2": InstructBLIP,
    "blip2_stage1": BLIP2,
    "blip_caption": BLIPCaption,
    "blip_vqa": BLIPVQA,
    "blip_retrieval": BLIPRetrieval,
    "blip_pretrain": BLIPPretrain,
}
_BUILDERS: dict[ModelKind, Callable[[ModelConfig], Model]] = {
    "instructblip": build_instructblip,
    "blip2": build_instructblip,
    "blip2_stage1": build_blip2_stage1,
    "blip_caption": build_blip_caption,
    "blip_vqa": build_blip_vqa,
    "blip_retrieval": build_blip_retrieval,
    "blip_pretrain": build_blip_retrieval,
}


def model_class(config: ModelConfig) -> type[Model]:
    """The class of a configured model: `MODELS` has that of each kind with a Q-Former, and BLIP's."""
    return MODELS[config.model.kind] if config.connector.kind == "qformer" else LLaVA


def train_parts(
    model: Model,
    trained: Collection[str],
    adapters: Mapping[str, Adapter] = MappingProxyType({}),
    *,
    seed: int = 0,
) -> None:
    """Choose what trains. It is held in float32: half precision would round small updates away.

    Args:
        model: without adapters so far.
        trained: parts.
        adapters: of those of which they alone train.
        seed: of new adapters.

    Raises:
        UserError: a part that the model has not, a language model whose weights are rounded, layers that it has not.
    """
    if missing := sorted(set(trained) - model.PARTS.keys()):
        mode = "lora" if missing[0] in adapters else "full"
        raise UserError(f"train.{missing[0]}={mode}: the model has no such part, only {', '.join(model.PARTS)}")
    for module in model.part_modules("llm") if "llm" in set(trained) - adapters.keys() else ():
        if any(isinstance(layer, QuantizedLinear) for layer in module.modules()):
            raise UserError(
                "train.llm=full needs the LLM's own weights; leave llm.quantization out, or set train.llm=frozen or lora"
            )
    for part in adapters:
        adapt(model, part, adapters[part], seed=seed)
    model.choose_trained(trained)
    for part in model.full_parts:
        for module in model.part_modules(part):
            module.float()
    for own, original in model.copies():  # half precision would lose what they move in a step
        own.data = own.data.to(original.dtype)


def adapt(model: Model, part: str, adapter: Adapter, *, seed: int = 0) -> None:
    """Put new adapters on a part; the model remembers them with the layers that they are on.

    Raises:
        UserError: peft is not installed, layers that the part has not, or that it never calls.
    """
    require_peft()
    blocks = model.blocks(part)
    layers = choose_layers(part, blocks, adapter.targets, model.language_settings() if part == "llm" else None)
    short = short_names(layers, blocks)
    inject(model, layers, adapter, seed=seed)
    model.adapters = {**model.adapters, part: replace(adapter, targets=short)}
    if part == "vision":
        _check_called(model, layers)


def _check_called(model: Model, layers: Collection[str]) -> None:
    size = model.vision.image_size
    picture = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=model.vision.mean.device)
    if unused := unused_layers(model, layers, lambda: model.vision(picture)):
        raise UserError(
            f"train.vision=lora: the encoder never calls {unused[0]} (and {len(unused) - 1} more), so an adapter would do "
            "nothing there; choose others in train.lora.vision.targets"
        )


# --- vision ----------------------------------------------------------------------------------------------------------


def load_vision(config: VisionConfig) -> VisionEncoder:
    """The image encoder with its weights: those of a folder's model.safetensors, or of a file under timm's names.

    Positions are resized to the configured image size. A file may hold more than is built: its classification head, the
    last norm where `final_norm` is false, and the blocks past `options.depth`. With `init=scratch` no file is opened, and
    the weights are those that timm draws.
    """
    if config.init == "scratch":
        return vision_encoder(config)
    file, encoder = _vision_file(config), vision_encoder(config)
    weights = _vision_weights(file)
    _fit_positions(encoder.backbone, weights)
    types = {name: tensor.dtype for name, tensor in encoder.backbone.state_dict().items()}
    # Where the types agree the tensors stay those of the mapped file, which all processes of a machine share.
    held = {name: tensor.to(types.get(name, tensor.dtype)) for name, tensor in weights.items()}
    load_exactly(encoder.backbone, held, str(file), surplus_ok=_not_built(encoder.backbone, config), assign=True)
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


def load_qformer(
    config: QFormerConfig, *, vision_width: int, reads_and_writes: bool = False
) -> tuple[QFormer, PreTrainedTokenizerBase | None]:
    """The trainable Q-Former and its tokenizer, None where it reads no text; `reads_and_writes` as in `make_qformer`.

    With `init=bert` the text branch and both feed-forwards of each layer start from BERT's weights, and only the query
    tokens and the cross-attention are new; with `scratch` and `given` everything is drawn. Where a file lacks the
    language-model head, as those of sentence embeddings do, that starts as BERT's did before it was trained.
    """
    folder = part_folder(sources(config.name, config.sources), setting="qformer.sources.path")
    bert = bert_settings(config_json(folder), f"{folder}/config.json")
    tokenizer, rows = None, bert["vocab_size"]
    if config.instruction_aware or config.query_init == "cls":
        tokenizer = open_tokenizer(folder, f"qformer={config.name}: ", truncation_side="left")
        add_tokens(tokenizer, config.extra_tokens)
        rows = max(rows, _rows_needed(tokenizer))
    qformer = make_qformer(
        config,
        bert,
        rows=rows,
        vision_width=vision_width,
        where=str(folder),
        reads_and_writes=reads_and_writes,
    )
    if config.init == "bert":
        check_computes_as_bert(bert, f"{folder}/config.json")
        check_weight_file(folder / "model.safetensors")
        weights = load_file(folder / "model.safetensors")
        if qformer.lm_head is not None and not has_language_model_head(weights):
            initialize_like_bert(qformer.lm_head)
        state = qformer_state_from_bert(weights, qformer)
        load_exactly(qformer, state, f"{folder}/model.safetensors", new=names_unknown_to_bert(weights, qformer))
        if config.query_init == "cls":
            assert tokenizer is not None
            draw_query_tokens_near(qformer, weights, token=tokenizer.cls_token_id)
    else:
        initialize_like_bert(qformer)
    return qformer, tokenizer


# --- BLIP's text model -----------------------------------------------------------------------------------------------


def load_text_model(
    config: TextConfig, *, source_width: int, **options: bool
) -> tuple[TextModel, PreTrainedTokenizerBase]:
    """BLIP's text model and its tokenizer, with `[DEC]` and `[ENC]`; `options` are those of `TextModel`.

    Everything is drawn as BERT is before pre-training. With `init=bert` all but cross-attention then starts from BERT's
    weights, and the language-model head where the file has one.

    Raises:
        UserError: it cannot be fetched, or is no BERT.
    """
    folder = part_folder(sources(config.name, config.sources), setting="text.sources.path")
    bert = bert_settings(config_json(folder), f"{folder}/config.json")
    tokenizer = open_tokenizer(folder, f"text={config.name}: ", truncation_side="right")
    add_tokens(tokenizer, BLIP_TOKENS)
    rows = max(bert["vocab_size"], _rows_needed(tokenizer))
    model = make_text_model(config, bert, rows=rows, source_width=source_width, where=str(folder), **options)
    initialize_like_bert(model)
    if config.init == "bert":
        check_computes_as_bert(bert, f"{folder}/config.json")
        check_weight_file(folder / "model.safetensors")
        weights = load_file(folder / "model.safetensors")
        new = names_unknown_to_bert(weights, model)
        load_exactly(model, text_model_state_from_bert(weights, model), f"{folder}/model.safetensors", new=new)
    return model, tokenizer


# --- language model --------------------------------------------------------------------------------------------------


def load_llm(config: LLMConfig) -> LLM:
    """The frozen language model with its tokenizer and text conventions, measured.

    Raises:
        UserError: a folder that is no whole, plain language model of that kind, or settings that do not fit it.
    """
    check_rounding(config)
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
        "image_in_text": config.image_in_text,
        "supervise_bos": config.supervise_bos,
        "max_prompt_tokens": config.max_prompt_tokens,
        "max_target_tokens": config.max_target_tokens,
    }
    return finished_llm(config.kind, model, tokenizer, conventions, where)


def _llm_tokenizer(config: LLMConfig, folder: Path) -> Any:
    tokenizer = open_tokenizer(folder, f"llm={config.name}: ")
    add_tokens(tokenizer, config.added_tokens)
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


def _rows_needed(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def load_exactly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    where: str,
    *,
    surplus_ok: tuple[str, ...] = (),
    new: Collection[str] = (),
    assign: bool = False,
) -> None:
    """Load a state dict and stop on a missing, surplus or misshapen tensor, naming it.

    Args:
        module: what is loaded into.
        state: tensors by name.
        where: they come from, for the message.
        surplus_ok: beginnings of names that the module may lack.
        new: names that the module has and `state` must not have; they stay as they are.
        assign: the module takes the tensors themselves, in their types, instead of copying their values.
    """
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items() if name not in new}
    known = {name: state[name] for name in state if not (surplus_ok and name.startswith(surplus_ok))}
    check_tensors(shapes, known, where)
    module.load_state_dict({name: state[name] for name in shapes}, strict=not new, assign=assign)
