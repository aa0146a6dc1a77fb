"""A model's parts from their configuration alone: the modules in their sizes, weights as constructed.

Sizes are those of the folder that is given for a part, where it is on this machine; else they stand in its YAML, and a part
without them has its config.json read. `parts.py` fills the modules from files; under `empty_modules()` they hold no memory,
and show what a run would need.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from instructblip.config.schema import (
    ArchitectureConfig,
    ConnectorConfig,
    LLMConfig,
    ModelConfig,
    QFormerConfig,
    TextConfig,
    VisionConfig,
)
from instructblip.errors import UserError
from instructblip.fetch.parts import part_settings, settings_here, sources
from instructblip.models.adapters import Adapter, choose_layers, inject, require_peft
from instructblip.models.base import blocks_of
from instructblip.models.connector import Connector, LinearConnector, MLPConnector, Patches, Resampler
from instructblip.models.empty import empty_modules
from instructblip.models.facts import TEMPERATURES
from instructblip.models.med import BLIP_TOKENS, TextModel
from instructblip.models.pairs import pair_heads
from instructblip.models.qformer import QFormer
from instructblip.models.vision import VisionEncoder
from instructblip.weights.outlines import outlined_encoder, outlined_language_model


@dataclass(frozen=True)
class Parts:
    """The parts of a model without its tokenizers."""

    vision: VisionEncoder
    norm: nn.Module
    qformer: QFormer
    heads: (
        nn.ModuleDict
    )  # what stands behind the Q-Former: InstructBLIP's projection, the heads of BLIP-2's first stage
    llm: Any  # a transformers model; None where there is none


@dataclass(frozen=True)
class ConnectorParts:
    """The parts of a model whose connector is no Q-Former, without its tokenizer; `llm` is a transformers model."""

    vision: VisionEncoder
    norm: nn.Module
    connector: Connector
    llm: Any


@dataclass(frozen=True)
class BLIPParts:
    """The parts of a BLIP without its tokenizer.

    Attributes:
        encoder, decoder: None where the model has none; one and the same in pre-training.
        heads: what contrasts and matches, by name.
        queue_size: pairs that a queue beside momentum copies holds; None without them.
    """

    vision: VisionEncoder
    encoder: TextModel | None
    decoder: TextModel | None
    heads: nn.ModuleDict
    queue_size: int | None


def parts_without_weights(config: ModelConfig, *, outlined: bool = False) -> Parts:
    """All parts on the meta device, the language model and BERT in the `sizes` of their YAML, else of their config.json.

    Args:
        config: of the model.
        outlined: vision encoder and language model are only to be counted: recorded outlines do where there are some.

    Raises:
        UserError: a part without either, or settings that do not fit.
    """
    with empty_modules():
        vision = _encoder(config.vision, outlined=outlined)
        norm = nn.LayerNorm(vision.width) if config.vision.norm == "layer" else nn.Identity()
        if config.model.kind == "blip2_stage1":
            qformer = qformer_of_sizes(config.q_former(), vision_width=vision.width, reads_and_writes=True)
            settle_first_stage(config.model, qformer)
            heads = pair_heads(qformer.width, qformer.width, config.model.feature_width)
            return Parts(vision, norm, qformer, nn.ModuleDict(heads), None)
        qformer = qformer_of_sizes(config.q_former(), vision_width=vision.width)
        check_instructions(config.q_former(), qformer.max_text_tokens)
        llm = _language_model(config.language_model(), outlined=outlined)
        projection = nn.Linear(qformer.width, llm.get_input_embeddings().weight.shape[1])
    return Parts(vision, norm, qformer, nn.ModuleDict({"projection": projection}), llm)


def adapt_without_weights(parts: Parts | ConnectorParts | BLIPParts, adapters: Mapping[str, Adapter]) -> None:
    """Put adapters on parts that lie on the meta device, as `parts.adapt` does on a model's.

    Raises:
        UserError: peft is not installed, or layers that a part has not.
    """
    roots: dict[str, dict[str, Any]] = {"vision": {"vision.backbone": parts.vision.backbone}}
    if isinstance(parts, Parts | ConnectorParts):
        roots["llm"] = {"llm.model": parts.llm}
    if isinstance(parts, Parts):
        roots["qformer"] = {"qformer": parts.qformer}
    if isinstance(parts, BLIPParts):
        own = None if parts.decoder is parts.encoder else parts.decoder  # in pre-training one model is both
        texts = {"text_encoder": parts.encoder, "text_decoder": own}
        roots["text"] = {name: model for name, model in texts.items() if model is not None}
    for part, adapter in adapters.items():
        require_peft()
        for name, root in roots[part].items():
            holder = nn.Module()
            for step in reversed(name.split(".")):
                holder, inner = nn.Module(), root if step == name.split(".")[-1] else holder
                holder.add_module(step, inner)
            members = {id(block) for block in blocks_of(root)}
            blocks = {path: module for path, module in holder.named_modules() if id(module) in members}
            config = root.config if part == "llm" else None
            with empty_modules():
                inject(holder, choose_layers(part, blocks, adapter.targets, config), adapter, seed=0)


def connector_without_weights(config: ModelConfig, *, outlined: bool = False) -> ConnectorParts:
    """All parts of a model whose connector is no Q-Former, as `parts_without_weights`."""
    with empty_modules():
        vision = _encoder(config.vision, outlined=outlined)
        norm = nn.LayerNorm(vision.width) if config.vision.norm == "layer" else nn.Identity()
        llm = _language_model(config.language_model(), outlined=outlined)
        connector = make_connector(config.connector, vision, llm.get_input_embeddings().weight.shape[1])
    return ConnectorParts(vision, norm, connector, llm)


def _encoder(config: VisionConfig, *, outlined: bool) -> VisionEncoder:
    return (outlined_encoder(config) if outlined else None) or vision_encoder(config)


def _language_model(config: LLMConfig, *, outlined: bool) -> Any:
    if (given := settings_here(config.sources.path, setting="llm.sources.path")) is not None:
        config = replace(config, sizes=given)
    return (outlined_language_model(config) if outlined else None) or language_model_of_sizes(config)


def make_connector(config: ConnectorConfig, vision: VisionEncoder, llm_width: int) -> Connector:
    """A connector that is no Q-Former, new, between an encoder and a language model of that width.

    Raises:
        UserError: settings that do not fit the encoder, or each other.
    """
    widths: dict[str, Any] = {"vision_width": vision.width, "llm_width": llm_width}
    try:
        if config.kind == "resampler":
            return Resampler(
                Patches(vision, class_token=config.class_token),
                **widths,
                tokens=config.tokens,
                width=config.width,
                depth=config.depth,
                heads=config.heads,
                hidden_width=config.hidden_width,
            )
        patches = Patches(vision, class_token=config.class_token, tokens=config.tokens)
        if config.kind == "linear":
            return LinearConnector(patches, **widths)
        return MLPConnector(patches, **widths, hidden_width=config.hidden_width)
    except ValueError as error:
        raise UserError(str(error)) from None


def vision_encoder(config: VisionConfig) -> VisionEncoder:
    """The frozen image encoder as timm constructs it, in the configured dtype.

    Raises:
        UserError: settings that timm cannot build.
    """
    try:
        encoder = VisionEncoder(
            backbone=config.backbone,
            image_size=config.image_size,
            mean=config.mean,
            std=config.std,
            layers=config.layers,
            grid=config.grid,
            options=config.options,
            final_norm=config.final_norm,
            norm_eps=config.norm_eps if config.norm == "none" else None,
        )
    except ValueError as error:
        raise UserError(f"vision={config.name}: {error}") from None
    return encoder.to(getattr(torch, config.dtype))


def make_qformer(
    config: QFormerConfig,
    bert: Mapping[str, Any],
    *,
    rows: int,
    vision_width: int,
    where: str,
    reads_and_writes: bool = False,
) -> QFormer:
    """The Q-Former over a BERT of these sizes (keys of its config.json, which `where` names), with `rows` of embeddings.

    With `reads_and_writes` it gives text states and has a language-model head, as BLIP-2's first stage needs.

    Raises:
        UserError: more layers than BERT has.
    """
    qformer = QFormer(
        vocab_size=rows,
        **_bert_sizes("qformer", config, bert, where),
        vision_width=vision_width,
        queries=config.queries,
        cross_attention_every=config.cross_attention_every,
        instruction_aware=config.instruction_aware,
        text_outputs=reads_and_writes,
        language_model_head=reads_and_writes,
    )
    if config.instruction_aware:
        qformer.word_embeddings.requires_grad_(config.train_text_embeddings)
        qformer.position_embeddings.requires_grad_(config.train_text_embeddings)
    return qformer


def qformer_of_sizes(config: QFormerConfig, *, vision_width: int, reads_and_writes: bool = False) -> QFormer:
    """The Q-Former over a BERT of the `sizes` in its YAML, else of its config.json.

    Raises:
        UserError: there is neither, or it has fewer layers than are wanted.
    """
    bert = bert_settings(_sizes("qformer", config), "qformer.sizes")
    rows = bert["vocab_size"] + len(config.extra_tokens)
    return make_qformer(
        config,
        bert,
        rows=rows,
        vision_width=vision_width,
        where="qformer.sizes",
        reads_and_writes=reads_and_writes,
    )


def settle_first_stage(model: ArchitectureConfig, qformer: QFormer) -> None:
    """Leave the language-model head out of BLIP-2's first stage where it is not to caption.

    Raises:
        UserError: texts that are longer than the Q-Former's places.
    """
    check_length(model, qformer.max_text_tokens)
    if not model.language_model_head:
        qformer.lm_head = None


def check_length(model: ArchitectureConfig, places: int) -> None:
    """Refuse texts that may be longer than a text model's places: the first that is would end the run.

    Raises:
        UserError: names the setting.
    """
    if model.max_text_tokens > places:
        raise UserError(
            f"model.max_text_tokens={model.max_text_tokens} is more than the text model's {places} places; lower it"
        )


def check_instructions(config: QFormerConfig, places: int) -> None:
    """Refuse instructions that may be longer than the Q-Former's places, as `check_length` does.

    Raises:
        UserError: names the setting.
    """
    if config.instruction_aware and config.max_instruction_tokens > places:
        raise UserError(
            f"qformer.max_instruction_tokens={config.max_instruction_tokens} is more than the Q-Former's {places} places; "
            "lower it"
        )


def check_temperature(temperature: float) -> None:
    """Refuse a temperature out of the bounds within which BLIP keeps it.

    Raises:
        UserError: names them.
    """
    lowest, highest = TEMPERATURES
    if not lowest <= temperature <= highest:
        raise UserError(
            f"model.temperature={temperature:g} is not between {lowest:g} and {highest:g}, where BLIP's is kept; set another"
        )


def make_text_model(
    config: TextConfig, bert: Mapping[str, Any], *, rows: int, source_width: int, where: str, **options: bool
) -> TextModel:
    """BLIP's text model over a BERT of these sizes, with `rows` of embeddings; `options` are those of `TextModel`.

    Raises:
        UserError: more layers than BERT has.
    """
    sizes = _bert_sizes("text", config, bert, where)
    return TextModel(vocab_size=rows, source_width=source_width, **sizes, **options)


_BERT = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)


def bert_settings(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of a BERT, with what older files leave to transformers.

    Raises:
        UserError: another kind of model, which calls its sizes otherwise; names the first that is missing.
    """
    if missing := [name for name in _BERT if name not in settings]:
        raise UserError(f"{where} has no {missing[0]}, as every BERT has; give a BERT's")
    return {"layer_norm_eps": 1e-12, **settings}


