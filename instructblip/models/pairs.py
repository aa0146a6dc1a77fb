"""What BLIP and BLIP-2's first stage share: texts as BERT's tokens; contrast and matching of images with texts.

Shape legend: B batch, C texts, P image tokens, U vision width, Q projected rows an image has, T text tokens, D text width,
E width of the projected features, S rows of an image or a text, W their width, N images.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from instructblip.models.arguments import check_choice, check_images, check_texts
from instructblip.models.base import Inputs, Model, Samples
from instructblip.models.vision import Images

if TYPE_CHECKING:  # transformers is imported where it is used: what only counts does without
    from transformers import PreTrainedTokenizerBase

MatchHead = Literal["itm", "itc"]


@dataclass(frozen=True)
class ImageOutputs:
    """What `encode_images` returns.

    Attributes:
        tokens_BPU: normalised image tokens, for `encode_pairs`.
        states_BSW: BLIP-2: states of the queries alone. BLIP: the same tokens.
        projected_BQE: unit length. BLIP-2: of each query. BLIP: of what stands for the image.
    """

    tokens_BPU: Tensor
    states_BSW: Tensor
    projected_BQE: Tensor


class TextOutputs(NamedTuple):
    """What `encode_texts` returns.

    Attributes:
        text_BTD: states of the text alone.
        projected_BE: of the first token ([CLS]), which stands for the text; unit length.
    """

    text_BTD: Tensor
    projected_BE: Tensor


class PairOutputs(NamedTuple):
    """What `encode_pairs` returns.

    Attributes:
        states_BSW: BLIP-2: states of the queries in the light of the text. BLIP: of the text in the light of the image.
        logits_B2: no match, match.
    """

    states_BSW: Tensor
    logits_B2: Tensor


class Features(NamedTuple):
    """What `features` returns; None where it was not asked for.

    Attributes:
        image: BLIP-2: states of the queries alone (B, Q, D). BLIP: image tokens (B, P, U).
        image_projected: (B, Q, E), unit length; BLIP has one row an image, that of [CLS].
        text: states of the text alone (B, T, D).
        text_projected: (B, E), unit length.
        text_mask: 1 at the text's tokens, 0 at padding (B, T).
        multimodal: BLIP-2: states of the queries in the light of the text (B, Q, D). BLIP: of the text in the light of the
            image (B, T, D).
    """

    image: Tensor | None = None
    image_projected: Tensor | None = None
    text: Tensor | None = None
    text_projected: Tensor | None = None
    text_mask: Tensor | None = None
    multimodal: Tensor | None = None


def similarities(image_BQE: Tensor, text_CE: Tensor) -> Tensor:
    """Cosine (B, C) of every image and every text: that of the text and the image's nearest row; no temperature."""
    return torch.einsum("bqe,ce->bcq", image_BQE, text_CE).amax(dim=2)


