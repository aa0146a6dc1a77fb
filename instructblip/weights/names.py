"""The names of tensors: this code's, LAVIS's, transformers'. One table, read in both directions; a second one for BLIP.

A state dict of this code (`InstructBLIP.state_dict()`, `BLIP2.state_dict()`) is compared with the formats in which the two
were released. timm's ViTs use LAVIS's names without their prefix. A language model's tensors differ by their prefix only.
"""

import contextlib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from instructblip.errors import UserError
from instructblip.models.vision import VisionEncoder

# `huggingface` is the layout of InstructBLIP's classes, `huggingface_blip2` that of BLIP-2's. BLIP's files, those of its own
# repository among them, and its classes have a table of their own.
Format = Literal["lavis", "huggingface", "huggingface_blip2", "lavis_blip", "huggingface_blip", "huggingface_llava"]


class Part(NamedTuple):
    """A part of the model: its prefix in each of the three, and rows of names behind it.

    `{i}` is the number of a layer; `.*` stands for `.weight` and `.bias`; None is a tensor that the format has no place for.
    """

    native: str
    lavis: str
    huggingface: str
    rows: tuple[tuple[str, str, str | None], ...]


TABLE = (
    Part(
        "vision.backbone.",
        "visual_encoder.",
        "vision_model.",
        (
            ("cls_token", "cls_token", "embeddings.class_embedding"),
            ("pos_embed", "pos_embed", "embeddings.position_embedding"),
            ("patch_embed.proj.*", "patch_embed.proj.*", "embeddings.patch_embedding.*"),
            ("blocks.{i}.norm1.*", "blocks.{i}.norm1.*", "encoder.layers.{i}.layer_norm1.*"),
            ("blocks.{i}.norm2.*", "blocks.{i}.norm2.*", "encoder.layers.{i}.layer_norm2.*"),
            ("blocks.{i}.attn.qkv.weight", "blocks.{i}.attn.qkv.weight", "encoder.layers.{i}.self_attn.qkv.weight"),
            # transformers keeps one vector [query, key, value]; see `pack_qkv_bias`.
            ("blocks.{i}.attn.q_bias", "blocks.{i}.attn.q_bias", "encoder.layers.{i}.self_attn.qkv.bias[query]"),
            ("blocks.{i}.attn.v_bias", "blocks.{i}.attn.v_bias", "encoder.layers.{i}.self_attn.qkv.bias[value]"),
            ("blocks.{i}.attn.proj.*", "blocks.{i}.attn.proj.*", "encoder.layers.{i}.self_attn.projection.*"),
            ("blocks.{i}.mlp.fc1.*", "blocks.{i}.mlp.fc1.*", "encoder.layers.{i}.mlp.fc1.*"),
            ("blocks.{i}.mlp.fc2.*", "blocks.{i}.mlp.fc2.*", "encoder.layers.{i}.mlp.fc2.*"),
        ),
    ),
    Part(
        "",
        "",
        "",
        (
            ("vision_norm.*", "ln_vision.*", "vision_model.post_layernorm.*"),
            ("qformer.query_tokens", "query_tokens", "query_tokens"),
            # LAVIS's name follows the language model: llm_proj, or t5_proj for an encoder-decoder (see PROJECTIONS).
            ("projection.*", "llm_proj.*", "language_projection.*"),
            # Heads of BLIP-2's first stage. transformers has no place for the temperature.
            ("vision_projection.*", "vision_proj.*", "vision_projection.*"),
            ("text_projection.*", "text_proj.*", "text_projection.*"),
            ("matching_head.*", "itm_head.*", "itm_head.*"),
            ("temperature", "temp", None),
        ),
    ),
    Part(
        "qformer.",
        "Qformer.bert.embeddings.",
        "qformer.embeddings.",
        (
            ("word_embeddings.weight", "word_embeddings.weight", "word_embeddings.weight"),
            ("position_embeddings.weight", "position_embeddings.weight", "position_embeddings.weight"),
            ("norm.*", "LayerNorm.*", "layernorm.*"),  # the only norm whose name transformers writes small
        ),
    ),
    Part(
        "qformer.layers.{i}.",
        "Qformer.bert.encoder.layer.{i}.",
        "qformer.encoder.layer.{i}.",
        (
            ("self_attention.query.*", "attention.self.query.*", "attention.attention.query.*"),
            ("self_attention.key.*", "attention.self.key.*", "attention.attention.key.*"),
            ("self_attention.value.*", "attention.self.value.*", "attention.attention.value.*"),
            ("self_attention.output.*", "attention.output.dense.*", "attention.output.dense.*"),
            ("self_attention.norm.*", "attention.output.LayerNorm.*", "attention.output.LayerNorm.*"),
            ("cross_attention.query.*", "crossattention.self.query.*", "crossattention.attention.query.*"),
            ("cross_attention.key.*", "crossattention.self.key.*", "crossattention.attention.key.*"),
            ("cross_attention.value.*", "crossattention.self.value.*", "crossattention.attention.value.*"),
            ("cross_attention.output.*", "crossattention.output.dense.*", "crossattention.output.dense.*"),
            ("cross_attention.norm.*", "crossattention.output.LayerNorm.*", "crossattention.output.LayerNorm.*"),
            ("query_ffn.up.*", "intermediate_query.dense.*", "intermediate_query.dense.*"),
            ("query_ffn.down.*", "output_query.dense.*", "output_query.dense.*"),
            ("query_ffn.norm.*", "output_query.LayerNorm.*", "output_query.LayerNorm.*"),
            ("text_ffn.up.*", "intermediate.dense.*", "intermediate.dense.*"),
            ("text_ffn.down.*", "output.dense.*", "output.dense.*"),
            ("text_ffn.norm.*", "output.LayerNorm.*", "output.LayerNorm.*"),
        ),
    ),
    Part(
        "qformer.lm_head.",
        "Qformer.cls.predictions.",
        "",
        # BLIP-2's first stage. transformers has no language-model head on a Q-Former. LAVIS's files also hold copies
        # (LAVIS_TIED).
        (
            ("dense.*", "transform.dense.*", None),
            ("norm.*", "transform.LayerNorm.*", None),
            ("bias", "bias", None),
        ),
    ),
)

