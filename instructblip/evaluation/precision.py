"""What an evaluation's matrix products are computed in, which its protocol states."""

import contextlib
from collections.abc import Iterator

import torch

from instructblip.config.schema import EvaluationPrecision
from instructblip.errors import UserError
from instructblip.models.base import Model


@contextlib.contextmanager
def computing(precision: EvaluationPrecision, device: torch.device) -> Iterator[None]:
    """Compute in a precision for the duration; parts that are held in half precision compute in that anyway.

    Args:
        precision: `fp32`: products of float32 tensors in float32. `tf32`: their factors rounded to 10 bits, on a GPU.
            `bf16`: autocast to bfloat16, as a run of recipe.precision=bf16 is trained.
        device: of the model.
    """
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def check_precision(precision: EvaluationPrecision, device: torch.device) -> None:
    """Refuse what a device cannot compute in.

    Raises:
        UserError: TF32 without a GPU of NVIDIA's.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"precision=tf32 is for NVIDIA GPUs, and the device is {device}; give precision=fp32 or bf16")


def check_held(precision: EvaluationPrecision, model: Model) -> None:
    """Refuse to autocast to bfloat16 what is held in float16: torch joins no tensors of the two.

    Raises:
        UserError: names the part.
    """
    held = (model.part_of(name) for name, weight in model.named_parameters() if weight.dtype == torch.float16)
    if precision == "bf16" and (part := next(held, None)):
        raise UserError(
            f"precision=bf16 computes in bfloat16, and the {part} of this model is held in float16, another half precision; "
            "leave precision out: what is held in float16 is computed in it anyway"
        )
