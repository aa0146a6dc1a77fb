"""Convert foreign weight files, once, when a part enters the cache. The results are safetensors and JSON only."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructblip._transformers import quiet_transformers
from instructblip.errors import UserError

if TYPE_CHECKING:  # imported where it is needed: whoever fetches data does without
    from torch import Tensor

# Blocks in each stage of EfficientNet-Lite0 (arXiv:1905.11946, table 1; Lite models do not scale the first and last).
_LITE0_STAGES = (1, 2, 2, 3, 3, 4, 1)
_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def convert_gguf(source: Path, target: Path) -> None:
    """Turn the one GGUF file in `source` into a transformers folder: config, tokenizer, weights in fp32.

    Quantised tensors are expanded; tied embeddings are stored once. Takes seconds per 100 M parameters.

    Raises:
        UserError: not exactly one GGUF file, or one that lacks tensors.
    """
    file = _only_file(source, ".gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.name, trust_remote_code=False)
        opened: Any = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file.name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        loaded, found = opened
        if lost := sorted(found["missing_keys"]):  # transformers would draw them
            raise UserError(
                f"{file.name} lacks the tensor {lost[0]}, or holds a part of the model; give the whole model"
            )
        # A model that came from a GGUF file refuses to be saved, though its weights are plain fp32 by now.
        config = loaded.config
        del config.quantization_config
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        plain.load_state_dict(loaded.state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(target)
        tokenizer.save_pretrained(target)


def convert_efficientnet_lite0(source: Path, target: Path) -> None:
    """Turn the one .pth file of EfficientNet-Lite0 in `source` into `model.safetensors` under timm's names.

    Raises:
        UserError: not exactly one .pth file, or a tensor is missing, unknown or of another shape.
    """
    file = _only_file(source, ".pth")
    import timm
    import torch
    from safetensors.torch import save_file

    weights = torch.load(file, map_location="cpu", weights_only=True)

    with torch.device("meta"):
        expected = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    renamed = rename_checked(weights, efficientnet_lite0_names(), expected, file.name)
    target.mkdir(parents=True, exist_ok=True)
    save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})


def efficientnet_lite0_names() -> dict[str, str]:
    """Names of EfficientNet-Lite0's tensors in the `efficientnet_pytorch` layout -> names in timm's."""
    modules = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    places = [(stage, place) for stage, count in enumerate(_LITE0_STAGES) for place in range(count)]
    for number, (stage, place) in enumerate(places):
        # The first stage does not expand: its block starts with the depthwise convolution, and timm counts from there.
        parts = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
        if stage > 0:
            parts = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
            parts |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
        for theirs, ours in parts.items():
            modules[f"_blocks.{number}.{theirs}"] = f"blocks.{stage}.{place}.{ours}"
    names: dict[str, str] = {}
    for theirs, ours in modules.items():
        kind = theirs.rpartition(".")[2]
        tensors = _NORM_TENSORS if kind.startswith("_bn") else ("weight", "bias") if kind == "_fc" else ("weight",)
        names |= {f"{theirs}.{tensor}": f"{ours}.{tensor}" for tensor in tensors}
    return names


def rename_checked(
    weights: "Mapping[str, Tensor]", names: Mapping[str, str], expected: "Mapping[str, Tensor]", file: str
) -> "dict[str, Tensor]":
    """Rename tensors by `names` and compare names and shapes with `expected`, one to one.

    Raises:
        UserError: names the first tensor that is missing, unknown or of another shape.
    """
    for name in weights:
        if name not in names or names[name] not in expected:
            raise UserError(f"{file} has an unknown tensor {name}; it is not the model this converter is for")
    renamed = {names[name]: tensor.contiguous() for name, tensor in weights.items()}
    for name, tensor in expected.items():
        if name not in renamed:
            raise UserError(f"{file} has no tensor for {name}; it is not the model this converter is for")
        if renamed[name].shape != tensor.shape:
            shapes = f"{tuple(renamed[name].shape)}, expected {tuple(tensor.shape)}"
            raise UserError(f"{file}: {name} has shape {shapes}; it is not the model this converter is for")
    return renamed


CONVERTERS: dict[str, Callable[[Path, Path], None]] = {
    "gguf": convert_gguf,
    "efficientnet_pth": convert_efficientnet_lite0,
}


def _only_file(folder: Path, suffix: str) -> Path:
    files = sorted(path for path in folder.iterdir() if path.suffix == suffix)
    if len(files) != 1:
        raise UserError(f"one {suffix} file is needed, found {len(files)}; correct the part's list of files")
    return files[0]
