"""BERT weights as the start of a Q-Former (BLIP-2, section 3.1)."""

from collections.abc import Mapping

from torch import Tensor

from instructblip.errors import UserError
from instructblip.model.qformer import QFormer, QFormerLayer

_ATTENTION = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "norm": "attention.output.LayerNorm",
}
_FEED_FORWARD = {"up": "intermediate.dense", "down": "output.dense", "norm": "output.LayerNorm"}


def qformer_state_from_bert(bert: Mapping[str, Tensor], qformer: QFormer) -> dict[str, Tensor]:
    """Name BERT's tensors as the Q-Former does; both feed-forwards of a layer start from BERT's one.

    A Q-Former has no token types, while BERT adds the embedding of type 0 to every token: it is folded into the positions,
    so the text branch starts as BERT itself.

    Raises:
        UserError: a tensor is missing.
    """
    names = {"norm": "embeddings.LayerNorm"}
    for index, layer in enumerate(qformer.layers):
        assert isinstance(layer, QFormerLayer)
        source = f"encoder.layer.{index}"
        names |= {f"layers.{index}.self_attention.{own}": f"{source}.{theirs}" for own, theirs in _ATTENTION.items()}
        branches = ["query_ffn"] if layer.text_ffn is None else ["query_ffn", "text_ffn"]
        for branch in branches:
            names |= {f"layers.{index}.{branch}.{own}": f"{source}.{theirs}" for own, theirs in _FEED_FORWARD.items()}
    state = {
        f"{own}.{part}": _find(bert, f"{theirs}.{part}") for own, theirs in names.items() for part in ("weight", "bias")
    }
    if qformer.instruction_aware:
        types = _find(bert, "embeddings.token_type_embeddings.weight")
        state["word_embeddings.weight"] = _find(bert, "embeddings.word_embeddings.weight")
        state["position_embeddings.weight"] = _find(bert, "embeddings.position_embeddings.weight") + types[0]
    return state


def _find(bert: Mapping[str, Tensor], name: str) -> Tensor:
    # Files converted from the first release, bert-base-uncased among them, call a norm's tensors gamma and beta.
    old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    for candidate in (name, f"bert.{name}", old, f"bert.{old}"):
        if candidate in bert:
            return bert[candidate]
    raise UserError(f"the BERT weights lack {name}; point qformer.sources at a BERT model")
