"""SHA-256 of weights, so that a checkpoint can say what it stands on; and what a module computes by beside them."""

import hashlib
import json
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a module's parameters and persistent buffers."""
    return fingerprint_tensors(module.state_dict())


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of named tensors; their order does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def settings_sha256(module: nn.Module) -> str:
    """SHA-256 of what a module's outputs depend on beside its tensors: heads, activations, epsilons, strides.

    Weights do not show them: CLIP's with GELU in the place of its own approximation are another encoder, in the same shapes.
    So the class and the plain attributes of each module below it count, as far as they are no matter of how it is run.
    """
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        kind = type(part).__name__.removeprefix("FSDP")  # as torch calls a sharded one
        plain = {key: _plain(value) for key, value in vars(part).items() if _is_setting(key, value)}
        digest.update(f"{name} {kind} {json.dumps(plain, sort_keys=True)}\n".encode())
    return digest.hexdigest()


def _is_setting(key: str, value: Any) -> bool:
    if key.startswith(("_", "forward")) or key in _HOW_IT_IS_RUN:
        return False
    values = value if isinstance(value, list | tuple) else [value]
    return all(item is None or isinstance(item, bool | int | float | str | FunctionType) for item in values)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.__qualname__ if isinstance(value, FunctionType) else value


_HOW_IT_IS_RUN = frozenset({"training", "fused_attn", "grad_checkpointing"})  # the latter two are timm's
