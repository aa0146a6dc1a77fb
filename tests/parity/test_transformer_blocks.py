"""The blocks equal transformers': stacked as BLIP-2's Q-Former and as BLIP's text model."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerConfig
from transformers.models.blip.configuration_blip import BlipTextConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings

import instructblip  # noqa: F401  (transformers' BLIP imports only behind it where torchvision is broken)
from instructblip.models.qformer import QFormer, QFormerOutput
from instructblip.models.transformer import (
    Attention,
    FeedForward,
    KeysValues,
    LanguageModelHead,
    causal_mask,
    padding_mask,
)
from instructblip.weights.names import foreign_names

VISION_WIDTH, WIDTH, VOCABULARY = 24, 32, 50
CLOSE = {"atol": 1e-5, "rtol": 0}


def redraw(module: nn.Module) -> None:
    """Weights that all matter: none is left at zero or one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def inputs(batch: int = 3, length: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Image tokens, token ids and their mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (batch, length), generator=generator)
    mask = (torch.arange(length) < torch.tensor([length, 3, 5])[:, None]).long()
    return torch.randn(batch, 6, VISION_WIDTH, generator=generator), ids * mask, mask


def blip2() -> tuple[QFormer, Blip2QFormerModel, Blip2TextEmbeddings]:
    """Our Q-Former, transformers' one and its text embeddings, of the same weights."""
    ours = QFormer(
        vocab_size=VOCABULARY,
        width=WIDTH,
        layers=3,
        heads=4,
        hidden_width=64,
        vision_width=VISION_WIDTH,
        queries=5,
        max_text_tokens=20,
        text_outputs=True,
    ).eval()
    redraw(ours)
    config = Blip2QFormerConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        encoder_hidden_size=VISION_WIDTH,
        max_position_embeddings=20,
        use_qformer_text_input=True,
    )
    theirs, embeddings = Blip2QFormerModel(config).eval(), Blip2TextEmbeddings(config).eval()
    names = foreign_names((f"qformer.{name}" for name in ours.state_dict()), "huggingface")
    state = {names[f"qformer.{name}"]: tensor for name, tensor in ours.state_dict().items()}
    del state["query_tokens"]
    words = {name: state.pop(f"qformer.embeddings.{name}") for name in embeddings.state_dict()}
    embeddings.load_state_dict(words)
    # BLIP-2's classes keep the first norm apart from the embeddings.
    flat = {
        name.replace("qformer.embeddings.layernorm", "layernorm").removeprefix("qformer."): tensor
        for name, tensor in state.items()
    }
    theirs.load_state_dict(flat)
    return ours, theirs, embeddings


@torch.no_grad()
def test_queries_alone_equal_blip2() -> None:
    ours, theirs, _ = blip2()
    image, _, _ = inputs()
    expected = theirs(query_embeds=ours.query_tokens.expand(3, -1, -1), encoder_hidden_states=image).last_hidden_state
    torch.testing.assert_close(ours(image).query_BQD, expected, **CLOSE)


@torch.no_grad()
def test_text_alone_equals_blip2() -> None:
    ours, theirs, embeddings = blip2()
    _, ids, mask = inputs()
    expected = theirs(query_embeds=embeddings(ids), query_length=0, attention_mask=mask).last_hidden_state
    found = ours(None, ids, mask, text_states=True).text_BTD
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("text_states", [False, True])
def test_queries_and_text_equal_blip2(text_states: bool) -> None:
    ours, theirs, embeddings = blip2()
    image, ids, mask = inputs()
    expected = theirs(
        query_embeds=embeddings(ids, query_embeds=ours.query_tokens.expand(3, -1, -1)),
        query_length=5,
        attention_mask=torch.cat([mask.new_ones(3, 5), mask], dim=1),
        encoder_hidden_states=image,
    ).last_hidden_state
    found = ours(image, ids, mask, text_states=text_states)
    assert isinstance(found, QFormerOutput)
    torch.testing.assert_close(found.query_BQD, expected[:, :5], **CLOSE)
    if text_states:
        real = mask.bool()
        torch.testing.assert_close(found.text_BTD[real], expected[:, 5:][real], **CLOSE)