_VIT = (
    ("cls_token", "cls_token", "embeddings.class_embedding"),
    ("pos_embed", "pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.*", "patch_embed.proj.*", "embeddings.patch_embedding.*"),
    ("blocks.{i}.norm1.*", "blocks.{i}.norm1.*", "encoder.layers.{i}.layer_norm1.*"),
    ("blocks.{i}.norm2.*", "blocks.{i}.norm2.*", "encoder.layers.{i}.layer_norm2.*"),
    ("blocks.{i}.attn.qkv.*", "blocks.{i}.attn.qkv.*", "encoder.layers.{i}.self_attn.qkv.*"),
    ("blocks.{i}.attn.proj.*", "blocks.{i}.attn.proj.*", "encoder.layers.{i}.self_attn.projection.*"),
    ("blocks.{i}.mlp.fc1.*", "blocks.{i}.mlp.fc1.*", "encoder.layers.{i}.mlp.fc1.*"),
    ("blocks.{i}.mlp.fc2.*", "blocks.{i}.mlp.fc2.*", "encoder.layers.{i}.mlp.fc2.*"),
    ("norm.*", "norm.*", "post_layernorm.*"),
)
_TEXT_EMBEDDINGS = (
    ("word_embeddings.weight", "word_embeddings.weight"),
    ("position_embeddings.weight", "position_embeddings.weight"),
    ("norm.*", "LayerNorm.*"),
)
_SELF_ATTENTION = (
    ("query.*", "self.query.*"),
    ("key.*", "self.key.*"),
    ("value.*", "self.value.*"),
    ("output.*", "output.dense.*"),
    ("norm.*", "output.LayerNorm.*"),
)
_TEXT_LAYER = (
    *((f"self_attention.{own}", f"attention.{theirs}") for own, theirs in _SELF_ATTENTION),
    *((f"cross_attention.{own}", f"crossattention.{theirs}") for own, theirs in _SELF_ATTENTION),
    ("ffn.up.*", "intermediate.dense.*"),
    ("ffn.down.*", "output.dense.*"),
    ("ffn.norm.*", "output.LayerNorm.*"),
)
_TEXT_HEAD = (("dense.*", "transform.dense.*"), ("norm.*", "transform.LayerNorm.*"), ("bias", "bias"))


