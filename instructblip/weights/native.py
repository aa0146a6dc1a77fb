"""A model of another format written as a run of ours: config.yaml and one checkpoint, with the frozen parts' files beside.

What came from LAVIS is built from configs/, so its folder holds the trained weights only. What came from a transformers
folder brings its own ViT, Q-Former sizes, tokenizers and language model: they are written below `vision/`, `qformer/` and
`llm/`, and config.yaml names them by their absolute paths.
"""

import dataclasses
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from timm.layers import QuickGELU

from instructblip._transformers import quiet_transformers
from instructblip.config.schema import (
    ArchitectureConfig,
    ConnectorConfig,
    Dtype,
    LLMConfig,
    ModelConfig,
    QFormerConfig,
    SourcesConfig,
    TextConfig,
    VisionConfig,
)
from instructblip.config.validate import to_yaml
from instructblip.files import write_atomically, write_json
from instructblip.models.adapters import plain_state, without_adapters
from instructblip.models.base import Model
from instructblip.models.blip import BLIP, BLIPCaption, BLIPRetrieval
from instructblip.models.blip2 import BLIP2
from instructblip.models.connector import MLPConnector
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llava import LLaVA
from instructblip.models.llm import LLM
from instructblip.models.med import TextLayer
from instructblip.models.vision import VisionEncoder
from instructblip.weights.blip import kind_of
from instructblip.weights.checkpoint import save_checkpoint
from instructblip.weights.load import frozen_fingerprints
from instructblip.weights.start import PLAIN, Standing
from instructblip.weights.transformers_blip import BACKBONE
from instructblip.weights.transformers_llava import BACKBONES
from instructblip.weights.transformers_settings import Settings, llm_conventions, ratio_of

CONFIG = "config.yaml"


def save_native(model: Model, config: ModelConfig, folder: Path, standing: Standing = PLAIN) -> None:
    """Write config.yaml and `checkpoints/step_00000000` into a folder.

    Args:
        model, config: what is written.
        folder: where.
        standing: what the model started from, and what of it was never trained or is aligned to another LLM.

    Raises:
        UserError: a full disk.
    """
    write_config(config, folder)
    save_checkpoint(
        folder / "checkpoints",
        step=0,
        model=model.held_state(),
        optimizer={},
        adapters=model.adapters,
        state={
            "frozen": frozen_fingerprints(model),
            "start": dataclasses.replace(standing.start, aligned_to=standing.aligned_to).to_json(),
            "untrained": standing.untrained,
            "seed": config.seed,
        },
        keep=1,
    )


def write_config(config: ModelConfig, folder: Path) -> None:
    """Write config.yaml; paths are made absolute, since the folder may be used from anywhere."""
    sections = {name: getattr(config, name) for name in ("vision", "qformer", "text", "llm")}
    absolute = dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(section, sources=_absolute(section.sources))
            for name, section in sections.items()
            if section is not None
        },
    )
    write_atomically(folder / CONFIG, to_yaml(absolute))


def save_parts(model: InstructBLIP | BLIP2, settings: Settings, folder: Path, *, with_llm: bool) -> None:
    """Write the frozen parts and tokenizers of a model that came from a transformers folder."""
    _save_vision(model.vision, folder)
    sizes = settings.qformer
    bert = {
        "model_type": "bert",
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "intermediate_size": sizes["hidden_width"],
        "max_position_embeddings": sizes["max_text_tokens"],
        "layer_norm_eps": sizes["norm_eps"],
    }
    (folder / "qformer").mkdir()
    with quiet_transformers():
        if (tokenizer := model.tokenizer if isinstance(model, BLIP2) else model.qformer_tokenizer) is not None:
            tokenizer.save_pretrained(folder / "qformer")
    if with_llm and isinstance(model, InstructBLIP):
        _save_llm(model.llm, folder)
    write_json(folder / "qformer/config.json", bert)


def parts_config(
    model: InstructBLIP | BLIP2, settings: Settings, folder: Path, name: str, *, llm: LLMConfig | None = None
) -> ModelConfig:
    """The configuration that builds a model from what `save_parts` wrote below `folder`.

    Args:
        model: the model.
        settings: what its transformers folder says.
        folder: where the parts are, or will be.
        name: of the model; names its parts.
        llm: a language model from elsewhere, which is not below `folder`.
    """
    qformer = settings.qformer
    return ModelConfig(
        model=_architecture(model, settings),
        vision=VisionConfig(
            name=f"{name}_vision",
            sources=SourcesConfig(path=str(folder / "vision")),
            dtype=_dtype_name(model.vision.dtype),
            norm_eps=settings.vision_norm_eps,
            **settings.vision,
        ),
        qformer=QFormerConfig(
            name=f"{name}_qformer",
            sources=SourcesConfig(path=str(folder / "qformer")),
            init="scratch",
            queries=qformer["queries"],
            cross_attention_every=qformer["cross_attention_every"],
            dropout=qformer["dropout"],
            instruction_aware=qformer["instruction_aware"],
            max_instruction_tokens=settings.max_text_tokens,
        ),
        llm=llm or _own_llm(model, settings, folder, name),
    )


def save_llava_parts(model: LLaVA, folder: Path, *, with_llm: bool) -> None:
    """Write the frozen parts of a LLaVA that came from a transformers folder; a checkpoint holds its connector."""
    _save_vision(model.vision, folder)
    if with_llm:
        _save_llm(model.llm, folder)


