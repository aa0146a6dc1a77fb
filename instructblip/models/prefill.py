"""Prompts that a language model has run, and what of a tree of tokens stands behind them.

Shape legend: B prompts, H heads, T positions, E width of a head, K nodes that were kept, L language-model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import EncoderDecoderCache


@dataclass
class Prefill:
    """Prompts that were run once and can be continued many times; what `LLM.prefill` returns.

    Attributes:
        last_BL: hidden state that predicts the first answer token.
        lengths: number of positions that each row's answer tokens may attend to before the answer.
        cache: keys and values of those positions, at least as wide as the longest row, and of the nodes behind them.
        encoded: encoder states and their mask, of an encoder-decoder model.
        depths_BK: places in the answer of the nodes that were kept.
    """

    last_BL: Tensor
    lengths: list[int]
    cache: Any
    encoded: dict[str, Tensor]
    depths_BK: Tensor

    @property
    def width(self) -> int:
        """Positions in front of the nodes, those of padding included."""
        return int(self._layers[0].keys.shape[2]) - self.depths_BK.shape[1]

    def keep(self, rows: Sequence[int]) -> "Prefill":
        """Some of the prompts; what has all of them must not be used afterwards."""
        kept = torch.tensor(rows, device=self.last_BL.device)
        self.cache.batch_select_indices(kept)
        encoded = {name: state[kept] for name, state in self.encoded.items()}
        lengths = [self.lengths[row] for row in rows]
        return Prefill(self.last_BL[kept], lengths, self.cache, encoded, self.depths_BK[kept])

    def keep_nodes(self, places_BN: Tensor) -> None:
        """Keep N of each prompt's nodes, by their places."""
        width = self.width
        for layer in self._layers:
            layer.keys, layer.values = (_picked(states, width, places_BN) for states in (layer.keys, layer.values))
        self.depths_BK = self.depths_BK.gather(1, places_BN)

    def joined(self, other: "Prefill") -> "Prefill":
        """These prompts and then the other's, as wide as the longest of all; both must not be used afterwards."""
        lengths = self.lengths + other.lengths
        width, nodes = max(lengths), max(self.depths_BK.shape[1], other.depths_BK.shape[1])
        widths = self.width, other.width
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            for name in ("keys", "values"):
                pair = zip((getattr(mine, name), getattr(theirs, name)), widths, strict=True)
                setattr(mine, name, torch.cat([_widened(states, own, width, nodes) for states, own in pair]))
        if isinstance(self.cache, EncoderDecoderCache):
            crosses = (cache.cross_attention_cache.layers for cache in (self.cache, other.cache))
            for mine, theirs in zip(*crosses, strict=True):
                mine.keys, mine.values = _together(mine.keys, theirs.keys, 2), _together(mine.values, theirs.values, 2)
        encoded = {name: _together(state, other.encoded[name], 1) for name, state in self.encoded.items()}
        depths_BK = _together(self.depths_BK, other.depths_BK, 1)
        return Prefill(torch.cat([self.last_BL, other.last_BL]), lengths, self.cache, encoded, depths_BK)

    @property
    def _layers(self) -> list[Any]:
        """Those of a decoder's attention to itself."""
        own = self.cache.self_attention_cache if isinstance(self.cache, EncoderDecoderCache) else self.cache
        layers: list[Any] = own.layers
        return layers


def _picked(states_BHTE: Tensor, width: int, places_BN: Tensor) -> Tensor:
    """States of the prompts, and behind them those of some nodes."""
    nodes_BHKE = states_BHTE[:, :, width:]
    places_BHNE = places_BN[:, None, :, None].expand(-1, nodes_BHKE.shape[1], -1, nodes_BHKE.shape[3])
    return torch.cat([states_BHTE[:, :, :width], nodes_BHKE.gather(2, places_BHNE)], dim=2)


def _widened(states_BHTE: Tensor, own: int, width: int, nodes: int) -> Tensor:
    """States whose prompts take `own` positions, with places for `width` of these and `nodes` nodes."""
    prompts_BHTE = F.pad(states_BHTE[:, :, : min(own, width)], (0, 0, 0, max(width - own, 0)))
    nodes_BHTE = states_BHTE[:, :, own:]
    return torch.cat([prompts_BHTE, F.pad(nodes_BHTE, (0, 0, 0, nodes - nodes_BHTE.shape[2]))], dim=2)


def _together(mine: Tensor, theirs: Tensor, dim: int) -> Tensor:
    """Rows of both, with zeros behind what is shorter in a dimension."""
    longest = max(mine.shape[dim], theirs.shape[dim])
    behind = [0, 0] * (mine.dim() - dim - 1)
    return torch.cat([F.pad(part, (*behind, 0, longest - part.shape[dim])) for part in (mine, theirs)])