def _alike(native: str, foreign: str, rows: Iterable[tuple[str, str]], *, in_transformers: bool = True) -> Part:
    """A part whose names are BERT's in LAVIS and in transformers alike."""
    return Part(native, foreign, foreign, tuple((own, name, name if in_transformers else None) for own, name in rows))


# BLIP, of LAVIS and of its own repository; momentum copies, the queue and the temperature have no place in transformers.
BLIP_TABLE = (
    Part("vision.backbone.", "visual_encoder.", "vision_model.", _VIT),
    Part("momentum.vision.backbone.", "visual_encoder_m.", "", tuple((own, name, None) for own, name, _ in _VIT)),
    _alike("text_encoder.", "text_encoder.embeddings.", _TEXT_EMBEDDINGS),
    _alike("text_encoder.layers.{i}.", "text_encoder.encoder.layer.{i}.", _TEXT_LAYER),
    _alike("momentum.text_encoder.", "text_encoder_m.embeddings.", _TEXT_EMBEDDINGS, in_transformers=False),
    _alike(
        "momentum.text_encoder.layers.{i}.", "text_encoder_m.encoder.layer.{i}.", _TEXT_LAYER, in_transformers=False
    ),
    _alike("text_decoder.", "text_decoder.bert.embeddings.", _TEXT_EMBEDDINGS),
    _alike("text_decoder.layers.{i}.", "text_decoder.bert.encoder.layer.{i}.", _TEXT_LAYER),
    _alike("text_decoder.lm_head.", "text_decoder.cls.predictions.", _TEXT_HEAD),
    # Pre-training's decoder is the encoder but for these. Files hold it whole: see `blip.LAVIS_SHARED`.
    _alike(
        "text_encoder.layers.{i}.decoder_attention.",
        "text_decoder.bert.encoder.layer.{i}.attention.",
        _SELF_ATTENTION,
        in_transformers=False,
    ),
    _alike("text_encoder.lm_head.", "text_decoder.cls.predictions.", _TEXT_HEAD, in_transformers=False),
    _alike(
        "",
        "",
        (
            ("vision_projection.*", "vision_proj.*"),
            ("text_projection.*", "text_proj.*"),
            ("matching_head.*", "itm_head.*"),
        ),
    ),
    _alike(
        "",
        "",
        (
            ("temperature", "temp"),
            ("momentum.vision_projection.*", "vision_proj_m.*"),
            ("momentum.text_projection.*", "text_proj_m.*"),
            ("momentum.image_queue", "image_queue"),
            ("momentum.text_queue", "text_queue"),
            ("momentum.image_id_queue", "idx_queue"),
            ("momentum.pointer", "queue_ptr"),
        ),
        in_transformers=False,
    ),
)

# LLaVA, in transformers' files; what they hold in other pieces, `pack_clip` puts together.
LLAVA_TABLE = (
    ("vision.backbone.cls_token", "vision_tower.embeddings.class_embedding"),
    ("vision.backbone.pos_embed", "vision_tower.embeddings.position_embedding.weight"),
    ("vision.backbone.patch_embed.proj.weight", "vision_tower.embeddings.patch_embedding.weight"),
    ("vision.backbone.norm_pre.*", "vision_tower.pre_layrnorm.*"),
    ("vision.backbone.blocks.{i}.norm1.*", "vision_tower.encoder.layers.{i}.layer_norm1.*"),
    ("vision.backbone.blocks.{i}.norm2.*", "vision_tower.encoder.layers.{i}.layer_norm2.*"),
    ("vision.backbone.blocks.{i}.attn.qkv.*", "vision_tower.encoder.layers.{i}.self_attn.qkv.*"),
    ("vision.backbone.blocks.{i}.attn.proj.*", "vision_tower.encoder.layers.{i}.self_attn.out_proj.*"),
    ("vision.backbone.blocks.{i}.mlp.fc1.*", "vision_tower.encoder.layers.{i}.mlp.fc1.*"),
    ("vision.backbone.blocks.{i}.mlp.fc2.*", "vision_tower.encoder.layers.{i}.mlp.fc2.*"),
    ("connector.hidden.*", "multi_modal_projector.linear_1.*"),
    ("connector.output.*", "multi_modal_projector.linear_2.*"),
)

