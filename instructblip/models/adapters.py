"""Low-rank adapters on frozen linear layers (LoRA, arXiv:2106.09685), through the peft library.

An adapter adds `alpha / rank * B A x` to what a layer computes of x. B starts at zero: a new adapter changes nothing. Both
matrices are in float32 over any base: float32, half precision, int8 or nf4 (QLoRA, arXiv:2305.14314), and the sum is rounded
to the base's type. peft's layers take the place of the adapted ones: whatever calls a layer, its adapter acts. In a state
dict the frozen layers keep their names, and the adapters' stand beside them:

    llm.model.model.layers.0.self_attn.q_proj.weight
    llm.model.model.layers.0.self_attn.q_proj.lora_A.default.weight

peft is imported where a part is adapted, and nowhere else.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from instructblip.errors import UserError
from instructblip.models.quantized import QuantizedLinear

NAME = "default"  # as peft calls the only adapter of a layer
ALL_LINEAR = "all-linear"  # as a target: every linear layer of the blocks, as in peft
# What a module that is no language model adapts unless targets are given: timm's attention, the Q-Former's and BERT's.
_USUAL = {
    "vision": ("qkv", "q_proj", "k_proj", "v_proj", "proj"),
    "qformer": ("query", "value"),
    "text": ("query", "value"),
}
_IN_ATTENTION = "attn."  # timm's patch embeddings and convolutions have a `proj`, too


@dataclass(frozen=True)
class Adapter:
    """How the layers of a part are adapted.

    Attributes:
        rank: columns of A, rows of B.
        alpha: what the product is multiplied by, times the rank.
        dropout: on a layer's input on its way into A, in training only.
        targets: names of linear layers in the part's blocks, or ends of their names; empty: the usual ones.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As a checkpoint's state holds it."""
        return {**dataclasses.asdict(self), "targets": list(self.targets)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Adapter":
        """The reverse."""
        return cls(**{**stored, "targets": tuple(stored["targets"])})


def is_adapter(name: str) -> bool:
    """Whether a tensor or parameter of that name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def without_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict that are no adapters': those of the base."""
    return {name: tensor for name, tensor in state.items() if not is_adapter(name)}


def root_of(layer: str) -> str:
    """The name of the module that peft looks at, and names a layer from: transformers' LLM, timm's backbone, or ours."""
    return next(
        (root for root in ("llm.model", "vision.backbone") if layer.startswith(f"{root}.")), layer.split(".")[0]
    )


def require_peft() -> None:
    """Import the library.

    Raises:
        UserError: it is not installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"low-rank adapters need a package that is not installed ({error}); pip install -r requirements-lora.txt"
        ) from None


def _linear_classes() -> tuple[type[nn.Module], ...]:
    from transformers.pytorch_utils import Conv1D

    return nn.Linear, QuantizedLinear, Conv1D


def choose_layers(
    part: str, blocks: Mapping[str, nn.Module], targets: Collection[str], config: Any = None
) -> dict[str, nn.Module]:
    """The linear layers that an adapter of a part is for, by name.

    Args:
        part: of the model.
        blocks: its repeated blocks by name. What stands outside, such as tables and output heads, which may be tied to each
            other, is never adapted.
        targets: names or their ends; `all-linear`; or none: what peft adapts in a transformers model of that type, all
            linear layers of one that it has no entry for.
        config: a language model's.

    Raises:
        UserError: a target that names no linear layer of the blocks.
    """
    linear = _linear_classes()
    known: dict[str, nn.Module] = {
        f"{prefix}.{name}": module
        for prefix, block in blocks.items()
        for name, module in block.named_modules()
        if isinstance(module, linear)
    }
    if not known:
        raise UserError(
            f"train.{part}=lora: the {part} has no linear layers in its blocks; set train.{part}=full or frozen"
        )
    wanted = tuple(targets) or _usual_targets(part, known, config)
    for target in wanted:
        if target != ALL_LINEAR and not any(_ends_with(name, target) for name in known):
            kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in known))
            raise UserError(
                f"train.lora.{part}.targets: no linear layer in the blocks of {part} is called {target}; there are: {kinds}"
            )
    if ALL_LINEAR in wanted:
        return known
    return {name: module for name, module in known.items() if any(_ends_with(name, target) for target in wanted)}


def _usual_targets(part: str, known: Mapping[str, nn.Module], config: Any) -> tuple[str, ...]:
    if config is None:
        usual = {name for name in _USUAL.get(part, ()) if part != "vision"}
        if part == "vision":
            usual = {
                name.rpartition(".")[2]
                for name in known
                if _IN_ATTENTION in name and name.rpartition(".")[2] in _USUAL["vision"]
            }
        return tuple(sorted(usual)) or (ALL_LINEAR,)
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as BY_TYPE

    found = BY_TYPE.get(config.model_type)
    return tuple(found) if isinstance(found, list) else (ALL_LINEAR,)


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def short_names(layers: Collection[str], blocks: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """The last words of layers' names, where those say which are meant; else the whole names."""
    short, linear = sorted({name.rpartition(".")[2] for name in layers}), _linear_classes()
    known = [
        f"{prefix}.{name}"
        for prefix, block in blocks.items()
        for name, module in block.named_modules()
        if isinstance(base_of(module), linear)
    ]
    meant = {name for name in known if name.rpartition(".")[2] in short}
    return tuple(short) if meant == set(layers) else tuple(sorted(layers))


