"""Frozen decoder-only language models: embeddings in, hidden states and logits out.

Everything particular to one LLM (padding token, end of sequence, how an answer starts) arrives as arguments; nothing here
looks at a model's name.

Shape legend: B batch, T tokens, L language-model width, N nodes of a candidate tree.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)

from instructblip.model.frozen import FrozenModule


class DecoderLLM(FrozenModule):
    """A frozen decoder-only transformers model with its tokenizer and text conventions.

    Args:
        model: a `...ForCausalLM`.
        tokenizer: its tokenizer; used without special tokens, which are added here.
        eos_token: token that ends an answer, in training targets and in ranking.
        pad_token: token that fills batches.
        bos_token: token before the prompt, or None where the model has none.
        image_prefix: text in front of the visual tokens. A model that always saw some token first sends much of its
            attention there; a visual token in that place is heard badly and disturbs the rest.
        prompt_prefix: text between the visual tokens and the prompt.
        answer_prefix: put before every target and candidate; byte-level vocabularies need the space.
        max_prompt_tokens: longer prompts lose their beginning (as released: truncation side left).
        max_target_tokens: longer targets lose their end, EOS included.
    """

    embedding_norms: Tensor  # (V,), of the rows of the embedding table

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_token: str,
        pad_token: str,
        bos_token: str | None = None,
        image_prefix: str = "",
        prompt_prefix: str = "",
        answer_prefix: str = "",
        max_prompt_tokens: int = 128,
        max_target_tokens: int = 256,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.eos_id = _token_id(tokenizer, eos_token)
        self.pad_id = _token_id(tokenizer, pad_token)
        self.bos_ids = [] if bos_token is None else [_token_id(tokenizer, bos_token)]
        self.image_prefix_ids: list[int] = tokenizer(image_prefix, add_special_tokens=False)["input_ids"]
        self.prompt_prefix = prompt_prefix
        self.answer_prefix = answer_prefix
        self.max_prompt_tokens = max_prompt_tokens
        self.max_target_tokens = max_target_tokens
        self.freeze()
        norms_V = self.embeddings.weight.detach().float().norm(dim=-1).clamp_min(1e-6)
        self.register_buffer("embedding_norms", norms_V.to(self.embeddings.weight.dtype), persistent=False)

    @property
    def width(self) -> int:
        """Width L of the token embeddings, which the projection must meet."""
        return self.embeddings.weight.shape[1]

    @property
    def embeddings(self) -> nn.Embedding:
        """The input embedding table."""
        table = self.model.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        return table

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt, cut from the left when too long; BOS stays, as tokenizers do it."""
        ids = self.tokenizer(self.prompt_prefix + prompt, add_special_tokens=False)["input_ids"]
        room = self.max_prompt_tokens - len(self.bos_ids)
        return self.bos_ids + ids[max(len(ids) - room, 0) :]

    def target_ids(self, target: str, include_eos: bool = True) -> list[int]:
        """Token ids of an answer and its EOS, cut from the right when too long (a cut answer has no EOS)."""
        ids = self.tokenizer(self.answer_prefix + target, add_special_tokens=False)["input_ids"]
        return (ids + [self.eos_id] * include_eos)[: self.max_target_tokens]

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Embeddings (T, L) of one sequence of token ids."""
        return self.embeddings(torch.tensor(ids, dtype=torch.long, device=self.embeddings.weight.device))

    def hidden_states(
        self,
        embeddings_BTL: Tensor,
        *,
        cache: DynamicCache | None = None,
        positions_BT: Tensor | None = None,
        mask_B1TK: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states (B, T, L). Without a mask attention is causal; a cache is read and extended in place."""
        outputs = self.model.base_model(
            inputs_embeds=embeddings_BTL,
            past_key_values=cache,
            position_ids=positions_BT,
            attention_mask=mask_B1TK,
            use_cache=cache is not None,
        )
        return outputs.last_hidden_state

    def logits(self, hidden_NL: Tensor) -> Tensor:
        """Vocabulary logits in float32 for the given rows of hidden states only."""
        return self.model.get_output_embeddings()(hidden_NL).float()

    def empty_cache(self) -> DynamicCache:
        """A key/value cache that keeps everything."""
        return DynamicCache()

    @torch.inference_mode()
    def generate(self, embeddings: Sequence[Tensor], *, repetition_penalty: float = 1.0, **options: Any) -> list[str]:
        """Continue each row of embeddings (T_i, L); return the new text only, stripped.

        `options` are transformers' generation options. The embeddings enter without token ids, so length limits and the
        repetition penalty count new tokens only.
        """
        # Left to itself, transformers exempts as many new tokens from the penalty as a row has padding, so that its
        # answer would depend on its neighbours in the batch (5.23, with embeddings in place of token ids).
        penalty = RepetitionPenaltyLogitsProcessor(float(repetition_penalty))
        processors = LogitsProcessorList([] if repetition_penalty == 1 else [penalty])
        longest = max(row.shape[0] for row in embeddings)
        padding = self.embed([self.pad_id])
        rows = [torch.cat([padding.expand(longest - row.shape[0], -1), row]) for row in embeddings]
        mask_BT = torch.tensor([[0] * (longest - row.shape[0]) + [1] * row.shape[0] for row in embeddings])
        ids = self.model.generate(  # type: ignore[operator]
            inputs_embeds=torch.stack(rows),
            attention_mask=mask_BT.to(padding.device),
            eos_token_id=self.eos_id,
            pad_token_id=self.pad_id,
            repetition_penalty=1.0,
            logits_processor=processors,
            **options,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token!r}; name one of its own in the llm config")
    return found
