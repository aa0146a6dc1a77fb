"""Frozen language models in two kinds, decoder-only and encoder-decoder: embeddings in, hidden states and logits out.

Everything particular to one LLM (special tokens, how a prompt and an answer start) arrives as arguments; nothing here looks
at a model's name.

Shape legend: B batch, T tokens, Q visual tokens, L language-model width, S answer tokens in the batch, V vocabulary,
N nodes of a candidate tree, K keys a node may attend to.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)

from instructblip.model.frozen import FrozenModule


@dataclass
class OpenPrompts:
    """Prompts that were run once and can be continued many times; what `LLM.open_prompts` returns.

    Attributes:
        last_BL: hidden state that predicts the first answer token.
        lengths: number of positions that each row's answer tokens may attend to before the answer.
        cache: keys and values of those positions, as wide as the longest row.
        encoded: encoder states and their mask, of an encoder-decoder model.
    """

    last_BL: Tensor
    lengths: list[int]
    cache: Any
    encoded: dict[str, Tensor]


class LLM(FrozenModule):
    """A frozen transformers model with its tokenizer and text conventions.

    Args:
        model: a `...ForCausalLM` or `...ForConditionalGeneration` of text.
        tokenizer: its tokenizer; used without special tokens, which are added here.
        eos_token: token that ends an answer, in training targets and in ranking.
        pad_token: token that fills batches.
        bos_token: token before the prompt, or None where the model has none.
        image_prefix: text in front of the visual tokens. A model that always saw some token first sends much of its
            attention there; a visual token in that place is heard badly and disturbs the rest.
        prompt_prefix: text between the visual tokens and the prompt.
        answer_prefix: put before every target and candidate; byte-level vocabularies need the space.
        max_prompt_tokens: in training, longer prompts lose their beginning (as released: truncation side left).
        max_target_tokens: longer targets lose their end; BOS counts, which the released code cuts with and then drops.

    Raises:
        ValueError: a token that the tokenizer does not know, or a model that this kind cannot run.
    """

    embedding_norms: Tensor  # (V,), of the token embeddings as the model receives them
    embedding_scale: Tensor  # (1,), what the embedding layer multiplies its table by

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
        self.image_prefix = image_prefix
        self.prompt_prefix = prompt_prefix
        self.answer_prefix = answer_prefix
        self.max_prompt_tokens = max_prompt_tokens
        self.max_target_tokens = max_target_tokens
        # What a checkpoint's authors like to sample with must not leak into an evaluation.
        model.generation_config = GenerationConfig(
            eos_token_id=self.eos_id,
            pad_token_id=self.pad_id,
            decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        )
        self.freeze()
        table = self.embeddings.weight.detach()
        norms_V = table.float().norm(dim=-1).clamp_min(1e-6)
        # Some models multiply what they look up, inside the embedding layer; for most the factor is 1.
        row_1 = norms_V.argmax()[None]
        scale = self.embeddings(row_1).detach().float().norm() / norms_V[row_1]
        self.register_buffer("embedding_norms", norms_V.mul(scale), persistent=False)
        self.register_buffer("embedding_scale", scale, persistent=False)

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

    @property
    def image_prefix_ids(self) -> list[int]:
        """Token ids in front of the visual tokens."""
        return self._ids(self.image_prefix)

    @abstractmethod
    def prompt_ids(self, prompt: str, *, truncate: bool = False) -> list[int]:
        """Token ids of a prompt; `truncate` cuts its beginning to `max_prompt_tokens`, special tokens stay."""

    @abstractmethod
    def target_ids(self, target: str, include_eos: bool = True) -> list[int]:
        """Token ids of an answer and its EOS, cut on the right to `max_target_tokens`."""

    @abstractmethod
    def answer_states(self, prefixes: Sequence[Tensor], answers: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states (S, L) that predict each token of each answer, row after row.

        Args:
            prefixes: B embedded prompts, each (T_i, L).
            answers: B token sequences, none of them empty.
        """

    @abstractmethod
    def open_prompts(self, prefixes: Sequence[Tensor]) -> OpenPrompts:
        """Run B embedded prompts, each (T_i, L), up to where their answers begin."""

    @abstractmethod
    def continue_prompts(
        self, prompts: OpenPrompts, tokens_BN: Tensor, depths_BN: Tensor, visible_BNN: Tensor
    ) -> Tensor:
        """Hidden states (B, N, L) of tree nodes after their prompts, which stay as they were.

        Args:
            prompts: what `open_prompts` returned.
            tokens_BN: the nodes' tokens.
            depths_BN: their places in the answer, 0 for its first token.
            visible_BNN: True where node i attends to node j: itself and its ancestors.
        """

    @abstractmethod
    def generate(self, prefixes: Sequence[Tensor], *, repetition_penalty: float = 1.0, **options: Any) -> list[str]:
        """Continue each embedded prompt (T_i, L); return the new text only, stripped.

        `options` are transformers' generation options. Length limits and the repetition penalty count new tokens only.
        """

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Embeddings (T, L) of one sequence of token ids."""
        return self.embeddings(torch.tensor(ids, dtype=torch.long, device=self.embeddings.weight.device))

    def prefix(self, visual_QL: Tensor, prompt: str, *, truncate: bool = False) -> Tensor:
        """The embedded prompt (T, L) of one sample: image prefix, visual tokens, prompt."""
        visual_QL = visual_QL.to(self.embeddings.weight.dtype)
        return torch.cat(
            [self.embed(self.image_prefix_ids), visual_QL, self.embed(self.prompt_ids(prompt, truncate=truncate))]
        )

    def embedding_cosines(self, directions_BL: Tensor) -> Tensor:
        """Cosine (B, V) of vectors of length up to 1 with every token embedding, times their length."""
        table_VL = self.embeddings.weight
        return (directions_BL.to(table_VL.dtype) @ table_VL.T).float() * self.embedding_scale / self.embedding_norms

    def embedding_deviation(self) -> Tensor:
        """Standard deviation of the entries of token embeddings as the model receives them: a scalar tensor."""
        return self.embeddings.weight.float().std() * self.embedding_scale

    def logits(self, hidden_NL: Tensor) -> Tensor:
        """Vocabulary logits in float32 for the given rows of hidden states only."""
        logits_NV = self.model.get_output_embeddings()(hidden_NL).float()
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return logits_NV if cap is None else cap * (logits_NV / cap).tanh()

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _decode(self, ids_BT: Tensor) -> list[str]:
        return [text.strip() for text in self.tokenizer.batch_decode(ids_BT, skip_special_tokens=True)]


class DecoderLLM(LLM):
    """Decoder-only: the answer continues the prompt."""

    def prompt_ids(self, prompt: str, *, truncate: bool = False) -> list[int]:
        """BOS and the prompt."""
        ids = self._ids(self.prompt_prefix + prompt)
        room = self.max_prompt_tokens - len(self.bos_ids)
        return self.bos_ids + (ids[max(len(ids) - room, 0) :] if truncate else ids)

    def target_ids(self, target: str, include_eos: bool = True) -> list[int]:
        """The answer and EOS; an answer that was cut has no EOS."""
        ids = self._ids(self.answer_prefix + target) + [self.eos_id] * include_eos
        return ids[: self.max_target_tokens - len(self.bos_ids)]

    def hidden_states(
        self,
        embeddings_BTL: Tensor,
        *,
        cache: DynamicCache | None = None,
        positions_BT: Tensor | None = None,
        mask: Tensor | dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Final hidden states (B, T, L). Without a mask attention is causal; a cache is read and extended in place."""
        outputs = self.model.base_model(
            inputs_embeds=embeddings_BTL,
            past_key_values=cache,
            position_ids=positions_BT,
            attention_mask=mask,
            use_cache=cache is not None,
        )
        return outputs.last_hidden_state

    def answer_states(self, prefixes: Sequence[Tensor], answers: Sequence[Sequence[int]]) -> Tensor:
        """One causal pass over `prompt answer`; the answer's last token is only ever predicted."""
        # Rows are padded on the right, where a causal model's real tokens never look: no mask is needed.
        rows = [torch.cat([prefix, self.embed(ids[:-1])]) for prefix, ids in zip(prefixes, answers, strict=True)]
        hidden_BTL = self.hidden_states(pad_sequence(rows, batch_first=True))
        first = [len(prefix) - 1 for prefix in prefixes]
        return torch.cat(
            [row[start : start + len(ids)] for row, start, ids in zip(hidden_BTL, first, answers, strict=True)]
        )

    def open_prompts(self, prefixes: Sequence[Tensor]) -> OpenPrompts:
        """Keep the prompts' keys and values; no window forgets any, masks do."""
        lengths, cache = [len(prefix) for prefix in prefixes], DynamicCache()
        hidden_BTL = self.hidden_states(pad_sequence(list(prefixes), batch_first=True), cache=cache)
        last_BL = torch.stack([row[length - 1] for row, length in zip(hidden_BTL, lengths, strict=True)])
        return OpenPrompts(last_BL, lengths, cache, {})

    def continue_prompts(
        self, prompts: OpenPrompts, tokens_BN: Tensor, depths_BN: Tensor, visible_BNN: Tensor
    ) -> Tensor:
        """A node's position is its prompt's length plus its depth."""
        device = tokens_BN.device
        lengths_B1, longest = torch.tensor(prompts.lengths, device=device)[:, None], prompts.cache.get_seq_length()
        prompt_BT = torch.arange(longest, device=device).expand(len(tokens_BN), -1)
        positions_BN = lengths_B1 + depths_BN
        prompt_visible_BNT = (prompt_BT < lengths_B1)[:, None].expand(-1, tokens_BN.shape[1], -1)
        mask = self._mask(
            torch.cat([prompt_visible_BNT, visible_BNN], dim=2),
            distance_BNK=positions_BN[:, :, None] - torch.cat([prompt_BT, positions_BN], dim=1)[:, None],
        )
        hidden_BNL = self.hidden_states(
            self.embeddings(tokens_BN), cache=prompts.cache, positions_BT=positions_BN, mask=mask
        )
        prompts.cache.crop(-tokens_BN.shape[1])
        return hidden_BNL

    def _mask(self, visible_BNK: Tensor, *, distance_BNK: Tensor) -> Tensor | dict[str, Tensor]:
        """What transformers adds to attention scores; layers with a sliding window get their own."""
        config, dtype = self.model.config.get_text_config(), self.embeddings.weight.dtype
        full_B1NK, window = _additive(visible_BNK, dtype)[:, None], getattr(config, "sliding_window", None)
        if window is None:
            return full_B1NK
        sliding_B1NK = _additive(visible_BNK & (distance_BNK < window), dtype)[:, None]
        if getattr(config, "layer_types", None) is None:
            return sliding_B1NK  # every layer slides
        return {"full_attention": full_B1NK, "sliding_attention": sliding_B1NK}

    @torch.inference_mode()
    def generate(self, prefixes: Sequence[Tensor], *, repetition_penalty: float = 1.0, **options: Any) -> list[str]:
        """Rows are padded on the left, so that all of them continue at the same place."""
        longest = max(len(prefix) for prefix in prefixes)
        padding = self.embed([self.pad_id])
        rows = [torch.cat([padding.expand(longest - len(prefix), -1), prefix]) for prefix in prefixes]
        mask_BT = torch.tensor([[0] * (longest - len(prefix)) + [1] * len(prefix) for prefix in prefixes])
        # The embeddings enter without token ids, so transformers counts new tokens only, with one exception: left to
        # itself it exempts as many of them from the penalty as a row has padding (5.23), and an answer would depend on
        # its neighbours in the batch.
        ids_BT = self.model.generate(  # type: ignore[operator]
            inputs_embeds=torch.stack(rows),
            attention_mask=mask_BT.to(padding.device),
            repetition_penalty=1.0,
            logits_processor=_penalty(repetition_penalty, skipped=0),
            **options,
        )
        return self._decode(ids_BT)


