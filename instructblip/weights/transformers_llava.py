"""transformers' folders of LLaVA, read into this code's model, and what is written of one.

* `vision_feature_layer` says which layer of CLIP is read. Layers behind it, and CLIP's last norm, do nothing: they are not
  built, and a folder that is written has a tower that ends there (`vision_feature_layer` -1), its last norm neutral.
* `vision_feature_select_strategy`: `default` leaves [CLS] out, `full` reads it.
* LLaVA's projector has the LLM's width between its layers.
* Where the folder says nothing else, prompts stand as LLaVA-1.5 was trained with them: USER: <image>, a line end, the
  prompt, ASSISTANT:. Pictures are squashed to a square, as everywhere in this code; CLIP's processor would crop them.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlavaConfig

from instructblip.errors import UserError
from instructblip.files import read_json
from instructblip.models.adapters import plain_state
from instructblip.models.connector import MLPConnector, Patches
from instructblip.models.llava import LLaVA
from instructblip.models.llm import LLM, EncoderDecoderLLM
from instructblip.models.vision import VisionEncoder
from instructblip.weights.gatekeeper import open_tokenizer
from instructblip.weights.names import (
    HUGGINGFACE_LLM_PREFIX,
    SIDECAR,
    SIDECAR_FORMAT,
    backbone_state,
    check_tensors,
    foreign_names,
    unpack_clip,
)
from instructblip.weights.transformers_read import load_own_llm, load_own_vision, read_weights
from instructblip.weights.transformers_settings import (
    LLMSettings,
    between_words,
    image_statistics,
    one_number,
    ratio_of,
    read_transformers_config,
    tower_layers,
)

logger = logging.getLogger(__name__)

# The architectures, by their activation; sizes come from the folder.
BACKBONES = {"quick_gelu": "vit_large_patch14_clip_quickgelu_224", "gelu": "vit_large_patch14_clip_224"}
_TITLE = "LlavaForConditionalGeneration"
_AS_RUN = "keep it as a run (--to native)"
# What LLaVA-1.5 was trained with, and by which a chat template is known to be its.
_USER, _LINE_END, _ASSISTANT = "USER: ", "\n", " ASSISTANT:"
# Written out, or as in the released folders, whose template makes it of the role: `message['role'].upper() + ': '`.
_USER_IN_TEMPLATE = re.compile(rf"{_USER}|role\W+upper\b\W*: ")


class LlavaSettings(NamedTuple):
    """What a folder says besides its weights.

    Attributes:
        vision: arguments of `VisionEncoder`.
        class_token: [CLS] is read too.
        hidden_width: of the projector.
        llm: of the language model.
    """

    vision: dict[str, Any]
    class_token: bool
    hidden_width: int
    llm: LLMSettings


# --- read ------------------------------------------------------------------------------------------------------------


def load_llava_folder(folder: Path, *, llm: LLM | None = None) -> LLaVA:
    """Read a transformers folder of LLaVA; frozen weights are used as they lie in the files, the connector is copied.

    Args:
        folder: of the model.
        llm: a language model in place of the folder's own. Where its width differs, the last layer stays new.

    Raises:
        UserError: not such a folder, a tensor that is missing, unknown or of another shape, or another vision tower than
            CLIP's.
    """
    settings, weights = read_llava_settings(folder), read_weights(folder)
    config = read_transformers_config(folder)
    vision = load_own_vision(settings.vision, weights, folder)
    own_llm = llm or load_own_llm(config, settings.llm, weights, folder)
    widths = {"vision_width": vision.width, "llm_width": own_llm.width, "hidden_width": settings.hidden_width}
    connector = MLPConnector(Patches(vision, class_token=settings.class_token), **widths)
    model = LLaVA(vision=vision, vision_norm=nn.Identity(), connector=connector, llm=own_llm)
    own = model.part_state("connector")
    others = {name: tensor for name, tensor in weights.items() if not name.startswith(HUGGINGFACE_LLM_PREFIX)}
    if own_llm.width != config.text_config.hidden_size:
        own = {name: tensor for name, tensor in own.items() if not name.startswith("connector.output.")}
        others = {name: tensor for name, tensor in others.items() if ".linear_2." not in name}
    names = foreign_names({**backbone_state(vision), **own}, "huggingface_llava")
    check_tensors(
        {names[name]: tensor.shape for name, tensor in {**backbone_state(vision), **own}.items()}, others, str(folder)
    )
    model.load_state_dict({name: others[names[name]] for name in own}, strict=False)
    return model.eval()


def read_llava_settings(folder: Path) -> LlavaSettings:
    """All that a folder says besides its weights; `instructblip.json` counts where it is there.

    Raises:
        UserError: a part that is not LLaVA's with a CLIP, or files that are missing.
    """
    config = read_transformers_config(folder)
    said = read_json(folder / SIDECAR) if (folder / SIDECAR).is_file() else None
    if said is not None and said["format"] != SIDECAR_FORMAT:
        raise UserError(f"{folder / SIDECAR} is of format {said['format']}, this code reads {SIDECAR_FORMAT}")
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise UserError(f"{folder}: the projector has not LLaVA-1.5's gelu and biases; such a model is not read")
    conventions = said["llm"] if said else _conventions(folder)
    rows = said["llm_rows"] if said else config.text_config.vocab_size
    return LlavaSettings(
        vision=_vision_arguments(config, said["vision"] if said else image_statistics(folder, config), folder),
        class_token=config.vision_feature_select_strategy == "full",
        hidden_width=config.text_config.hidden_size,
        llm=LLMSettings("decoder", conventions, rows),
    )


def _vision_arguments(config: Any, said: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    tower = config.vision_config
    if tower.model_type != "clip_vision_model" or tower.hidden_act not in BACKBONES:
        raise UserError(f"{folder}: the vision tower is {tower.model_type} ({tower.hidden_act}); CLIP's alone is read")
    image_size, patch_size = one_number(tower.image_size), one_number(tower.patch_size)
    if image_size is None or patch_size is None:
        raise UserError(f"{folder}: vision_config is not that of a ViT on square images; it is another model")
    return {
        "backbone": BACKBONES[tower.hidden_act],
        "image_size": image_size,
        "mean": said["mean"],
        "std": said["std"],
        "options": {
            "patch_size": patch_size,
            "embed_dim": tower.hidden_size,
            "depth": tower_layers(config, folder),
            "num_heads": tower.num_attention_heads,
            "mlp_ratio": ratio_of(tower.hidden_size, tower.intermediate_size),
        },
        "final_norm": False,
        "norm_eps": tower.layer_norm_eps,
    }


def _conventions(folder: Path) -> dict[str, Any]:
    """Of LLaVA-1.5, where the folder's chat template is its; else prompts stand behind the image as they are."""
    tokenizer = open_tokenizer(folder)
    plain, whole = tokenizer("a photo", add_special_tokens=False)["input_ids"], tokenizer("a photo")["input_ids"]
    if tokenizer.eos_token is None or len(whole) > len(plain) + 1 or whole[-len(plain) :] != plain:
        raise UserError(f"{folder}: the tokenizer must have an EOS token and put at most one token before a text")
    templates = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.j*")) if file.name in _TEMPLATES]
    known = any(_USER_IN_TEMPLATE.search(text) and _ASSISTANT.strip() in text for text in templates)
    if not known:
        logger.warning(
            "%s has no chat template of LLaVA-1.5: prompts stand behind the image as they are; write what the model was "
            "trained with around them",
            folder,
        )
    around = {"prompt_prefix": _LINE_END, "prompt_suffix": _ASSISTANT} if known else {}
    return {
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token or tokenizer.eos_token,
        "bos_token": start_of(tokenizer) or None,
        "image_in_text": True,
        "image_prefix": _USER if known else "",
        "answer_prefix": between_words(tokenizer),
        **around,
    }


