"""Attention over samples of different lengths that lie one behind the other in a single row, none of which sees another.

A dense mask is T times T for T tokens of a row, is written and read in every layer, and its zeros are computed all the same.
Kernels of variable length take the samples' ends instead. transformers hands these to what is registered as an attention:
`cu_seq_lens_q`, as its FlashAttention does. Without them the registered function is transformers' `sdpa`.

On a GPU in half precision torch's own kernel runs; elsewhere each sample goes through `scaled_dot_product_attention` alone.

Shape legend: H heads, T tokens of the row, D head width, N samples.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from instructblip.devices import on_device

NAME = "by_length"  # what transformers calls it


def attention(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers' layers call: the attended values (1, T, H, D), and no weights.

    Args:
        module: the layer's attention; of it only the number of heads that share keys is read.
        query_1HTD, key_1HTD, value_1HTD: of one row; keys and values may have fewer heads.
        attention_mask: read where there are no ends.
        dropout, scaling, sliding_window: as transformers' layers give them.
        cu_seq_lens_q: where samples end, with 0 in front, int32 (N + 1,).
        max_length_q: tokens of the longest.
        options: of other attentions.

    Raises:
        ValueError: a cap on scores, which no kernel here has.
    """
    if cu_seq_lens_q is None:
        options |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query_1HTD, key_1HTD, value_1HTD, attention_mask, **options)
    if options.get("softcap") is not None:
        raise ValueError("attention by length has no cap on scores")
    groups = getattr(module, "num_key_value_groups", 1)
    rows = [query_1HTD, repeat_kv(key_1HTD, groups), repeat_kv(value_1HTD, groups)]
    if query_1HTD.is_cuda and query_1HTD.dtype.itemsize == 2 and not dropout:
        query, key, value = (row[0].transpose(0, 1).contiguous() for row in rows)
        window = (-1 if sliding_window is None else sliding_window - 1, 0)  # tokens to the left, and none to the right
        ends = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        found = varlen_attn(query, key, value, *ends, scale=scaling, window_size=window)
        assert isinstance(found, Tensor)  # no weights were asked for
        return found[None], None
    parts = [
        _alone([row[:, :, start:end] for row in rows], dropout, scaling, sliding_window)
        for start, end in pairwise(cu_seq_lens_q.tolist())
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _alone(rows: Sequence[Tensor], dropout: float, scaling: float | None, window: int | None) -> Tensor:
    """One sample's attention (1, H, T, D), of its queries, keys and values."""
    query, key, value = rows
    tokens, mask = query.shape[2], None
    if window is not None and window < tokens:
        places = torch.arange(tokens, device=query.device)
        distance = places[:, None] - places
        mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
    )


def ends_of(lengths: list[int], device: torch.device) -> dict[str, Any]:
    """What layers are to be told of samples of these lengths."""
    ends = on_device([0, *accumulate(lengths)], device, torch.int32)
    longest = max(lengths)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