_COMPUTED = {"hidden_act": "gelu", "position_embedding_type": "absolute"}


def check_computes_as_bert(settings: Mapping[str, Any], where: str) -> None:
    """Refuse to start from weights that were trained to compute otherwise: their shapes do not show it.

    Raises:
        UserError: names the setting.
    """
    for name, own in _COMPUTED.items():
        if (said := settings.get(name, own)) != own:
            raise UserError(
                f"{where} has {name}={said}, where BERT's weights are run with {own} here; give another BERT's"
            )


def _bert_sizes(part: str, config: QFormerConfig | TextConfig, bert: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What both take of BERT, and dropout."""
    layers = bert["num_hidden_layers"] if config.layers is None else config.layers
    if not 1 <= layers <= bert["num_hidden_layers"]:
        raise UserError(f"{part}.layers={layers}: {where} has {bert['num_hidden_layers']}; give 1 to that many")
    return {
        "width": bert["hidden_size"],
        "layers": layers,
        "heads": bert["num_attention_heads"],
        "hidden_width": bert["intermediate_size"],
        "max_text_tokens": bert["max_position_embeddings"],
        "dropout": config.dropout,
        "norm_eps": bert["layer_norm_eps"],
    }


def blip_without_weights(config: ModelConfig, *, outlined: bool = False) -> BLIPParts:
    """The parts of a BLIP on the meta device, its text models in the `sizes` of their YAML, else of BERT's config.json.

    Arguments are those of `parts_without_weights`.

    Raises:
        UserError: a part without either, or settings that do not fit.
    """
    kind, text = config.model.kind, config.text_model()
    bert = bert_settings(_sizes("text", text), "text.sizes")
    check_length(config.model, bert["max_position_embeddings"])
    if kind in ("blip_retrieval", "blip_pretrain"):
        check_temperature(config.model.temperature)
    common: dict[str, Any] = {"bert": bert, "rows": bert["vocab_size"] + len(BLIP_TOKENS), "where": "text.sizes"}
    writes = kind != "blip_retrieval"
    with empty_modules():
        vision = _encoder(config.vision, outlined=outlined)
        decoder_reads = bert["hidden_size"] if kind == "blip_vqa" else vision.width
        if kind in ("blip_caption", "blip_vqa"):
            decoder = make_text_model(text, source_width=decoder_reads, language_model_head=True, **common)
            encoder = make_text_model(text, source_width=vision.width, **common) if kind == "blip_vqa" else None
            return BLIPParts(vision, encoder, decoder, nn.ModuleDict(), None)
        one = make_text_model(
            text, source_width=vision.width, language_model_head=writes, decoder_attention=writes, **common
        )
        heads = pair_heads(vision.width, one.width, config.model.feature_width)
    return BLIPParts(vision, one, one if writes else None, nn.ModuleDict(heads), config.model.queue_size)


def language_model_of_sizes(config: LLMConfig) -> Any:
    """The transformers model of the `sizes` in its YAML, else of its config.json, the text part alone where it has others.

    It gets the `options`, rows for the added tokens, and its dtype.

    Raises:
        UserError: there is neither, or transformers does not know its sizes or the options.
    """
    from transformers import AutoConfig

    from instructblip.models.llm import LLM_KINDS
    from instructblip.models.vocabulary import resize_vocabulary
    from instructblip.weights.gatekeeper import check_kind

    sizes = dict(_sizes("llm", config))
    try:
        settings = AutoConfig.for_model(sizes.pop("model_type", ""), **sizes)
    except (ValueError, TypeError) as error:
        raise UserError(f"llm.sizes of {config.name}: {str(error).partition(chr(10))[0]}") from None
    if config.kind == "decoder":
        settings = settings.get_text_config()
    check_kind(settings, config.kind, f"llm={config.name}: ")
    override_settings(settings, config.options)
    dtype = getattr(torch, config.dtype)
    model = LLM_KINDS[config.kind].auto_class.from_config(settings, dtype=dtype, trust_remote_code=False)
    if config.added_tokens:
        resize_vocabulary(model, settings.vocab_size + len(config.added_tokens))
    if config.kind == "encoder_decoder" and not sizes.get("tie_word_embeddings", True):
        # transformers ties T5's output head to its token table until a file's tensors say otherwise, as FlanT5's do.
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight).normal_(std=settings.d_model**-0.5))
    return model


def override_settings(settings: Any, options: Mapping[Any, Any]) -> None:
    """Replace values of a transformers configuration.

    Raises:
        UserError: it has no such setting.
    """
    for name, value in options.items():
        if not hasattr(settings, name):
            raise UserError(f"llm.options.{name} is no setting of a {type(settings).__name__}; see its config.json")
        setattr(settings, name, value)


def _sizes(part: str, config: LLMConfig | QFormerConfig | TextConfig) -> Mapping[str, Any]:
    setting = f"{part}.sources.path"
    given = settings_here(config.sources.path, setting=setting)
    if given is not None:  # which the run would build, whatever the YAML states
        return given
    if config.sizes:
        return config.sizes
    try:
        return part_settings(sources(config.name, config.sources), setting=setting)
    except UserError as error:
        raise UserError(f"{part}={config.name} states no {part}.sizes to plan with, and {error}") from None