# BLIP-2's classes keep the text embeddings outside the Q-Former, and its first norm inside.
_BLIP2_PREFIXES = {"qformer.embeddings.layernorm.": "qformer.layernorm.", "qformer.embeddings.": "embeddings."}

# The language model: transformers' own names behind these prefixes. LAVIS never stores it.
LLM_PREFIX, HUGGINGFACE_LLM_PREFIX = "llm.model.", "language_model."

# LAVIS's names of the projection, one a family of language models: Vicuna, Flan-T5, OPT.
PROJECTIONS = ("llm_proj", "t5_proj", "opt_proj")

# LAVIS leaves frozen weights out of its files by their names, and a tied table has more names than one.
LAVIS_ALIASES = (
    "t5_model.encoder.embed_tokens.weight",
    "t5_model.decoder.embed_tokens.weight",
    "opt_model.lm_head.weight",
)

# Copies in the files of BLIP-2's first stage: of the word embeddings, and of the head's bias.
LAVIS_TIED = ("Qformer.cls.predictions.decoder.weight", "Qformer.cls.predictions.decoder.bias")

# How each format is called in messages, and what it holds.
_PLACES: dict[Format, tuple[str, str]] = {
    "lavis": ("a LAVIS file", "its parts are EVA-CLIP ViT and Q-Former"),
    "huggingface": ("a transformers InstructBLIP file", "its parts are EVA-CLIP ViT and Q-Former"),
    "huggingface_blip2": ("a transformers BLIP-2 file", "its parts are EVA-CLIP ViT and Q-Former"),
    "lavis_blip": ("a BLIP file of LAVIS", "its vision part is a plain ViT, its text part a BERT"),
    "huggingface_blip": ("a transformers BLIP file", "its vision part is a plain ViT, its text part a BERT"),
    "huggingface_llava": ("a transformers LLaVA file", "its vision part is CLIP's ViT, its connector an MLP"),
}

# Tensors that may stand in a file and mean nothing here.
IGNORED: dict[Format, tuple[str, ...]] = {
    "lavis": (
        "Qformer.bert.embeddings.position_ids",  # 0, 1, 2, ...
        *LAVIS_TIED,
        "*.rotary_emb.inv_freq",  # computed from the configuration
        *LAVIS_ALIASES,
    ),
    "huggingface": (
        "qformer.embeddings.position_ids",
        "*.rotary_emb.inv_freq",
    ),
    "huggingface_blip2": (
        "embeddings.position_ids",
        "*.rotary_emb.inv_freq",
    ),
    "lavis_blip": ("*.position_ids", "*.cls.predictions.decoder.*"),
    "huggingface_blip": ("*.position_ids", "*.cls.predictions.decoder.*"),
    "huggingface_llava": ("*.position_ids", "*.rotary_emb.inv_freq", "vision_tower.post_layernorm.*"),
}


def _expand() -> dict[str, dict[Format, str]]:
    table: dict[str, dict[Format, str]] = {}
    tables: tuple[tuple[tuple[Part, ...], Format, tuple[Format, ...]], ...] = (
        (TABLE, "lavis", ("huggingface", "huggingface_blip2")),
        (BLIP_TABLE, "lavis_blip", ("huggingface_blip",)),
    )
    for parts, of_lavis, of_transformers in tables:
        for part in parts:
            for native, lavis, huggingface in part.rows:
                for ending in ("weight", "bias") if native.endswith(".*") else ("",):
                    names = table.setdefault(part.native + _ended(native, ending), {})
                    names[of_lavis] = part.lavis + _ended(lavis, ending)
                    for form in of_transformers if huggingface is not None else ():
                        name = part.huggingface + _ended(huggingface or "", ending)
                        names[form] = _blip2_name(name) if form == "huggingface_blip2" else name
    for native, theirs in LLAVA_TABLE:
        for ending in ("weight", "bias") if native.endswith(".*") else ("",):
            table.setdefault(_ended(native, ending), {})["huggingface_llava"] = _ended(theirs, ending)
    return table


