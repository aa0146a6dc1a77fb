"""What "frozen" means here: no gradient, evaluation mode that survives `.train()`, weights that can be fingerprinted."""

import hashlib
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn


class FrozenModule(nn.Module):
    """A module whose weights never train and whose dropout and batch-norm always behave as in evaluation."""

    def freeze(self) -> Self:
        """Take every parameter out of training; call once, when the weights are in place."""
        self.requires_grad_(False)
        return self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode whatever the mode of the model around it."""
        return super().train(False)


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
