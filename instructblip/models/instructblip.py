"""InstructBLIP: image tokens and instruction -> Q-Former -> projection -> LLM (paper, section 2).

With a Q-Former that has no text branch it is BLIP-2's second stage, in which the instruction reaches the LLM alone (BLIP-2,
section 3.2).

Shape legend: B batch, F frames, P image tokens, V vision width, Q queries, D Q-Former width, T text tokens,
L language-model width, S supervised tokens in the batch.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from instructblip.models import generation
from instructblip.models.arguments import (
    check_candidates,
    check_choice,
    check_counts,
    check_decoding,
    check_images,
    check_names,
    check_noise,
    check_positions,
    check_texts,
    check_tokens,
    frame_counts,
)
from instructblip.models.base import Inputs, Model, Outputs, PartStructure, PassWorkload, Samples, blocks_of
from instructblip.models.decoding import Draws
from instructblip.models.llm import LLM
from instructblip.models.qformer import QFormer
from instructblip.models.ranking import TOKEN_BUDGET, deduplicated, rank_candidates
from instructblip.models.vision import Images, VisionEncoder


class InstructBLIP(Model):
    """A vision encoder, a Q-Former with its projection, and a language model: InstructBLIP, or BLIP-2's second stage.

    Outputs by name: `visual_prompt` (B, F * Q, L), the soft prompt; `visual_cosines` (B, V), cosines of its mean direction
    with the LLM's input embeddings; `embedding_length` (), their mean length; `answer_logits` (S, V), for each token of each
    answer, sample after sample.

    Args:
        vision: image encoder.
        vision_norm: trainable or calibrated normalisation between the encoder and the Q-Former (`ln_vision`).
        qformer: the Q-Former; with its text branch (`instruction_aware`) the model is InstructBLIP, else BLIP-2.
        qformer_tokenizer: its tokenizer (BERT's); None where it reads no text.
        llm: the language model; the projection's width follows it.
        max_instruction_tokens: longer instructions lose their beginning on the way into the Q-Former (128 as released).
        trained: the parts that train; the others are frozen.

    Raises:
        ValueError: a Q-Former that reads instructions, without a tokenizer.
    """

    PARTS = {"vision": ("vision",), "qformer": ("vision_norm", "qformer", "projection"), "llm": ("llm",)}  # noqa: RUF012
    held_parts = frozenset({"qformer"})
    OUTPUTS = frozenset({"visual_prompt", "visual_cosines", "embedding_length", "answer_logits"})
    SKILLS = frozenset({"rank", "generate"})

    def __init__(
        self,
        *,
        vision: VisionEncoder,
        vision_norm: nn.Module,
        qformer: QFormer,
        qformer_tokenizer: PreTrainedTokenizerBase | None,
        llm: LLM,
        max_instruction_tokens: int = 128,
        trained: Collection[str] = ("qformer",),
    ) -> None:
        super().__init__()
        if qformer.instruction_aware and qformer_tokenizer is None:
            raise ValueError("a Q-Former that reads instructions needs its tokenizer")
        self.vision = vision
        self.vision_norm = vision_norm
        self.qformer = qformer
        self.qformer_tokenizer = qformer_tokenizer
        self.llm = llm
        self.max_instruction_tokens = max_instruction_tokens
        self.projection = nn.Linear(qformer.width, llm.width)
        self._match_embedding_scale()
        self._fixed = [parameter for parameter in qformer.parameters() if not parameter.requires_grad]
        self.choose_trained(trained)

    @property
    def title(self) -> str:
        """InstructBLIP, or BLIP-2's second stage."""
        return "InstructBLIP" if self.qformer.instruction_aware else "BLIP-2's second stage"

    @property
    def device(self) -> torch.device:
        """That of the projection, which stands between all parts."""
        return self.projection.weight.device

    def tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        """The LLM's, and the Q-Former's where it reads instructions."""
        found = {"llm": self.llm.prompt_format.tokenizer}
        return found if self.qformer_tokenizer is None else found | {"qformer": self.qformer_tokenizer}

    def conventions(self) -> list[Any]:
        """Tokens around image, prompt and answer, and how the Q-Former reads instructions."""
        prompt_format = self.llm.prompt_format
        texts = [prompt_format.prompt_ids("A word?"), prompt_format.target_ids("A word.")]
        return [
            [prompt_format.image_prefix_ids, *texts],
            [self.max_instruction_tokens, self.qformer.instruction_aware],
        ]

    def structure(self) -> dict[str, PartStructure]:
        """The vision encoder and the LLM may be sharded; the Q-Former is small."""
        return {
            "vision": self.vision_structure(),
            "qformer": PartStructure(list(self.qformer.layers)),
            "llm": PartStructure(blocks_of(self.llm.model), self.llm.roots()),
        }

    def language_settings(self) -> Any:
        """The LLM's."""
        return self.llm.model.config

    def fixed_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the Q-Former that it was built with as fixed: text layers that nothing reads, embeddings by choice."""
        return iter(self._fixed)

    def normalised(self, tokens_NPV: Tensor) -> Tensor:
        """Image tokens (N, P, V) behind `ln_vision`, in the type of what trains: float32, unless the model was cast."""
        return self.vision_norm(tokens_NPV.to(self.projection.weight.dtype))

    def visual_prompt(self, tokens_BFPV: Tensor, instructions: Sequence[str]) -> Tensor:
        """Soft prompt (B, F * Q, L): each frame goes alone through the Q-Former with the same instruction."""
        return self._visual_prompt(tokens_BFPV, instructions)[0]

    def _visual_prompt(self, tokens_BFPV: Tensor, instructions: Sequence[str]) -> tuple[Tensor, int]:
        """The soft prompt, and the tokens of text that the Q-Former read for it."""
        batch, frames = tokens_BFPV.shape[:2]
        image_NPV = self.normalised(tokens_BFPV.flatten(0, 1))
        text_NT, mask_NT, tokens = None, None, 0
        if self.qformer.instruction_aware:
            text_BT, mask_BT = self._tokenize_instructions(instructions)
            tokens = frames * int(mask_BT.sum())
            text_BT, mask_BT = text_BT.to(image_NPV.device), mask_BT.to(image_NPV.device)
            text_NT = text_BT.repeat_interleave(frames, dim=0)
            mask_NT = mask_BT.repeat_interleave(frames, dim=0)
        query_NQD = self.qformer(image_NPV, text_NT, mask_NT).query_BQD
        return self.projection(query_NQD).view(batch, -1, self.llm.width), tokens

    def prepare(self, samples: Samples) -> Inputs:
        """Answers end with EOS; too long ones are cut on the right.

        Raises:
            EntryError: a prompt and its answer need more positions than the LLM has a table of.
        """
        count = check_images(samples.images)
        check_texts("instructions", samples.instructions, count)
        check_texts("targets", samples.targets, count)
        pairs = zip(samples.instructions, samples.targets, strict=True)
        answers = [self.llm.prompt_format.answer_ids(prompt, target) for prompt, target in pairs]
        # Rotary positions go on behind those that a model was made for, which one long sample of many may.
        if self.llm.has_position_table:
            self._check_positions(samples.images, samples.instructions, answers, training=True)
        return Inputs(samples.images, samples.instructions, answers, samples.image_ids, samples.positions)

    def forward(self, inputs: Inputs, wanted: Collection[str], *, packed: bool = False) -> Outputs:
        """See the class for the outputs. Of the LLM, only `answer_logits` needs its layers."""
        count = check_images(inputs.images)
        check_texts("prompts", inputs.prompts, count)
        check_tokens("answers", inputs.answers, count)
        check_names("wanted", wanted, self.OUTPUTS)
        visual_BQL, text = self._visual_prompt(self.image_tokens(inputs.images), inputs.prompts)
        tensors, workload = {"visual_prompt": visual_BQL}, PassWorkload(text=text)
        if "visual_cosines" in wanted:
            # The mean of unit vectors is long only where they agree, so every visual token learns to name the answer.
            tensors["visual_cosines"] = self.llm.embedding_cosines(F.normalize(visual_BQL, dim=-1).mean(dim=1))
        if "embedding_length" in wanted:
            tensors["embedding_length"] = self.llm.embedding_norms.mean()
        if "answer_logits" in wanted:
            prefixes = self.llm.prefixes(visual_BQL, inputs.prompts, training=True)
            states = self.llm.answer_states(prefixes, inputs.answers, packed=packed)
            tensors["answer_logits"] = self.llm.logits(states.hidden_SL)
            workload = PassWorkload(states.positions, states.padding, text)
        return Outputs({name: tensors[name] for name in wanted}, workload)

    def uses_every_weight(self, wanted: Collection[str]) -> bool:
        """Every output comes from the whole Q-Former; a vision encoder may end early, the LLM may be left out."""
        return self.full_parts == self.trained_parts <= {"qformer"}

    def packs(self) -> bool:
        """Where the LLM's class was seen to keep them apart."""
        return self.llm.abilities.packed

    def sample_length(self) -> Callable[[str, str, int], int]:
        """A picklable function: how many positions of the LLM a sample fills, from its (prompt, target, frames)."""
        return partial(self.llm.prompt_format.length, queries=self.qformer.query_tokens.shape[1])

    @torch.inference_mode()
    def rank(
        self,
        images: Images,
        prompts: Sequence[str],
        candidates: Sequence[Sequence[str]],
        *,
        normalize: str = "sum",
        include_eos: bool = True,
        token_budget: int = TOKEN_BUDGET,
    ) -> list[Tensor]:
        """Log-likelihood (nats) of every candidate answer: one float32 tensor a sample, in the candidates' order.

        Args:
            images: B pictures, clips or their image tokens.
            prompts: B prompts.
            candidates: B lists, of any lengths.
            normalize: `sum` over a candidate's tokens, or their `mean`.
            include_eos: count the end of sequence, without which a candidate that begins another always wins over it.
            token_budget: tokens that one pass through the LLM may hold; bounds memory, changes no score.

        Raises:
            ValueError: a wrong argument, by its name, before anything is computed.
        """
        count = check_images(images)
        check_texts("prompts", prompts, count)
        check_candidates(candidates, count)
        check_choice("normalize", normalize, ("sum", "mean"))
        check_counts({"token_budget": token_budget}, at_least=1)
        # Every text is tokenised once, and lists that are alike (a vocabulary) are worked on once.
        form = self.llm.prompt_format
        follows = [bool(form.text_before(prompt)) for prompt in prompts]
        lists, list_of = deduplicated(
            [(follow, tuple(texts)) for follow, texts in zip(follows, candidates, strict=True)]
        )
        tokens = {
            (follow, text): form.target_ids(text, include_eos, follows_text=follow)
            for follow, text in {(follow, text) for follow, texts in lists for text in texts}
        }
        if not all(tokens.values()):
            raise ValueError("candidates holds a text without tokens; set include_eos=True, or leave it out")
        ids = [[tokens[follow, text] for text in texts] for follow, texts in lists]
        longest = [max(ids[number], key=len) for number in list_of]
        self._check_positions(images, prompts, longest)
        prefixes = self.llm.prefixes(self.visual_prompt(self.image_tokens(images), prompts), prompts)
        return rank_candidates(self.llm, prefixes, ids, list_of, normalize=normalize, token_budget=token_budget)

    @torch.inference_mode()
    def generate(
        self,
        images: Images,
        prompts: Sequence[str] | None = None,
        *,
        num_beams: int = 1,
        max_new_tokens: int = 10,
        min_new_tokens: int = 1,
        length_penalty: float = 1.0,
        repetition_penalty: float = 1.0,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        noise: Tensor | None = None,
        beam_lengths: str = "new_tokens",
    ) -> list[str]:
        """Answer each prompt freely; the returned text never holds the prompt. Without prompts BLIP-2 captions the images.

        Lengths and the repetition penalty are over new tokens only. Greedy with one beam; with `do_sample` the next token
        is drawn from the smallest set of probability `top_p`, after division of the logits by `temperature`, with torch's
        global random stream or with `noise`: a number in [0, 1) for each new token of each image (B, max_new_tokens). The
        released defaults are 5 beams, 256 tokens, a repetition penalty of 1.5. `beam_lengths` is one of
        `generation.BEAM_LENGTHS`.

        Raises:
            ValueError: a wrong argument, by its name, before anything is computed.
            UserError: logits that are not finite.
        """
        count = check_images(images)
        if prompts is None:
            prompts = self._no_prompts(count)
        check_texts("prompts", prompts, count)
        check_decoding(
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            length_penalty=length_penalty,
            repetition_penalty=repetition_penalty,
            temperature=temperature,
            top_p=top_p,
        )
        check_choice("beam_lengths", beam_lengths, generation.BEAM_LENGTHS)
        check_noise(noise, count, max_new_tokens, do_sample=do_sample)
        if noise is not None and num_beams > 1:
            raise ValueError("noise draws one text for each image: num_beams=1")
        self._check_positions(images, prompts, [range(max_new_tokens)] * len(prompts))
        sampling: dict[str, Any] = {"do_sample": False}
        if noise is not None:
            sampling["draws"] = Draws(noise, temperature, top_p)
        elif do_sample:  # top_k=0 sets no limit; left out, transformers' default of 50 would
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        with generation.finite_logits(self.llm.model), generation.beam_lengths(self.llm.model, beam_lengths):
            return self.llm.generate(
                self.llm.prefixes(self.visual_prompt(self.image_tokens(images), prompts), prompts),
                num_beams=num_beams,
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                length_penalty=length_penalty,
                repetition_penalty=repetition_penalty,
                **sampling,
            )

    def _no_prompts(self, count: int) -> list[str]:
        if self.qformer.instruction_aware:
            raise ValueError("prompts is of type NoneType, and this Q-Former reads them; give a list of strings")
        return [""] * count

    def _check_positions(
        self, images: Images, prompts: Sequence[str], answers: Sequence[Sequence[int]], *, training: bool = False
    ) -> None:
        """Refuse prompts that the LLM has too few positions for, with the visual tokens of their frames and an answer."""
        texts, queries = self.llm.prompt_format, self.qformer.query_tokens.shape[1]
        spans = [
            self.llm.span(
                len(texts.image_prefix_ids) + n * queries + len(texts.prompt_ids(text, training=training)), len(ids)
            )
            for n, text, ids in zip(frame_counts(images), prompts, answers, strict=True)
        ]
        check_positions(spans, self.llm.max_positions)

    @torch.no_grad()
    def _match_embedding_scale(self) -> None:
        """Start the projection so that visual tokens are as large as the LLM's own embeddings.

        A language model fed with inputs of another scale starts from a loss several times that of ignoring them.
        """
        norm = self.qformer.output_norm
        power = norm.weight.square().sum() + norm.bias.square().sum()  # expected squared length of a query output
        self.projection.weight.normal_().mul_(self.llm.embedding_deviation() / power.sqrt())
        self.projection.bias.zero_()

    def _tokenize_instructions(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        # [CLS] and [SEP] stay, as in the released model; what is too long loses its beginning.
        assert self.qformer_tokenizer is not None
        encoded = self.qformer_tokenizer(
            list(instructions),
            padding="longest",
            truncation=True,
            max_length=self.max_instruction_tokens,
            return_tensors="pt",
        )
        return encoded["input_ids"], encoded["attention_mask"]