class BertBased(Model):
    """A model without an LLM, which reads one picture a sample and BERT's tokens.

    Attributes:
        max_text_tokens: longer texts lose their end, but for [SEP].
    """

    tokenizer: "PreTrainedTokenizerBase"
    max_text_tokens: int

    @property
    @abstractmethod
    def _read_dtype(self) -> torch.dtype: ...

    def normalised(self, tokens_B1PU: Tensor) -> Tensor:
        """Image tokens (B, P, U) behind `vision_norm`, in the type of what reads them: float32, unless the model was cast.

        Raises:
            ValueError: clips of several frames.
        """
        if tokens_B1PU.shape[1] != 1:
            raise ValueError(f"{self.title} reads one picture a sample, not {tokens_B1PU.shape[1]} frames")
        return self.vision_norm(tokens_B1PU[:, 0].to(self._read_dtype))

    def token_ids(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """Tokens of each text with [CLS] and [SEP], of at most `max_text_tokens` or another number."""
        limit = self.max_text_tokens if limit is None else limit
        # Not the tokenizer's own truncation: InstructBLIP's loses the beginning.
        rows = self.tokenizer(list(texts), truncation=False)["input_ids"]
        return [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in rows]

    def padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids (B, T), padded on the right, and their mask: 1 at tokens, 0 at padding."""
        tensors = [torch.tensor(ids, device=self.device) for ids in rows]
        masks = [torch.ones_like(ids) for ids in tensors]
        pad_id = self.tokenizer.pad_token_id
        return pad_sequence(tensors, batch_first=True, padding_value=pad_id), pad_sequence(masks, batch_first=True)

    def _texts(self, ids_BT: Tensor) -> list[str]:
        return [text.strip() for text in self.tokenizer.batch_decode(ids_BT, skip_special_tokens=True)]

    def _prepared(self, samples: Samples, answers: Sequence[Sequence[int]]) -> Inputs:
        images, ids = samples.images, samples.image_ids
        return Inputs(images, samples.instructions, answers, ids, samples.positions, pixel_ids=samples.pixel_ids)

    def _check_forward(self, packed: bool) -> None:
        if packed:
            raise ValueError(f"{self.title} has no LLM whose rows samples could share")


class PairModel(BertBased):
    """A model that contrasts and matches images with texts.

    Attributes:
        vision_projection, text_projection, matching_head: see `pair_heads`.
        temperature: what similarities are divided by.
    """

    vision_projection: nn.Linear
    text_projection: nn.Linear
    matching_head: nn.Linear
    temperature: nn.Parameter

    def _add_heads(self, vision_width: int, text_width: int, feature_width: int, temperature: float) -> None:
        for name, head in pair_heads(vision_width, text_width, feature_width).items():
            setattr(self, name, head)
        self.temperature = nn.Parameter(torch.tensor(temperature))

    @property
    @abstractmethod
    def _longest_text(self) -> int:
        """Tokens that it can read, in training or not."""

    @abstractmethod
    def encode_images(self, tokens_B1PU: Tensor) -> ImageOutputs:
        """Images alone, of their tokens (B, 1, P, U) as `image_tokens` gives them.

        Raises:
            ValueError: clips of several frames.
        """

    @abstractmethod
    def encode_texts(self, ids_BT: Tensor, mask_BT: Tensor) -> TextOutputs:
        """Texts alone."""

    @abstractmethod
    def encode_pairs(
        self, tokens_NPU: Tensor, ids_BT: Tensor, mask_BT: Tensor, image_rows_B: Tensor | None = None
    ) -> PairOutputs:
        """Images and texts together, and whether they match.

        Args:
            tokens_NPU: normalised image tokens (`ImageOutputs.tokens_BPU`).
            ids_BT, mask_BT: as `tokenize` gives them.
            image_rows_B: each text's image among the N, which is read once for all its texts; None: N = B, in order.
        """

    @abstractmethod
    def _cosines(self, image_BQE: Tensor, text_BE: Tensor) -> Tensor:
        """(B,), of each image and its text, by their projected features."""

    def prepare(self, samples: Samples) -> Inputs:
        """Answers are the texts' tokens behind [CLS], with [SEP]; too long ones lose their end. Prompts are not read."""
        sizes = len(samples.images), len(samples.targets)
        if len(set(sizes)) > 1:
            raise ValueError(f"{sizes[0]} images and {sizes[1]} texts do not make pairs")
        return self._prepared(samples, [ids[1:] for ids in self.token_ids(samples.targets)])

    def tokenize(self, texts: Sequence[str], *, max_tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Token ids (B, T) with [CLS] and [SEP], padded on the right, and their mask.

        Args:
            texts: B texts.
            max_tokens: in place of `max_text_tokens`.
        """
        return self.padded(self.token_ids(texts, max_tokens))

    def _texts_of(self, answers: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        return self.padded([[self.tokenizer.cls_token_id, *answer] for answer in answers])

    def _match_logits(self, image_BPU: Tensor, inputs: Inputs) -> Tensor:
        assert inputs.partners is not None
        other_BPU = self.normalised(self.image_tokens(inputs.partners.images))
        ids_NT, mask_NT = self._texts_of([*inputs.answers, *inputs.answers, *inputs.partners.answers])
        pairs = self.encode_pairs(torch.cat([image_BPU, other_BPU, image_BPU]), ids_NT, mask_NT)
        return pairs.logits_B2.float().unflatten(0, (3, -1))

    @torch.inference_mode()
    def match(self, images: Images, texts: Sequence[str], *, head: MatchHead = "itm") -> Tensor:
        """How well each image and its text match: (B,).

        Args:
            images: B pictures, or their image tokens.
            texts: B texts.
            head: `itm` is the probability that they match; `itc` the cosine of text and image, of BLIP-2's queries the
                nearest one, no probability.

        Raises:
            ValueError: unequal numbers of images and texts, an unknown head.
        """
        check_pairs(images, texts)
        check_choice("head", head, get_args(MatchHead))
        ids_BT, mask_BT = self.tokenize(texts)
        tokens_B1PU = self.image_tokens(images)
        if head == "itm":
            pairs = self.encode_pairs(self.normalised(tokens_B1PU), ids_BT, mask_BT)
            return pairs.logits_B2.float().softmax(dim=1)[:, 1]
        # In float32: in half precision near pairs would be equal.
        image_BQE = self.encode_images(tokens_B1PU).projected_BQE.float()
        return self._cosines(image_BQE, self.encode_texts(ids_BT, mask_BT).projected_BE.float())

    @torch.inference_mode()
    def features(self, images: Images | None = None, texts: Sequence[str] | None = None) -> Features:
        """Features of images, of texts, or of both and of each in the light of the other.

        Args:
            images: B pictures, or their image tokens.
            texts: texts, as many where images are given too; as long as the model can read.

        Raises:
            ValueError: neither, or unequal numbers.
        """
        check_pairs(images, texts)
        image = None if images is None else self.encode_images(self.image_tokens(images))
        features = Features()
        if image is not None:
            features = Features(image.states_BSW, image.projected_BQE)
        if texts is not None:
            ids_BT, mask_BT = self.tokenize(texts, max_tokens=self._longest_text)
            text = self.encode_texts(ids_BT, mask_BT)
            features = features._replace(text=text.text_BTD, text_projected=text.projected_BE, text_mask=mask_BT)
            if image is not None:
                features = features._replace(multimodal=self.encode_pairs(image.tokens_BPU, ids_BT, mask_BT).states_BSW)
        return features


def pair_heads(vision_width: int, text_width: int, feature_width: int) -> dict[str, nn.Linear]:
    """What contrasts and matches: projections of both sides' states to width E, and the matching head."""
    return {
        "vision_projection": nn.Linear(vision_width, feature_width),
        "text_projection": nn.Linear(text_width, feature_width),
        "matching_head": nn.Linear(text_width, 2),
    }


def check_pairs(images: Images | None, texts: Sequence[str] | None) -> None:
    """Images, texts, or as many of both.

    Raises:
        ValueError: names the argument.
    """
    if images is None and texts is None:
        raise ValueError("images and texts are both missing: give one of them, or both")
    count = None if images is None else check_images(images)
    if texts is not None:
        check_texts("texts", texts, count)