_TEMPLATES = ("chat_template.json", "chat_template.jinja", "processor_config.json", "tokenizer_config.json")


def start_of(tokenizer: Any) -> str:
    """The tokens that a tokenizer puts in front of every text by itself, as text."""
    plain, whole = tokenizer("a photo", add_special_tokens=False)["input_ids"], tokenizer("a photo")["input_ids"]
    return "".join(tokenizer.convert_ids_to_tokens(whole[: len(whole) - len(plain)]))


def around_image(tokenizer: Any, said: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a user of transformers writes before the image token, between it and the prompt, and behind that."""
    start, text = (
        said.get("bos_token") or "",
        {"image_prefix": "", "prompt_prefix": "", "prompt_suffix": ""} | dict(said),
    )
    begins, continues = (start, "") if said.get("image_in_text") else ("", start)
    before = f"{begins}{text['image_prefix']}".removeprefix(start_of(tokenizer))
    return before, f"{continues}{text['prompt_prefix']}", text["prompt_suffix"]


# --- written ---------------------------------------------------------------------------------------------------------


def check_llava(model: LLaVA) -> None:
    """Refuse a model that transformers' class cannot hold.

    Raises:
        UserError: says why, and what to do.
    """
    if (reason := _unholdable(model)) is not None:
        raise UserError(f"transformers' {_TITLE} cannot hold this model: {reason}")


def _unholdable(model: LLaVA) -> str | None:
    vision, connector, llm = model.vision, model.connector, model.llm
    if not isinstance(connector, MLPConnector):
        return f"its projector is an MLP, the connector is connector={connector.kind}; {_AS_RUN}"
    if connector.hidden.out_features != llm.width:
        return f"its projector's hidden width is the LLM's {llm.width}, not {connector.hidden.out_features}; {_AS_RUN}"
    if connector.patches.pools:
        return f"it reads all patches, the connector averages them to {connector.tokens} tokens; {_AS_RUN}"
    if not isinstance(vision.backbone, VisionTransformer) or not isinstance(vision.backbone.norm_pre, nn.LayerNorm):
        return f"its vision tower is CLIP's ViT, this one is {type(vision.backbone).__name__}; {_AS_RUN}"
    if vision.layers or not isinstance(vision.backbone.norm, nn.Identity):
        return "it reads CLIP's tokens in front of the last norm; train with vision.final_norm=false"
    if not isinstance(model.vision_norm, nn.Identity):
        return "it has no norm between CLIP and the projector; train with vision.norm=none"
    return _unholdable_llm(llm)


def _unholdable_llm(llm: LLM) -> str | None:
    name = type(llm.model).__name__
    if isinstance(llm, EncoderDecoderLLM):
        return f"its language model is decoder-only, {name} is not; {_AS_RUN}"
    if not hasattr(llm.model.base_model, "embed_tokens"):  # which the class ties its head to by that name
        return f"it looks tokens up in its language model's embed_tokens, and {name} has none there; {_AS_RUN}"
    if llm.model.base_model_prefix != "model" or not _has_plain_head(llm):
        return f"it puts one matrix behind its language model's layers, and {name} does more; {_AS_RUN}"
    return None


@torch.inference_mode()
def _has_plain_head(llm: LLM) -> bool:
    """Whether logits are the last states times a matrix, of embeddings as they are looked up: found by trying."""
    head, table = llm.model.get_output_embeddings(), llm.embeddings.weight
    if getattr(head, "bias", None) is not None or llm.abilities.embedding_factor != 1:
        return False
    ids = torch.arange(min(4, len(table)), device=table.device)[None]
    states = llm.model.base_model(inputs_embeds=llm.embeddings(ids)).last_hidden_state
    logits = llm.model(inputs_embeds=llm.embeddings(ids)).logits
    return torch.allclose(head(states).float(), logits.float(), rtol=1e-3, atol=1e-3)


def llava_config(model: LLaVA, text: Mapping[str, Any], image_token: int) -> LlavaConfig:
    """transformers' configuration, of one for the language model."""
    vision, backbone = model.vision, model.vision.backbone
    block = backbone.blocks[0]
    tower = CLIPVisionConfig(
        hidden_size=vision.width,
        intermediate_size=block.mlp.fc1.out_features,
        num_hidden_layers=len(backbone.blocks),
        num_attention_heads=block.attn.num_heads,
        image_size=vision.image_size,
        patch_size=backbone.patch_embed.patch_size[0],
        layer_norm_eps=block.norm1.eps,
        hidden_act="quick_gelu" if isinstance(block.mlp.act, QuickGELU) else "gelu",
    )
    return LlavaConfig(
        vision_config=tower.to_dict(),
        text_config=dict(text),
        image_token_index=image_token,
        image_seq_length=model.connector.tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full" if model.connector.patches.class_token else "default",
    )


def llava_tensors(model: LLaVA, llm: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors under the names of transformers' class; `llm` holds the language model's, as in its files."""
    vision = {f"vision.backbone.{name}": value.detach() for name, value in plain_state(model.vision.backbone).items()}
    own = {**vision, **model.part_state("connector")}
    names = foreign_names(own, "huggingface_llava")
    state = unpack_clip({names[name]: tensor for name, tensor in own.items()})
    norm = model.vision.backbone.blocks[0].norm1
    neutral = {"weight": torch.ones_like(norm.weight), "bias": torch.zeros_like(norm.bias)}
    state |= {f"vision_tower.post_layernorm.{name}": tensor.detach() for name, tensor in neutral.items()}
    inside = {f"model.{name}": tensor for name, tensor in state.items()}
    head = f"{HUGGINGFACE_LLM_PREFIX}lm_head."
    for name, tensor in llm.items():
        layers = name.replace(f"{HUGGINGFACE_LLM_PREFIX}model.", f"model.{HUGGINGFACE_LLM_PREFIX}", 1)
        inside[name.removeprefix(HUGGINGFACE_LLM_PREFIX) if name.startswith(head) else layers] = tensor
    return inside


def llava_image_processor(vision: VisionEncoder) -> CLIPImageProcessor:
    """One that squashes pictures as this code does."""
    size = {"height": vision.image_size, "width": vision.image_size}
    return CLIPImageProcessor(
        size=size,
        crop_size=size,
        do_center_crop=False,
        image_mean=[value / 255 for value in vision.mean.flatten().tolist()],
        image_std=[value / 255 for value in vision.std.flatten().tolist()],
    )
