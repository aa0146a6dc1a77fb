"""The table of names: nothing lost, nothing twice, and the names that the formats are known to have."""

import pytest
import torch
from torch import nn

from instructblip.errors import UserError
from instructblip.models.qformer import QFormer
from instructblip.weights.names import (
    check_tensors,
    foreign_names,
    is_ignored,
    pack_qkv_bias,
    unpack_qkv_bias,
)
from tests.kit.tiny import tiny_model, tiny_released_model

# native -> (LAVIS, transformers), as read in both projects
KNOWN = {
    "vision.backbone.cls_token": ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    "vision.backbone.patch_embed.proj.bias": (
        "visual_encoder.patch_embed.proj.bias",
        "vision_model.embeddings.patch_embedding.bias",
    ),
    "vision.backbone.blocks.38.attn.proj.weight": (
        "visual_encoder.blocks.38.attn.proj.weight",
        "vision_model.encoder.layers.38.self_attn.projection.weight",
    ),
    "vision.backbone.blocks.7.attn.v_bias": (
        "visual_encoder.blocks.7.attn.v_bias",
        "vision_model.encoder.layers.7.self_attn.qkv.bias[value]",
    ),
    "vision_norm.weight": ("ln_vision.weight", "vision_model.post_layernorm.weight"),
    "qformer.query_tokens": ("query_tokens", "query_tokens"),
    "qformer.norm.bias": ("Qformer.bert.embeddings.LayerNorm.bias", "qformer.embeddings.layernorm.bias"),
    "qformer.layers.10.cross_attention.key.weight": (
        "Qformer.bert.encoder.layer.10.crossattention.self.key.weight",
        "qformer.encoder.layer.10.crossattention.attention.key.weight",
    ),
    "qformer.layers.11.text_ffn.norm.weight": (
        "Qformer.bert.encoder.layer.11.output.LayerNorm.weight",
        "qformer.encoder.layer.11.output.LayerNorm.weight",
    ),
    "qformer.layers.0.query_ffn.up.weight": (
        "Qformer.bert.encoder.layer.0.intermediate_query.dense.weight",
        "qformer.encoder.layer.0.intermediate_query.dense.weight",
    ),
    "projection.weight": ("llm_proj.weight", "language_projection.weight"),
}


def own_names() -> list[str]:
    model = tiny_released_model()
    with torch.device("meta"):
        published = QFormer(vocab_size=9, width=16, layers=12, heads=2, hidden_width=8, vision_width=8)
    return [
        *(name for name in model.state_dict() if not name.startswith(("llm.", "qformer."))),
        *(f"qformer.{name}" for name in published.state_dict()),
    ]


def test_known_names() -> None:
    assert foreign_names(KNOWN, "lavis") == {name: lavis for name, (lavis, _) in KNOWN.items()}
    assert foreign_names(KNOWN, "huggingface") == {name: theirs for name, (_, theirs) in KNOWN.items()}


def test_the_language_model_head_has_a_place_at_lavis_only() -> None:
    names = {
        "qformer.lm_head.dense.weight": "Qformer.cls.predictions.transform.dense.weight",
        "qformer.lm_head.norm.bias": "Qformer.cls.predictions.transform.LayerNorm.bias",
        "qformer.lm_head.bias": "Qformer.cls.predictions.bias",
    }
    assert foreign_names(names, "lavis") == names
    with pytest.raises(UserError, match=r"^qformer.lm_head.dense.weight has no place in a transformers"):
        foreign_names(names, "huggingface")


@pytest.mark.parametrize("form", ["lavis", "huggingface"])
def test_every_tensor_has_a_name_of_its_own(form: str) -> None:
    names = foreign_names(own_names(), form)  # type: ignore[arg-type]
    assert list(names) == own_names()
    assert len(set(names.values())) == len(names) > 200
    assert not [name for name in names.values() if is_ignored(name, form)]  # type: ignore[arg-type]


def test_a_tensor_without_a_place_is_named() -> None:
    with pytest.raises(UserError, match=r"^vision_norm.mean has no place in a LAVIS file"):
        foreign_names(tiny_model(vision_norm="channel").held_state(), "lavis")
    with pytest.raises(UserError, match=r"vision.backbone.blocks.0.attn.rope has no place in a transformers"):
        foreign_names(["vision.backbone.blocks.0.attn.rope"], "huggingface")


def test_query_and_value_biases_are_one_vector_at_transformers() -> None:
    query, value, other = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.ones(5)
    apart = {"layers.0.self_attn.qkv.bias[query]": query, "layers.0.self_attn.qkv.bias[value]": value, "other": other}
    packed = pack_qkv_bias(apart)
    assert packed.keys() == {"layers.0.self_attn.qkv.bias", "other"}
    assert packed["layers.0.self_attn.qkv.bias"].tolist() == [1, 2, 0, 0, 3, 4]
    again = unpack_qkv_bias(packed)
    assert again.keys() == apart.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in apart.items())
    assert unpack_qkv_bias({"a.self_attn.qkv.bias": torch.arange(6.0)})["a.self_attn.qkv.bias[value]"].tolist() == [
        4,
        5,
    ]


def test_a_key_bias_changes_no_attention() -> None:
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(1, 5, 8)
    before = attention(x, x, x)[0]
    with torch.no_grad():
        attention.in_proj_bias[8:16] = torch.randn(8)
    torch.testing.assert_close(attention(x, x, x)[0], before)


def test_what_may_be_in_a_file_and_means_nothing() -> None:
    for name in (
        "Qformer.bert.embeddings.position_ids",
        "Qformer.cls.predictions.decoder.weight",
        "Qformer.cls.predictions.decoder.bias",
        "llm_model.model.layers.0.self_attn.rotary_emb.inv_freq",
    ):
        assert is_ignored(name, "lavis")
    assert is_ignored("qformer.embeddings.position_ids", "huggingface")
    for name in ("temp", "itm_head.weight", "Qformer.bert.pooler.dense.weight", "llm_model.lm_head.weight"):
        assert not is_ignored(name, "lavis")


def test_tensors_are_compared_one_to_one() -> None:
    expected = {"a": torch.Size([2]), "b": torch.Size([3])}
    whole = {"a": torch.zeros(2), "b": torch.zeros(3)}
    check_tensors(expected, whole, "file")
    cases = {
        "file lacks the tensor a; it is of another model, or incomplete": {"b": torch.zeros(3)},
        r"file lacks the tensor a \(and 1 more\)": {},
        r"file: b is \(1,\), the model needs \(3,\); it is of another model": {**whole, "b": torch.zeros(1)},
        "file has the unknown tensor c; it is of another model": {**whole, "c": torch.zeros(1)},
    }
    for message, found in cases.items():
        with pytest.raises(UserError, match=message):
            check_tensors(expected, found, "file")
