"""BLIP-2's first stage: a Q-Former that contrasts, matches and captions, without a language model (BLIP-2, section 3.1).

It is also the model of BLIP-2's retrieval, matching and features. It gives outputs; losses are made of them elsewhere.

Shape legend: B batch, C texts, F frames, P image tokens, U vision width, Q queries, T text tokens, D Q-Former width, E width
of the projected features, N rows of any kind, S supervised tokens in the batch, W vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from instructblip.models.arguments import Decoding, DecodingOptions, check_images, shows_options
from instructblip.models.attention import ImageAttention, recorded_attention
from instructblip.models.base import Inputs, Outputs, PartStructure, PassWorkload
from instructblip.models.decoding import decode
from instructblip.models.facts import STAGE1
from instructblip.models.pairs import ImageOutputs, PairModel, PairOutputs, TextOutputs, check_pairs
from instructblip.models.qformer import QFormer
from instructblip.models.streaming import on_ids
from instructblip.models.transformer import KeyValueCache
from instructblip.models.vision import Images, VisionEncoder


@dataclass(frozen=True)
class QueryOutputs(ImageOutputs):
    """What `BLIP2.encode_images` returns.

    Attributes:
        cache: the queries' keys and values, for `encode_captions`.
    """

    cache: KeyValueCache


class CaptionOutputs(NamedTuple):
    """What `BLIP2.encode_captions` returns, N tokens of all captions one after the other.

    Attributes:
        text_BTD: states of the captions.
        logits_NW: of every token that follows another; padding has none.
        targets_N: those tokens.
        tokens_B: how many each caption has.
    """

    text_BTD: Tensor
    logits_NW: Tensor
    targets_N: Tensor
    tokens_B: Tensor


class BLIP2(PairModel):
    """A vision encoder and a Q-Former with its heads.

    Outputs by name: `image_projected` (B, Q, E) and `text_projected` (B, E), unit length, and `temperature` (), which their
    scalar products are divided by; `answer_logits` (S, W), for each token of each caption, sample after sample;
    `match_logits` (3, B, 2): no match, match, of each sample's own pair, of its text with its partner's image, of its image
    with its partner's text. Logits are in float32, whatever the passes are computed in.

    Args:
        vision: image encoder.
        vision_norm: normalisation between the encoder and the Q-Former (`ln_vision`).
        qformer: with text outputs; without a language-model head, which transformers' format has no place for, it does not
            caption.
        tokenizer: the Q-Former's (BERT's).
        feature_width: E.
        max_text_tokens: longer texts lose their end, but for [SEP]. 32 in training; retrieval is evaluated with 35.
        start_token: begins a caption in the place of [CLS].
        temperature: starting value of what similarities are divided by.
        trained: the parts that train; the others are frozen.

    Raises:
        ValueError: a Q-Former without text outputs, or a tokenizer without the start token.
    """

    PARTS = {  # noqa: RUF012
        "vision": ("vision",),
        "qformer": (
            "vision_norm",
            "qformer",
            "vision_projection",
            "text_projection",
            "matching_head",
            "temperature",
        ),
    }

    held_parts = frozenset({"qformer"})
    OUTPUTS = STAGE1
    SKILLS = frozenset({"caption", "retrieve", "match"})
    DECODING = Decoding(num_beams=3, max_new_tokens=29, min_new_tokens=9, top_p=0.9)

    def __init__(
        self,
        *,
        vision: VisionEncoder,
        vision_norm: nn.Module,
        qformer: QFormer,
        tokenizer: PreTrainedTokenizerBase,
        feature_width: int = 256,
        max_text_tokens: int = 32,
        start_token: str = "[DEC]",
        temperature: float = 0.07,
        trained: Collection[str] = ("qformer",),
    ) -> None:
        super().__init__()
        if not qformer.text_outputs:
            raise ValueError("BLIP-2's first stage needs a Q-Former with text outputs")
        if start_token not in tokenizer.get_vocab():
            raise ValueError(f"the tokenizer has no {start_token}, which begins a caption; add it")
        self.vision = vision
        self.vision_norm = vision_norm
        self.qformer = qformer
        self.tokenizer = tokenizer
        self.max_text_tokens = max_text_tokens
        self.start_id: int = tokenizer.get_vocab()[start_token]
        self._add_heads(qformer.width, qformer.width, feature_width, temperature)
        self._fixed = [parameter for parameter in qformer.parameters() if not parameter.requires_grad]
        self.choose_trained(trained)

    @property
    def title(self) -> str:
        """BLIP-2's first stage."""
        return "BLIP-2's first stage"

    def calls(self) -> list[str]:
        """All but ranking, and captions where there is a language-model head."""
        return [name for name in super().calls() if name != "generate" or self.qformer.lm_head is not None]

    @property
    def device(self) -> torch.device:
        """That of the temperature; all parts lie together."""
        return self.temperature.device

    def tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        """The Q-Former's."""
        return {"qformer": self.tokenizer}

    def conventions(self) -> list[Any]:
        """Tokens of a text, and of a caption's beginning."""
        return [self.token_ids(["A word."]), self.max_text_tokens, self.start_id]

    def structure(self) -> dict[str, PartStructure]:
        """The vision encoder may be sharded; the Q-Former is small."""
        return {"vision": self.vision_structure(), "qformer": PartStructure(list(self.qformer.layers))}

    def fixed_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the Q-Former that it was built with as fixed: embeddings by choice."""
        return iter(self._fixed)

    @property
    def _read_dtype(self) -> torch.dtype:
        return self.vision_projection.weight.dtype

    @property
    def _longest_text(self) -> int:
        return self.qformer.max_text_tokens

    def forward(self, inputs: Inputs, wanted: Collection[str], *, packed: bool = False) -> Outputs:
        """See the class for the outputs. `match_logits` needs partners.

        Raises:
            ValueError: packed: there is no LLM. Clips of several frames.
        """
        self._check_forward(packed)
        ids_BT, mask_BT = self._texts_of(inputs.answers)
        tokens_B1PU = self.image_tokens(inputs.images, inputs.pixel_ids)
        # Not the parameter itself: DDP looks for what is used by walking back from the outputs.
        tensors: dict[str, Tensor] = {"temperature": self.temperature.clone()}
        # The first two come first, so that dropout draws the same in a pass for them alone.
        image = self.encode_images(tokens_B1PU) if {"image_projected", "answer_logits"} & set(wanted) else None
        if "text_projected" in wanted:
            tensors["text_projected"] = self.encode_texts(ids_BT, mask_BT).projected_BE
        if image is not None:
            tensors["image_projected"] = image.projected_BQE
            if "answer_logits" in wanted:
                tensors["answer_logits"] = self.encode_captions(image.cache, ids_BT, mask_BT).logits_NW.float()
        if "match_logits" in wanted:
            image_BPU = self.normalised(tokens_B1PU) if image is None else image.tokens_BPU
            tensors["match_logits"] = self._match_logits(image_BPU, inputs)
        workload = PassWorkload(text=sum(map(len, inputs.answers)) + len(inputs))
        return Outputs({name: tensors[name] for name in wanted}, workload)

    def uses_every_weight(self, wanted: Collection[str]) -> bool:
        """The three tasks together use all of the Q-Former and its heads; a vision encoder may end early."""
        tasks = {"image_projected", "text_projected", "temperature", "answer_logits", "match_logits"}
        return self.full_parts == self.trained_parts <= {"qformer"} and tasks <= set(wanted)

    def sample_length(self) -> Callable[[str, str, int], int]:
        """A picklable function: queries and tokens of a sample's pair, from its (prompt, target, frames)."""
        return partial(_pair_length, self.tokenizer, self.max_text_tokens, self.qformer.query_tokens.shape[1])

    def encode_images(self, tokens_B1PU: Tensor) -> QueryOutputs:
        """Queries alone, of image tokens (B, 1, P, U) as `image_tokens` gives them.

        Raises:
            ValueError: clips of several frames.
        """
        tokens_BPU, cache = self.normalised(tokens_B1PU), KeyValueCache()
        query_BQD = self.qformer(tokens_BPU, cache=cache).query_BQD
        projected_BQE = F.normalize(self.vision_projection(query_BQD), dim=-1)
        return QueryOutputs(tokens_BPU, query_BQD, projected_BQE, cache)

    def encode_texts(self, ids_BT: Tensor, mask_BT: Tensor) -> TextOutputs:
        """Text alone."""
        text_BTD = self.qformer(None, ids_BT, mask_BT, text_states=True).text_BTD
        return TextOutputs(text_BTD, F.normalize(self.text_projection(text_BTD[:, 0]), dim=-1))

    def encode_pairs(
        self, tokens_NPU: Tensor, ids_BT: Tensor, mask_BT: Tensor, image_rows_B: Tensor | None = None
    ) -> PairOutputs:
        """Queries and text together; the matching logits are those of each query, averaged. Arguments as of `PairModel`."""
        query_BQD = self.qformer(tokens_NPU, ids_BT, mask_BT, image_rows_B=image_rows_B).query_BQD
        return PairOutputs(query_BQD, self.matching_head(query_BQD).mean(dim=1))

    def encode_captions(self, cache: KeyValueCache, ids_BT: Tensor, mask_BT: Tensor) -> CaptionOutputs:
        """Each text as the caption of its image: a language model over the text, behind the image's queries.

        Args:
            cache: the images' keys and values, `QueryOutputs.cache`; stays as it is.
            ids_BT, mask_BT: as `tokenize` gives them.
        """
        ids_BT = torch.cat([torch.full_like(ids_BT[:, :1], self.start_id), ids_BT[:, 1:]], dim=1)
        text_BTD = self._caption_states(replace(cache), ids_BT, mask_BT)
        predicted_BT = mask_BT[:, 1:].bool()
        logits_NW = self.qformer.logits(text_BTD[:, :-1][predicted_BT])
        return CaptionOutputs(text_BTD, logits_NW, ids_BT[:, 1:][predicted_BT], predicted_BT.sum(dim=1))

    def _cosines(self, image_BQE: Tensor, text_BE: Tensor) -> Tensor:
        return torch.einsum("bqe,be->bq", image_BQE, text_BE).amax(dim=1)

    @torch.inference_mode()
    @shows_options(DECODING)
    def generate(self, images: Images, prompts: None = None, **options: Unpack[DecodingOptions]) -> list[str]:
        """Caption each image; the defaults are the released ones, whose length limits count the start token.

        Args:
            images: B pictures, or their image tokens.
            prompts: this model captions without one.
            options: of `arguments.Decoding`, which says what they are; sampling draws one text, whatever `num_beams`.

        Raises:
            ValueError: prompts, or a wrong argument by its name, before anything is computed.
            UserError: there is no language-model head.
        """
        if self.qformer.lm_head is None:
            raise self._has_no("language-model head to caption with")
        if prompts is not None:
            raise ValueError("BLIP-2's first stage captions without a prompt: prompts=None")
        count = check_images(images)
        decoding = self.DECODING.given(options, count, draws_one=True)
        places = self.qformer.max_text_tokens - 1  # the start token takes one
        ids_BT = decode(
            self._next_logits,
            torch.full((count, 1), self.start_id, device=self.device),
            self.encode_images(self.image_tokens(images)).cache,
            replace(decoding, max_new_tokens=min(decoding.max_new_tokens, places)),
            eos_id=self.tokenizer.sep_token_id,
            pad_id=self.tokenizer.pad_token_id,
            on_ids=on_ids(decoding.on_text, self._texts),
        )
        return self._texts(ids_BT[:, 1:])

    @torch.inference_mode()
    def attention(self, images: Images, prompts: Sequence[str] | None = None) -> ImageAttention:
        """Where the queries look on their own, or in the light of texts, as `match` reads them.

        Args:
            images: B pictures, or their image tokens.
            prompts: B texts; None: the queries alone.

        Raises:
            ValueError: unequal numbers of images and texts, clips of several frames.
        """
        check_pairs(images, prompts)
        tokens_B1PU = self.image_tokens(images)
        with recorded_attention(self.qformer) as weights:
            if prompts is None:
                self.encode_images(tokens_B1PU)
            else:
                self.encode_pairs(self.normalised(tokens_B1PU), *self.tokenize(prompts))
        return ImageAttention.of(weights, self.vision, frames=1)

    def _next_logits(self, new_RT: Tensor, cache: KeyValueCache) -> Tensor:
        return self.qformer.logits(self._caption_states(cache, new_RT, torch.ones_like(new_RT))[:, -1])

    def _caption_states(self, cache: KeyValueCache, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return self.qformer(None, ids_BT, mask_BT, mask="unilm", text_states=True, cache=cache).text_BTD


def _pair_length(
    tokenizer: PreTrainedTokenizerBase, limit: int, queries: int, prompt: str, target: str, frames: int
) -> int:
    return frames * queries + min(len(tokenizer(target)["input_ids"]), limit)
