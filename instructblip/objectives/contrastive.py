"""Image-text contrast over the global batch (BLIP-2, section 3.1).

Shape legend: B samples of a rank, N of the global batch.
"""

import torch
from torch import Tensor

from instructblip.models.base import Inputs
from instructblip.models.pairs import similarities
from instructblip.objectives.base import BatchObjective, Term, WholeBatch

_LABEL_SMOOTHING = 0.1  # LAVIS, blip2_qformer.py


class Contrastive(BatchObjective):
    """Each image finds its text among all texts of the batch, and each text its image.

    Cross-entropy over similarities, divided by the learnt temperature, which LAVIS does not bound. Samples of one image
    share the right answer evenly.
    """

    name = "contrastive"
    unit = "samples"
    outputs = frozenset({"image_projected", "text_projected", "temperature"})
    rows = ("image_projected", "text_projected")
    shared = ("temperature",)

    def count(self, inputs: Inputs) -> int:
        """Samples."""
        return len(inputs)

    def batch_term(self, batch: WholeBatch) -> Term:
        """From `image_projected` (B, Q, E), `text_projected` (B, E) and `temperature` (); the mean of both directions."""
        same_BN = batch.same_image().float()
        targets_BN = (1 - _LABEL_SMOOTHING) * same_BN / same_BN.sum(dim=1, keepdim=True)
        targets_BN = targets_BN + _LABEL_SMOOTHING / same_BN.shape[1]
        own, everyone, temperature = batch.own, batch.everyone, batch.shared["temperature"]
        to_texts_BN = similarities(own["image_projected"], everyone["text_projected"])
        to_images_BN = similarities(everyone["image_projected"], own["text_projected"]).T
        losses_B = torch.stack(
            [soft_cross_entropy(scores / temperature, targets_BN) for scores in (to_texts_BN, to_images_BN)]
        ).mean(dim=0)
        return Term(losses_B.sum(), losses_B.detach(), torch.ones_like(losses_B, dtype=torch.int64))


def soft_cross_entropy(logits_BN: Tensor, targets_BN: Tensor) -> Tensor:
    """Cross-entropy (nats) of each row with a distribution over its columns: (B,)."""
    return -(logits_BN.log_softmax(dim=1) * targets_BN).sum(dim=1)
