"""Modules of shapes alone, on the meta device: to be counted, or to be filled from files."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Methods of tensors by which constructors draw and scale initial weights.
_IN_PLACE = frozenset({"normal_", "uniform_", "erfinv_", "add_", "mul_", "div_", "clamp_", "fill_", "zero_"})
_DRAWN = (torch.randn, torch.rand)  # torch draws for the meta device in Python, for which it imports its compiler


@contextlib.contextmanager
def empty_modules() -> Iterator[None]:
    """Construct modules on the meta device, where they hold no memory, and leave out their initial weights.

    Computing these takes most of the time of a constructor (a second for a ViT of a billion weights), and none is kept.
    """
    with torch.device("meta"), _NoInitialWeights():
        yield


class _NoInitialWeights(TorchFunctionMode):
    """Leaves out what would only change the values of a tensor on the meta device, which has none."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _IN_PLACE or (name.endswith("_") and getattr(func, "__module__", "") == "torch.nn.init"):
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        if func in _DRAWN and "generator" not in kwargs:
            return torch.empty(*args, **kwargs)
        return func(*args, **kwargs)
