"""Outlines of vision encoders and language models: every module by class, name and shape, without what it computes.

timm and transformers take longer to import than a plan to be counted, and a plan reads shapes alone. So those of the
configurations in `configs` are recorded in `outlines.json`; other sizes are built, and counted with the same lines.
`python -m instructblip.training.plan.record` renews the record, and a test holds it equal to what the libraries build.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from instructblip.config.schema import LLMConfig, VisionConfig
from instructblip.models.vision import VisionEncoder

RECORD = Path(__file__).with_name("outlines.json")
# Classes that a plan tells apart; of others it reads names and parameters.
_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.ModuleList, nn.Sequential)


class OutlinedEncoder(VisionEncoder):
    """A vision encoder that is counted and not run.

    Attributes:
        flops: of one picture, as torch counts them.
    """

    flops: float

    def __init__(self, config: VisionConfig, recorded: Mapping[str, Any]) -> None:
        nn.Module.__init__(self)
        self.backbone = build(recorded["modules"], getattr(torch, config.dtype))
        self.backbone.num_prefix_tokens = recorded["prefix_tokens"]
        self.image_size, self.grid, self.layers = config.image_size, config.grid, tuple(config.layers)
        self.tokens, self.width, self.flops = recorded["tokens"], recorded["width"], recorded["flops"]


def outlined_encoder(config: VisionConfig) -> OutlinedEncoder | None:
    """The outline of a vision encoder; None where none is recorded."""
    found = _found("vision", encoder_settings(config))
    return None if found is None else OutlinedEncoder(config, found)


def outlined_language_model(config: LLMConfig) -> Any:
    """The outline of a transformers model, which has its methods that find its parts; None where none is recorded."""
    found = _found("llm", language_model_settings(config))
    if found is None:
        return None
    model: Any = build(found["modules"], dtype := getattr(torch, config.dtype))
    model.dtype, model.config = dtype, SimpleNamespace(is_encoder_decoder=config.kind == "encoder_decoder")
    object.__setattr__(model, "base_model", model.get_submodule(found["parts"]["base_model"]))
    for name in found["parts"].keys() - {"base_model"}:
        setattr(model, name, functools.partial(model.get_submodule, found["parts"][name]))
    return model


# --- records ---------------------------------------------------------------------------------------------------------


def encoder_settings(config: VisionConfig) -> dict[str, Any]:
    """What the shapes of a vision encoder follow from."""
    names = ("backbone", "image_size", "options", "layers", "grid", "final_norm")
    return {name: getattr(config, name) for name in names}


def language_model_settings(config: LLMConfig) -> dict[str, Any]:
    """What the shapes of a language model follow from."""
    return {
        "kind": config.kind,
        "sizes": config.sizes,
        "options": config.options,
        "added_tokens": len(config.added_tokens),
    }


def record_of_encoder(encoder: VisionEncoder, flops: float) -> dict[str, Any]:
    """What is recorded of a built one."""
    return {
        "tokens": encoder.tokens,
        "width": encoder.width,
        "prefix_tokens": int(getattr(encoder.backbone, "num_prefix_tokens", 0)),
        "flops": flops,
        "modules": describe(encoder.backbone),
    }


def record_of_language_model(model: Any) -> dict[str, Any]:
    """What is recorded of a built one."""
    names = {id(module): name for name, module in model.named_modules()}
    methods = ["get_input_embeddings", "get_output_embeddings"]
    methods += ["get_encoder", "get_decoder"] if model.config.is_encoder_decoder else []
    parts = {"base_model": model.base_model, **{method: getattr(model, method)() for method in methods}}
    return {"parts": {name: names[id(part)] for name, part in parts.items()}, "modules": describe(model)}


def describe(module: nn.Module, prefix: str = "", seen: dict[int, str] | None = None) -> dict[str, Any]:
    """A module as JSON values: its class, the shapes of its parameters, its children; equal ones in a row once.

    Args:
        module: on any device.
        prefix: of its name, with a dot.
        seen: where each parameter was first met: others that are the same (tied tables) name that place.
    """
    seen = {} if seen is None else seen
    parameters: dict[str, list[int] | str] = {}
    for name, parameter in module._parameters.items():
        if parameter is not None:
            first = seen.setdefault(id(parameter), prefix + name)
            parameters[name] = list(parameter.shape) if first == prefix + name else first
    children: list[list[Any]] = []
    for name, child in module.named_children():
        described = describe(child, f"{prefix}{name}.", seen)
        if children and name.isdecimal() and children[-1][1] == described:
            children[-1][0] += 1
        else:
            children.append([1 if name.isdecimal() else name, described])
    kind = next((kind.__name__ for kind in _KINDS if isinstance(module, kind)), None)
    found = {"class": type(module).__name__, "kind": kind, "parameters": parameters, "children": children}
    return {name: value for name, value in found.items() if value}


@functools.cache
def _records() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def _found(part: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    return next((record for record in _records()[part] if record["settings"] == settings), None)


# --- modules ---------------------------------------------------------------------------------------------------------


def build(described: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A module on the meta device as `describe` described it."""
    return _built(described, dtype, "", {})


def _built(described: Mapping[str, Any], dtype: torch.dtype, prefix: str, made: dict[str, nn.Parameter]) -> nn.Module:
    kind = _class(described["class"], described.get("kind"))
    module: Any = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, shape in described.get("parameters", {}).items():
        if isinstance(shape, str):
            made[prefix + name] = made[shape]
        else:
            made[prefix + name] = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        module.register_parameter(name, made[prefix + name])
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    for name, child in _children(described):
        module.add_module(name, _built(child, dtype, f"{prefix}{name}.", made))
    return module


def _children(described: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for name, child in described.get("children", []):
        if isinstance(name, str):
            yield name, child
            continue
        yield from ((str(place), child) for place in range(number, number + name))
        number += name


@functools.cache
def _class(name: str, kind: str | None) -> type[nn.Module]:
    """A class of that name: those of a list's members are told apart, and nothing more of them is needed."""
    base = nn.Module if kind is None else getattr(nn, kind)
    return base if name == kind else type(name, (base,), {})
