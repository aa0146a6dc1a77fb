"""The Q-Former: its arithmetic is transformers', instructions steer the queries, masks hide padding."""

import pytest
import torch
from torch import Tensor
from transformers import InstructBlipQFormerConfig
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

from instructblip.models.qformer import QFormer, QFormerLayer
from tests.kit.tiny import tiny_qformer

VISION_WIDTH = 24
TEXT = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 9, 3, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])

# Our module names -> those of transformers, inside one layer.
ATTENTION = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "output": "output.dense",
    "norm": "output.LayerNorm",
}
LAYER = (
    {f"self_attention.{ours}": f"attention.{theirs}" for ours, theirs in ATTENTION.items()}
    | {f"cross_attention.{ours}": f"crossattention.{theirs}" for ours, theirs in ATTENTION.items()}
    | {
        f"{ours}.{part}": f"{kind}{suffix}.{module}"
        for ours, suffix in (("query_ffn", "_query"), ("text_ffn", ""))
        for part, kind, module in (
            ("up", "intermediate", "dense"),
            ("down", "output", "dense"),
            ("norm", "output", "LayerNorm"),
        )
    }
)


def images(batch: int = 2, tokens: int = 6) -> Tensor:
    return torch.randn(batch, tokens, VISION_WIDTH, generator=torch.Generator().manual_seed(1))


