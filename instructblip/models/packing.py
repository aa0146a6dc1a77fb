"""Packing: several samples in one row of a decoder-only model, each blind to the others, its positions from 0 on.

Shape legend: R rows, T tokens of the longest row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from instructblip.devices import on_device

_FILLER = -1  # owner of the padding behind a row's samples


class RowLayout(NamedTuple):
    """Which sample each place of each row belongs to, and where in it: both int64 (R, T).

    Padding has an owner of its own, so that no row of a mask is empty.
    """

    owner_RT: Tensor
    position_RT: Tensor


def pack_rows(lengths: Sequence[int], *, width: int) -> list[list[int]]:
    """Share samples out among rows of about equal length: the numbers of the samples in each row.

    A transformer layer of width L does about 24 L^2 FLOPs a token in its matrices and 4 L for each of the row's T places in
    attention, which does not skip what a mask hides; so R rows of T cost R T (1 + T / 6L). Few long rows pad least, many
    short ones attend least. For each number of rows the longest samples go first, each to the emptiest row; the cheapest
    number wins. No row is shorter than the longest sample needs.

    Args:
        lengths: tokens of each sample.
        width: L, the model's.
    """
    total = sum(lengths)
    longest_first = sorted(range(len(lengths)), key=lambda sample: -lengths[sample])
    best: list[list[int]] = [[sample] for sample in range(len(lengths))]
    least = _cost(len(lengths), max(lengths), width)
    for count in range(min(len(lengths), -(-total // max(lengths))), 0, -1):
        if _cost(count, total / count, width) >= least:
            break  # without any padding; fewer and longer rows cost more still
        rows, longest = _share_out(longest_first, lengths, count)
        if _cost(count, longest, width) < least:
            best, least = rows, _cost(count, longest, width)
    return sorted(sorted(row) for row in best)


def _cost(rows: int, row_length: float, width: int) -> float:
    return rows * row_length * (1 + row_length / (6 * width))


def _share_out(longest_first: Sequence[int], lengths: Sequence[int], count: int) -> tuple[list[list[int]], int]:
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for sample in longest_first:
        emptiest = filled.index(min(filled))
        rows[emptiest].append(sample)
        filled[emptiest] += lengths[sample]
    return rows, max(filled)


def packed_layout(rows: Sequence[Sequence[int]], lengths: Sequence[int], *, device: torch.device) -> RowLayout:
    """Where the samples of each row lie."""
    longest = max(sum(lengths[sample] for sample in row) for row in rows)
    owners, positions = [], []
    for row in rows:
        pieces = [(sample, lengths[sample]) for sample in row]
        pieces.append((_FILLER, longest - sum(length for _, length in pieces)))
        owners.append([owner for owner, length in pieces for _ in range(length)])
        positions.append([position for _, length in pieces for position in range(length)])
    return RowLayout(on_device(owners, device), on_device(positions, device))


def block_causal_mask(layout: RowLayout) -> Tensor:
    """True where a place may attend to another, (R, T, T): to its own sample, up to itself."""
    same_RTT = layout.owner_RT[:, :, None] == layout.owner_RT[:, None]
    return same_RTT & (layout.position_RT[:, :, None] >= layout.position_RT[:, None])
