"""Adapters as files in the format of the peft library: written beside each checkpoint, read from whoever wrote them.

A folder in that format is adapter_config.json and adapter_model.safetensors; its names lead from the module that it is for.
Of a checkpoint these are transformers' class of the language model, timm's vision encoder, or this code's Q-Former:

    base = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    PeftModel.from_pretrained(base, "outputs/train/mine/checkpoints/step_00000600/adapters/llm")

Shape legend: R rank, I and O the width of what a layer reads and writes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from instructblip.errors import UserError
from instructblip.files import read_json
from instructblip.models.adapters import NAME, Adapter, is_adapter, root_of
from instructblip.models.base import Model
from instructblip.weights.names import Format, foreign_layers

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FOLDER = "adapter"  # beside a model of transformers that is written without its adapters
_PREFIX = "base_model.model."
MATRICES = ("lora_A", "lora_B")
# Values of plain LoRA. Other starts than these (pissa, olora, loftq) change the base, which the folder does not hold.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva"),
}
# Settings of plain LoRA, which the tensors and their names follow, and those of what is switched on by another.
_READ = {
    *("alpha_pattern", "lora_alpha", "r", "rank_pattern", "use_rslora"),
    *(
        "target_modules",
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "fan_in_fan_out",
        "ensure_weight_tying",
    ),
    *("inference_mode", "lora_dropout", "runtime_config", "task_type"),
    *("auto_mapping", "base_model_name_or_path", "peft_version", "revision"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "megatron_core", "qalora_group_size"),
}
# The part of the model that a root belongs to, where they are not called alike.
_PARTS = {"text_encoder": "text", "text_decoder": "text"}


class PeftFolder(NamedTuple):
    """What a folder in peft's format holds: adapter_config.json, and the tensors under peft's names."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def write(self, folder: Path) -> list[Path]:
        """Write both files, and return their paths."""
        folder.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / WEIGHTS_FILE)
        text = json.dumps(self.config, indent=2, sort_keys=True)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        return [folder / WEIGHTS_FILE, folder / CONFIG_FILE]


def peft_folders(adapters: Mapping[str, Adapter], state: Mapping[str, Tensor]) -> dict[str, PeftFolder]:
    """The adapters in a state dict of this code, by the module that each folder is for: `llm`, `vision`, `text_encoder`."""
    by_root: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if is_adapter(name):
            by_root.setdefault(root_of(name), {})[name] = tensor
    found = {}
    for root, tensors in by_root.items():
        first = root.partition(".")[0]
        names = {layer: layer.removeprefix(f"{root}.") for layer in map(_layer_of, tensors)}
        settings = dict.fromkeys(names, adapters[_PARTS.get(first, first)])
        found[first] = _folder(tensors, names, settings)
    return found


def whole_folder(model: Model, layout: Format) -> PeftFolder:
    """All adapters of a model in one, for transformers' class of the whole model, where layers have that layout's names."""
    tensors = {name: tensor for name, tensor in model.held_state().items() if is_adapter(name)}
    layers = dict.fromkeys(map(_layer_of, tensors))
    settings = {layer: model.adapters[model.part_of(layer)] for layer in layers}
    return _folder(tensors, foreign_layers(layers, layout), settings)


def _folder(tensors: Mapping[str, Tensor], names: Mapping[str, str], settings: Mapping[str, Adapter]) -> PeftFolder:
    """A folder of these tensors, whose layers get other names; ranks and factors may differ from layer to layer."""
    from peft import LoraConfig

    first = next(iter(settings.values()))
    differing = {names[layer]: own for layer, own in settings.items() if own != first}
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,  # type: ignore[arg-type]
        lora_dropout=first.dropout,
        target_modules=sorted(names.values()),
        rank_pattern={name: own.rank for name, own in differing.items()},
        alpha_pattern={name: own.alpha for name, own in differing.items()},
        inference_mode=True,
    ).to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    renamed = {}
    for name, tensor in tensors.items():
        layer = _layer_of(name)
        renamed[_PREFIX + names[layer] + name.removeprefix(layer).replace(f".{NAME}.", ".")] = tensor
    return PeftFolder({**plain, "peft_type": "LORA", "target_modules": sorted(names.values())}, renamed)


def _layer_of(name: str) -> str:
    """The adapted layer that a tensor of that name belongs to."""
    return name.partition(".lora_")[0]


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerAdapter:
    """An adapter of one layer."""

    rank: int
    scaling: float
    a_RI: Tensor
    b_OR: Tensor


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder is in peft's format."""
    return (folder / CONFIG_FILE).is_file()


def read_peft_folder(folder: Path) -> dict[str, LayerAdapter]:
    """The adapters of a folder by the names of their layers.

    Raises:
        UserError: no such folder, or adapters of another kind than plain LoRA.
    """
    if not is_adapter_folder(folder):
        raise UserError(
            f"adapter={folder} has no {CONFIG_FILE}; give a folder that peft wrote, or adapters/llm of a checkpoint"
        )
    config = _read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / WEIGHTS_FILE} cannot be read ({error}); save the adapter again, as safetensors"
        ) from None
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, matrix = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if matrix not in MATRICES:
            raise UserError(f"adapter={folder} has the tensor {name}; only lora_A and lora_B of linear layers are read")
        pairs.setdefault(layer, {})[matrix] = tensor
    if lone := [layer for layer, pair in pairs.items() if len(pair) < 2]:
        raise UserError(f"adapter={folder} has but one matrix for {lone[0]}; save it again")
    return {layer: _found(layer, pair, config) for layer, pair in pairs.items()}


def _read_config(folder: Path) -> dict[str, Any]:
    """The settings in a folder; whatever switches on more than plain LoRA is refused, also what peft has yet to think of."""
    config = read_json(folder / CONFIG_FILE)
    if not isinstance(config, dict) or "peft_type" not in config:
        raise UserError(f"{folder / CONFIG_FILE} is no configuration of peft's; save the adapter again")
    for key, value in config.items():
        if key not in _READ and (value not in _PLAIN[key] if key in _PLAIN else value):
            raise UserError(f"adapter={folder} has {key}={json.dumps(value)}; only plain LoRA is read")
    alphas = [config.get("lora_alpha"), *_alpha_pattern(config).values()]
    if not all(isinstance(alpha, int | float) and math.isfinite(alpha) for alpha in alphas):
        raise UserError(
            f"{folder / CONFIG_FILE} has no number as lora_alpha, or in alpha_pattern; save the adapter again"
        )
    return config


def _alpha_pattern(config: Mapping[str, Any]) -> dict[str, Any]:
    """Alphas of layers that have one of their own."""
    found = config.get("alpha_pattern")
    return found if isinstance(found, dict) else {}


def _found(layer: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> LayerAdapter:
    from peft.utils.other import get_pattern_key

    rank, patterns = pair["lora_A"].shape[0], _alpha_pattern(config)
    alpha = float(patterns.get(get_pattern_key(list(patterns), layer), config["lora_alpha"]))
    return LayerAdapter(rank, alpha / (rank**0.5 if config.get("use_rslora") else rank), pair["lora_A"], pair["lora_B"])
