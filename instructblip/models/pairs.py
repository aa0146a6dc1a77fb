"""What models that contrast and match images with texts share: texts as tokens, features, similarities.

Shape legend: B batch, C texts, P image tokens, Q projected rows an image has, T text tokens, D text width, E width of the
projected features.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from instructblip.models.arguments import check_images, check_texts
from instructblip.models.vision import Images

MatchHead = Literal["itm", "itc"]


class TextOutputs(NamedTuple):
    """What `encode_texts` returns.

    Attributes:
        text_BTD: states of the text alone.
        projected_BE: of the first token ([CLS]), which stands for the text; unit length.
    """

    text_BTD: Tensor
    projected_BE: Tensor


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


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int) -> list[list[int]]:
    """Tokens of each text with [CLS] and [SEP]; what is longer than the limit loses its end, but for [SEP]."""
    # Not the tokenizer's own truncation: InstructBLIP's loses the beginning.
    rows = tokenizer(list(texts), truncation=False)["input_ids"]
    return [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in rows]


def padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, T), padded on the right, and their mask: 1 at tokens, 0 at padding."""
    tensors = [torch.tensor(ids, device=device) for ids in rows]
    masks = [torch.ones_like(ids) for ids in tensors]
    return pad_sequence(tensors, batch_first=True, padding_value=pad_id), pad_sequence(masks, batch_first=True)


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
