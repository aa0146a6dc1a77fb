"""BLIP's text model: its three modes, its cache, one source for many rows, and BERT as its start."""

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from instructblip.models.med import TextModel
from instructblip.models.transformer import KeyValueCache
from instructblip.weights.bert import initialize_like_bert, names_unknown_to_bert, text_model_state_from_bert
from instructblip.weights.parts import load_exactly
from tests.kit.tiny import redraw

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
WIDTH, SOURCE, VOCABULARY = 32, 24, 50


def text_model(*, seed: int = 0, dropout: float = 0.0, shared: bool = True, added: int = 0) -> TextModel:
    torch.manual_seed(seed)
    model = TextModel(
        vocab_size=VOCABULARY + added,
        width=WIDTH,
        layers=2,
        heads=4,
        hidden_width=64,
        source_width=SOURCE,
        max_text_tokens=16,
        dropout=dropout,
        language_model_head=True,
        decoder_attention=shared,
    )
    redraw(model)
    return model.eval()


def inputs(batch: int = 3, length: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and mask of texts of unequal length, and what they read."""
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    mask_BT = (torch.arange(length) < torch.arange(length, length - batch, -1)[:, None]).long()
    return ids_BT, mask_BT, torch.randn(batch, 5, SOURCE, generator=generator)


@torch.no_grad()
def test_the_three_modes_see_what_they_should() -> None:
    model, (ids_BT, mask_BT, source_BPU) = text_model(), inputs()
    other_BT = ids_BT.clone()
    other_BT[:, 3] = (ids_BT[:, 3] + 1) % VOCABULARY
    for source in (None, source_BPU):
        for causal in (False, True):
            before, after = (model(ids, mask_BT, source, causal=causal) for ids in (ids_BT, other_BT))
            moved_BT = ~torch.isclose(before, after, **CLOSE).all(dim=2)
            assert moved_BT[:, 3:4].all()
            assert moved_BT[:, :3].any().item() is not causal  # earlier tokens see it, unless they may not
        assert not torch.allclose(model(ids_BT, mask_BT, source), model(ids_BT, mask_BT, source, causal=True), **CLOSE)
    alone, grounded = model(ids_BT, mask_BT), model(ids_BT, mask_BT, source_BPU)
    assert not torch.allclose(alone, grounded, **CLOSE)
    assert not torch.allclose(grounded, model(ids_BT, mask_BT, source_BPU.flip(0)), **CLOSE)


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    model, (ids_BT, mask_BT, source_BPU) = text_model(), inputs()
    hidden_BP = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    for causal in (False, True):
        together = model(ids_BT, mask_BT, source_BPU, hidden_BP, causal=causal)
        for row in range(3):
            tokens, shown = int(mask_BT[row].sum()), int(hidden_BP[row].sum())
            alone = model(
                ids_BT[row : row + 1, :tokens],
                mask_BT[row : row + 1, :tokens],
                source_BPU[row : row + 1, :shown],
                causal=causal,
            )
            torch.testing.assert_close(alone[0], together[row, :tokens], **CLOSE)


@torch.no_grad()
def test_a_cache_and_prepared_sources_give_the_states_of_one_pass() -> None:
    model, (ids_BT, _, source_BPU) = text_model(), inputs()
    mask_BT = torch.ones_like(ids_BT)
    whole, cache, source = (
        model(ids_BT, mask_BT, source_BPU, causal=True),
        KeyValueCache(),
        model.keys_values(source_BPU),
    )
    parts = [
        model(ids_BT[:, a:b], mask_BT[:, a:b], source, causal=True, cache=cache) for a, b in ((0, 3), (3, 4), (4, 6))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)
    assert cache.text == 6


@torch.no_grad()
def test_rows_of_one_source_need_no_copies_of_it() -> None:
    model, (_, _, source_BPU) = text_model(), inputs()
    ids_RT, mask_RT, _ = inputs(batch=6)
    hidden_BP = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    copied = model(ids_RT, mask_RT, source_BPU.repeat_interleave(2, 0), hidden_BP.repeat_interleave(2, 0), causal=True)
    for source in (source_BPU, model.keys_values(source_BPU)):
        torch.testing.assert_close(model(ids_RT, mask_RT, source, hidden_BP, causal=True), copied, **CLOSE)


@torch.no_grad()
def test_texts_read_the_source_that_is_theirs() -> None:
    model, (_, _, source_BPU) = text_model(), inputs()
    ids_RT, mask_RT, _ = inputs(batch=6)
    for rows in ([2, 0, 0, 1, 2, 0], [0] * 6):  # in any order; and one source for all
        rows_R = torch.tensor(rows)
        copied, given = model(ids_RT, mask_RT, source_BPU[rows_R]), source_BPU[: max(rows) + 1]
        for source in (given, model.keys_values(given)):
            torch.testing.assert_close(model(ids_RT, mask_RT, source, source_rows_R=rows_R), copied, **CLOSE)


@torch.no_grad()
def test_encoder_and_decoder_share_all_but_self_attention() -> None:
    model, (ids_BT, mask_BT, source_BPU) = text_model(), inputs()
    before = {causal: model(ids_BT, mask_BT, source_BPU, causal=causal) for causal in (False, True)}

    def moved(part: torch.nn.Module) -> set[bool]:
        weight = next(part.parameters())
        kept = weight.clone()
        weight.mul_(1.5)
        found = {
            causal
            for causal, states in before.items()
            if not torch.allclose(model(ids_BT, mask_BT, source_BPU, causal=causal), states, **CLOSE)
        }
        weight.copy_(kept)
        return found

    layer = model.layers[0]
    assert moved(layer.self_attention) == {False}
    assert moved(layer.decoder_attention) == {True}
    assert moved(layer.cross_attention) == moved(layer.ffn) == moved(model.word_embeddings) == {False, True}


def test_dropout_is_drawn_in_training_only() -> None:
    model, (ids_BT, mask_BT, source_BPU) = text_model(dropout=0.3), inputs()
    assert torch.equal(model(ids_BT, mask_BT, source_BPU), model(ids_BT, mask_BT, source_BPU))
    model.train()
    assert not torch.equal(model(ids_BT, mask_BT, source_BPU), model(ids_BT, mask_BT, source_BPU))


def test_what_does_not_fit_is_refused() -> None:
    model = text_model()
    ids_BT = torch.zeros(1, 17, dtype=torch.int64)
    with pytest.raises(ValueError, match="text of 17 tokens, the limit is 16"):
        model(ids_BT, torch.ones_like(ids_BT))
    model.lm_head = None
    with pytest.raises(ValueError, match="no language-model head"):
        model.logits(torch.zeros(1, WIDTH))


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_started_from_bert_it_is_bert_where_it_reads_no_image(causal: bool) -> None:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        is_decoder=causal,
    )
    torch.manual_seed(3)
    bert = BertForMaskedLM(config).eval()
    redraw(bert)
    model = text_model(added=2)
    initialize_like_bert(model)
    weights = {name: tensor for name, tensor in bert.state_dict().items() if ".decoder." not in name}
    state = text_model_state_from_bert(weights, model)
    load_exactly(model, state, "bert", new=names_unknown_to_bert(weights, model))
    ids_BT, mask_BT, _ = inputs()
    found = model.logits(model(ids_BT, mask_BT, causal=causal))[..., :VOCABULARY]
    expected = bert(ids_BT, attention_mask=mask_BT).logits
    torch.testing.assert_close(found[mask_BT.bool()], expected[mask_BT.bool()], **CLOSE)
    cross = model.layers[0].cross_attention.key.weight
    assert 0.01 < float(cross.std()) < 0.03  # as BERT's are before pre-training
    assert torch.equal(model.word_embeddings.weight[-1], model.word_embeddings.weight[-2])
