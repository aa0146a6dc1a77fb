"""A vision encoder, a connector and a language model: what is the same whatever connects the two.

A connector turns the image tokens of a frame, and the instruction where it reads one, into visual tokens of the LLM's
width: InstructBLIP's is a Q-Former (`instructblip.py`), LLaVA's reads the patches (`llava.py`).

Shape legend: B batch, F frames, P image tokens, V vision width, Q visual tokens of a frame, T text tokens,
L language-model width, S supervised tokens in the batch.
"""

import itertools
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from instructblip.models import abilities, generation
from instructblip.models.arguments import (
    Decoding,
    DecodingOptions,
    check_candidates,
    check_choice,
    check_counts,
    check_images,
    check_names,
    check_positions,
    check_texts,
    check_tokens,
    frame_counts,
    shows_options,
)
from instructblip.models.base import Inputs, Model, Outputs, PassWorkload, Samples
from instructblip.models.decoding import BEAM_LENGTHS
from instructblip.models.facts import LANGUAGE
from instructblip.models.llm import LLM
from instructblip.models.pruning import best_candidates
from instructblip.models.ranking import TOKEN_BUDGET, deduplicated, greedy_candidates, rank_candidates
from instructblip.models.vision import Images


class VisionLanguageModel(Model):
    """A language model that reads visual tokens in front of its prompts; a subclass makes these.

    Outputs by name: `visual_prompt` (B, F * Q, L), the soft prompt; `visual_cosines` (B, V), cosines of its mean direction
    with the LLM's input embeddings; `embedding_length` (), their mean length; `answer_logits` (S, V), for each token of each
    answer, sample after sample.

    Attributes:
        llm: the language model, a part of its own.
        connector_part: name of the part that connects, with its normalisation of image tokens.
    """

    OUTPUTS = LANGUAGE
    SKILLS = frozenset({"rank", "generate"})
    DECODING = Decoding()
    connector_part: ClassVar[str]
    llm: LLM

    @property
    @abstractmethod
    def frame_tokens(self) -> int:
        """Q, visual tokens of a frame."""

    @abstractmethod
    def _visual_prompt(self, tokens_BFPV: Tensor, instructions: Sequence[str]) -> tuple[Tensor, int]:
        """The soft prompt, and the tokens of text that the connector read for it."""

    @abstractmethod
    def _no_prompts(self, count: int) -> list[str]:
        """What stands for prompts where none are given.

        Raises:
            ValueError: there must be some.
        """

    def visual_prompt(self, tokens_BFPV: Tensor, instructions: Sequence[str]) -> Tensor:
        """Soft prompt (B, F * Q, L): each frame goes alone through the connector, with the same instruction."""
        return self._visual_prompt(tokens_BFPV, instructions)[0]

    def language_settings(self) -> Any:
        """The LLM's."""
        return self.llm.model.config

    def text_conventions(self) -> list[Any]:
        """Tokens around image, prompt and answer."""
        prompt_format = self.llm.prompt_format
        texts = [prompt_format.prompt_ids("A word?"), prompt_format.target_ids("A word.")]
        return [prompt_format.image_prefix_ids, *texts]

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
        return Inputs(
            samples.images,
            samples.instructions,
            answers,
            samples.image_ids,
            samples.positions,
            pixel_ids=samples.pixel_ids,
        )

    def forward(self, inputs: Inputs, wanted: Collection[str], *, packed: bool = False) -> Outputs:
        """See the class for the outputs. Of the LLM, only `answer_logits` needs its layers."""
        count = check_images(inputs.images)
        check_texts("prompts", inputs.prompts, count)
        check_tokens("answers", inputs.answers, count)
        check_names("wanted", wanted, self.OUTPUTS)
        visual_BQL, text = self._visual_prompt(self.image_tokens(inputs.images, inputs.pixel_ids), inputs.prompts)
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
        """Every output comes from the whole connector; a vision encoder may end early, the LLM may be left out."""
        return self.full_parts == self.trained_parts <= {self.connector_part}

    def packs(self) -> bool:
        """Where the LLM's class was seen to keep them apart."""
        return self.llm.abilities.packed

    def attend_by_length(self) -> None:
        """By the LLM, if it is decoder-only."""
        with torch.inference_mode():
            abilities.attend_by_length(self.llm)

    def sample_length(self) -> Callable[[str, str, int], int]:
        """A picklable function: how many positions of the LLM a sample fills, from its (prompt, target, frames)."""
        return partial(self.llm.prompt_format.length, queries=self.frame_tokens)

    @torch.inference_mode()
    def rank(
        self,
        images: Images,
        prompts: Sequence[str],
        candidates: Sequence[Sequence[str]],
        *,
        normalize: str = "sum",
        include_eos: bool = True,
        best: int | None = None,
        token_budget: int = TOKEN_BUDGET,
    ) -> list[Tensor]:
        """Log-likelihood (nats) of every candidate answer: one float32 tensor a sample, in the candidates' order.

        Args:
            images: B pictures, clips or their image tokens.
            prompts: B prompts.
            candidates: B lists, of any lengths.
            normalize: `sum` over a candidate's tokens, or their `mean`.
            include_eos: count the end of sequence, without which a candidate that begins another always wins over it.
            best: only so many are needed, the likeliest. The others may be left out where a part of their tokens shows that
                they are none of these, and have -inf; the best ones and their scores stay the same. None: all are needed.
            token_budget: tokens that one pass through the LLM may hold; bounds memory, changes no score.

        Raises:
            ValueError: a wrong argument, by its name, before anything is computed.
        """
        count = check_images(images)
        check_texts("prompts", prompts, count)
        check_candidates(candidates, count)
        check_choice("normalize", normalize, ("sum", "mean"))
        check_counts({"token_budget": token_budget} | ({} if best is None else {"best": best}), at_least=1)
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
        score = rank_candidates if best is None else partial(best_candidates, best=best)
        return score(self.llm, prefixes, ids, list_of, normalize=normalize, token_budget=token_budget)

    @torch.inference_mode()
    def is_greedy(
        self,
        images: Images,
        prompts: Sequence[str],
        candidates: Sequence[Sequence[str]],
        *,
        include_eos: bool = True,
        token_budget: int = TOKEN_BUDGET,
    ) -> list[list[bool]]:
        """Whether greedy decoding would write each candidate: each of its tokens is the likeliest in its place.

        Args:
            images, prompts, candidates, include_eos, token_budget: as of `rank`.

        Raises:
            ValueError: as `rank`.
        """
        count = check_images(images)
        check_texts("prompts", prompts, count)
        check_candidates(candidates, count)
        check_counts({"token_budget": token_budget}, at_least=1)
        form = self.llm.prompt_format
        ids = [
            [form.target_ids(text, include_eos, follows_text=bool(form.text_before(prompt))) for text in texts]
            for prompt, texts in zip(prompts, candidates, strict=True)
        ]
        self._check_positions(images, prompts, [max(tokens, key=len) for tokens in ids])
        prefixes = self.llm.prefixes(self.visual_prompt(self.image_tokens(images), prompts), prompts)
        rows = [prefix for prefix, tokens in zip(prefixes, ids, strict=True) for _ in tokens]
        found = greedy_candidates(self.llm, rows, [own for tokens in ids for own in tokens], token_budget)
        ends = list(itertools.accumulate(map(len, ids)))
        return [found[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    @torch.inference_mode()
    @shows_options(DECODING)
    def generate(
        self,
        images: Images,
        prompts: Sequence[str] | None = None,
        *,
        beam_lengths: str = "new_tokens",
        at_once: int | None = None,
        **options: Unpack[DecodingOptions],
    ) -> list[str]:
        """Answer each prompt freely; the returned text never holds the prompt. Without prompts BLIP-2 captions the images.

        Lengths and the repetition penalty are over new tokens only. The released defaults are 5 beams, 256 tokens, a
        repetition penalty of 1.5.

        Args:
            images: B pictures, clips or their image tokens.
            prompts: B prompts.
            beam_lengths: how a search counts its tokens, one of `decoding.BEAM_LENGTHS`.
            at_once: so many images are worked on together, at most: as some texts end, others are begun. None: all.
            options: of `arguments.Decoding`, which says what they are.

        Raises:
            ValueError: a wrong argument, by its name, before anything is computed.
            UserError: logits that are not finite.
        """
        count = check_images(images)
        if prompts is None:
            prompts = self._no_prompts(count)
        check_texts("prompts", prompts, count)
        decoding = self.DECODING.given(options, count)
        check_choice("beam_lengths", beam_lengths, tuple(BEAM_LENGTHS))
        self._check_positions(images, prompts, [range(decoding.max_new_tokens)] * len(prompts))
        if at_once is not None:
            check_counts({"at_once": at_once}, at_least=1)
        generation.check_write(self.llm, decoding, beam_lengths)
        prefixes = self._prefixes(images, prompts, at_once or count)
        return generation.write(self.llm, prefixes, decoding, beam_lengths=beam_lengths, at_once=at_once)

    def _prefixes(self, images: Images, prompts: Sequence[str], at_once: int) -> list[Tensor]:
        """The LLM's embedded prompts (T_i, L), so many by one pass of the vision encoder and the connector."""
        found: list[Tensor] = []
        for first in range(0, len(prompts), at_once):
            asked, tokens_BFPV = prompts[first : first + at_once], self.image_tokens(images[first : first + at_once])
            found += self.llm.prefixes(self.visual_prompt(tokens_BFPV, asked), asked)
        return found

    def _check_positions(
        self, images: Images, prompts: Sequence[str], answers: Sequence[Sequence[int]], *, training: bool = False
    ) -> None:
        """Refuse prompts that the LLM has too few positions for, with the visual tokens of their frames and an answer."""
        texts, queries = self.llm.prompt_format, self.frame_tokens
        spans = [
            self.llm.span(
                len(texts.image_prefix_ids) + n * queries + len(texts.prompt_ids(text, training=training)), len(ids)
            )
            for n, text, ids in zip(frame_counts(images), prompts, answers, strict=True)
        ]
        check_positions(spans, self.llm.max_positions)
