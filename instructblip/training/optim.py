"""The optimiser and its schedule (paper, section 3: AdamW, linear warm-up, cosine to zero)."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from instructblip.models.instructblip import InstructBLIP

# What BERT does not bring to a Q-Former. The projection is new too, but its weights are as small as the LLM's embeddings,
# and a large rate would turn it over within a few steps.
NEW_PARTS = ("query_tokens", "cross_attention.")


def make_adamw(
    parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float, betas: Sequence[float]
) -> torch.optim.AdamW:
    """AdamW over named trainable parameters; norms, biases and query tokens do not decay.

    The released code decays the query tokens because they are three-dimensional; decaying a learned constant input towards
    zero has no motive, and the other constants (biases, norms) are spared for the same reason.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not name.endswith("query_tokens")
            new = any(part in name for part in NEW_PARTS)
            groups.setdefault((decays, new), []).append(parameter)
    options = [
        {"params": group, "weight_decay": weight_decay if decays else 0.0, "new": new}
        for (decays, new), group in groups.items()
    ]
    # The learning rate is set before every step; fused, one pass over memory instead of seven.
    return torch.optim.AdamW(options, lr=0.0, betas=(betas[0], betas[1]), fused=True)


def learning_rate(
    step: int,
    *,
    steps: int,
    peak: float,
    warmup_steps: int,
    start: float,
    final: float,
    plateau_steps: int | None = None,
) -> float:
    """Learning rate of a step: linear from `start` to `peak` over the warm-up, then a per-step cosine to `final`.

    With `plateau_steps` it is what the released code computes (`linear_warmup_cosine_lr` of LAVIS): the warm-up ends with
    the first plateau at the latest, and the cosine is evaluated once a plateau, over all steps from the first.
    """
    if plateau_steps is not None:
        plateau = step // plateau_steps
        if plateau == 0:
            return min(peak, start + (peak - start) * step / max(1, warmup_steps))
        return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * plateau / (steps / plateau_steps)))
    if step < warmup_steps:
        return start + (peak - start) * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, new_parts_scale: float = 1.0) -> None:
    """Give every parameter group the rate; `NEW_PARTS` get that multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * (new_parts_scale if group["new"] else 1.0)


class WeightAverage:
    """`average = decay * average + (1 - decay) * weights` after each optimiser step (Polyak and Juditsky 1992).

    Args:
        model: whose trainable parameters are followed, from their present values on.
        decay: 0.999 averages over about the last thousand steps.
    """

    def __init__(self, model: InstructBLIP, decay: float) -> None:
        self.decay = decay
        self._own = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._average = {name: value.detach().clone() for name, value in self._own.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Follow the weights after a step."""
        torch._foreach_lerp_(list(self._average.values()), list(self._own.values()), 1 - self.decay)

    def state(self, trainable: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`trainable`, a model's trainable state, with the averages in place of the weights."""
        return {name: self._average.get(name, tensor) for name, tensor in trainable.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved averages."""
        for name, value in self._average.items():
            value.copy_(state[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the averages inside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self._own.items():
            kept = value.detach().clone()
            value.copy_(self._average[name])
            self._average[name].copy_(kept)
