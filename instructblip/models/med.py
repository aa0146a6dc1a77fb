"""BLIP's text model, MED (BLIP, section 3.1): BERT whose layers can read an image, and can write.

The same blocks work in three modes. As a text encoder they do not look at an image. As an image-grounded encoder every
layer's text reads the image by cross-attention. As an image-grounded decoder it does the same behind a causal mask.

Shape legend: B batch, R text rows (B, or a multiple of it: those of a source stand one after the other), T text tokens,
K positions attended to (those of earlier passes in front), P positions of the source (image tokens, or a question's
states), U their width, D width of the text, N rows of any kind, V vocabulary.
"""

from collections.abc import Sequence

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

BLIP_TOKENS = ("[DEC]", "[ENC]")  # what a written text begins with, and what one that reads an image does
CAPTION_PROMPT = "a picture of "

# What the layers read: the source's states (B, P, U), or their keys and values in each layer, from `keys_values`.
Source = Tensor | Sequence[KeysValues]


class TextLayer(nn.Module):
    """One block: self-attention, cross-attention where there is a source, feed-forward.

    Args:
        width, heads, hidden_width, norm_eps: those of BERT.
        source_width: U.
        decoder_attention: whether the decoder has a self-attention of its own and shares the rest of the layer.
        dropout: on attention weights and on every residual branch, in training only.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        hidden_width: int,
        source_width: int,
        decoder_attention: bool,
        dropout: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.self_attention = Attention(width, heads, width, dropout, norm_eps)
        self.decoder_attention = Attention(width, heads, width, dropout, norm_eps) if decoder_attention else None
        self.cross_attention = Attention(width, heads, source_width, dropout, norm_eps)
        self.ffn = FeedForward(width, hidden_width, dropout, norm_eps)

    def forward(
        self,
        hidden_RTD: Tensor,
        source: Tensor | KeysValues | None,
        mask_R1TK: Tensor,
        source_mask_B11P: Tensor | None = None,
        past: KeysValues | None = None,
        decodes: bool = False,
        source_rows_R: Tensor | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """Compute one layer.

        Args:
            hidden_RTD: states of the text.
            source: of B samples, or its keys and values; None in a text encoder.
            mask_R1TK: where self-attention may look.
            source_mask_B11P: where cross-attention may look; None hides nothing.
            past: keys and values of earlier positions, in front of those of this pass.
            decodes: by the decoder's self-attention, where it has one of its own.
            source_rows_R: the source that each row reads; None: the first rows read the first, and so on.

        Returns:
            (R, T, D), and the keys and values of self-attention, those of `past` included.
        """
        own = self.decoder_attention if decodes and self.decoder_attention is not None else self.self_attention
        hidden_RTD, kept = own(hidden_RTD, hidden_RTD, mask_R1TK, past)
        if source is not None:
            if source_rows_R is not None:
                source = self._of_rows(source, source_rows_R)
            hidden_RTD = self._read(hidden_RTD, source, source_mask_B11P)
        return self.ffn(hidden_RTD), kept

    def _of_rows(self, source: Tensor | KeysValues, rows_R: Tensor) -> KeysValues:
        found = source if isinstance(source, KeysValues) else self.cross_attention.keys_values(source)
        # One source is not multiplied: all rows read it together.
        return found if len(found.keys_BHKE) == 1 else found.select(rows_R)

    def _read(self, hidden_RTD: Tensor, source: Tensor | KeysValues, source_mask_B11P: Tensor | None) -> Tensor:
        # Rows of one source read it together, as one longer row: beams and candidates need no copies of it.
        batch, length = len(source.keys_BHKE if isinstance(source, KeysValues) else source), hidden_RTD.shape[1]
        together_BSD = hidden_RTD.unflatten(0, (batch, -1)).flatten(1, 2)
        read_BSD, _ = self.cross_attention(together_BSD, source, source_mask_B11P)
        return read_BSD.unflatten(1, (-1, length)).flatten(0, 1)


class TextModel(nn.Module):
    """BERT with cross-attention in every layer; absolute positions, no token types, no pooler.

    Args:
        vocab_size, max_text_tokens: size of the embedding tables (BERT's vocabulary plus `[DEC]` and `[ENC]`; 512
            positions).
        width, layers, heads, hidden_width, norm_eps: those of the BERT model it starts from.
        source_width: U, of the image tokens, or of the states of questions.
        dropout: on attention weights and on every residual branch, in training only.
        language_model_head: whether states can become logits.
        decoder_attention: encoder and decoder are one model but for their self-attention, as in pre-training.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        layers: int,
        heads: int,
        hidden_width: int,
        source_width: int,
        max_text_tokens: int = 512,
        dropout: float = 0.1,
        norm_eps: float = 1e-12,
        language_model_head: bool = False,
        decoder_attention: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.max_text_tokens = max_text_tokens
        self.dropout = dropout
        self.word_embeddings = nn.Embedding(vocab_size, width)
        self.position_embeddings = nn.Embedding(max_text_tokens, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.layers = nn.ModuleList(
            TextLayer(
                width=width,
                heads=heads,
                hidden_width=hidden_width,
                source_width=source_width,
                decoder_attention=decoder_attention,
                dropout=dropout,
                norm_eps=norm_eps,
            )
            for _ in range(layers)
        )
        self.lm_head = LanguageModelHead(width, vocab_size, norm_eps) if language_model_head else None

    def forward(
        self,
        text_RT: Tensor,
        text_mask_RT: Tensor,
        source: Source | None = None,
        source_mask_BP: Tensor | None = None,
        *,
        source_rows_R: Tensor | None = None,
        causal: bool = False,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """States (R, T, D) of texts.

        Args:
            text_RT: token ids, padded on the right.
            text_mask_RT: 1 at tokens, 0 at padding.
            source: what the text reads, of B samples; None: nothing, as in a text encoder.
            source_mask_BP: 1 where there is something to read; None: everywhere.
            source_rows_R: the source that each text reads, without a mask; None: the first texts read the first source, as
                many the next.
            causal: a decoder, whose tokens see earlier ones only.
            cache: keys and values of earlier passes over the same rows; read, and extended in place.

        Raises:
            ValueError: more text than `max_text_tokens`, or rows that do not divide among the sources.
        """
        first = 0 if cache is None else cache.text
        if first + text_RT.shape[1] > self.max_text_tokens:
            raise ValueError(f"text of {first + text_RT.shape[1]} tokens, the limit is {self.max_text_tokens}")
        visible_RK = text_mask_RT.bool()
        if cache is not None and cache.visible_BK is not None:
            visible_RK = torch.cat([cache.visible_BK, visible_RK], dim=1)
        mask_R1TK = causal_mask(visible_RK, positions=text_RT.shape[1]) if causal else padding_mask(visible_RK)
        source_mask_B11P = None if source_mask_BP is None else padding_mask(source_mask_BP.bool())
        positions_T = torch.arange(first, first + text_RT.shape[1], device=text_RT.device)
        hidden_RTD = self.norm(self.word_embeddings(text_RT) + self.position_embeddings(positions_T))
        hidden_RTD = F.dropout(hidden_RTD, self.dropout, self.training)
        past = [None] * len(self.layers) if cache is None or not cache.layers else cache.layers
        kept = []
        for index, layer in enumerate(self.layers):
            read = source if source is None or isinstance(source, Tensor) else source[index]
            hidden_RTD, keys_values = layer(
                hidden_RTD, read, mask_R1TK, source_mask_B11P, past[index], causal, source_rows_R
            )
            if cache is not None:  # without one, each layer's are freed at once
                kept.append(keys_values)
        if cache is not None:
            cache.layers, cache.visible_BK, cache.text = kept, visible_RK, first + text_RT.shape[1]
        return hidden_RTD

    def keys_values(self, source_BPU: Tensor) -> list[KeysValues]:
        """What each layer's cross-attention makes of a source, for passes that read it many times."""
        found = []
        for layer in self.layers:
            assert isinstance(layer, TextLayer)
            found.append(layer.cross_attention.keys_values(source_BPU))
        return found

    def logits(self, text_ND: Tensor) -> Tensor:
        """Vocabulary logits (N, V) of a decoder's states: state t predicts token t + 1.

        Raises:
            ValueError: there is no language-model head.
        """
        if self.lm_head is None:
            raise ValueError("this text model has no language-model head")
        return self.lm_head(text_ND, self.word_embeddings.weight)