def seeded(seed: int = 0, **options: object) -> QFormer:
    """A Q-Former whose every tensor matters: none is left at one or zero, as norms and biases would be."""
    torch.manual_seed(seed)
    qformer = tiny_qformer(vision_width=VISION_WIDTH, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in qformer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return qformer.eval()


def theirs_with_weights_of(ours: QFormer) -> tuple[InstructBlipQFormerModel, list[str]]:
    """transformers' Q-Former with our weights, and the names of its tensors that we have no counterpart for."""
    config = InstructBlipQFormerConfig(
        vocab_size=ours.word_embeddings.num_embeddings,
        hidden_size=ours.width,
        num_hidden_layers=len(ours.layers),
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=ours.max_text_tokens,
        cross_attention_frequency=2,
        encoder_hidden_size=VISION_WIDTH,
    )
    names = {"norm": "embeddings.layernorm"}
    names |= {f"{kind}_embeddings": f"embeddings.{kind}_embeddings" for kind in ("word", "position")}
    for index in range(len(ours.layers)):
        names |= {f"layers.{index}.{own}": f"encoder.layer.{index}.{other}" for own, other in LAYER.items()}
    state = {}
    for name, tensor in ours.state_dict().items():
        if name != "query_tokens":
            module, _, part = name.rpartition(".")
            state[f"{names[module]}.{part}"] = tensor
    theirs = InstructBlipQFormerModel(config).eval()
    result = theirs.load_state_dict(state, strict=False)
    assert result.unexpected_keys == []
    return theirs, result.missing_keys


@torch.no_grad()
def test_query_outputs_equal_those_of_transformers() -> None:
    ours = seeded()
    theirs, missing = theirs_with_weights_of(ours)
    assert missing == []
    expected = theirs(
        input_ids=TEXT,
        attention_mask=torch.cat([torch.ones(2, 4, dtype=torch.long), MASK], dim=1),
        query_embeds=ours.query_tokens.expand(2, -1, -1),
        encoder_hidden_states=images(),
    ).last_hidden_state[:, :4]
    torch.testing.assert_close(ours(images(), TEXT, MASK), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_without_a_text_branch_outputs_equal_transformers_without_text() -> None:
    aware, unaware = seeded(), seeded(instruction_aware=False)
    # Same weights in both, as far as the second has them.
    unaware.load_state_dict({name: aware.state_dict()[name] for name in unaware.state_dict()})
    theirs, _ = theirs_with_weights_of(aware)
    expected = theirs(
        input_ids=None,
        attention_mask=torch.ones(2, 4),
        query_embeds=aware.query_tokens.expand(2, -1, -1),
        encoder_hidden_states=images(),
    ).last_hidden_state
    torch.testing.assert_close(unaware(images()), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("aware", [True, False])
def test_the_instruction_changes_the_queries_only_where_it_is_read(aware: bool) -> None:
    qformer = seeded(instruction_aware=aware)
    other = TEXT.clone()
    other[:, 1] = 11
    difference = (qformer(images(), TEXT, MASK) - qformer(images(), other, MASK)).abs().amax(dim=(1, 2))
    assert bool((difference > 1e-3).all()) is aware
    assert bool((difference == 0).all()) is not aware


@torch.no_grad()
def test_padding_of_the_text_changes_nothing() -> None:
    qformer = seeded()
    padded = torch.cat([TEXT, torch.full((2, 7), 9)], dim=1)
    mask = torch.cat([MASK, torch.zeros(2, 7, dtype=torch.long)], dim=1)
    torch.testing.assert_close(qformer(images(), padded, mask), qformer(images(), TEXT, MASK), atol=1e-6, rtol=0)
    alone = qformer(images()[1:], TEXT[1:, :4], MASK[1:, :4])
    torch.testing.assert_close(qformer(images(), TEXT, MASK)[1:], alone, atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_image_reaches_every_query() -> None:
    qformer = seeded()
    difference = (qformer(images(), TEXT, MASK) - qformer(images() + 1, TEXT, MASK)).abs().amax(dim=2)
    assert bool((difference > 1e-3).all())


@pytest.mark.parametrize("aware", [True, False])
def test_which_modules_exist(aware: bool) -> None:
    qformer = seeded(instruction_aware=aware)
    assert [layer.text_ffn is not None for layer in qformer.layers] == [aware, aware, aware]
    assert [layer.cross_attention is not None for layer in qformer.layers] == [True, False, True]
    assert hasattr(qformer, "word_embeddings") is aware
    assert qformer.output_norm is qformer.layers[-1].query_ffn.norm
    assert (qformer.width, qformer(images(), TEXT, MASK).shape) == (32, (2, 4, 32))


def test_every_parameter_gets_a_gradient_but_the_text_branch_of_the_last_layer() -> None:
    qformer = seeded()
    qformer(images(), TEXT, MASK).square().sum().backward()
    # A trainable parameter without gradient would stop distributed training; this branch can influence nothing.
    without = {name for name, parameter in qformer.named_parameters() if parameter.grad is None}
    last = qformer.layers[-1].text_ffn
    assert without == {f"layers.2.text_ffn.{name}" for name, _ in last.named_parameters()}
    assert without == {name for name, parameter in qformer.named_parameters() if not parameter.requires_grad}


@torch.no_grad()
def test_the_text_branch_of_the_last_layer_is_not_computed_and_moves_no_random_stream() -> None:
    qformer = seeded()
    expected = qformer(images(), TEXT, MASK)
    for parameter in qformer.layers[-1].text_ffn.parameters():
        parameter.fill_(torch.nan)
    assert torch.equal(qformer(images(), TEXT, MASK), expected)
    layer = {"width": 8, "heads": 2, "hidden_width": 8, "vision_width": 4, "dropout": 0.0, "norm_eps": 1e-12}
    after = []
    for has_text in (True, False):
        torch.manual_seed(0)
        QFormerLayer(**layer, has_text=has_text, is_last=True)
        after.append(torch.rand(()))
    assert after[0] == after[1]


def test_queries_start_apart() -> None:
    queries = tiny_qformer(vision_width=VISION_WIDTH, queries=8).query_tokens[0]
    assert torch.pdist(queries).min() > 0.01
    assert 0.01 < queries.std() < 0.03


@torch.no_grad()
def test_dropout_in_training_only() -> None:
    qformer = seeded(dropout=0.3)
    first, second = (qformer(images(), TEXT, MASK) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, seeded(dropout=0.0)(images(), TEXT, MASK))
    qformer.train()
    torch.manual_seed(0)
    first, second = (qformer(images(), TEXT, MASK) for _ in range(2))
    assert not torch.allclose(first, second, atol=1e-2)
    torch.manual_seed(0)
    assert torch.equal(first, qformer(images(), TEXT, MASK))


def test_errors() -> None:
    qformer = seeded()
    with pytest.raises(ValueError, match="needs the instruction's token ids"):
        qformer(images())
    with pytest.raises(ValueError, match="needs the instruction's token ids and mask"):
        qformer(images(), TEXT)
    long = torch.ones(2, 65, dtype=torch.long)
    with pytest.raises(ValueError, match="instruction of 65 tokens, the limit is 64"):
        qformer(images(), long, long)
    with pytest.raises(ValueError, match="width 30 is not a multiple of its 4 heads"):
        QFormer(vocab_size=8, width=30, layers=1, heads=4, hidden_width=8, vision_width=8)
