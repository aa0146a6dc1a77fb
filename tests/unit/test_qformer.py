"""The Q-Former: its arithmetic is transformers', instructions steer the queries, masks hide padding."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import InstructBlipQFormerConfig
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

from instructblip.models.qformer import QFormer, QFormerLayer, QFormerOutput
from instructblip.models.transformer import KeyValueCache
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


def queries(qformer: QFormer, text: Tensor = TEXT, mask: Tensor = MASK) -> Tensor:
    return qformer(images(), text, mask).query_BQD


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
    torch.testing.assert_close(ours(images(), TEXT, MASK).query_BQD, expected, atol=1e-5, rtol=0)


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
    torch.testing.assert_close(unaware(images()).query_BQD, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_instruction_changes_the_queries() -> None:
    qformer = seeded()
    other = TEXT.clone()
    other[:, 1] = 11
    difference = queries(qformer, TEXT) - queries(qformer, other)
    assert bool((difference.abs().amax(dim=(1, 2)) > 1e-3).all())


@torch.no_grad()
def test_padding_of_the_text_changes_nothing() -> None:
    qformer = seeded()
    padded = torch.cat([TEXT, torch.full((2, 7), 9)], dim=1)
    mask = torch.cat([MASK, torch.zeros(2, 7, dtype=torch.long)], dim=1)
    torch.testing.assert_close(
        queries(qformer, padded, mask), queries(qformer), atol=5e-6, rtol=0
    )  # rounding, which is the processor's
    alone = qformer(images()[1:], TEXT[1:, :4], MASK[1:, :4]).query_BQD
    torch.testing.assert_close(queries(qformer)[1:], alone, atol=5e-6, rtol=0)  # rounding, which is the processor's


@torch.no_grad()
def test_the_image_reaches_every_query() -> None:
    qformer = seeded()
    difference = (queries(qformer) - qformer(images() + 1, TEXT, MASK).query_BQD).abs().amax(dim=2)
    assert bool((difference > 1e-3).all())


@pytest.mark.parametrize("aware", [True, False])
def test_which_modules_exist(aware: bool) -> None:
    qformer = seeded(instruction_aware=aware)
    assert [layer.text_ffn is not None for layer in qformer.layers] == [aware, aware, aware]
    assert [layer.cross_attention is not None for layer in qformer.layers] == [True, False, True]
    assert hasattr(qformer, "word_embeddings") is aware
    assert qformer.lm_head is None
    assert qformer.output_norm is qformer.layers[-1].query_ffn.norm
    assert (qformer.width, qformer(images()).query_BQD.shape) == (32, (2, 4, 32))


def test_every_parameter_gets_a_gradient_but_the_text_branch_of_the_last_layer() -> None:
    qformer = seeded()
    queries(qformer).square().sum().backward()
    # A trainable parameter without gradient would stop distributed training; this branch can influence nothing.
    without = {name for name, parameter in qformer.named_parameters() if parameter.grad is None}
    last = qformer.layers[-1].text_ffn
    assert without == {f"layers.2.text_ffn.{name}" for name, _ in last.named_parameters()}
    assert without == {name for name, parameter in qformer.named_parameters() if not parameter.requires_grad}


@torch.no_grad()
def test_the_text_branch_of_the_last_layer_is_not_computed_and_moves_no_random_stream() -> None:
    qformer = seeded()
    expected = queries(qformer)
    for parameter in qformer.layers[-1].text_ffn.parameters():
        parameter.fill_(torch.nan)
    assert torch.equal(queries(qformer), expected)
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
    first, second = (queries(qformer) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, queries(seeded(dropout=0.0)))
    qformer.train()
    torch.manual_seed(0)
    first, second = (queries(qformer) for _ in range(2))
    assert not torch.allclose(first, second, atol=1e-2)
    torch.manual_seed(0)
    assert torch.equal(first, queries(qformer))


PASSES = {
    "queries alone": {"image": True, "text": False},
    "text alone": {"image": False, "text": True},
    "both": {"image": True, "text": True},
    "caption": {"image": True, "text": True, "mask": "unilm"},
    "causal text": {"image": False, "text": True, "mask": "unilm"},
}
TEXT_PASSES = [name for name, options in PASSES.items() if options["text"]]


def stage1(**options: object) -> QFormer:
    return seeded(text_outputs=True, language_model_head=True, **options)


def run(qformer: QFormer, name: str, image: Tensor, text: Tensor, mask: Tensor) -> QFormerOutput:
    """One of `PASSES` with everything returned that it can return."""
    chosen = PASSES[name]
    return qformer(
        image if chosen["image"] else None,
        text if chosen["text"] else None,
        mask if chosen["text"] else None,
        mask=chosen.get("mask", "bidirectional"),
        text_states=chosen["text"],
    )


def samples(batch: int = 8, length: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts of different lengths, and their masks."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(5, 30, (batch, length), generator=generator)
    mask = (torch.arange(length) < torch.arange(2, batch + 2).clamp_max(length)[:, None]).long()
    return images(batch), text * mask, mask


@torch.no_grad()
@pytest.mark.parametrize("name", PASSES)
def test_batch_and_padding_change_no_state(name: str) -> None:
    qformer, (image, text, mask) = stage1(), samples()
    together = run(qformer, name, image, text, mask)
    for row in range(len(text)):
        length = int(mask[row].sum())
        one = slice(row, row + 1)
        alone = run(qformer, name, image[one], text[one, :length], mask[one, :length])
        torch.testing.assert_close(together.query_BQD[one], alone.query_BQD, atol=1e-5, rtol=0)
        torch.testing.assert_close(together.text_BTD[one, :length], alone.text_BTD, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", TEXT_PASSES)
def test_which_states_a_token_changes(name: str) -> None:
    """A token changes every state with a bidirectional mask; with a UniLM mask its own and later ones only."""
    qformer, (image, text, _) = stage1(), samples()
    mask, place = torch.ones_like(text), 4
    other = text.clone()
    other[:, place] += 1
    first, second = (run(qformer, name, image, tokens, mask) for tokens in (text, other))
    changed_T = (first.text_BTD - second.text_BTD).abs().amax(dim=(0, 2)) > 1e-4
    bidirectional = name in ("text alone", "both")
    assert changed_T.tolist() == [bidirectional or position >= place for position in range(text.shape[1])]
    if PASSES[name]["image"]:
        changed_Q = (first.query_BQD - second.query_BQD).abs().amax(dim=(0, 2)) > 1e-4
        assert changed_Q.tolist() == [bidirectional] * 4
        assert bidirectional or torch.equal(first.query_BQD, second.query_BQD)


@torch.no_grad()
def test_which_states_an_image_changes() -> None:
    """With a UniLM mask the image reaches the text through the queries; text alone never sees one."""
    qformer, (image, text, mask) = stage1(), samples()
    for name in TEXT_PASSES:
        first, second = (run(qformer, name, pixels, text, mask).text_BTD for pixels in (image, image + 1))
        changed_B = (first - second).abs().amax(dim=(1, 2)) > 1e-4
        assert changed_B.tolist() == [PASSES[name]["image"]] * len(text)


@torch.no_grad()
def test_the_caption_pass_leaves_the_queries_as_they_are_alone() -> None:
    qformer, batch = stage1(), samples()
    alone, with_text = (run(qformer, name, *batch).query_BQD for name in ("queries alone", "caption"))
    torch.testing.assert_close(alone, with_text, atol=5e-6, rtol=0)  # rounding, which is the processor's


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[9], [1] * 9, [3, 4, 2]])
def test_text_in_pieces_after_the_cached_queries_equals_one_pass(pieces: list[int]) -> None:
    qformer, (image, text, mask) = stage1(), samples()
    expected = run(qformer, "caption", image, text, mask)
    cache = KeyValueCache()
    query_BQD = qformer(image, cache=cache).query_BQD
    torch.testing.assert_close(query_BQD, expected.query_BQD, atol=5e-6, rtol=0)  # rounding, which is the processor's
    states = [
        qformer(None, tokens, visible, mask="unilm", text_states=True, cache=cache).text_BTD
        for tokens, visible in zip(text.split(pieces, dim=1), mask.split(pieces, dim=1), strict=True)
    ]
    real = mask.bool()
    torch.testing.assert_close(torch.cat(states, dim=1)[real], expected.text_BTD[real], atol=1e-5, rtol=0)
    assert (cache.text, len(cache.layers), cache.layers[0].keys_BHKE.shape) == (9, 3, (8, 4, 4 + 9, 8))


@torch.no_grad()
def test_rows_of_a_cache_go_on_as_those_samples() -> None:
    """Beams repeat and reorder rows."""
    qformer, (image, text, mask) = stage1(), samples()
    cache, rows = KeyValueCache(), torch.tensor([5, 5, 0, 2])
    qformer(image, cache=cache)
    chosen = cache.select(rows)
    states = qformer(None, text[rows], mask[rows], mask="unilm", text_states=True, cache=chosen).text_BTD
    expected = run(qformer, "caption", image, text, mask).text_BTD[rows]
    torch.testing.assert_close(states[mask[rows].bool()], expected[mask[rows].bool()], atol=1e-5, rtol=0)
    assert (cache.text, chosen.text) == (0, 9)


@pytest.mark.parametrize("cached", [False, True])
def test_recomputed_layers_give_the_same_gradients(cached: bool) -> None:
    """Activation checkpointing and the kept keys and values do not disturb each other."""
    gradients = []
    for recompute in (False, True):
        qformer, (image, text, mask) = stage1(), samples()
        if recompute:
            for layer in qformer.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        cache = KeyValueCache() if cached else None
        if cached:
            qformer(image, cache=cache)
        output = qformer(None if cached else image, text, mask, mask="unilm", text_states=True, cache=cache)
        qformer.logits(output.text_BTD).logsumexp(dim=-1).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in qformer.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradient is None) is (gradients[1][name] is None)
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_with_text_outputs_every_parameter_trains() -> None:
    qformer, batch = stage1(), samples()
    names = {name for name, _ in qformer.named_parameters()}
    assert all(parameter.requires_grad for parameter in qformer.parameters())
    reached: dict[str, set[str]] = {}
    for name in PASSES:
        qformer.zero_grad()
        output = run(qformer, name, *batch)
        # The caption pass is trained by its text alone.
        loss = output.text_BTD.square().sum() + (0 if name == "caption" else output.query_BQD.square().sum())
        if name == "caption":
            loss = loss + qformer.logits(output.text_BTD).logsumexp(dim=-1).sum()
        loss.backward()
        reached[name] = {
            name
            for name, parameter in qformer.named_parameters()
            if parameter.grad is not None and parameter.grad.any()
        }
    text_side = {name for name in names if ".text_ffn." in name or "embeddings" in name}
    image_side = {
        name for name in names if ".query_ffn." in name or "cross_attention" in name or name == "query_tokens"
    }
    head = {name for name in names if name.startswith("lm_head.")}
    assert reached["queries alone"] == names - text_side - head
    assert reached["text alone"] == reached["causal text"] == names - image_side - head
    assert reached["both"] == names - head
    # What the last layer makes of the queries reaches no text.
    last = {name for name in image_side if name.startswith("layers.2.")}
    assert reached["caption"] == names - last


def test_text_outputs_and_head_add_nothing_but_the_head() -> None:
    plain, whole = seeded(), stage1()
    added = whole.state_dict().keys() - plain.state_dict().keys()
    assert added == {
        "lm_head.bias",
        *(f"lm_head.{part}.{kind}" for part in ("dense", "norm") for kind in ("weight", "bias")),
    }
    assert plain.state_dict().keys() < whole.state_dict().keys()
    frozen = {name for name, parameter in plain.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in plain.state_dict() if name.startswith("layers.2.text_ffn.")}


def test_arguments_that_do_not_go_together() -> None:
    qformer, plain, blind = stage1(), seeded(), seeded(instruction_aware=False)
    long = torch.ones(2, 65, dtype=torch.long)
    filled = KeyValueCache()
    with torch.no_grad():
        qformer(images(), cache=filled)
        qformer(None, long[:, :60], long[:, :60], text_states=True, cache=filled)
    cases: list[tuple[str, Callable[[], object]]] = [
        ("needs an image, a text, or both", lambda: qformer()),
        ("token ids and their mask come together", lambda: qformer(images(), TEXT)),
        ("this Q-Former has no text branch", lambda: blind(images(), TEXT, MASK)),
        ("a Q-Former with text_outputs", lambda: plain(images(), TEXT, MASK, text_states=True)),
        ("text states need a text", lambda: qformer(images(), text_states=True)),
        ("nothing to return but text states", lambda: qformer(None, TEXT, MASK)),
        ("the text changes no query", lambda: qformer(images(), TEXT, MASK, mask="unilm")),
        ("queries come first", lambda: qformer(images(), cache=filled)),
        ("text of 65 tokens, the limit is 64", lambda: plain(images(), long, long)),
        ("text of 65 tokens, the limit is 64", lambda: qformer(None, TEXT, MASK, text_states=True, cache=filled)),
        ("no language-model head", lambda: plain.logits(torch.ones(1, 32))),
        ("needs the text branch", lambda: tiny_qformer(vision_width=8, instruction_aware=False, text_outputs=True)),
        ("needs text_outputs", lambda: tiny_qformer(vision_width=8, language_model_head=True)),
        (
            "width 30 is not a multiple of its 4 heads",
            lambda: QFormer(vocab_size=8, width=30, layers=1, heads=4, hidden_width=8, vision_width=8),
        ),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
