"""The instruction-aware Q-Former (InstructBLIP, section 2.3; BERT blocks with cross-attention, as released in BLIP-2).

Learned queries and the instruction's tokens share self-attention; only the queries look at the image; only the queries'
outputs leave. Each layer has two feed-forwards, one for the queries and one for the text.

Shape legend: B batch, Q queries, T text tokens, S = Q + T, P image tokens, D Q-Former width, V vision width, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention with the residual and post-norm of BERT: `norm(x + dropout(out(attend(x, source))))`."""

    def __init__(self, width: int, heads: int, source_width: int, dropout: float, norm_eps: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"Q-Former width {width} is not a multiple of its {heads} heads")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = dropout

    def forward(self, x_BSD: Tensor, source_BKV: Tensor, mask_B11K: Tensor | None = None) -> Tensor:
        split = (x_BSD.shape[0], -1, self.heads, x_BSD.shape[-1] // self.heads)
        q_BHSE = self.query(x_BSD).view(split).transpose(1, 2)
        k_BHKE = self.key(source_BKV).view(split).transpose(1, 2)
        v_BHKE = self.value(source_BKV).view(split).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        out_BHSE = F.scaled_dot_product_attention(q_BHSE, k_BHKE, v_BHKE, attn_mask=mask_B11K, dropout_p=dropout)
        out_BSD = self.output(out_BHSE.transpose(1, 2).flatten(2))
        return self.norm(x_BSD + F.dropout(out_BSD, self.dropout, self.training))


class FeedForward(nn.Module):
    """BERT's feed-forward with its residual and post-norm."""

    def __init__(self, width: int, hidden_width: int, dropout: float, norm_eps: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden_width)
        self.down = nn.Linear(hidden_width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = dropout

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.norm(x_BSD + F.dropout(self.down(F.gelu(self.up(x_BSD))), self.dropout, self.training))


class QFormerLayer(nn.Module):
    """One block: shared self-attention, cross-attention of the queries (in some layers), two feed-forwards."""

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        hidden_width: int,
        vision_width: int | None,
        has_text: bool,
        is_last: bool,
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
        if has_text and not is_last:
            self.text_ffn = FeedForward(width, hidden_width, dropout, norm_eps)
        elif has_text:
            # Never computed, never trained: here so that released weights come in and go out whole. Its starting values
            # are drawn aside, or what cannot influence anything would move the random stream of what does.
            with torch.random.fork_rng(devices=[]):
                self.text_ffn = FeedForward(width, hidden_width, dropout, norm_eps).requires_grad_(False)

    def forward(self, hidden_BSD: Tensor, image_BPV: Tensor, queries: int, mask_B11S: Tensor | None) -> Tensor:
        """Return (B, S, D), or (B, Q, D) from the last layer, where the text outputs could influence nothing."""
        wanted_BSD = hidden_BSD[:, :queries] if self.is_last else hidden_BSD
        hidden = self.self_attention(wanted_BSD, hidden_BSD, mask_B11S)
        query_BQD = hidden[:, :queries]
        if self.cross_attention is not None:
            query_BQD = self.cross_attention(query_BQD, image_BPV)
        query_BQD = self.query_ffn(query_BQD)
        if self.text_ffn is None or self.is_last:
            return query_BQD
        return torch.cat([query_BQD, self.text_ffn(hidden[:, queries:])], dim=1)


class QFormer(nn.Module):
    """Queries that read an image in the light of an instruction.

    Args:
        vocab_size, max_text_tokens: size of the text embedding tables (BERT's vocabulary plus `[DEC]`, 512 positions).
        width, layers, heads, hidden_width, norm_eps: those of the BERT model it starts from.
        queries: number of learned query tokens (32 in the paper).
        vision_width: width V of the image tokens.
        cross_attention_every: cross-attention stands in layers 0, n, 2n, ... (2 in the paper).
        instruction_aware: `False` is the paper's ablation: the text branch does not exist, as in BLIP-2's second stage.
        dropout: on attention weights and on every residual branch, in training only.
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
    ) -> None:
        super().__init__()
        self.instruction_aware = instruction_aware
        self.max_text_tokens = max_text_tokens
        self.dropout = dropout
        # A zero start would make all queries equal for ever: BLIP-2 draws them with BERT's initial deviation.
        self.query_tokens = nn.Parameter(torch.randn(1, queries, width) * 0.02)
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
                dropout=dropout,
                norm_eps=norm_eps,
            )
            for index in range(layers)
        )

    @property
    def width(self) -> int:
        """Width D of the query outputs."""
        return self.query_tokens.shape[-1]

    @property
    def output_norm(self) -> nn.LayerNorm:
        """The last norm before the query outputs leave."""
        last = self.layers[-1]
        assert isinstance(last, QFormerLayer)
        return last.query_ffn.norm

    def forward(self, image_BPV: Tensor, text_BT: Tensor | None = None, text_mask_BT: Tensor | None = None) -> Tensor:
        """Read the image and return the queries' outputs, (B, Q, D).

        Args:
            image_BPV: image tokens.
            text_BT: the instruction's token ids; required when the Q-Former is instruction-aware, else ignored.
            text_mask_BT: 1 at real tokens, 0 at padding.

        Raises:
            ValueError: instruction-aware and no text given, or more text than `max_text_tokens`.
        """
        batch, queries = image_BPV.shape[0], self.query_tokens.shape[1]
        hidden_BSD = self.query_tokens.expand(batch, -1, -1)
        mask_B11S = None
        if self.instruction_aware:
            if text_BT is None or text_mask_BT is None:
                raise ValueError("an instruction-aware Q-Former needs the instruction's token ids and mask")
            if text_BT.shape[1] > self.max_text_tokens:
                raise ValueError(f"instruction of {text_BT.shape[1]} tokens, the limit is {self.max_text_tokens}")
            hidden_BSD = torch.cat([hidden_BSD, self._embed_text(text_BT)], dim=1)
            query_mask_BQ = text_mask_BT.new_ones(batch, queries)
            mask_B11S = torch.cat([query_mask_BQ, text_mask_BT], dim=1).bool()[:, None, None, :]
        hidden_BSD = F.dropout(self.norm(hidden_BSD), self.dropout, self.training)
        for layer in self.layers:
            hidden_BSD = layer(hidden_BSD, image_BPV, queries, mask_B11S)
        return hidden_BSD[:, :queries]

    def _embed_text(self, text_BT: Tensor) -> Tensor:
        # Text positions start at 0: the queries in front have none.
        positions_T = torch.arange(text_BT.shape[1], device=text_BT.device)
        return self.word_embeddings(text_BT) + self.position_embeddings(positions_T)
