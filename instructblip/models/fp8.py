"""Matrix products in 8-bit floating point with a scale a row, for frozen weights: forward, and the gradient to the inputs.

A weight is rounded once, when the model is loaded. Inputs and gradients are rounded at each product, every row by its own
largest value, so that a row's result depends on that row alone. Tensor cores read both operands along the dimension that is
summed over: outputs sum over a weight's columns and gradients over its rows, so a weight lies in memory in both orders.

On a GPU this is `torch._scaled_mm`, elsewhere the same numbers multiplied in float32.

Shape legend: M rows of inputs, K input features, N output features.
"""

from typing import Any

import torch
from torch import Tensor, nn

from instructblip.errors import UserError

FP8 = torch.float8_e4m3fn
MULTIPLE = 16  # of both sides of a weight: what tensor cores take
CAPABILITY = (8, 9)  # of the GPUs that multiply it, from Ada and Hopper on
_LEAST = 1e-12  # of a row's largest value, lest a row of zeros has no scale


def to_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (M, K) rounded to float8, and the scales (M, 1) that they are to be multiplied by."""
    wide = rows.float()
    scale = wide.abs().amax(dim=1, keepdim=True).clamp_min(_LEAST) / torch.finfo(FP8).max
    return (wide / scale).to(FP8), scale


def scaled_product(left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, *, fast: bool) -> Tensor:
    """`(left * left_scale) @ (right * right_scale).T`: (M, N).

    Args:
        left, left_scale: (M, K) in float8, (M, 1).
        right, right_scale: (N, K) in float8, (N, 1).
        fast: sums may be kept in fewer bits on the way, as Hopper does unless it is told otherwise.
    """
    if left.is_cuda:
        return torch._scaled_mm(
            left,
            right.t(),
            scale_a=left_scale,
            scale_b=right_scale.t(),
            out_dtype=torch.bfloat16,  # the only one with a scale a row
            use_fast_accum=fast,
        )
    with torch.autocast(left.device.type, enabled=False):
        return (left.float() @ right.float().t()) * left_scale * right_scale.t()


class Fp8Product(torch.autograd.Function):
    """`inputs @ weight.T`, with a gradient for the inputs alone."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, scale: Tensor, transposed: Tensor) -> Tensor:
        """Multiply inputs (..., K) by a weight (N, K) of int8 bits, scaled by (N, 1); `transposed` are its bits (K, N)."""
        ctx.save_for_backward(scale, transposed)
        rows, row_scale = to_fp8(inputs.reshape(-1, inputs.shape[-1]))
        found = scaled_product(rows, row_scale, weight.view(FP8), scale, fast=True)
        return found.view(*inputs.shape[:-1], -1).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Outputs' scales belong to what is summed over here, so they go into the gradient before it is rounded."""
        (gradient,), (scale, transposed) = gradients, ctx.saved_tensors
        scaled = gradient.reshape(-1, gradient.shape[-1]).float() * scale.t()
        rows, row_scale = to_fp8(scaled)
        ones = scale.new_ones(len(transposed), 1)
        found = scaled_product(rows, row_scale, transposed.view(FP8), ones, fast=False)
        return found.view(*gradient.shape[:-1], -1).to(gradient.dtype), None, None, None


def check_device(model: nn.Module, device: torch.device) -> None:
    """Refuse a GPU that cannot multiply a model's weights.

    Raises:
        UserError: there are weights in float8, and the GPU is older than those that multiply it.
    """
    if device.type != "cuda" or not any(getattr(module, "kind", None) == "fp8" for module in model.modules()):
        return
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        raise UserError(
            f"llm.quantization=fp8 needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} (Ada, Hopper or newer) "
            f"and {torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}; use int8, or leave it out"
        )