class TextModel(nn.Module):
    """BLIP's text model of our blocks."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.position_embeddings = nn.Embedding(20, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.own = nn.ModuleList(Attention(WIDTH, 4, WIDTH, 0.0, 1e-12) for _ in range(layers))
        self.cross = nn.ModuleList(Attention(WIDTH, 4, VISION_WIDTH, 0.0, 1e-12) for _ in range(layers))
        self.ffn = nn.ModuleList(FeedForward(WIDTH, 64, 0.0, 1e-12) for _ in range(layers))
        self.head = LanguageModelHead(WIDTH, VOCABULARY, 1e-12)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        source: Tensor | list[KeysValues] | None,
        source_mask: Tensor | None = None,
        past: list[KeysValues] | None = None,
        first: int = 0,
    ) -> tuple[Tensor, list[KeysValues], list[KeysValues]]:
        positions = torch.arange(first, first + ids.shape[1])
        hidden = self.norm(self.word_embeddings(ids) + self.position_embeddings(positions))
        kept, seen = [], []
        for index, (own, cross, ffn) in enumerate(zip(self.own, self.cross, self.ffn, strict=True)):
            hidden, keys_values = own(hidden, hidden, mask, None if past is None else past[index])
            kept.append(keys_values)
            if source is not None:
                hidden, keys_values = cross(
                    hidden, source if isinstance(source, Tensor) else source[index], source_mask
                )
                seen.append(keys_values)
            hidden = ffn(hidden)
        return hidden, kept, seen

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden, self.word_embeddings.weight)


def blip() -> tuple[TextModel, nn.Module]:
    """Our blocks, and transformers' text model with language-model head, of the same weights."""
    from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

    ours = TextModel().eval()
    redraw(ours)
    config = BlipTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        encoder_hidden_size=VISION_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=20,
        is_decoder=True,
        bos_token_id=1,
        sep_token_id=2,
        pad_token_id=0,
    )
    theirs = BlipTextLMHeadModel(config).eval()
    parts = {"query": "self.query", "key": "self.key", "value": "self.value"}
    parts |= {"output": "output.dense", "norm": "output.LayerNorm"}
    names = {
        "word_embeddings": "bert.embeddings.word_embeddings",
        "position_embeddings": "bert.embeddings.position_embeddings",
        "norm": "bert.embeddings.LayerNorm",
        "head.dense": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
        "head": "cls.predictions",
    }
    for index in range(2):
        layer = f"bert.encoder.layer.{index}"
        for kind, theirs_kind in (("own", "attention"), ("cross", "crossattention")):
            names |= {f"{kind}.{index}.{part}": f"{layer}.{theirs_kind}.{name}" for part, name in parts.items()}
        names |= {
            f"ffn.{index}.up": f"{layer}.intermediate.dense",
            f"ffn.{index}.down": f"{layer}.output.dense",
            f"ffn.{index}.norm": f"{layer}.output.LayerNorm",
        }
    state = {}
    for name, tensor in ours.state_dict().items():
        module, _, kind = name.rpartition(".")
        state[f"{names[module]}.{kind}"] = tensor
    result = theirs.load_state_dict(state, strict=False)
    assert result.unexpected_keys == []
    assert {name for name in result.missing_keys if "pooler" not in name} == {
        "cls.predictions.decoder.weight",  # tied
        "cls.predictions.decoder.bias",
    }
    return ours, theirs


@torch.no_grad()
@pytest.mark.parametrize("sees_image", [False, True])
def test_text_encoder_and_grounded_encoder_equal_blip(sees_image: bool) -> None:
    ours, theirs = blip()
    image, ids, mask = inputs()
    expected = theirs.bert(
        ids, attention_mask=mask, encoder_hidden_states=image if sees_image else None, is_decoder=False
    ).last_hidden_state
    found, _, _ = ours(ids, padding_mask(mask.bool()), image if sees_image else None)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)


@torch.no_grad()
def test_decoder_equals_blip() -> None:
    """The answer decoder attends to padded questions, the captioner to whole images.

    transformers 5.23 loses the mask of what is cross-attended, so it gets each source without its padding.
    """
    ours, theirs = blip()
    source, ids, mask = inputs()
    lengths = [6, 2, 4]
    visible = torch.arange(6) < torch.tensor(lengths)[:, None]
    causal = causal_mask(mask.bool(), positions=ids.shape[1])
    logits = ours.logits(ours(ids, causal, source, padding_mask(visible))[0])
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        expected = theirs(
            ids[one], attention_mask=mask[one], encoder_hidden_states=source[one, :length], is_decoder=True
        ).logits
        real = mask[one].bool()
        torch.testing.assert_close(logits[one][real], expected[real], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[0, 1, 2, 3, 4, 5, 6, 7], [0, 4, 7]])
def test_decoding_in_steps_equals_one_pass(cuts: list[int]) -> None:
    """Own keys and values grow; those of the image are computed once."""
    ours, _ = blip()
    image, ids, mask = inputs()
    whole, _, _ = ours(ids, causal_mask(mask.bool(), positions=7), image)
    past, source, states = None, image, []
    for start, end in pairwise(cuts):
        step = causal_mask(mask[:, :end].bool(), positions=end - start)
        hidden, past, source = ours(ids[:, start:end], step, source, past=past, first=start)
        states.append(hidden)
    torch.testing.assert_close(torch.cat(states, dim=1)[mask.bool()], whole[mask.bool()], **CLOSE)
    assert past[0].keys_BHKE.shape == (3, 4, 7, 8)
    assert source[0].keys_BHKE.shape == (3, 4, 6, 8)


@torch.no_grad()
def test_head_equals_bert() -> None:
    ours, theirs = blip()
    hidden = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours.logits(hidden), theirs.cls(hidden), atol=1e-4, rtol=0)
    assert not torch.allclose(ours.logits(hidden), F.linear(hidden, ours.word_embeddings.weight), atol=1.0)
