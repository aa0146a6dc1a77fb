"""What an evaluation's matrix products are computed in, which its protocol states."""

import contextlib
import threading
from collections.abc import Iterator

import torch

from instructblip.config.schema import EvaluationPrecision
from instructblip.errors import UserError
from instructblip.models.base import Model

_Rules = tuple[str, bool]  # of float32: for matrix products, and whether convolutions may round to TF32

# torch has one setting for all threads of a process. Evaluations in several threads need not end in the order in which they
# began, so what was set before the first is kept here, followed by what each of them asks for.
_rules: list[_Rules] = []
_rules_lock = threading.Lock()


@contextlib.contextmanager
def computing(precision: EvaluationPrecision, device: torch.device) -> Iterator[None]:
    """Compute in a precision for the duration; parts that are held in half precision compute in that anyway.

    Args:
        precision: `fp32`: products of float32 tensors in float32. `tf32`: their factors rounded to 10 bits, on a GPU.
            `bf16`: autocast to bfloat16, as a run of recipe.precision=bf16 is trained.
        device: of the model.
    """
    rules = ("high", True) if precision == "tf32" else ("highest", False)
    with _float32_rules(rules), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        yield


@contextlib.contextmanager
def _float32_rules(rules: _Rules) -> Iterator[None]:
    with _rules_lock:
        if not _rules:
            _rules.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        _rules.append(rules)
        _set_rules(rules)
    try:
        yield
    finally:
        with _rules_lock:
            _rules.remove(rules)
            _set_rules(_rules[-1])
            if len(_rules) == 1:
                _rules.clear()


def _set_rules(rules: _Rules) -> None:
    products, convolutions = rules
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
