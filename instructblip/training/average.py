"""An exponential moving average of what trains, kept beside the weights and evaluated in their place."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from instructblip.model.instructblip import InstructBLIP


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
