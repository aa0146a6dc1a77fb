"""A CLIP from a transformers folder or the hub."""

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPModel

from instructblip._transformers import quiet_transformers
from instructblip.distributed import choose_device
from instructblip.errors import UserError
from instructblip.models.clip import CLIP
from instructblip.weights.gatekeeper import (
    check_settings,
    check_vocabulary,
    check_weights,
    config_json,
    foreign_settings,
    open_config,
    open_tokenizer,
    reason,
)
from instructblip.weights.language_model import check_loaded
from instructblip.weights.load import hub_folder, is_hub_id
from instructblip.weights.transformers_settings import image_statistics

_RELEASED = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}


def find_clip(source: str) -> Path:
    """The folder of a CLIP: the one given, or that of a hub id, which is fetched.

    Raises:
        UserError: neither, another model, or weights that cannot be opened.
    """
    path = Path(source).expanduser()
    if not path.exists() and not is_hub_id(source):
        raise UserError(f"filter={source} is no folder and no hub id; give one of a CLIP")
    folder = path if path.exists() else hub_folder(source)
    if (kind := config_json(folder).get("model_type")) != "clip":
        raise UserError(
            f"filter={source} is a model of type {kind}, wanted is a CLIP: openai/clip-vit-large-patch14, say"
        )
    check_settings(folder)
    check_weights(folder)
    return folder


def load_clip(folder: Path, device: str = "auto") -> CLIP:
    """Load a CLIP in float32.

    Args:
        folder: what `find_clip` gave.
        device: `auto` takes a GPU where there is one.

    Raises:
        UserError: files that do not fit together.
    """
    settings, tokenizer = open_config(folder), open_tokenizer(folder, truncation_side="right")
    check_vocabulary(tokenizer, settings.text_config.vocab_size, f"{folder}: ")
    try:
        with quiet_transformers():
            loaded: Any = CLIPModel.from_pretrained(
                folder,
                config=settings,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
            )
    except Exception as error:  # its class may stumble over settings and files in any way
        raise UserError(f"{folder} cannot be loaded ({reason(error)}); it is damaged: fetch it again") from None
    model, found = loaded
    check_loaded(found, str(folder), "")
    with foreign_settings(folder):
        statistics = image_statistics(folder, settings, crops=True, usual=_RELEASED)
        return CLIP(model, tokenizer, **statistics).to(choose_device(device))
