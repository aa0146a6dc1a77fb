"""Rows of token tables: taken away and added without a random number, tied tables tied and others not."""

import pytest
import torch

from instructblip.models.vocabulary import resize_vocabulary, with_rows
from tests.kit.tiny import tiny_llama, tiny_t5


def test_rows_behind_are_the_mean() -> None:
    table = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert with_rows(table, 4).tolist() == [[1, 2], [3, 6], [2, 4], [2, 4]]
    assert with_rows(table, 1).tolist() == [[1, 2]]
    assert with_rows(table[0], 3).tolist() == [1, 2, 1.5]  # a bias
    assert with_rows(table.bfloat16(), 3).dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [30, 40, 43])
@pytest.mark.parametrize("tied", [True, False])
def test_tables_of_a_decoder(tied: bool, rows: int) -> None:
    model = tiny_llama(40, 1).requires_grad_(False)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    table, head = model.model.embed_tokens.weight, model.lm_head.weight
    resize_vocabulary(model, rows)
    assert torch.equal(model.model.embed_tokens.weight, with_rows(table, rows))
    assert torch.equal(model.lm_head.weight, with_rows(head, rows))
    assert (model.model.embed_tokens.weight is model.lm_head.weight) is tied
    assert not model.lm_head.weight.requires_grad
    assert model.config.vocab_size == rows
    assert model(torch.tensor([[rows - 1]])).logits.shape == (1, 1, rows)


def test_t5_keeps_a_head_of_its_own() -> None:
    model = tiny_t5(40, 1)
    head = model.lm_head.weight
    resize_vocabulary(model, 41)
    assert torch.equal(model.lm_head.weight, with_rows(head, 41))
    assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight is model.shared.weight
    assert not torch.equal(model.shared.weight, model.lm_head.weight)
