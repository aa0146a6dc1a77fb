"""Modules of shapes alone are those that torch's meta device gives, made without computing initial weights."""

from typing import Any

import pytest
import timm
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig

from instructblip.models.empty import empty_modules


def small_vit() -> nn.Module:
    return timm.create_model("eva_giant_patch14_224", depth=2, embed_dim=32, num_heads=2)  # type: ignore[no-any-return]


def small_llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def small_bert() -> nn.Module:
    return BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48))


def described(module: nn.Module) -> list[tuple[Any, ...]]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return [(name, value.shape, value.dtype, value.device, value.requires_grad) for name, value in named]


@pytest.mark.parametrize("make", [small_vit, small_llama, small_bert])
def test_modules_are_as_on_the_meta_device(make: Any) -> None:
    with torch.device("meta"):
        expected = described(make())
    with empty_modules():
        assert described(make()) == expected
    torch.manual_seed(0)
    after = make()
    torch.manual_seed(0)
    again = make()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in after.state_dict().items())
    assert max(float(value.detach().std()) for value in after.parameters() if value.ndim > 1) > 0


def test_real_tensors_are_changed_meanwhile() -> None:
    real = torch.zeros(3)
    with empty_modules():
        assert real.fill_(2.0).add_(1).tolist() == [3.0] * 3
        assert nn.init.constant_(real, 5.0).tolist() == [5.0] * 3
