"""Language models in two kinds, decoder-only and encoder-decoder: embeddings in, hidden states and logits out.

Everything particular to one LLM arrives as arguments, its text conventions in `prompt_format.py`; nothing here looks at a
model's name.

Shape legend: B batch, R rows of one sample or of several, T tokens, Q visual tokens, L language-model width, S answer tokens
in the batch, V vocabulary, N nodes of a candidate tree, K keys a node may attend to.
"""

import copy
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from instructblip.devices import on_device
from instructblip.errors import UserError
from instructblip.models import varlen
from instructblip.models.exact_buffers import ExactBuffers
from instructblip.models.packing import RowLayout, block_causal_mask, pack_rows, packed_layout
from instructblip.models.prefill import Prefill
from instructblip.models.prompt_format import DecoderPromptFormat, EncoderDecoderPromptFormat, PromptFormat


@dataclass(frozen=True)
class LLMAbilities:
    """Which savings one language model allows; `abilities.measure` finds out. What it does not allow is done the plain way.

    Attributes:
        tree: all candidates of a prompt in one pass, and all its beams (`prefill`, `decode_tree`). Else each candidate in a
            row of its own, and texts by transformers' generation; the four of these at the end are asked only then.
        packed: several samples in a row; else one.
        padded_prompts: prompts of different lengths are continued together; else one by one.
        shared_beams: the beams of a prompt share its keys and values; else each beam runs the prompt.
        beams: its class searches with several beams.
        generates: its class generates from embeddings at all.
        embedding_factor: what its class multiplies embeddings by that it looked up itself, and none that it is given.
    """

    tree: bool = True
    packed: bool = True
    padded_prompts: bool = True
    shared_beams: bool = True
    beams: bool = True
    generates: bool = True
    embedding_factor: float = 1.0


class AnswerStates(NamedTuple):
    """What `LLM.answer_states` returns.

    Attributes:
        hidden_SL: the hidden states that predict each token of each answer, sample after sample.
        positions: places of the pass through the model, an encoder-decoder's in both parts.
        padding: those of them that hold nothing.
    """

    hidden_SL: Tensor
    positions: int
    padding: int


