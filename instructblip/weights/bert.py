"""BERT weights as the start of a Q-Former (BLIP-2, section 3.1), or of BLIP's text model (BLIP, section 3.2)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from instructblip.errors import UserError
from instructblip.models.med import TextModel
from instructblip.models.qformer import QFormer

_ATTENTION = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "norm": "attention.output.LayerNorm",
}
_STD = 0.02  # deviation of BERT's weights before pre-training
_HEAD = {"dense": "dense", "norm": "LayerNorm"}
_FEED_FORWARD = {"up": "intermediate.dense", "down": "output.dense", "norm": "output.LayerNorm"}
_COPIES = {  # parts of a layer, as far as it has them
    "self_attention": _ATTENTION,
    "decoder_attention": _ATTENTION,
    "query_ffn": _FEED_FORWARD,
    "text_ffn": _FEED_FORWARD,
    "ffn": _FEED_FORWARD,
}


def qformer_state_from_bert(bert: Mapping[str, Tensor], qformer: QFormer) -> dict[str, Tensor]:
    """Name BERT's tensors as the Q-Former does; both feed-forwards of a layer start from BERT's one.

    A Q-Former has no token types, while BERT adds the embedding of type 0 to every token: it is folded into the positions,
    so the text branch starts as BERT itself. Tokens that the Q-Former has beyond BERT's get the mean of BERT's embeddings,
    and no bias in the language-model head.

    Raises:
        UserError: a tensor is missing.
    """
    rows = qformer.word_embeddings.num_embeddings if qformer.instruction_aware else None
    return _taken(bert, _names(qformer)) | _tables(bert, rows, head=qformer.lm_head is not None)


def text_model_state_from_bert(bert: Mapping[str, Tensor], model: TextModel) -> dict[str, Tensor]:
    """Name BERT's tensors as BLIP's text model does; a decoder's own self-attention starts from BERT's, too.

    Token types and added tokens are as in `qformer_state_from_bert`. Cross-attention is not in it.

    Raises:
        UserError: a tensor is missing.
    """
    rows = model.word_embeddings.num_embeddings
    return _taken(bert, _names(model)) | _tables(bert, rows, head=model.lm_head is not None)


def _names(model: QFormer | TextModel) -> dict[str, str]:
    """Its layers' names -> BERT's."""
    names = {"norm": "embeddings.LayerNorm"}
    for index, layer in enumerate(model.layers):
        for part, of_part in _COPIES.items():
            if getattr(layer, part, None) is not None:
                names |= {f"layers.{index}.{part}.{own}": f"encoder.layer.{index}.{it}" for own, it in of_part.items()}
    return names


def _taken(bert: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Weight and bias of layers: this code's names -> BERT's."""
    return {
        f"{own}.{part}": _find(bert, f"{theirs}.{part}") for own, theirs in names.items() for part in ("weight", "bias")
    }


def _tables(bert: Mapping[str, Tensor], rows: int | None, *, head: bool) -> dict[str, Tensor]:
    """Embeddings of `rows` tokens (None: there are none) and of positions; the language-model head where BERT has it."""
    state: dict[str, Tensor] = {}
    if rows is not None:
        types = _find(bert, "embeddings.token_type_embeddings.weight")
        words = _find(bert, "embeddings.word_embeddings.weight")
        added = max(rows - len(words), 0)
        state["word_embeddings.weight"] = torch.cat([words, words.mean(dim=0, keepdim=True).expand(added, -1)])
        state["position_embeddings.weight"] = _find(bert, "embeddings.position_embeddings.weight") + types[0]
        if head and has_language_model_head(bert):
            state |= _taken(
                bert, {f"lm_head.{own}": f"cls.predictions.transform.{name}" for own, name in _HEAD.items()}
            )
            bias = _find(bert, "cls.predictions.bias")
            state["lm_head.bias"] = torch.cat([bias, bias.new_zeros(added)])
    return state


def has_language_model_head(bert: Mapping[str, Tensor]) -> bool:
    """Whether a file has BERT's language-model head; models that were made for embeddings have lost it."""
    return any("cls.predictions." in name for name in bert)


def names_unknown_to_bert(bert: Mapping[str, Tensor], model: QFormer | TextModel) -> list[str]:
    """A model's tensors that BERT has none for, and which start at random: query tokens and cross-attention.

    The language-model head too, where the file has none.
    """
    heads = () if has_language_model_head(bert) else ("lm_head.",)
    return [
        name
        for name in model.state_dict()
        if name == "query_tokens" or ".cross_attention." in name or name.startswith(heads)
    ]


@torch.no_grad()
def draw_query_tokens_near(qformer: QFormer, bert: Mapping[str, Tensor], *, token: int) -> None:
    """Start the query tokens as one of BERT's own tokens at the first positions, each a little different.

    Tokens drawn at random look like nothing that the pre-trained attention ever saw; near [CLS] they gather what a text
    says from the first step on.
    """
    words, positions = (_find(bert, f"embeddings.{kind}_embeddings.weight") for kind in ("word", "position"))
    types = _find(bert, "embeddings.token_type_embeddings.weight")
    noise = torch.randn_like(qformer.query_tokens) * words.std() / 2
    queries = qformer.query_tokens.shape[1]
    qformer.query_tokens.copy_(words[token] + positions[:queries] + types[0] + noise)


@torch.no_grad()
def initialize_like_bert(module: nn.Module) -> None:
    """Draw every layer's weights as BERT's are before pre-training: deviation 0.02, biases 0, norms that change nothing."""
    if isinstance(module, QFormer):
        module.query_tokens.normal_(std=_STD)
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            layer.weight.normal_(std=_STD)
        if isinstance(layer, nn.Linear):
            layer.bias.zero_()
        if isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()


def _find(bert: Mapping[str, Tensor], name: str) -> Tensor:
    # Files converted from the first release, bert-base-uncased among them, call a norm's tensors gamma and beta.
    old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    for candidate in (name, f"bert.{name}", old, f"bert.{old}"):
        if candidate in bert:
            return bert[candidate]
    raise UserError(f"the BERT weights lack {name}; point qformer.sources at a BERT model")
