"""Where the queries of a Q-Former look: the weights of its cross-attention over the image tokens.

They are computed beside the pass, from the same queries and image tokens, and change nothing in it.

Shape legend: B batch, F frames, N = B x F, H heads, Q queries, P image tokens, R rows and C columns of patches.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from instructblip.models.qformer import QFormer, QFormerLayer
from instructblip.models.transformer import Attention
from instructblip.models.vision import VisionEncoder


class ImageAttention(NamedTuple):
    """What `attention` returns.

    Attributes:
        weights: of each layer that has cross-attention, by its number from 0: (B, F, H, Q, P), float32; over the image
            tokens they sum to 1.
        prefix: image tokens that stand for no patch: a ViT's [CLS] and registers, which come first.
        grid: rows and columns of the patches, the other image tokens, row after row.
    """

    weights: Mapping[int, Tensor]
    prefix: int
    grid: tuple[int, int]

    @classmethod
    def of(cls, weights_NHQP: Mapping[int, Tensor], vision: VisionEncoder, *, frames: int) -> Self:
        """Of each layer's weights, frame after frame."""
        shaped = {layer: weights.unflatten(0, (-1, frames)) for layer, weights in weights_NHQP.items()}
        return cls(shaped, vision.prefix_tokens, vision.patch_grid)

    def maps(self) -> Tensor:
        """The shares of the patches (layers, B, F, Q, R, C), mean over heads; with those of the prefix they sum to 1."""
        mean_LBFQP = torch.stack([weights.mean(dim=2) for weights in self.weights.values()])
        return mean_LBFQP[..., self.prefix :].unflatten(-1, self.grid)


@contextmanager
def recorded_attention(qformer: QFormer) -> Iterator[dict[int, Tensor]]:
    """Weights (N, H, Q, P) of each layer's cross-attention in the pass that is run inside."""
    found: dict[int, Tensor] = {}

    def record(layer: int, module: Attention, inputs: tuple[Any, ...]) -> None:
        found[layer] = module.weights(*inputs)

    handles = []
    for number, layer in enumerate(qformer.layers):
        assert isinstance(layer, QFormerLayer)
        if layer.cross_attention is not None:
            handles.append(layer.cross_attention.register_forward_pre_hook(partial(record, number)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
