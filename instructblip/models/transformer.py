"""The parts of a BERT block (post-norm), its masks and its language-model head, for the Q-Former and BLIP's text model.

Shape legend: B batch, S positions computed in this pass, K positions attended to (those of earlier passes in front),
H heads, E width of a head, D width, U width of what is attended to, N rows of any kind, V vocabulary.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeysValues(NamedTuple):
    """Keys and values of one attention."""

    keys_BHKE: Tensor
    values_BHKE: Tensor

    def followed_by(self, later: "KeysValues") -> "KeysValues":
        """Join two stretches of positions, this one first."""
        keys_BHKE = torch.cat([self.keys_BHKE, later.keys_BHKE], dim=2)
        return KeysValues(keys_BHKE, torch.cat([self.values_BHKE, later.values_BHKE], dim=2))

    def select(self, rows_N: Tensor) -> "KeysValues":
        """Those of these rows of the batch, in this order; a row may be taken more than once."""
        if len(self.keys_BHKE) == 1:  # nothing to choose from, so nothing to copy
            return KeysValues(*(tensor.expand(len(rows_N), -1, -1, -1) for tensor in self))
        return KeysValues(self.keys_BHKE[rows_N], self.values_BHKE[rows_N])


@dataclass
class KeyValueCache:
    """Keys and values of positions that a stack has already computed; each pass reads and extends it in place.

    Nothing is detached: a loss of a later pass has gradients in the earlier ones.

    Attributes:
        layers: of each layer's self-attention; empty before the first pass.
        visible_BK: True at the positions that later ones may attend to, False at padding; None before the first pass.
        text: how many of the K positions are text, which is the position number of the next token.
    """

    layers: list[KeysValues] = field(default_factory=list)
    visible_BK: Tensor | None = None
    text: int = 0

    def select(self, rows_N: Tensor) -> "KeyValueCache":
        """A cache of these rows of the batch, in this order; a row may be taken more than once."""
        layers = [keys_values.select(rows_N) for keys_values in self.layers]
        return KeyValueCache(layers, None if self.visible_BK is None else self.visible_BK[rows_N], self.text)


class Attention(nn.Module):
    """Multi-head attention with the residual and post-norm of BERT: `norm(x + dropout(out(attend(x, source))))`.

    Args:
        width: D, of what attends.
        heads: H.
        source_width: U, of what is attended to.
        dropout: on attention weights and on the output, in training only.
        norm_eps: of the LayerNorm.

    Raises:
        ValueError: heads that do not divide the width.
    """

    def __init__(self, width: int, heads: int, source_width: int, dropout: float, norm_eps: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of its {heads} heads")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = dropout

    def forward(
        self,
        x_BSD: Tensor,
        source: Tensor | KeysValues,
        mask_B1SK: Tensor | None = None,
        past: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """Attend from S positions to K.

        Args:
            x_BSD: what attends.
            source: what is attended to, (B, K, U), or its keys and values from an earlier call.
            mask_B1SK: True where a position may attend; dimensions of size 1 are expanded. None hides nothing.
            past: keys and values of earlier positions, put in front of the source's; the mask covers them.

        Returns:
            The output (B, S, D), and the keys and values attended to, those of `past` included.
        """
        # The order of the three projections is part of the golden losses: gradients of x are summed in it.
        q_BHSE = self._split_heads(self.query(x_BSD))
        if not isinstance(source, KeysValues):
            source = self.keys_values(source)
        if past is not None:
            source = past.followed_by(source)
        dropout = self.dropout if self.training else 0.0
        out_BHSE = F.scaled_dot_product_attention(q_BHSE, *source, attn_mask=mask_B1SK, dropout_p=dropout)
        out_BSD = self.output(out_BHSE.transpose(1, 2).flatten(2))
        return self.norm(x_BSD + F.dropout(out_BSD, self.dropout, self.training)), source

    def weights(self, x_BSD: Tensor, source: Tensor | KeysValues, mask_B1SK: Tensor | None = None) -> Tensor:
        """How much each position attends to each of the source's: (B, H, S, K), float32, rows sum to 1.

        What `forward` multiplies the values by, without dropout; it computes them in a kernel that keeps none.
        """
        q_BHSE = self._split_heads(self.query(x_BSD)).float()
        keys_BHKE = (source if isinstance(source, KeysValues) else self.keys_values(source)).keys_BHKE.float()
        scores_BHSK = q_BHSE @ keys_BHKE.transpose(2, 3) / math.sqrt(q_BHSE.shape[-1])
        if mask_B1SK is not None:
            scores_BHSK = scores_BHSK.masked_fill(~mask_B1SK, -torch.inf)
        return scores_BHSK.softmax(dim=3)

    def keys_values(self, source_BKU: Tensor) -> KeysValues:
        """Keys and values of what is attended to."""
        return KeysValues(self._split_heads(self.key(source_BKU)), self._split_heads(self.value(source_BKU)))

    def _split_heads(self, x_BND: Tensor) -> Tensor:
        return x_BND.unflatten(2, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """BERT's feed-forward with its residual and post-norm: `norm(x + dropout(down(gelu(up(x)))))`."""

    def __init__(self, width: int, hidden_width: int, dropout: float, norm_eps: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden_width)
        self.down = nn.Linear(hidden_width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = dropout

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.norm(x_BSD + F.dropout(self.down(F.gelu(self.up(x_BSD))), self.dropout, self.training))


class LanguageModelHead(nn.Module):
    """BERT's head: a transform, then the scalar product with every word embedding, plus a bias of each word.

    The embeddings come from outside at each call and are no parameters of the head, so the tie cannot break and no file
    holds them twice.
    """

    def __init__(self, width: int, vocab_size: int, norm_eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden_ND: Tensor, word_embeddings_VD: Tensor) -> Tensor:
        """Logits (N, V) of hidden states of any leading dimensions."""
        return F.linear(self.norm(F.gelu(self.dense(hidden_ND))), word_embeddings_VD, self.bias)


def padding_mask(visible_BK: Tensor) -> Tensor:
    """Every position attends to all that are not padding: a mask (B, 1, 1, K) for `Attention`."""
    return visible_BK[:, None, None, :]


def causal_mask(visible_BK: Tensor, *, positions: int, prefix: int = 0) -> Tensor:
    """Each position attends to itself and to what stands before it: a mask (B, 1, S, K) for `Attention`.

    Args:
        visible_BK: True where there is no padding.
        positions: S; the last S of the K positions are those that attend.
        prefix: the first positions of the K, which attend to each other in both directions and to nothing behind them, as
            the visual prefix of UniLM's sequence-to-sequence mask (BLIP-2, figure 2). 0 is a plain causal mask.
    """
    keys_K = torch.arange(visible_BK.shape[1], device=visible_BK.device)
    last_S = keys_K[-positions:].clamp_min(prefix - 1)
    return padding_mask(visible_BK) & (keys_K <= last_S[:, None])
