"""InstructBLIP: image tokens and instruction -> Q-Former -> projection -> LLM (paper, section 2).

With a Q-Former that has no text branch it is BLIP-2's second stage, in which the instruction reaches the LLM alone (BLIP-2,
section 3.2).

Shape legend: B batch, F frames, P image tokens, V vision width, Q queries, D Q-Former width, T text tokens,
L language-model width, S supervised tokens in the batch.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from instructblip.devices import to_device
from instructblip.models.arguments import check_images, check_texts
from instructblip.models.attention import ImageAttention, recorded_attention
from instructblip.models.base import PartStructure, blocks_of
from instructblip.models.llm import LLM
from instructblip.models.qformer import QFormer
from instructblip.models.vision import Images, VisionEncoder
from instructblip.models.vision_language import VisionLanguageModel


class InstructBLIP(VisionLanguageModel):
    """A vision encoder, a Q-Former with its projection, and a language model: InstructBLIP, or BLIP-2's second stage.

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
    connector_part = "qformer"

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
        return [self.text_conventions(), [self.max_instruction_tokens, self.qformer.instruction_aware]]

    @property
    def frame_tokens(self) -> int:
        """The queries."""
        return self.qformer.query_tokens.shape[1]

    def structure(self) -> dict[str, PartStructure]:
        """The vision encoder and the LLM may be sharded; the Q-Former is small."""
        return {
            "vision": self.vision_structure(),
            "qformer": PartStructure(list(self.qformer.layers)),
            "llm": PartStructure(blocks_of(self.llm.model), self.llm.roots()),
        }

    def fixed_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the Q-Former that it was built with as fixed: text layers that nothing reads, embeddings by choice."""
        return iter(self._fixed)

    @torch.inference_mode()
    def attention(self, images: Images, prompts: Sequence[str] | None = None) -> ImageAttention:
        """Where the queries look, in the light of the prompts where the Q-Former reads them.

        Args:
            images: B pictures, clips or their image tokens.
            prompts: B prompts; BLIP-2 needs none.

        Raises:
            ValueError: a wrong argument, by its name, before anything is computed.
        """
        count = check_images(images)
        prompts = self._no_prompts(count) if prompts is None else prompts
        check_texts("prompts", prompts, count)
        tokens_BFPV = self.image_tokens(images)
        with recorded_attention(self.qformer) as weights:
            self.visual_prompt(tokens_BFPV, prompts)
        return ImageAttention.of(weights, self.vision, frames=tokens_BFPV.shape[1])

    def normalised(self, tokens_NPV: Tensor) -> Tensor:
        """Image tokens (N, P, V) behind `ln_vision`, in the type of what trains: float32, unless the model was cast."""
        return self.vision_norm(tokens_NPV.to(self.projection.weight.dtype))

    def _visual_prompt(self, tokens_BFPV: Tensor, instructions: Sequence[str]) -> tuple[Tensor, int]:
        """The soft prompt, and the tokens of text that the Q-Former read for it."""
        batch, frames = tokens_BFPV.shape[:2]
        image_NPV = self.normalised(tokens_BFPV.flatten(0, 1))
        text_NT, mask_NT, tokens = None, None, 0
        if self.qformer.instruction_aware:
            text_BT, mask_BT = self._tokenize_instructions(instructions)
            tokens = frames * int(mask_BT.sum())
            text_BT, mask_BT = to_device(text_BT, image_NPV.device), to_device(mask_BT, image_NPV.device)
            text_NT = text_BT.repeat_interleave(frames, dim=0)
            mask_NT = mask_BT.repeat_interleave(frames, dim=0)
        query_NQD = self.qformer(image_NPV, text_NT, mask_NT).query_BQD
        return self.projection(query_NQD).view(batch, -1, self.llm.width), tokens

    def _no_prompts(self, count: int) -> list[str]:
        if self.qformer.instruction_aware:
            raise ValueError("prompts is of type NoneType, and this Q-Former reads them; give a list of strings")
        return [""] * count

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
        # [CLS] and [SEP] stay, as in the released model; what is too long loses its beginning. Padding stands behind,
        # whatever the tokenizer's folder says: positions count from the row's first place.
        assert self.qformer_tokenizer is not None
        encoded = self.qformer_tokenizer(
            list(instructions),
            padding="longest",
            padding_side="right",
            truncation=True,
            max_length=self.max_instruction_tokens,
            return_tensors="pt",
        )
        return encoded["input_ids"], encoded["attention_mask"]