class EncoderDecoderLLM(LLM):
    """Encoder-decoder with T5's relative positions: the prompt is encoded, the answer decoded beside it."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **conventions: Any) -> None:
        super().__init__(model, tokenizer, **conventions)
        biases = [m for m in model.get_decoder().modules() if getattr(m, "has_relative_attention_bias", False)]
        if not biases or not hasattr(biases[0], "compute_bias"):
            raise ValueError(f"{type(model).__name__} has no relative position bias as T5's, which ranking needs")
        self._relative: Any = biases[0]
        self.start_id: int = model.config.decoder_start_token_id

    def prompt_ids(self, prompt: str, *, truncate: bool = False) -> list[int]:
        """BOS where the model has one, the prompt, EOS."""
        ids = self._ids(self.prompt_prefix + prompt)
        room = self.max_prompt_tokens - len(self.bos_ids) - 1
        return [*self.bos_ids, *(ids[max(len(ids) - room, 0) :] if truncate else ids), self.eos_id]

    def target_ids(self, target: str, include_eos: bool = True) -> list[int]:
        """The answer and EOS, which stays when the answer is cut."""
        ids = self._ids(self.answer_prefix + target)[: self.max_target_tokens - 1]
        return ids + [self.eos_id] * include_eos

    def answer_states(self, prefixes: Sequence[Tensor], answers: Sequence[Sequence[int]]) -> Tensor:
        """Decode `start answer`; the answer's last token is only ever predicted."""
        encoded = self._encode(prefixes)
        longest = max(len(ids) for ids in answers)
        inputs = [[self.start_id, *ids[:-1]] + [self.pad_id] * (longest - len(ids)) for ids in answers]
        hidden_BTL = self._decode_states(torch.tensor(inputs, device=self.embeddings.weight.device), encoded)
        return torch.cat([row[: len(ids)] for row, ids in zip(hidden_BTL, answers, strict=True)])

    def open_prompts(self, prefixes: Sequence[Tensor]) -> OpenPrompts:
        """Encode the prompts and decode the start token, which leaves the keys and values of the encoder's states."""
        encoded, cache = self._encode(prefixes), EncoderDecoderCache(DynamicCache(), DynamicCache())
        start_B1 = torch.full((len(prefixes), 1), self.start_id, device=self.embeddings.weight.device)
        hidden_B1L = self._decode_states(start_B1, encoded, cache=cache)
        return OpenPrompts(hidden_B1L[:, 0], [1] * len(prefixes), cache, encoded)

    def continue_prompts(
        self, prompts: OpenPrompts, tokens_BN: Tensor, depths_BN: Tensor, visible_BNN: Tensor
    ) -> Tensor:
        """A node's place after the start token is its depth; what the model adds for its index is taken back."""
        dtype, nodes = self.embeddings.weight.dtype, tokens_BN.shape[1]
        visible_BNK = torch.cat([visible_BNN.new_ones(len(tokens_BN), nodes, 1), visible_BNN], dim=2)
        place_BK = torch.cat([depths_BN.new_zeros(len(tokens_BN), 1), depths_BN + 1], dim=1)
        depth = int(place_BK.max()) + 1
        by_place_HKK = self._relative.compute_bias(depth, depth)[0]
        by_index_1HNK = self._relative.compute_bias(nodes, nodes + 1, past_seen_tokens=1)
        wanted_BHNK = by_place_HKK[:, place_BK[:, 1:, None], place_BK[:, None]].transpose(0, 1)
        mask_BHNK = wanted_BHNK - by_index_1HNK + _additive(visible_BNK, dtype)[:, None]
        hidden_BNL = self._decode_states(tokens_BN, prompts.encoded, cache=prompts.cache, mask=mask_BHNK)
        prompts.cache.self_attention_cache.crop(-nodes)
        return hidden_BNL

    @torch.inference_mode()
    def generate(self, prefixes: Sequence[Tensor], *, repetition_penalty: float = 1.0, **options: Any) -> list[str]:
        """The decoder's start token counts neither as new nor for the penalty."""
        mask_BT = _row_mask(prefixes)
        ids_BT = self.model.generate(  # type: ignore[operator]
            inputs_embeds=pad_sequence(list(prefixes), batch_first=True),
            attention_mask=mask_BT,
            repetition_penalty=1.0,
            logits_processor=_penalty(repetition_penalty, skipped=1),
            **options,
        )
        return self._decode(ids_BT[:, 1:])

    def logits(self, hidden_NL: Tensor) -> Tensor:
        """As the model: hidden states are scaled first where its output head is its embedding table."""
        scaled = getattr(self.model.config, "scale_decoder_outputs", False)
        return super().logits(hidden_NL * hidden_NL.shape[-1] ** -0.5 if scaled else hidden_NL)

    def _encode(self, prefixes: Sequence[Tensor]) -> dict[str, Tensor]:
        mask_BT = _row_mask(prefixes)
        outputs = self.model.get_encoder()(
            inputs_embeds=pad_sequence(list(prefixes), batch_first=True), attention_mask=mask_BT
        )
        return {"encoder_hidden_states": outputs.last_hidden_state, "encoder_attention_mask": mask_BT}

    def _decode_states(
        self, tokens_BT: Tensor, encoded: dict[str, Tensor], *, cache: Any = None, mask: Tensor | None = None
    ) -> Tensor:
        outputs = self.model.get_decoder()(
            input_ids=tokens_BT, attention_mask=mask, past_key_values=cache, use_cache=cache is not None, **encoded
        )
        return outputs.last_hidden_state


LLM_KINDS: dict[str, type[LLM]] = {"decoder": DecoderLLM, "encoder_decoder": EncoderDecoderLLM}


class _NewTokensPenalty(LogitsProcessor):
    """Repetition penalty that does not see the first tokens of a row."""

    def __init__(self, penalty: float, skipped: int) -> None:
        self.penalty = RepetitionPenaltyLogitsProcessor(float(penalty))
        self.skipped = skipped

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.penalty(input_ids[:, self.skipped :], scores)


def _penalty(repetition_penalty: float, *, skipped: int) -> LogitsProcessorList:
    return LogitsProcessorList([] if repetition_penalty == 1 else [_NewTokensPenalty(repetition_penalty, skipped)])


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


def _row_mask(rows: Sequence[Tensor]) -> Tensor:
    """1 at the rows' positions, 0 at the padding behind them: (B, T)."""
    return pad_sequence([torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows], batch_first=True)


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token!r}; name one of its own in the llm config")
    return found
