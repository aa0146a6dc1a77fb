"""Frozen linear layers held in 8 or 4 bits.

`int8` and `nf4` save memory: weights are expanded for each use, activations stay as they are. The backward pass expands the
weights again instead of keeping them, so training through such a layer holds no more than the rounded weights. `fp8` saves
time on GPUs that multiply it (`fp8.py`): a model in half precision has activations and gradients rounded too, and each
weight is held twice.

A row's result depends on that row alone: batch size and padding change nothing, as they would with methods that share a
scale among rows or look for outliers among a batch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instructblip.models.fp8 import FP8, MULTIPLE, Fp8Product, to_fp8

QUANTIZATIONS = ("int8", "nf4", "fp8")
_BLOCK = 64  # values that share a scale in nf4, as in QLoRA (arXiv:2305.14314)


class QuantizedLinear(nn.Module):
    """What `nn.Linear` computes, with its weight in 8 bits (one scale a row) or in 4-bit NormalFloat (one a block of 64).

    Args:
        linear: the layer whose weight is rounded; its bias is taken over.
        kind: `int8`, `nf4` or `fp8`.

    Raises:
        ImportError: `nf4` without bitsandbytes.
        ValueError: another kind, or a weight whose sides do not fit it.
    """

    # int8, whatever the bits mean: no cast of the module touches them, and transformers' T5 looks at this name and type.
    weight: Tensor  # (out, in), or two 4-bit values a byte
    scale: Tensor
    transposed: Tensor  # fp8: (in, out), what gradients are multiplied by

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        if kind not in QUANTIZATIONS:
            raise ValueError(f"quantization {kind} is none of {', '.join(QUANTIZATIONS)}")
        self.kind = kind
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        rounded, scale = _ROUND[kind](linear.weight.detach())
        self.register_buffer("weight", rounded)
        self.register_buffer("scale", scale)
        if kind == "fp8":
            self.register_buffer("transposed", rounded.t().contiguous(), persistent=False)

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that the layer multiplies with."""
        if self.kind == "int8":
            return (self.weight * self.scale).to(dtype)
        if self.kind == "fp8":
            return (self.weight.view(FP8).float() * self.scale).to(dtype)
        return _from_nf4(self.weight, self.scale, (self.out_features, self.in_features), dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        # In float32 nothing but weights is rounded: that is how abilities.py looks for mistakes.
        if self.kind != "fp8" or inputs.dtype == torch.float32:
            return _Multiply.apply(inputs, self)
        found = Fp8Product.apply(inputs, self.weight, self.scale, self.transposed)
        return found if self.bias is None else found + self.bias.to(found.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, kind={self.kind}"


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
        return F.linear(inputs, layer.expanded(inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.expanded(gradient.dtype), None


def quantize_linears(model: nn.Module, kind: str, *, keep: nn.Module | None = None) -> int:
    """Replace every `nn.Linear` below `model` by a `QuantizedLinear`, in place; return how many.

    Args:
        model: a frozen model.
        kind: one of `QUANTIZATIONS`.
        keep: a layer that stays as it is: a language model's output head, whose errors go straight into its scores.

    Raises:
        ImportError: `nf4` without bitsandbytes.
        ValueError: another kind, or a weight whose sides do not fit it.
    """
    found = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not keep
    ]
    for name, linear in found:
        model.set_submodule(name, QuantizedLinear(linear, kind))
    return len(found)


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight.float() / scale).round().to(torch.int8), scale


def _to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    if any(side % MULTIPLE for side in weight.shape):
        raise ValueError(f"a weight of {tuple(weight.shape)} has sides that are no multiples of {MULTIPLE}; use int8")
    rounded, scale = to_fp8(weight)
    return rounded.view(torch.int8), scale


def _to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    if weight.numel() % _BLOCK:
        raise ValueError(f"a weight of {tuple(weight.shape)} does not fill blocks of {_BLOCK}; use int8")
    packed, state = _bitsandbytes().quantize_4bit(weight.float(), blocksize=_BLOCK, quant_type="nf4")
    return packed.view(torch.int8), state.absmax


def _from_nf4(packed: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    bitsandbytes = _bitsandbytes()
    # One row a block: with rows that are no whole number of blocks the CPU kernel of 0.50 takes wrong scales.
    blocks = torch.Size((len(scale), _BLOCK))
    state = bitsandbytes.QuantState(scale, shape=blocks, blocksize=_BLOCK, quant_type="nf4", dtype=dtype)
    return bitsandbytes.dequantize_4bit(packed.view(torch.uint8), state).view(shape)


def _bitsandbytes() -> Any:
    from bitsandbytes import functional

    return functional


_ROUND = {"int8": _to_int8, "nf4": _to_nf4, "fp8": _to_fp8}