def _ended(name: str, ending: str) -> str:
    return name.removesuffix("*") + ending if ending else name


def _blip2_name(huggingface: str) -> str:
    for prefix, theirs in _BLIP2_PREFIXES.items():
        if huggingface.startswith(prefix):
            return theirs + huggingface.removeprefix(prefix)
    return huggingface


_BY_NATIVE = _expand()
_BY_FOREIGN: dict[Format, dict[str, str]] = {
    form: {names[form]: native for native, names in _BY_NATIVE.items() if form in names} for form in _PLACES
}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def foreign_names(native: Iterable[str], to: Format) -> dict[str, str]:
    """This code's tensor names -> those of another format, in the same order.

    Raises:
        UserError: a tensor that has no place in that format.
    """
    names = {}
    for name in native:
        layer = _NUMBER.search(name)
        row = _BY_NATIVE.get(_NUMBER.sub("{i}", name))
        if row is None or to not in row:
            place, parts = _PLACES[to]
            raise UserError(f"{name} has no place in {place}; {parts}")
        names[name] = row[to].replace("{i}", layer.group()) if layer else row[to]
    return names


def native_names(foreign: Iterable[str], of: Format, where: str) -> dict[str, str]:
    """The tensor names of another format -> this code's, in the same order; those that mean nothing here are left out.

    Args:
        foreign: names; LAVIS's projection is called `llm_proj` whatever the family.
        of: their format. A language model's have a place in transformers' only.
        where: they were read, for the message.

    Raises:
        UserError: an unknown name.
    """
    names, unknown = {}, []
    for name in foreign:
        layer = _NUMBER.search(name)
        native = _BY_FOREIGN[of].get(_NUMBER.sub("{i}", name))
        if native is not None:
            names[name] = native.replace("{i}", layer.group()) if layer else native
        elif of != "lavis" and name.startswith(HUGGINGFACE_LLM_PREFIX):
            names[name] = LLM_PREFIX + name.removeprefix(HUGGINGFACE_LLM_PREFIX)
        elif not is_ignored(name, of):
            unknown.append(name)
    if unknown:
        raise UserError(f"{where} has the unknown tensor {_first(unknown)}; it is of another model")
    return names


def foreign_layers(native: Iterable[str], to: Format) -> dict[str, str]:
    """The same of layers, the language model's included: the names that their weights have, without `.weight`.

    Raises:
        UserError: a layer that has no place in that format.
    """
    names = {}
    for layer in native:
        if layer.startswith(LLM_PREFIX):
            names[layer] = HUGGINGFACE_LLM_PREFIX + layer.removeprefix(LLM_PREFIX)
        else:
            names[layer] = foreign_names([f"{layer}.weight"], to)[f"{layer}.weight"].removesuffix(".weight")
    return names


def native_layers(foreign: Iterable[str], of: Format) -> dict[str, str]:
    """The reverse of `foreign_layers`, of those layers that are known."""
    names: dict[str, str] = {}
    for layer in foreign:
        weight = f"{layer}.weight" if of != "huggingface_llava" else _llava_name(f"{layer}.weight")
        with contextlib.suppress(UserError):
            names[layer] = native_names([weight], of, "it")[weight].removesuffix(".weight")
    return names


def has_place(native: str, to: Format) -> bool:
    """Whether another format has a place for a tensor of this code."""
    return to in _BY_NATIVE.get(_NUMBER.sub("{i}", native), {})