def inject(model: nn.Module, layers: Collection[str], adapter: Adapter, *, seed: int) -> None:
    """Put new adapters on layers, in place; A is drawn from `seed`, and the global random stream is not touched.

    Args:
        model: that has the layers.
        layers: their names in it.
        adapter: rank, alpha and dropout.
        seed: equal ones give equal adapters.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore")  # fan_in_fan_out, which it sets itself
        for root in sorted({root_of(name) for name in layers}):
            own = [name.removeprefix(f"{root}.") for name in layers if root_of(name) == root]
            config = LoraConfig(
                r=adapter.rank,
                lora_alpha=adapter.alpha,  # type: ignore[arg-type]
                lora_dropout=adapter.dropout,
                target_modules=own,
            )
            config._register_custom_module({QuantizedLinear: Linear})
            inject_adapter_in_model(config, model.get_submodule(root), NAME)
    for name in layers:
        layer: Any = model.get_submodule(name)
        for matrices in (layer.lora_A, layer.lora_B):
            matrices.to(torch.float32)
        layer.train(base_of(layer).training)
        layer._register_state_dict_hook(_hide_base)
        layer.register_load_state_dict_pre_hook(_find_base)
        parent: Any = model.get_submodule(name.rpartition(".")[0])
        if layer is getattr(parent, "qkv", None) and hasattr(parent, "qkv_bias_separate"):
            parent.qkv_bias_separate = True  # else timm's EVA multiplies with the weight itself, and no adapter acts


def _hide_base(_layer: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """In a state dict the adapted layer has the name that it has without an adapter."""
    inner = f"{prefix}base_layer."
    for name in [name for name in state if name.startswith(inner)]:
        state[prefix + name.removeprefix(inner)] = state.pop(name)


def _find_base(_layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """The reverse of `_hide_base`."""
    for name in [name for name in state if name.startswith(prefix)]:
        own = name.removeprefix(prefix)
        if not own.startswith(("base_layer.", "lora_")):
            state[f"{prefix}base_layer.{own}"] = state.pop(name)


def adapted_layers(model: nn.Module, *, aliases: bool = False) -> Iterator[tuple[str, Any]]:
    """The adapted layers below a module, peft's, by name; with `aliases` by each name of those that have several."""
    for name, module in model.named_modules(remove_duplicate=not aliases):
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the block a model computes what it does without its adapters."""
    layers = [layer for _, layer in adapted_layers(model)]
    for layer in layers:
        layer._disable_adapters = True  # peft's own way also takes their gradients
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def linear_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every linear layer below a module by name, rounded and adapted ones too, and none of what an adapter is made of."""
    inside = tuple(f"{name}." for name, _ in adapted_layers(module))
    for name, layer in module.named_modules():
        if hasattr(layer, "in_features") and hasattr(layer, "out_features") and not name.startswith(inside):
            yield name, layer


def adapter_size(layer: Any) -> int:
    """Parameters of the adapter on a layer; 0 without one."""
    return sum(value.numel() for name, value in layer.named_parameters() if is_adapter(f".{name}"))


def base_of(module: nn.Module) -> nn.Module:
    """The layer below an adapter, or the module itself."""
    found = getattr(module, "base_layer", module)
    assert isinstance(found, nn.Module)
    return found


def train_dropout(module: nn.Module, mode: bool) -> None:
    """Let the adapters below a module drop what they read, or not; the rest of it stays as it is."""
    for _, layer in adapted_layers(module):
        layer.lora_dropout.train(mode)


def unused_layers(model: nn.Module, layers: Iterable[str], run: Any) -> list[str]:
    """Those of the layers that a pass (`run()`) never calls: their weights are read elsewhere, and no adapter would act."""
    called = set[str]()
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name)) for name in layers
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in layers if name not in called]


# --- merging ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_state(module: nn.Module, *, merge: bool = True) -> dict[str, Tensor]:
    """A module's state dict without adapters and rounded weights, the tensors shared where they stay as they are.

    What an adapter was trained over it goes with: int8 and nf4 weights are expanded, in float32.

    Args:
        module: stays as it is.
        merge: adapted layers have the sum of both weights, in float32: half precision would round small adapters away.
    """
    state = without_adapters(module.state_dict(keep_vars=True))
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, QuantizedLinear):
            own = name.removesuffix(".base_layer")
            del state[f"{own}.scale"]
            state[f"{own}.weight"] = layer.expanded(torch.float32)
    for name, layer in adapted_layers(module, aliases=True) if merge else ():
        state[f"{name}.weight"] = state[f"{name}.weight"].float() + layer.get_delta_weight(NAME).float()
    return state
