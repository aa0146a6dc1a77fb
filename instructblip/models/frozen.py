"""What "frozen" means here: no gradient, evaluation mode that survives `.train()`, weights that can be fingerprinted.

And what a change of dtype leaves alone: buffers that are no factor of a matrix product, such as pixel statistics.
"""

from collections.abc import Callable, Iterator
from typing import Any, Self

from torch import nn


class ExactBuffers(nn.Module):
    """A module some of whose buffers stay in float32 whatever dtype it is cast to (`.to(dtype)`, `.half()`).

    Parameters and all other buffers take the dtype together, or a product of the two would fail.
    """

    def exact_buffers(self) -> Iterator[tuple[nn.Module, str]]:
        """The buffers that stay in float32: the module that holds each, and its name there."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        # Every cast and every move of a module goes through here. What was rounded cannot be restored afterwards.
        before = [(module, name, getattr(module, name)) for module, name in self.exact_buffers()]
        super()._apply(fn, recurse)
        for module, name, exact in before:
            found = getattr(module, name)
            if found.dtype.itemsize < exact.dtype.itemsize:
                setattr(module, name, exact.to(found.device))
        return self


class FrozenModule(ExactBuffers):
    """A module whose weights never train and whose dropout and batch-norm always behave as in evaluation."""

    def freeze(self) -> Self:
        """Take every parameter out of training; call once, when the weights are in place."""
        self.requires_grad_(False)
        return self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode whatever the mode of the model around it."""
        return super().train(False)
