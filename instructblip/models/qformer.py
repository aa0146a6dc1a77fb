"""The Q-Former (BLIP-2, section 3.1; InstructBLIP, section 2.3): BERT blocks in which learned queries read an image.

Queries and text share self-attention. Only the queries look at the image, by cross-attention. Each layer has two
feed-forwards, one for the queries and one for the text. InstructBLIP gives it the instruction and takes the queries'
outputs. BLIP-2's first stage runs it four ways: queries alone, text alone, both, and the text as a caption of the queries.

Shape legend: B batch, Q queries, T text tokens, S = Q + T (either may be 0), K positions attended to (S and those of earlier
passes), P image tokens, D Q-Former width, U vision width, N rows of any kind, W vocabulary.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instructblip.models.transformer import (
    Attention,
    FeedForward,
    KeysValues,
    KeyValueCache,
    LanguageModelHead,
    causal_mask,
    padding_mask,
)

# `bidirectional`: queries and text attend to each other. `unilm`: queries attend to queries only, text to all queries and to
# earlier text, so that the text can be generated.
SelfAttentionMask = Literal["bidirectional", "unilm"]


class QFormerOutput(NamedTuple):
    """Final hidden states.

    Attributes:
        query_BQD: of the queries; Q = 0 where no image was given.
        text_BTD: of the text; T = 0 where it was not asked for.
    """

    query_BQD: Tensor
    text_BTD: Tensor


class QFormerLayer(nn.Module):
    """One block: shared self-attention, cross-attention of the queries (in some layers), two feed-forwards.

    Args:
        width, heads, hidden_width, norm_eps: those of BERT.
        vision_width: U; None in a layer without cross-attention.
        has_text: whether there is a text branch.
        is_last: the last layer of its stack.
        text_outputs: whether the last layer's text states are ever asked for.
        dropout: on attention weights and on every residual branch, in training only.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        hidden_width: int,
        vision_width: int | None,
        has_text: bool,
        is_last: bool,
        text_outputs: bool = False,
        dropout: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.is_last = is_last
        self.self_attention = Attention(width, heads, width, dropout, norm_eps)
        self.cross_attention = None
        if vision_width is not None:
            self.cross_attention = Attention(width, heads, vision_width, dropout, norm_eps)
        self.query_ffn = FeedForward(width, hidden_width, dropout, norm_eps)
        self.text_ffn = None
        if has_text and (text_outputs or not is_last):
            self.text_ffn = FeedForward(width, hidden_width, dropout, norm_eps)
        elif has_text:
            # Never computed, never trained: here so that released weights come in and go out whole. Drawn outside the
            # global random stream, which weights that influence nothing must not shift.
            with torch.random.fork_rng(devices=[]):
                self.text_ffn = FeedForward(width, hidden_width, dropout, norm_eps).requires_grad_(False)

    def forward(
        self,
        hidden_BSD: Tensor,
        image_BPU: Tensor | None,
        queries: int,
        mask_B1SK: Tensor | None = None,
        past: KeysValues | None = None,
        text_states: bool = True,
        image_rows_B: Tensor | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """Compute one layer.

        Args:
            hidden_BSD: `queries` rows of queries, then text; either may be missing.
            image_BPU: image tokens; needed with queries. With `image_rows_B` those of fewer images.
            queries: Q.
            mask_B1SK: where self-attention may look; None hides nothing.
            past: keys and values of earlier positions, in front of those of this pass.
            text_states: False returns the queries only, (B, Q, D): text is attended to and not computed.
            image_rows_B: the image that each row reads; None: its own.

        Returns:
            (B, S, D), and the keys and values of self-attention, those of `past` included.
        """
        wanted_BSD = hidden_BSD if text_states else hidden_BSD[:, :queries]
        hidden_BSD, kept = self.self_attention(wanted_BSD, hidden_BSD, mask_B1SK, past)
        outputs = []
        if queries:
            query_BQD = hidden_BSD[:, :queries]
            if self.cross_attention is not None:
                assert image_BPU is not None
                source: Tensor | KeysValues = image_BPU
                if image_rows_B is not None:
                    source = self.cross_attention.keys_values(image_BPU).select(image_rows_B)
                query_BQD, _ = self.cross_attention(query_BQD, source)
            outputs.append(self.query_ffn(query_BQD))
        if hidden_BSD.shape[1] > queries:
            assert self.text_ffn is not None
            outputs.append(self.text_ffn(hidden_BSD[:, queries:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), kept


class QFormer(nn.Module):
    """Queries that read an image, text, or an image in the light of a text.

    Args:
        vocab_size, max_text_tokens: size of the text embedding tables (BERT's vocabulary plus `[DEC]`, 512 positions).
        width, layers, heads, hidden_width, norm_eps: those of the BERT model it starts from.
        queries: number of learned query tokens (32 in the papers).
        vision_width: width U of the image tokens.
        cross_attention_every: cross-attention stands in layers 0, n, 2n, ... (2 in the papers).
        instruction_aware: whether there is a text branch. `False` is the Q-Former of BLIP-2's second stage, and
            InstructBLIP's ablation.
        text_outputs: whether text states can be asked for. InstructBLIP never does: the text branch of its last layer is
            not computed and not trained.
        language_model_head: whether text states can become logits; needs `text_outputs`.
        dropout: on attention weights and on every residual branch, in training only.

    Raises:
        ValueError: sizes or options that do not go together.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        layers: int,
        heads: int,
        hidden_width: int,
        vision_width: int,
        queries: int = 32,
        cross_attention_every: int = 2,
        max_text_tokens: int = 512,
        dropout: float = 0.1,
        norm_eps: float = 1e-12,
        instruction_aware: bool = True,
        text_outputs: bool = False,
        language_model_head: bool = False,
    ) -> None:
        super().__init__()
        if text_outputs and not instruction_aware:
            raise ValueError("text_outputs needs the text branch: instruction_aware")
        if language_model_head and not text_outputs:
            raise ValueError("language_model_head needs text_outputs")
        self.instruction_aware = instruction_aware
        self.text_outputs = text_outputs
        self.max_text_tokens = max_text_tokens
        self.dropout = dropout
        # A zero start would make all queries equal for ever: BLIP-2 draws them with BERT's initial deviation.
        self.query_tokens = nn.Parameter(torch.randn(1, queries, width).mul_(0.02))
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        if instruction_aware:
            self.word_embeddings = nn.Embedding(vocab_size, width)
            self.position_embeddings = nn.Embedding(max_text_tokens, width)
        self.layers = nn.ModuleList(
            QFormerLayer(
                width=width,
                heads=heads,
                hidden_width=hidden_width,
                vision_width=vision_width if index % cross_attention_every == 0 else None,
                has_text=instruction_aware,
                is_last=index == layers - 1,
                text_outputs=text_outputs,
                dropout=dropout,
                norm_eps=norm_eps,
            )
            for index in range(layers)
        )
        self.lm_head = LanguageModelHead(width, vocab_size, norm_eps) if language_model_head else None

    @property
    def width(self) -> int:
        """Width D of the outputs."""
        return self.query_tokens.shape[-1]

    @property
    def output_norm(self) -> nn.LayerNorm:
        """The last norm before the query outputs leave."""
        last = self.layers[-1]
        assert isinstance(last, QFormerLayer)
        return last.query_ffn.norm

    def forward(
        self,
        image_BPU: Tensor | None = None,
        text_BT: Tensor | None = None,
        text_mask_BT: Tensor | None = None,
        *,
        image_rows_B: Tensor | None = None,
        mask: SelfAttentionMask = "bidirectional",
        text_states: bool = False,
        cache: KeyValueCache | None = None,
    ) -> QFormerOutput:
        """Run the queries (where an image is given), the text (where one is given), or both.

        Args:
            image_BPU: image tokens, which the queries read.
            text_BT: token ids, padded on the right.
            text_mask_BT: 1 at real tokens, 0 at padding; comes with `text_BT`.
            image_rows_B: which of the images each text comes with, so that its keys and values are computed once for all
                of them; None: as many images as texts, in the same order.
            mask: who attends to whom. With text alone, `unilm` is a causal mask.
            text_states: also return the text's states; otherwise the last layer computes the queries only.
            cache: keys and values of earlier passes over the same samples, whose positions stand in front of this pass's;
                read, and extended in place. Queries come first: once it holds anything, a pass takes text only. The text
                after cached queries is the same as both in one pass with `mask="unilm"`, without a second look at the image.

        Raises:
            ValueError: arguments that do not go together, no text branch, or more text than `max_text_tokens`.
        """
        self._check_arguments(image_BPU, text_BT, text_mask_BT, mask, text_states, cache, image_rows_B)
        read = image_BPU if image_rows_B is None else image_rows_B
        first = 0 if cache is None else cache.text
        hidden_BSD, visible_BS = self._embed(0 if read is None else len(read), text_BT, text_mask_BT, first=first)
        hidden_BSD = F.dropout(self.norm(hidden_BSD), self.dropout, self.training)
        queries = 0 if image_BPU is None else self.query_tokens.shape[1]
        visible_BK, mask_B1SK = visible_BS, None
        if cache is not None and cache.visible_BK is not None:
            visible_BK = torch.cat([cache.visible_BK, visible_BS], dim=1)
        if text_BT is not None and mask == "unilm":
            mask_B1SK = causal_mask(visible_BK, positions=hidden_BSD.shape[1], prefix=queries)
        elif text_BT is not None:
            mask_B1SK = padding_mask(visible_BK)
        hidden_BSD = self._run_layers(hidden_BSD, image_BPU, queries, mask_B1SK, cache, text_states, image_rows_B)
        if cache is not None:
            cache.visible_BK = visible_BK
            cache.text += 0 if text_BT is None else text_BT.shape[1]
        return QFormerOutput(hidden_BSD[:, :queries], hidden_BSD[:, queries:])

    def logits(self, text_ND: Tensor) -> Tensor:
        """Vocabulary logits (N, W) of text states: state t predicts token t + 1.

        Raises:
            ValueError: there is no language-model head.
        """
        if self.lm_head is None:
            raise ValueError("this Q-Former has no language-model head")
        return self.lm_head(text_ND, self.word_embeddings.weight)

    def _check_arguments(
        self,
        image_BPU: Tensor | None,
        text_BT: Tensor | None,
        text_mask_BT: Tensor | None,
        mask: SelfAttentionMask,
        text_states: bool,
        cache: KeyValueCache | None,
        image_rows_B: Tensor | None,
    ) -> None:
        if image_BPU is None and text_BT is None:
            raise ValueError("a Q-Former needs an image, a text, or both")
        if (text_BT is None) != (text_mask_BT is None):
            raise ValueError("token ids and their mask come together")
        if text_BT is not None and not self.instruction_aware:
            raise ValueError("this Q-Former has no text branch")
        if text_states and (text_BT is None or not self.text_outputs):
            raise ValueError("text states need a text, and a Q-Former with text_outputs")
        if not text_states and image_BPU is None:
            raise ValueError("without an image there is nothing to return but text states: ask for them")
        if mask == "unilm" and text_BT is not None and not text_states:
            raise ValueError("with a UniLM mask the text changes no query: ask for text states, or leave the text out")
        if image_rows_B is not None and (
            image_BPU is None or (text_BT is not None and len(text_BT) != len(image_rows_B))
        ):
            raise ValueError("image rows need images, and are as many as the texts")
        if cache is not None and cache.layers and image_BPU is not None:
            raise ValueError("queries come first: this cache holds positions already")
        first = 0 if cache is None else cache.text
        if text_BT is not None and first + text_BT.shape[1] > self.max_text_tokens:
            raise ValueError(f"text of {first + text_BT.shape[1]} tokens, the limit is {self.max_text_tokens}")

    def _embed(
        self, queried: int, text_BT: Tensor | None, text_mask_BT: Tensor | None, *, first: int
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B, S, D) before the norm, queries of so many rows in front, and where there is no padding (B, S)."""
        parts, visible = [], []
        if queried:
            query_BQD = self.query_tokens.expand(queried, -1, -1)
            parts.append(query_BQD)
            visible.append(torch.ones(query_BQD.shape[:2], dtype=torch.bool, device=query_BQD.device))
        if text_BT is not None and text_mask_BT is not None:
            # Text positions start at 0: the queries in front have none.
            positions_T = torch.arange(first, first + text_BT.shape[1], device=text_BT.device)
            parts.append(self.word_embeddings(text_BT) + self.position_embeddings(positions_T))
            visible.append(text_mask_BT.bool())
        return torch.cat(parts, dim=1), torch.cat(visible, dim=1)

    def _run_layers(
        self,
        hidden_BSD: Tensor,
        image_BPU: Tensor | None,
        queries: int,
        mask_B1SK: Tensor | None,
        cache: KeyValueCache | None,
        text_states: bool,
        image_rows_B: Tensor | None,
    ) -> Tensor:
        past = [None] * len(self.layers) if cache is None or not cache.layers else cache.layers
        last, kept = len(self.layers) - 1, []
        for index, layer in enumerate(self.layers):
            wants_text = text_states or index < last
            hidden_BSD, keys_values = layer(
                hidden_BSD, image_BPU, queries, mask_B1SK, past[index], wants_text, image_rows_B
            )
            if cache is not None:  # without one, each layer's are freed at once
                kept.append(keys_values)
        if cache is not None:
            cache.layers = kept
        return hidden_BSD
