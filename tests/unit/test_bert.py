"""BERT weights as the start of a Q-Former: the text branch starts as BERT, the query branch as a copy of it."""

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel

from instructblip.errors import UserError
from instructblip.models.qformer import QFormer
from instructblip.weights.bert import names_unknown_to_bert, qformer_state_from_bert
from tests.kit.tiny import tiny_bert_tokenizer, tiny_qformer


@pytest.fixture
def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tiny_bert_tokenizer()),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return BertModel(config).eval()


def load(qformer: QFormer, weights: dict[str, Tensor]) -> list[str]:
    """Load BERT's weights; return the names of tensors that have none there."""
    result = qformer.load_state_dict(qformer_state_from_bert(weights, qformer), strict=False)
    assert result.unexpected_keys == []
    return result.missing_keys


@torch.no_grad()
def test_the_text_branch_starts_as_bert(bert: BertModel) -> None:
    qformer = tiny_qformer(vision_width=8, text_outputs=True).eval()
    missing = load(qformer, bert.state_dict())
    assert all(name == "query_tokens" or ".cross_attention." in name for name in missing)
    text = tiny_bert_tokenizer()("what color is the shape?", return_tensors="pt")
    found = qformer(None, text["input_ids"], text["attention_mask"], text_states=True).text_BTD
    torch.testing.assert_close(found, bert(text["input_ids"]).last_hidden_state, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_head_starts_as_berts() -> None:
    config = BertConfig(
        vocab_size=len(tiny_bert_tokenizer()) - 1,  # the Q-Former adds [DEC]
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    bert = BertForMaskedLM(config).eval()
    bert.cls.predictions.bias.normal_()
    qformer = tiny_qformer(vision_width=8, text_outputs=True, language_model_head=True).eval()
    load(qformer, bert.state_dict())
    text = tiny_bert_tokenizer()("what color is the shape?", return_tensors="pt")
    states = qformer(None, text["input_ids"], text["attention_mask"], text_states=True).text_BTD
    torch.testing.assert_close(qformer.logits(states)[..., :-1], bert(text["input_ids"]).logits, atol=1e-4, rtol=0)
    assert qformer.lm_head.bias[-1] == 0
    before = {name: tensor.clone() for name, tensor in qformer.lm_head.state_dict().items()}
    headless = bert.bert.state_dict()
    assert not any("lm_head" in name for name in qformer_state_from_bert(headless, qformer))
    assert {f"lm_head.{name}" for name in before} < set(names_unknown_to_bert(headless, qformer))
    assert not any("lm_head" in name for name in names_unknown_to_bert(bert.state_dict(), qformer))


def test_both_feed_forwards_of_a_layer_start_from_one(bert: BertModel) -> None:
    qformer = tiny_qformer(vision_width=8)
    load(qformer, bert.state_dict())
    layer = qformer.layers[0]
    assert torch.equal(layer.query_ffn.up.weight, layer.text_ffn.up.weight)
    assert torch.equal(layer.query_ffn.down.weight, bert.encoder.layer[0].output.dense.weight)


def test_prefixed_and_old_names(bert: BertModel) -> None:
    renamed = {
        f"bert.{name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')}": value
        for name, value in bert.state_dict().items()
    }
    qformer = tiny_qformer(vision_width=8)
    expected, found = (qformer_state_from_bert(weights, qformer) for weights in (bert.state_dict(), renamed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_without_text_no_embeddings_are_needed(bert: BertModel) -> None:
    weights = {name: value for name, value in bert.state_dict().items() if "_embeddings" not in name}
    load(tiny_qformer(vision_width=8, instruction_aware=False), weights)
    with pytest.raises(UserError, match=r"lack embeddings\.token_type_embeddings\.weight"):
        load(tiny_qformer(vision_width=8), weights)


def test_a_missing_tensor_is_named(bert: BertModel) -> None:
    weights = bert.state_dict()
    del weights["encoder.layer.1.output.dense.bias"]
    with pytest.raises(UserError, match=r"lack encoder\.layer\.1\.output\.dense\.bias"):
        load(tiny_qformer(vision_width=8), weights)
