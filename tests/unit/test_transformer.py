"""Masks of the transformer blocks, written out."""

import torch

from instructblip.models.transformer import causal_mask, padding_mask

VISIBLE = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()


def rows(mask: torch.Tensor, sample: int) -> list[str]:
    """Of each position what it attends to, as 1 and 0."""
    return ["".join(str(int(value)) for value in row) for row in mask[sample, 0].tolist()]


def test_padding_is_seen_by_none() -> None:
    assert padding_mask(VISIBLE).shape == (2, 1, 1, 5)
    assert rows(padding_mask(VISIBLE), 1) == ["11110"]


def test_a_causal_mask_shows_what_stands_before() -> None:
    mask = causal_mask(VISIBLE, positions=5)
    assert rows(mask, 0) == ["10000", "11000", "11100", "11110", "11111"]
    assert rows(mask, 1) == ["10000", "11000", "11100", "11110", "11110"]


def test_unilm_hides_the_text_from_the_queries() -> None:
    assert rows(causal_mask(VISIBLE, positions=5, prefix=2), 0) == ["11000", "11000", "11100", "11110", "11111"]


def test_later_positions_see_all_earlier_ones() -> None:
    assert rows(causal_mask(VISIBLE, positions=2), 0) == ["11110", "11111"]
    assert rows(causal_mask(VISIBLE, positions=2, prefix=3), 1) == ["11110", "11110"]
