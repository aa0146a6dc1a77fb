"""InstructBLIP: image tokens and instruction -> Q-Former -> projection -> frozen LLM (paper, section 2).

Shape legend: B batch, F frames, P image tokens, V vision width, Q queries, D Q-Former width, T text tokens,
L language-model width, S supervised tokens in the batch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from instructblip.images import resize_square
from instructblip.models.arguments import (
    check_candidates,
    check_choice,
    check_counts,
    check_decoding,
    check_images,
    check_positions,
    check_texts,
)
from instructblip.models.frozen import FrozenModule
from instructblip.models.llm import LLM
from instructblip.models.qformer import QFormer
from instructblip.models.ranking import TOKEN_BUDGET, deduplicated, rank_candidates
from instructblip.models.vision import VisionEncoder

# Tensors are frozen image tokens (B, F, P, V), or uint8 frames (B, F, 3, H, W); pictures are PIL images or lists of frames.
Images = Tensor | Sequence[Image.Image | Sequence[Image.Image]]


# Inverse temperature of the alignment loss: high enough that a cosine of 1 stands out among a vocabulary of 50,000
# (log 50,000 = 10.8), low enough for an even loss; the LLM's own output head is several times as sharp.
_ALIGNMENT_SCALE = 25.0


class Loss(NamedTuple):
    """Cross-entropy summed over supervised tokens (nats), its terms, and how many tokens of each sample they are.

    Sums, not means: only the training loop knows the number of supervised tokens in the global batch. `positions` are the
    places of the pass through the LLM, `padding` those of them that hold nothing, `text` the tokens of the instructions in
    the Q-Former, once a frame.
    """

    total: Tensor
    per_sample: Tensor  # (B,), detached
    tokens_per_sample: Tensor  # (B,), int64
    positions: int = 0
    padding: int = 0
    text: int = 0


class InstructBLIP(nn.Module):
    """A frozen vision encoder, a trainable Q-Former with its projection, and a frozen language model.

    Args:
        vision: frozen image encoder.
        vision_norm: trainable or calibrated normalisation between the encoder and the Q-Former (`ln_vision`).
        qformer: the Q-Former; trained.
        qformer_tokenizer: its tokenizer (BERT's).
        llm: the frozen language model; the projection's width follows it.
        max_instruction_tokens: longer instructions lose their beginning on the way into the Q-Former (128 as released).
    """

    def __init__(
        self,
        *,
        vision: VisionEncoder,
        vision_norm: nn.Module,
        qformer: QFormer,
        qformer_tokenizer: PreTrainedTokenizerBase,
        llm: LLM,
        max_instruction_tokens: int = 128,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.vision_norm = vision_norm
        self.qformer = qformer
        self.qformer_tokenizer = qformer_tokenizer
        self.llm = llm
        self.max_instruction_tokens = max_instruction_tokens
        self.projection = nn.Linear(qformer.width, llm.width)
        self._match_embedding_scale()

    def trainable_state(self) -> dict[str, Tensor]:
        """Everything that is not frozen: parameters and buffers outside the vision encoder and the LLM."""
        # The model's own state_dict would go through the frozen parts as well, whose blocks may be shared out among
        # processes: its hooks reshard them, and a process that does so alone gathers other blocks than the rest afterwards.
        return {
            name: tensor
            for part, module in self.named_children()
            if not isinstance(module, FrozenModule)
            for name, tensor in module.state_dict(prefix=f"{part}.").items()
        }

    def image_tokens(self, images: Images) -> Tensor:
        """Frozen image tokens (B, F, P, V) of pictures or uint8 frames; tokens (from a feature cache) pass through."""
        if not isinstance(images, Tensor):
            frames = [[image] if isinstance(image, Image.Image) else list(image) for image in images]
            size = self.vision.image_size
            images = torch.stack(
                [torch.stack([resize_square(frame.convert("RGB"), size) for frame in clip]) for clip in frames]
            )
        images = images.to(self.projection.weight.device)
        if images.dtype != torch.uint8:
            return images
        return self.vision(images.flatten(0, 1)).unflatten(0, images.shape[:2])

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
        query_NQD = self.qformer(image_NPV, text_NT, mask_NT)
        return self.projection(query_NQD).view(batch, -1, self.llm.width), tokens

    def forward(
        self,
        images: Images,
        instructions: Sequence[str],
        targets: Sequence[str],
        *,
        through_llm: bool = True,
        packed: bool = False,
    ) -> Loss:
        """Language-model loss of the targets given images and instructions.

        Args:
            images: B pictures, clips or their image tokens.
            instructions: B prompts.
            targets: B answers; EOS is added and supervised.
            through_llm: False is the alignment loss, for a Q-Former and projection that have never met this LLM: among all
                its input embeddings the visual tokens must point nearest to that of the answer's first token (a
                cross-entropy over cosines), and be as long as embeddings are (the squared log of the ratio).
                It costs a small part of a pass through the LLM and teaches the projection the language of its inputs.
            packed: several samples in a row of the LLM, each blind to the others: less padding, the same loss.

        Raises:
            ValueError: a wrong argument, by its name; packed, and the LLM is no decoder-only one.
        """
        count = check_images(images)
        check_texts("instructions", instructions, count)
        check_texts("targets", targets, count)
        visual_BQL, text = self._visual_prompt(self.image_tokens(images), instructions)
        if not through_llm:
            return self._alignment_loss(visual_BQL, targets)._replace(text=text)
        prefixes = self.llm.prefixes(visual_BQL, instructions, truncate=True)
        answers = [self.llm.prompt_format.target_ids(text) for text in targets]
        states = self.llm.answer_states(prefixes, answers, packed=packed)
        labels_S = torch.tensor([token for ids in answers for token in ids], device=states.hidden_SL.device)
        loss = _summed_loss(self.llm.logits(states.hidden_SL), labels_S, [len(ids) for ids in answers])
        return loss._replace(positions=states.positions, padding=states.padding, text=text)

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
        lists, list_of = deduplicated([tuple(texts) for texts in candidates])
        texts = {text for texts in lists for text in texts}
        tokens = {text: self.llm.prompt_format.target_ids(text, include_eos) for text in texts}
        ids = [[tokens[text] for text in texts] for texts in lists]
        check_positions(self._prompt_lengths(images, prompts), max(map(len, tokens.values())), self.llm.max_positions)
        prefixes = self.llm.prefixes(self.visual_prompt(self.image_tokens(images), prompts), prompts)
        return rank_candidates(self.llm, prefixes, ids, list_of, normalize=normalize, token_budget=token_budget)

    @torch.inference_mode()
    def generate(
        self,
        images: Images,
        prompts: Sequence[str],
        *,
        num_beams: int = 1,
        max_new_tokens: int = 10,
        min_new_tokens: int = 1,
        length_penalty: float = 1.0,
        repetition_penalty: float = 1.0,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> list[str]:
        """Answer each prompt freely; the returned text never holds the prompt.

        Lengths and the repetition penalty are over new tokens only. Greedy with one beam; with `do_sample` the next token
        is drawn (torch's global random stream) from the smallest set of probability `top_p`, after division of the logits
        by `temperature`. The released defaults are 5 beams, 256 tokens, a repetition penalty of 1.5.

        Raises:
            ValueError: a wrong argument, by its name, before anything is computed.
        """
        check_texts("prompts", prompts, check_images(images))
        check_decoding(
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            length_penalty=length_penalty,
            repetition_penalty=repetition_penalty,
            temperature=temperature,
            top_p=top_p,
        )
        check_positions(self._prompt_lengths(images, prompts), max_new_tokens, self.llm.max_positions)
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if do_sample else {"do_sample": False}
        )
        return self.llm.generate(
            self.llm.prefixes(self.visual_prompt(self.image_tokens(images), prompts), prompts),
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            length_penalty=length_penalty,
            repetition_penalty=repetition_penalty,
            **sampling,
        )

    def _prompt_lengths(self, images: Images, prompts: Sequence[str]) -> list[int]:
        """Positions that each prompt fills in the LLM, with the visual tokens of its frames."""
        texts, queries = self.llm.prompt_format, self.qformer.query_tokens.shape[1]
        clips = [images.shape[1]] * len(images) if isinstance(images, Tensor) else images
        frames = [
            clip if isinstance(clip, int) else 1 if isinstance(clip, Image.Image) else len(clip) for clip in clips
        ]
        before = len(texts.image_prefix_ids)
        return [before + n * queries + len(texts.prompt_ids(text)) for n, text in zip(frames, prompts, strict=True)]

    def save_huggingface(self, folder: str | Path) -> None:
        """Write a folder that transformers' `InstructBlipForConditionalGeneration` and `InstructBlipProcessor` open.

        Raises:
            UserError: parts that their format cannot hold.
        """
        from instructblip.weights.transformers_write import save_huggingface  # which knows this class

        save_huggingface(self, Path(folder))

    def _alignment_loss(self, visual_BQL: Tensor, targets: Sequence[str]) -> Loss:
        # The mean of unit vectors is long only where they agree, so every visual token learns to name the answer.
        directions_BL = F.normalize(visual_BQL, dim=-1).mean(dim=1)
        logits_BV = _ALIGNMENT_SCALE * self.llm.embedding_cosines(directions_BL)
        first_B = torch.tensor(
            [self.llm.prompt_format.target_ids(text)[0] for text in targets], device=logits_BV.device
        )
        loss = _summed_loss(logits_BV, first_B, [1] * len(targets))
        # Directions alone would let the tokens' lengths drift far from anything the LLM knows.
        stretch_BQ = visual_BQL.norm(dim=-1).div(self.llm.embedding_norms.mean()).log()
        return loss._replace(total=loss.total + stretch_BQ.square().mean(dim=1).sum())

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
        encoded = self.qformer_tokenizer(
            list(instructions),
            padding="longest",
            truncation=True,
            max_length=self.max_instruction_tokens,
            return_tensors="pt",
        )
        return encoded["input_ids"], encoded["attention_mask"]


def _summed_loss(logits_SV: Tensor, labels_S: Tensor, counts: Sequence[int]) -> Loss:
    losses_S = F.cross_entropy(logits_SV, labels_S, reduction="none")
    counts_B = torch.tensor(counts, device=losses_S.device)
    sample_S = torch.repeat_interleave(torch.arange(len(counts), device=losses_S.device), counts_B)
    per_sample_B = torch.zeros(len(counts), device=losses_S.device).index_add(0, sample_S, losses_S.detach())
    return Loss(losses_S.sum(), per_sample_B, counts_B)
