"""The optimiser and its schedule (paper, section 3: AdamW, linear warm-up, cosine to zero)."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from instructblip.distributed import placed_like
from instructblip.models.adapters import is_adapter
from instructblip.models.base import Model

AnyTensor = TypeVar("AnyTensor", bound=Tensor)

# What BERT does not bring to a Q-Former. The projection is new too, but its weights are as small as the LLM's embeddings,
# and a large rate would turn it over within a few steps.
NEW_PARTS = ("query_tokens", "cross_attention.")
_CONSTANT_INPUTS = ("query_tokens", "latents")


def make_adamw(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    betas: Sequence[float],
    part_of: Callable[[str], str] = lambda _: "qformer",
    layer_scales: Mapping[str, float] = MappingProxyType({}),
) -> torch.optim.AdamW:
    """AdamW over named parameters that train; norms, biases, query tokens and a resampler's latents do not decay.

    Args:
        parameters: of which those without gradient are left out.
        weight_decay, betas: of AdamW.
        part_of: the part of the model that a parameter of that name belongs to, see `set_learning_rate`.
        layer_scales: factor of the learning rate by name, for those that have one, see `layer_decay`.

    The released code decays the query tokens because they are three-dimensional; decaying a learned constant input towards
    zero has no motive, and the other constants (biases, norms) are spared for the same reason.
    """
    groups: dict[tuple[bool, bool, str, float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            part, sharded = part_of(name), isinstance(parameter, DTensor)
            decays = parameter.ndim >= 2 and not name.endswith(_CONSTANT_INPUTS)
            new = part == "qformer" and any(word in name for word in NEW_PARTS) and not is_adapter(name)
            # A step of the fused kernel takes whole tensors or sharded ones.
            groups.setdefault((decays, new, part, layer_scales.get(name, 1.0), sharded), []).append(parameter)
    options = [
        {"params": group, "weight_decay": weight_decay if decays else 0.0, "new": new, "part": part, "scale": scale}
        for (decays, new, part, scale, _), group in groups.items()
    ]
    # The learning rate is set before every step; fused, one pass over memory instead of seven.
    return torch.optim.AdamW(options, lr=0.0, betas=(betas[0], betas[1]), fused=True)


def layer_decay(model: Model, decay: float) -> dict[str, float]:
    """Factors of the learning rate of a vision encoder's parameters, by their names in the model.

    Its last block has `decay`, the one before that squared, and so on; patches and positions come before the first block,
    and what follows the blocks has 1 (Clark et al., "ELECTRA", 2020; BLIP-2, table 7). The released code makes such groups
    and never reads their factors.
    """
    if decay == 1.0:
        return {}
    return {f"vision.{name}": decay**behind for name, behind in model.vision.layers_of_parameters().items()}


def learning_rate(
    step: int,
    *,
    steps: int,
    peak: float,
    warmup_steps: int,
    start: float,
    final: float,
    plateau_steps: int | None = None,
    plateau_decay: float | None = None,
) -> float:
    """Learning rate of a step: linear from `start` to `peak` over the warm-up, then a per-step cosine to `final`.

    With `plateau_steps` it is what the released code computes (`linear_warmup_cosine_lr` of LAVIS): the warm-up ends with
    the first plateau at the latest, and the cosine is evaluated once a plateau, over all steps from the first. A
    `plateau_decay` takes the cosine's place: each plateau's rate is that share of the one before, and no less than `final`.
    """
    if plateau_steps is not None:
        plateau = step // plateau_steps
        if plateau == 0:
            return min(peak, start + (peak - start) * step / max(1, warmup_steps))
        if plateau_decay is not None:
            return max(final, peak * plateau_decay**plateau)
        return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * plateau / (steps / plateau_steps)))
    if step < warmup_steps:
        return start + (peak - start) * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(
    optimizer: torch.optim.Optimizer,
    rate: float,
    new_parts_scale: float = 1.0,
    part_scales: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Give every parameter group the rate: `NEW_PARTS` that multiple of it, parts with a rate of their own theirs.

    Layers of the vision encoder have their factor of it, see `layer_decay`.
    """
    for group in optimizer.param_groups:
        scale = group["scale"] * part_scales.get(group["part"], 1.0) * (new_parts_scale if group["new"] else 1.0)
        group["lr"] = rate * scale


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients together so that their norm is at most `max_norm`; return the norm before, a scalar on the device.

    All ranks call this.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    kinds = _by_kind(trained)
    norms = [nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = whole[0] if len(whole) == 1 else torch.stack(whole).norm()
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, max_norm, total)
    return total


def step_unless(optimizer: torch.optim.Optimizer, not_finite: Tensor) -> None:
    """Take a step, unless `not_finite`, a scalar of 0 or 1, says that its gradients are of no use.

    The fused kernel reads that itself, as it does for torch's GradScaler: the host need not wait. It reads none for sharded
    weights.
    """
    if any(isinstance(weight, DTensor) for group in optimizer.param_groups for weight in group["params"]):
        if not bool(not_finite):
            optimizer.step()
        return
    optimizer.found_inf = not_finite  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def _by_kind(tensors: Iterable[AnyTensor]) -> list[list[AnyTensor]]:
    """Whole tensors and sharded ones apart: operations over lists take one kind."""
    tensors = list(tensors)
    kinds = [[t for t in tensors if isinstance(t, DTensor) == sharded] for sharded in (False, True)]
    return [kind for kind in kinds if kind]


@torch.no_grad()
def follow(copies: Iterable[tuple[Tensor, Tensor]], momentum: float) -> None:
    """`copy = momentum * copy + (1 - momentum) * original` for each of a model's copies (He et al., "MoCo", 2020).

    All ranks call this: an original may be shared out among them, a copy is whole. What equals its original stays as it is,
    bit for bit.
    """
    for own, original in copies:
        whole = original.full_tensor() if isinstance(original, DTensor) else original
        own.lerp_(whole.to(own.dtype), 1 - momentum)


class WeightAverage:
    """`average = decay * average + (1 - decay) * weights` after each optimiser step (Polyak and Juditsky 1992).

    Args:
        model: whose trainable parameters are followed, from their present values on.
        decay: 0.999 averages over about the last thousand steps.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self._own = {name: value for name, value in model.named_parameters() if value.requires_grad}
        names = {value: name for name, value in self._own.items()}
        # A tied table has several, and a checkpoint holds it under each.
        every = model.named_parameters(remove_duplicate=False)
        self._own_names = {name: names[value] for name, value in every if value in names}
        self._average = {name: value.detach().clone() for name, value in self._own.items()}
        self._follow = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Follow the weights after a step."""
        for averages, weights in zip(_by_kind(self._average.values()), _by_kind(self._own.values()), strict=True):
            self._follow(averages, weights, torch.empty(0))  # a constant decay reads no number of steps

    def state(self, trainable: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`trainable`, a model's trainable state, with the averages in place of the weights."""
        own = self._own_names
        return {name: self._average[own[name]] if name in own else tensor for name, tensor in trainable.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved averages."""
        for name, value in self._average.items():
            value.copy_(placed_like(state[name], value))

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