def pack_qkv_bias(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join `...qkv.bias[query]` and `[value]` into `...qkv.bias` = [query, zeros, value], as transformers stores it."""
    packed = {name: tensor for name, tensor in state.items() if not name.endswith("]")}
    for name, query in state.items():
        if name.endswith("[query]"):
            whole = name.removesuffix("[query]")
            packed[whole] = torch.cat([query, torch.zeros_like(query), state[f"{whole}[value]"]])
    return packed


def unpack_qkv_bias(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `pack_qkv_bias`.

    A key bias is dropped: it adds the same number to every score of a query, which the softmax takes away again. Released
    files hold zeros there.
    """
    unpacked: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(".self_attn.qkv.bias") and tensor.ndim == 1 and len(tensor) % 3 == 0:
            query, _, value = tensor.chunk(3)
            unpacked |= {f"{name}[query]": query, f"{name}[value]": value}
        else:
            unpacked[name] = tensor
    return unpacked


# Leading dimensions of size 1 that files leave out.
_CLIP_LOST = {
    "vision_tower.embeddings.class_embedding": 2,
    "vision_tower.embeddings.position_embedding.weight": 1,
}
_QKV = ("q_proj", "k_proj", "v_proj")


def pack_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a LLaVA file -> those of `LLAVA_TABLE`: one projection for queries, keys and values; rows of a batch.

    Files name the tower with `vision_model` or without, and begin with `model.` or not.
    """
    plain = {_llava_name(name): tensor for name, tensor in state.items()}
    packed: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        piece = next((part for part in _QKV if f".self_attn.{part}." in name), None)
        if piece is None or not name.startswith("vision_tower."):
            packed[name] = tensor
        elif all(name.replace(piece, part) in plain for part in _QKV):  # else it is missed where tensors are compared
            packed[name.replace(piece, "qkv")] = torch.cat([plain[name.replace(piece, part)] for part in _QKV])
    for name, lost in _CLIP_LOST.items():
        if name in packed:
            packed[name] = packed[name][(None,) * lost]
    return packed


def unpack_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `pack_clip`."""
    unpacked: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".self_attn.qkv." in name:
            unpacked |= {name.replace("qkv", part): piece for part, piece in zip(_QKV, tensor.chunk(3), strict=True)}
        else:
            unpacked[name] = tensor
    for name, lost in _CLIP_LOST.items():
        unpacked[name] = unpacked[name][(0,) * lost]
    return unpacked


def _llava_name(name: str) -> str:
    """A tensor's name in a LLaVA file as released ones have it, the tower without its inner `vision_model`."""
    name = name.removeprefix("model.") if name.startswith(_LLAVA_INSIDE) else name
    if name.startswith("lm_head."):
        return HUGGINGFACE_LLM_PREFIX + name
    name = name.replace("vision_tower.vision_model.", "vision_tower.", 1)
    if name.startswith(HUGGINGFACE_LLM_PREFIX) and not name.startswith(_LLAVA_HELD):
        return name.replace(HUGGINGFACE_LLM_PREFIX, f"{HUGGINGFACE_LLM_PREFIX}model.", 1)
    return name


_LLAVA_INSIDE = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.")
_LLAVA_HELD = tuple(f"{HUGGINGFACE_LLM_PREFIX}{part}." for part in ("model", "lm_head"))


def is_ignored(name: str, of: Format) -> bool:
    """Whether a tensor of a foreign file means nothing here."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in IGNORED[of])


def check_tensors(expected: Mapping[str, torch.Size], found: Mapping[str, Tensor], where: str) -> None:
    """Compare a file's tensors with those a model needs, one to one.

    Raises:
        UserError: names the first tensor that is missing, of another shape, or unknown, and how many more there are.
    """
    missing = [name for name in expected if name not in found]
    misshapen = [name for name in expected if name in found and found[name].shape != expected[name]]
    surplus = [name for name in found if name not in expected]
    if missing:
        raise UserError(f"{where} lacks the tensor {_first(missing)}; it is of another model, or incomplete")
    if misshapen:
        shapes = f"{tuple(found[misshapen[0]].shape)}, the model needs {tuple(expected[misshapen[0]])}"
        raise UserError(f"{where}: {misshapen[0]} is {shapes}; it is of another model")
    if surplus:
        raise UserError(f"{where} has the unknown tensor {_first(surplus)}; it is of another model")


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


SIDECAR = "instructblip.json"
SIDECAR_FORMAT = 1
SIDE_TENSORS = "instructblip.safetensors"  # what transformers' class has no place for, under this code's names
LLM_TOKENIZER = "llm_tokenizer"
QFORMER_TOKENIZER = "qformer_tokenizer"


def backbone_state(vision: VisionEncoder) -> dict[str, Tensor]:
    return {f"vision.backbone.{name}": tensor for name, tensor in vision.backbone.state_dict().items()}
