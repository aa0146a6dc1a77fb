"""CLIP, as transformers has it: how near pictures and texts are. BLIP-2's captions of web pictures are ranked by it.

Shape legend: B pictures, H and W pixels, C texts, E width of the features.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedTokenizerBase


class CLIP(nn.Module):
    """A CLIP with its tokenizer, in evaluation mode.

    Args:
        model: transformers' model.
        tokenizer: its own.
        mean, std: per-channel normalisation on the 0..255 scale.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase, *, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        vision, text = model.vision_model.config, model.text_model.config
        self.image_size = int(vision.image_size)
        self.max_tokens = int(text.max_position_embeddings)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.eval()

    @torch.inference_mode()
    def encode_images(self, pixels_B3HW: Tensor) -> Tensor:
        """Features (B, E) of uint8 pictures whose shorter side was resized and whose middle was kept; unit length."""
        pixels_B3HW = (pixels_B3HW.to(self.mean.device) - self.mean) / self.std
        pooled = self.model.vision_model(pixel_values=pixels_B3HW).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Features (C, E) of texts, unit length; long ones lose their end, but for the end token."""
        rows = self.tokenizer(
            list(texts),
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self.mean.device)
        pooled = self.model.text_model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)