class LLM(ExactBuffers):
    """A transformers model with its tokenizer and text conventions.

    Args:
        model: a `...ForCausalLM` or `...ForConditionalGeneration` of text.
        tokenizer, conventions: its text conventions, as `PromptFormat` takes them.

    Attributes:
        kind: key of `LLM_KINDS`.
        auto_class: what transformers opens such a model with.
        abilities: all of them, until they are measured.

    Raises:
        ValueError: a token that the tokenizer does not know, an encoder-decoder without a token to start with.
    """

    kind: ClassVar[str]
    auto_class: ClassVar[Any]
    prompt_format_kind: ClassVar[type[PromptFormat]]
    abilities: LLMAbilities = LLMAbilities()
    frozen_norms: Tensor  # (V,), see `embedding_norms`
    embedding_scale: Tensor  # (1,), what the embedding layer multiplies its table by

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **conventions: Any) -> None:
        super().__init__()
        self.model = model
        self.prompt_format = self.prompt_format_kind(tokenizer, **conventions)
        # What a checkpoint's authors like to sample with must not leak into an evaluation.
        model.generation_config = GenerationConfig(
            eos_token_id=self.prompt_format.eos_id,
            pad_token_id=self.prompt_format.pad_id,
            decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        )
        self.eval()
        norms_V = _row_norms(self.embeddings.weight)
        # Some models multiply what they look up, inside the embedding layer; for most the factor is 1.
        row_1 = norms_V.argmax()[None]
        scale = self.embeddings(row_1).detach().float().norm() / norms_V[row_1]
        self.register_buffer("frozen_norms", norms_V.mul(scale), persistent=False)
        self.register_buffer("embedding_scale", scale, persistent=False)
        self.register_load_state_dict_post_hook(_measure_table)

    def exact_buffers(self) -> Iterator[tuple[nn.Module, str]]:
        """All that are in float32: norms of embeddings, rotary frequencies, scales of rounded weights. None is a matrix."""
        for module in self.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.dtype == torch.float32:
                    yield module, name

    @abstractmethod
    def roots(self) -> list[nn.Module]:
        """What one forward pass calls, above the repeated blocks."""

    @property
    def width(self) -> int:
        """Width L of the token embeddings, which the projection must meet."""
        return self.embeddings.weight.shape[1]

    @property
    def max_positions(self) -> int | None:
        """Positions that the model was made for; None where it sets no limit."""
        settings = self.model.config.get_text_config(decoder=True)
        found = [getattr(settings, name, None) for name in ("max_position_embeddings", "max_seq_len")]
        return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)  # -1: no limit

    @property
    def has_position_table(self) -> bool:
        """Whether positions are looked up in a table of `max_positions` rows, where none is behind the last."""
        rows = range(self.max_positions or 0, (self.max_positions or 0) + 3)  # OPT has two more
        tables = (module for module in self.model.modules() if isinstance(module, nn.Embedding))
        return any(table.num_embeddings in rows and table is not self.embeddings for table in tables)

    @abstractmethod
    def span(self, prompt: int, answer: int) -> int:
        """Positions that the longer of its passes needs, for a prompt and an answer of so many tokens."""

    @property
    def embeddings(self) -> nn.Embedding:
        """The input embedding table."""
        table = self.model.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        return table

    @property
    def embedding_norms(self) -> Tensor:
        """Lengths (V,) of the token embeddings as the model receives them; a frozen table is measured when it is loaded."""
        table = self.embeddings.weight
        norms_V = _row_norms(table) * self.embedding_scale if table.requires_grad else self.frozen_norms
        return norms_V * self.abilities.embedding_factor

    @abstractmethod
    def answer_states(
        self, prefixes: Sequence[Tensor], answers: Sequence[Sequence[int]], *, packed: bool = False
    ) -> AnswerStates:
        """Run each prompt with its answer.

        Args:
            prefixes: B embedded prompts, each (T_i, L).
            answers: B token sequences, none of them empty.
            packed: several samples in a row, each blind to the others, where `abilities` allow it.

        Raises:
            ValueError: packed, and the model is no decoder-only one.
        """

    @abstractmethod
    def prefill(self, prefixes: Sequence[Tensor]) -> Prefill:
        """Run B embedded prompts, each (T_i, L), up to where their answers begin."""

    @abstractmethod
    def decode_tree(
        self, prompts: Prefill, tokens_BN: Tensor, depths_BN: Tensor, visible_BNK: Tensor, *, keep: bool = False
    ) -> Tensor:
        """Hidden states (B, N, L) of tree nodes after their prompts.

        Args:
            prompts: what `prefill` returned.
            tokens_BN: the nodes' tokens.
            depths_BN: their places in the answer, 0 for its first token.
            visible_BNK: True where a node attends to another, itself or an ancestor: first those that were kept, then these.
            keep: later nodes may attend to these; else the prompts stay as they were.
        """

    @abstractmethod
    def continue_rows(
        self,
        prefixes: Sequence[Tensor],
        *,
        repetition_penalty: float = 1.0,
        processors: Sequence[LogitsProcessor] = (),
        **options: Any,
    ) -> Any:
        """Continue embedded prompts (T_i, L) in one batch by transformers' generation; what that returns.

        `options` are transformers' generation options, `processors` of scores come behind the penalty. Length limits and the
        repetition penalty count new tokens only.
        """

    @abstractmethod
    def new_tokens(self, ids_BT: Tensor) -> Tensor:
        """Those of the token ids that `continue_rows` returned which are new."""

    def check_writes(self, num_beams: int) -> None:
        """Refuse to generate what transformers' class of this model cannot.

        Raises:
            UserError: it cannot generate from embeddings, or not with several beams.
        """
        if self.abilities.tree:
            return
        name = type(self.model).__name__
        if not self.abilities.generates:
            raise UserError(
                f"{name} does not generate from embeddings what its own forward pass would; rank candidates instead"
            )
        if num_beams > 1 and not self.abilities.beams:
            raise UserError(f"{name} does not search with several beams; set num_beams=1")

    def texts(self, ids_BT: Tensor) -> list[str]:
        """What rows of token ids say up to their end, stripped."""
        end = self.prompt_format.eos_id  # which need not be marked as special: OPT's newline, a chat's own marks
        rows = [ids[: ids.index(end)] if end in ids else ids for ids in ids_BT.tolist()]
        return [text.strip() for text in self.prompt_format.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def embed(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Embeddings (T_i, L) of sequences of token ids, which go to the device together."""
        ids = [token for sequence in sequences for token in sequence]
        embedded = self.look_up(on_device(ids, self.embeddings.weight.device, torch.long))
        return list(embedded.split([len(sequence) for sequence in sequences]))

    def look_up(self, ids: Tensor) -> Tensor:
        """Embeddings (..., L) of token ids as the first layer is to receive them."""
        factor = self.abilities.embedding_factor
        return self.embeddings(ids) if factor == 1 else self.embeddings(ids) * factor

    def prefixes(self, visual_BQL: Tensor, prompts: Sequence[str], *, training: bool = False) -> list[Tensor]:
        """The embedded prompts (T_i, L): image prefix, visual tokens, prompt."""
        texts = [self.prompt_format.prompt_ids(prompt, training=training) for prompt in prompts]
        first, *rest = self.embed([self.prompt_format.image_prefix_ids, *texts])
        visual_BQL = visual_BQL.to(first.dtype)
        return [torch.cat([first, visual_QL, text]) for visual_QL, text in zip(visual_BQL, rest, strict=True)]

    def embedding_cosines(self, directions_BL: Tensor) -> Tensor:
        """Cosine (B, V) of vectors of length up to 1 with every token embedding, times their length."""
        table_VL = self.embeddings.weight
        received_BV = (directions_BL.to(table_VL.dtype) @ table_VL.T).float() * self._received_scale
        return received_BV / self.embedding_norms

    def embedding_deviation(self) -> Tensor:
        """Standard deviation of the entries of token embeddings as the model receives them: a scalar tensor."""
        return self.embeddings.weight.float().std() * self._received_scale

    @property
    def _received_scale(self) -> Tensor:
        """What separates the first layer's input from the table (1,), inside the embedding layer and outside."""
        return self.embedding_scale * self.abilities.embedding_factor

    def logits(self, hidden_NL: Tensor) -> Tensor:
        """Vocabulary logits in float32 for the given rows of final hidden states only, as the model's class makes them."""
        return self._logits(hidden_NL[None])[0].float()

    @abstractmethod
    def _logits(self, hidden_1NL: Tensor) -> Tensor: ...

    def _with_states(self, parts: Sequence[nn.Module], hidden_1NL: Tensor) -> Any:
        """The model with `parts` of it replaced by what returns these hidden states.

        Some classes scale hidden states before their output head, some scale or cap the logits behind it. So the class's own
        forward is called, on hidden states that are there already.
        """
        model = copy.copy(self.model)
        children: dict[str, Any] = dict(self.model._modules)
        for name, module in children.items():
            if any(module is part for part in parts):
                children[name] = _Computed(module, hidden_1NL)
        model._modules = children
        return model


class _Computed:
    """Stands for a module that was run: a call returns its final hidden states, anything else is asked of the module."""

    def __init__(self, module: nn.Module, hidden_BTL: Tensor) -> None:
        self._module, self._hidden_BTL = module, hidden_BTL

    def __call__(self, *_: Any, **__: Any) -> ModelOutput:
        return _FinalStates(last_hidden_state=self._hidden_BTL)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)  # OPT calls its base model's decoder
        return _Computed(found, self._hidden_BTL) if isinstance(found, nn.Module) else found


class _FinalStates(BaseModelOutput):
    """The output of a base model that has nothing but final hidden states, whatever a class looks for in it."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class DecoderLLM(LLM):
    """Decoder-only: the answer continues the prompt.

    Attributes:
        by_length: packed samples lie in one row without padding, whose attention knows their ends, not a mask.
    """

    kind = "decoder"
    auto_class = AutoModelForCausalLM
    prompt_format_kind = DecoderPromptFormat
    by_length: bool = False

    def roots(self) -> list[nn.Module]:
        """The decoder."""
        return [self.body]

    @property
    def body(self) -> nn.Module:
        """What turns embeddings into final hidden states: the base model, or where a class names none the token table's."""
        base: nn.Module = self.model.base_model
        return getattr(self.model, body_name(self.model)) if base is self.model else base

    def span(self, prompt: int, answer: int) -> int:
        """One sequence, without the answer's last token."""
        return prompt + answer - 1

    def hidden_states(
        self,
        embeddings_BTL: Tensor,
        *,
        cache: DynamicCache | None = None,
        positions_BT: Tensor | None = None,
        mask: Tensor | dict[str, Tensor] | None = None,
        **ends: Any,
    ) -> Tensor:
        """Final hidden states (B, T, L). Without a mask attention is causal; a cache is read and extended in place.

        `ends` of samples in one row are for its attention, see `attend_by_length`.
        """
        given = {"past_key_values": cache, "position_ids": positions_BT, "attention_mask": mask, **ends}
        # Not every class takes every argument; one that is needed and not taken shows when abilities are measured.
        given = {name: value for name, value in given.items() if value is not None}
        outputs = self.body(inputs_embeds=embeddings_BTL, use_cache=cache is not None, **given)
        return outputs.last_hidden_state

    def _logits(self, hidden_1NL: Tensor) -> Tensor:
        model = self._with_states([self.body], hidden_1NL)
        return model.forward(inputs_embeds=hidden_1NL, use_cache=False).logits

    def answer_states(
        self, prefixes: Sequence[Tensor], answers: Sequence[Sequence[int]], *, packed: bool = False
    ) -> AnswerStates:
        """One causal pass over `prompt answer`; the answer's last token is only ever predicted.

        Packed or not, rows are padded on the right, where a causal model's real tokens never look.
        """
        heard = self.embed([ids[:-1] for ids in answers])
        samples = [torch.cat([prefix, answer]) for prefix, answer in zip(prefixes, heard, strict=True)]
        lengths = [len(sample) for sample in samples]
        rows: Sequence[Sequence[int]] = [[sample] for sample in range(len(samples))]
        if packed and self.abilities.packed:
            rows = [range(len(samples))] if self.by_length else pack_rows(lengths, width=self.width)
        states = self.states_in_rows(samples, rows)
        hidden_SL = torch.cat(
            [hidden_TL[len(prefix) - 1 :] for prefix, hidden_TL in zip(prefixes, states, strict=True)]
        )
        positions = len(rows) * max(sum(lengths[k] for k in row) for row in rows)
        return AnswerStates(hidden_SL, positions, positions - sum(lengths))

    def states_in_rows(self, samples: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Final hidden states (T_i, L) of each of B embedded samples (T_i, L), which share rows but see themselves alone.

        Args:
            samples: prompts with their answers.
            rows: the numbers of the samples in each row.
        """
        lengths = [len(sample) for sample in samples]
        embeddings_RTL = pad_sequence([torch.cat([samples[k] for k in row]) for row in rows], batch_first=True)
        if len(rows) == 1 < len(samples) and self.by_length:
            hidden_RTL = self._states_by_length(embeddings_RTL, [lengths[k] for k in rows[0]])
        elif len(rows) < len(samples):
            layout = packed_layout(rows, lengths, device=embeddings_RTL.device)
            hidden_RTL = self._isolated_states(embeddings_RTL, layout)
        else:
            hidden_RTL = self.hidden_states(embeddings_RTL)
        states: dict[int, Tensor] = {}
        for row, hidden_TL in zip(rows, hidden_RTL, strict=True):
            filled = [lengths[k] for k in row]
            states |= zip(row, hidden_TL[: sum(filled)].split(filled), strict=True)
        return [states[k] for k in range(len(samples))]

    def _isolated_states(self, embeddings_RTL: Tensor, layout: RowLayout) -> Tensor:
        """Final hidden states of rows that hold several samples each."""
        distance_RTT = layout.position_RT[:, :, None] - layout.position_RT[:, None]
        mask = self._mask(block_causal_mask(layout), distance_BNK=distance_RTT)
        return self.hidden_states(embeddings_RTL, positions_BT=layout.position_RT, mask=mask)

    def attend_by_length(self) -> None:
        """From now on give packed samples to attention by their lengths; `abilities` tells whether that is right."""
        self.by_length = True
        self.model.set_attn_implementation(varlen.NAME)

    def _states_by_length(self, embeddings_1TL: Tensor, lengths: list[int]) -> Tensor:
        """Final hidden states of one row of samples of these lengths."""
        device = embeddings_1TL.device
        positions_1T = on_device([[place for length in lengths for place in range(length)]], device)
        # A mask of one place hides nothing. Without any, transformers would read the positions and make one.
        nothing = torch.zeros(1, 1, 1, dtype=torch.long, device=device)
        mask = self._mask(nothing == 0, distance_BNK=nothing)
        ends = varlen.ends_of(lengths, device)
        return self.hidden_states(embeddings_1TL, positions_BT=positions_1T, mask=mask, **ends)

    def prefill(self, prefixes: Sequence[Tensor]) -> Prefill:
        """Keep the prompts' keys and values; no window forgets any, masks do."""
        lengths, cache = [len(prefix) for prefix in prefixes], DynamicCache()
        hidden_BTL = self.hidden_states(pad_sequence(list(prefixes), batch_first=True), cache=cache)
        last_BL = torch.stack([row[length - 1] for row, length in zip(hidden_BTL, lengths, strict=True)])
        return Prefill(last_BL, lengths, cache, {}, _no_nodes(prefixes))

    def decode_tree(
        self, prompts: Prefill, tokens_BN: Tensor, depths_BN: Tensor, visible_BNK: Tensor, *, keep: bool = False
    ) -> Tensor:
        """A node's position is its prompt's length plus its depth."""
        device, depths_BK = tokens_BN.device, torch.cat([prompts.depths_BK, depths_BN], dim=1)
        lengths_B1 = torch.tensor(prompts.lengths, device=device)[:, None]
        prompt_BT = torch.arange(prompts.width, device=device).expand(len(tokens_BN), -1)
        positions_BN = lengths_B1 + depths_BN
        prompt_visible_BNT = (prompt_BT < lengths_B1)[:, None].expand(-1, tokens_BN.shape[1], -1)
        mask = self._mask(
            torch.cat([prompt_visible_BNT, visible_BNK], dim=2),
            distance_BNK=positions_BN[:, :, None] - torch.cat([prompt_BT, lengths_B1 + depths_BK], dim=1)[:, None],
        )
        hidden_BNL = self.hidden_states(
            self.look_up(tokens_BN), cache=prompts.cache, positions_BT=positions_BN, mask=mask
        )
        if keep:
            prompts.depths_BK = depths_BK
        else:
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
    def continue_rows(
        self,
        prefixes: Sequence[Tensor],
        *,
        repetition_penalty: float = 1.0,
        processors: Sequence[LogitsProcessor] = (),
        **options: Any,
    ) -> Any:
        """Rows are padded on the left, so that all of them continue at the same place; beams share a prompt's keys."""
        longest = max(len(prefix) for prefix in prefixes)
        (padding,) = self.embed([[self.prompt_format.pad_id]])
        rows_BTL = torch.stack([torch.cat([padding.expand(longest - len(prefix), -1), prefix]) for prefix in prefixes])
        mask_BT = torch.tensor([[0] * (longest - len(prefix)) + [1] * len(prefix) for prefix in prefixes])
        mask_BT = mask_BT.to(padding.device)
        if (beams := options.get("num_beams", 1)) > 1 and self.abilities.shared_beams:
            options["past_key_values"] = self._repeated_prompts(rows_BTL, mask_BT, beams)
        # The embeddings enter without token ids, so transformers counts new tokens only, with one exception: left to
        # itself it exempts as many of them from the penalty as a row has padding (5.23), and an answer would depend on
        # its neighbours in the batch.
        return self.model.generate(  # type: ignore[operator]
            inputs_embeds=rows_BTL,
            attention_mask=mask_BT,
            repetition_penalty=1.0,
            logits_processor=_processors(repetition_penalty, processors, skipped=0),
            **options,
        )

    def new_tokens(self, ids_BT: Tensor) -> Tensor:
        """All of them: the prompts entered as embeddings."""
        return ids_BT

    def _repeated_prompts(self, rows_BTL: Tensor, mask_BT: Tensor, times: int) -> DynamicCache:
        """Keys and values of all but the last place of each row, computed once and repeated for its beams.

        transformers' own beam search runs every prompt once a beam.
        """
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        if rows_BTL.shape[1] > 1:
            positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp_min(0)
            self.hidden_states(rows_BTL[:, :-1], cache=cache, positions_BT=positions_BT[:, :-1], mask=mask_BT[:, :-1])
            cache.batch_repeat_interleave(times)
        return cache


class EncoderDecoderLLM(LLM):
    """Encoder-decoder: the prompt is encoded, the answer decoded beside it."""

    kind = "encoder_decoder"
    auto_class = AutoModelForSeq2SeqLM
    prompt_format_kind = EncoderDecoderPromptFormat

    def roots(self) -> list[nn.Module]:
        """Encoder and decoder, one after the other."""
        return [self.model.get_encoder(), self.model.get_decoder()]

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **conventions: Any) -> None:
        super().__init__(model, tokenizer, **conventions)
        modules = model.get_decoder().modules()
        # T5's relative positions, which a tree needs; its first layer has them for all.
        self._relative: Any = next((m for m in modules if getattr(m, "has_relative_attention_bias", False)), None)
        start = getattr(model.config, "decoder_start_token_id", None)
        if start is None:
            raise ValueError(
                "the model's config.json has no decoder_start_token_id, with which an answer begins; add it"
            )
        self.start_id: int = start

    def span(self, prompt: int, answer: int) -> int:
        """Encoder and decoder count on their own; the start token stands for the answer's last."""
        return max(prompt, answer)

    def answer_states(
        self, prefixes: Sequence[Tensor], answers: Sequence[Sequence[int]], *, packed: bool = False
    ) -> AnswerStates:
        """Decode `start answer`; the answer's last token is only ever predicted."""
        if packed:
            raise ValueError("rows of an encoder-decoder model hold one sample each; take bucketed batches instead")
        encoded = self._encode(prefixes)
        longest = max(len(ids) for ids in answers)
        inputs = [[self.start_id, *ids[:-1]] + [self.prompt_format.pad_id] * (longest - len(ids)) for ids in answers]
        hidden_BTL = self._decode_states(on_device(inputs, self.embeddings.weight.device), encoded)
        hidden_SL = torch.cat([row[: len(ids)] for row, ids in zip(hidden_BTL, answers, strict=True)])
        positions = len(answers) * (max(len(prefix) for prefix in prefixes) + longest)
        filled = sum(len(prefix) + len(ids) for prefix, ids in zip(prefixes, answers, strict=True))
        return AnswerStates(hidden_SL, positions, positions - filled)

    def prefill(self, prefixes: Sequence[Tensor]) -> Prefill:
        """Encode the prompts and decode the start token, which leaves the keys and values of the encoder's states."""
        encoded, cache = self._encode(prefixes), EncoderDecoderCache(DynamicCache(), DynamicCache())
        start_B1 = torch.full((len(prefixes), 1), self.start_id, device=self.embeddings.weight.device)
        hidden_B1L = self._decode_states(start_B1, encoded, cache=cache)
        return Prefill(hidden_B1L[:, 0], [1] * len(prefixes), cache, encoded, _no_nodes(prefixes))

    def decode_tree(
        self, prompts: Prefill, tokens_BN: Tensor, depths_BN: Tensor, visible_BNK: Tensor, *, keep: bool = False
    ) -> Tensor:
        """A node's place after the start token is its depth; what T5 adds for its index is taken back."""
        dtype, nodes = self.embeddings.weight.dtype, tokens_BN.shape[1]
        depths_BK = torch.cat([prompts.depths_BK, depths_BN], dim=1)
        visible_BNK = torch.cat([visible_BNK.new_ones(len(tokens_BN), nodes, 1), visible_BNK], dim=2)
        place_BK = torch.cat([depths_BN.new_zeros(len(tokens_BN), 1), depths_BK + 1], dim=1)
        depth, keys = int(place_BK.max()) + 1, place_BK.shape[1]
        by_place_HKK = self._relative.compute_bias(depth, depth)[0]
        by_index_1HNK = self._relative.compute_bias(nodes, keys, past_seen_tokens=keys - nodes)
        wanted_BHNK = by_place_HKK[:, place_BK[:, keys - nodes :, None], place_BK[:, None]].transpose(0, 1)
        mask_BHNK = wanted_BHNK - by_index_1HNK + _additive(visible_BNK, dtype)[:, None]
        hidden_BNL = self._decode_states(tokens_BN, prompts.encoded, cache=prompts.cache, mask=mask_BHNK)
        if keep:
            prompts.depths_BK = depths_BK
        else:
            prompts.cache.self_attention_cache.crop(-nodes)
        return hidden_BNL

    @torch.inference_mode()
    def continue_rows(
        self,
        prefixes: Sequence[Tensor],
        *,
        repetition_penalty: float = 1.0,
        processors: Sequence[LogitsProcessor] = (),
        **options: Any,
    ) -> Any:
        """The decoder's start token counts neither as new nor for the penalty."""
        mask_BT = _row_mask(prefixes)
        return self.model.generate(  # type: ignore[operator]
            inputs_embeds=pad_sequence(list(prefixes), batch_first=True),
            attention_mask=mask_BT,
            repetition_penalty=1.0,
            logits_processor=_processors(repetition_penalty, processors, skipped=1),
            **options,
        )

    def new_tokens(self, ids_BT: Tensor) -> Tensor:
        """All but the start token."""
        return ids_BT[:, 1:]

    def _logits(self, hidden_1NL: Tensor) -> Tensor:
        base = self.model.base_model
        parts = [self.model.get_encoder(), self.model.get_decoder()] if base is self.model else [base]
        model = self._with_states(parts, hidden_1NL)
        encoded = _FinalStates(last_hidden_state=hidden_1NL)
        return model.forward(encoder_outputs=encoded, decoder_inputs_embeds=hidden_1NL, use_cache=False).logits

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


LLM_KINDS: dict[str, type[LLM]] = {llm.kind: llm for llm in (DecoderLLM, EncoderDecoderLLM)}


class _NewTokensPenalty(LogitsProcessor):
    """Repetition penalty that does not see the first tokens of a row."""

    def __init__(self, penalty: float, skipped: int) -> None:
        self.penalty = RepetitionPenaltyLogitsProcessor(float(penalty))
        self.skipped = skipped

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.penalty(input_ids[:, self.skipped :], scores)


def _processors(penalty: float, further: Sequence[LogitsProcessor], *, skipped: int) -> LogitsProcessorList:
    return LogitsProcessorList([*([] if penalty == 1 else [_NewTokensPenalty(penalty, skipped)]), *further])


def body_name(model: PreTrainedModel) -> str:
    """The name of the child of a causal language model that holds its token table, and with it all layers."""
    table = model.get_input_embeddings()
    return next(name for name, child in model.named_children() if any(part is table for part in child.modules()))


def _row_norms(table_VL: Tensor) -> Tensor:
    return table_VL.detach().float().norm(dim=-1).clamp_min(1e-6)


def _measure_table(llm: LLM, _: object) -> None:
    """A hook behind `load_state_dict`: a run may start from a language model that another has trained."""
    llm.frozen_norms = _row_norms(llm.embeddings.weight).mul(llm.embedding_scale)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


def _no_nodes(prefixes: Sequence[Tensor]) -> Tensor:
    return torch.zeros(len(prefixes), 0, dtype=torch.long, device=prefixes[0].device)


def _row_mask(rows: Sequence[Tensor]) -> Tensor:
    """1 at the rows' positions, 0 at the padding behind them: (B, T)."""
    return pad_sequence([torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows], batch_first=True)