def llava_parts_config(model: LLaVA, folder: Path, name: str, *, llm: LLMConfig | None = None) -> ModelConfig:
    """The configuration that builds a LLaVA from what `save_llava_parts` wrote; arguments as of `parts_config`."""
    vision, connector, block = model.vision, model.connector, model.vision.backbone.blocks[0]
    assert isinstance(connector, MLPConnector)
    quick = isinstance(block.mlp.act, QuickGELU)
    return ModelConfig(
        vision=VisionConfig(
            name=f"{name}_vision",
            sources=SourcesConfig(path=str(folder / "vision")),
            backbone=BACKBONES["quick_gelu" if quick else "gelu"],
            options={
                "patch_size": vision.backbone.patch_embed.patch_size[0],
                "embed_dim": vision.width,
                "depth": len(vision.backbone.blocks),
                "num_heads": block.attn.num_heads,
                "mlp_ratio": ratio_of(vision.width, block.mlp.fc1.out_features),
            },
            dtype=_dtype_name(vision.dtype),
            image_size=vision.image_size,
            mean=vision.mean.flatten().tolist(),
            std=vision.std.flatten().tolist(),
            final_norm=False,
            norm="none",
            norm_eps=block.norm1.eps,
        ),
        connector=ConnectorConfig(
            kind="mlp",
            class_token=connector.patches.class_token,
            hidden_width=connector.hidden.out_features,
        ),
        llm=llm
        or LLMConfig(
            name=f"{name}_llm",
            sources=SourcesConfig(path=str(folder / "llm")),
            dtype=_dtype_name(model.llm.embeddings.weight.dtype),
            **llm_conventions(model.llm),
        ),
    )


def save_blip_parts(model: BLIP, folder: Path) -> None:
    """Write the sizes and tokenizer of a BLIP that came from a transformers folder; a checkpoint holds all its weights."""
    text = model.text_models()[0]
    layer = text.layers[0]
    assert isinstance(layer, TextLayer)
    (folder / "text").mkdir(parents=True)
    with quiet_transformers():
        model.tokenizer.save_pretrained(folder / "text")
    bert = {
        "model_type": "bert",
        "vocab_size": text.word_embeddings.num_embeddings,
        "hidden_size": text.width,
        "num_hidden_layers": len(text.layers),
        "num_attention_heads": layer.self_attention.heads,
        "intermediate_size": layer.ffn.up.out_features,
        "max_position_embeddings": text.max_text_tokens,
        "layer_norm_eps": text.norm.eps,
    }
    write_json(folder / "text/config.json", bert)


def blip_parts_config(model: BLIP, folder: Path, name: str) -> ModelConfig:
    """The configuration that builds a BLIP from what `save_blip_parts` wrote below `folder`; `name` names its parts."""
    backbone, settings = model.vision.backbone, ArchitectureConfig(kind=kind_of(model))
    settings.max_text_tokens = model.max_text_tokens
    if isinstance(model, BLIPCaption):
        settings.prompt = model.prompt
    else:
        settings.enc_token = model.enc_token
    if isinstance(model, BLIPRetrieval):
        settings.feature_width = model.text_projection.out_features
        settings.queue_size = model.queue_size
    block = backbone.blocks[0]
    return ModelConfig(
        model=settings,
        vision=VisionConfig(
            name=f"{name}_vision",
            init="scratch",
            backbone=BACKBONE,
            options={
                "patch_size": backbone.patch_embed.patch_size[0],
                "embed_dim": model.vision.width,
                "depth": len(backbone.blocks),
                "num_heads": block.attn.num_heads,
                "mlp_ratio": ratio_of(model.vision.width, block.mlp.fc1.out_features),
            },
            dtype=_dtype_name(model.vision.dtype),
            image_size=model.vision.image_size,
            mean=model.vision.mean.flatten().tolist(),
            std=model.vision.std.flatten().tolist(),
            norm="none",
            norm_eps=block.norm1.eps,
        ),
        text=TextConfig(
            name=f"{name}_text",
            sources=SourcesConfig(path=str(folder / "text")),
            init="scratch",
            dropout=model.text_models()[0].dropout,
        ),
    )


def _architecture(model: InstructBLIP | BLIP2, settings: Settings) -> ArchitectureConfig:
    if not isinstance(model, BLIP2):
        return ArchitectureConfig(kind=settings.kind)
    return ArchitectureConfig(
        kind=settings.kind,
        feature_width=settings.feature_width,
        max_text_tokens=settings.max_text_tokens,
        language_model_head=model.qformer.lm_head is not None,
    )


def _own_llm(model: InstructBLIP | BLIP2, settings: Settings, folder: Path, name: str) -> LLMConfig | None:
    if settings.llm is None or isinstance(model, BLIP2):
        return None
    return LLMConfig(
        name=f"{name}_llm",
        sources=SourcesConfig(path=str(folder / "llm")),
        kind=settings.llm.kind,
        dtype=_dtype_name(model.llm.embeddings.weight.dtype),
        **settings.llm.conventions,
    )


def _save_vision(vision: VisionEncoder, folder: Path) -> None:
    (folder / "vision").mkdir(parents=True)
    weights = {name: tensor.contiguous() for name, tensor in without_adapters(vision.backbone.state_dict()).items()}
    save_file(weights, folder / "vision/model.safetensors", metadata={"format": "pt"})


def _save_llm(llm: LLM, folder: Path) -> None:
    plain = {name: tensor.detach() for name, tensor in plain_state(llm.model, merge=False).items()}
    with quiet_transformers():
        llm.model.save_pretrained(folder / "llm", state_dict=plain)
        llm.prompt_format.tokenizer.save_pretrained(folder / "llm")


def _dtype_name(dtype: torch.dtype) -> Dtype:
    return cast(Dtype, str(dtype).removeprefix("torch."))


def _absolute(sources: SourcesConfig) -> SourcesConfig:
    if sources.path is None:
        return sources
    return dataclasses.replace(sources, path=str(Path(sources.path).expanduser().absolute()))
