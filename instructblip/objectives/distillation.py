"""Image-text contrast with momentum distillation (BLIP, section 3.2; ALBEF, section 3.3).

Keys come from copies of the encoders that follow them slowly: those of the global batch, and behind them a queue of earlier
ones. The copies' own likelihoods are a part of the targets, since what a noisy caption leaves out may be true all the same.

Shape legend: B samples of a rank, N of the global batch, K places in the queue, M = N + K keys, E width of the features.
"""

import copy
from typing import Literal, Self

import torch
from torch import Tensor

from instructblip.models.base import Inputs
from instructblip.objectives.base import BatchObjective, ObjectiveSettings, Term, WholeBatch
from instructblip.objectives.contrastive import soft_cross_entropy

COPIES = frozenset({"image_projected_m", "text_projected_m"})  # outputs of the momentum copies

Side = Literal["image", "text"]
_OTHER: dict[Side, Side] = {"image": "text", "text": "image"}


class Distillation(BatchObjective):
    """Each image finds its texts among those of the batch and of the queue, and each text its images.

    Texts of one image share the right answer evenly, and so do images of one text. The released code compares with the keys
    of its own GPU and the queue, this with those of all GPUs; neither has a gradient at a key.

    Args:
        weight: as in `Objective`.
        soft_targets: share of the copies' likelihoods in the targets, 0 to 1.
        ramp: steps over which that share grows from 0.
    """

    name = "distillation"
    unit = "samples"
    outputs = frozenset({"image_projected", "text_projected", "temperature"})
    rows = ("image_projected", "text_projected", *sorted(COPIES))
    shared = ("temperature", "image_queue", "text_queue", "image_id_queue")

    def __init__(self, weight: float = 1.0, *, soft_targets: float = 0.4, ramp: int = 0) -> None:
        super().__init__(weight)
        self.soft_targets = soft_targets
        self.ramp = ramp

    @classmethod
    def of(cls, weight: float, settings: ObjectiveSettings) -> Self:
        """With the phase's soft targets."""
        return cls(weight, soft_targets=settings.soft_targets, ramp=settings.soft_targets_ramp)

    def at(self, step: int) -> "Distillation":
        """With the share of soft targets that the step has."""
        now = copy.copy(self)
        now.soft_targets, now.ramp = self.soft_targets * min(1.0, step / max(self.ramp, 1)), 0
        return now if self.ramp else self

    def count(self, inputs: Inputs) -> int:
        """Samples."""
        return len(inputs)

    def batch_term(self, batch: WholeBatch) -> Term:
        """The mean of both directions.

        From `image_projected` (B, 1, E), `text_projected` (B, E), those of the copies (`_m`), `temperature` (),
        `image_queue` and `text_queue` (E, K), `image_id_queue` (1, K).
        """
        losses_B = [
            soft_cross_entropy(_logits(batch, side, f"{side}_projected"), self.targets(batch, side)) for side in _OTHER
        ]
        both_B = (losses_B[0] + losses_B[1]) / 2
        return Term(both_B.sum(), both_B.detach(), torch.ones_like(both_B, dtype=torch.int64))

    @torch.no_grad()
    def targets(self, batch: WholeBatch, side: Side) -> Tensor:
        """What each own image (or text) should find: shares of the texts (or images), (B, M)."""
        right_BM = self.right(batch).float()
        right_BM = right_BM / right_BM.sum(dim=1, keepdim=True)
        soft_BM = _logits(batch, side, f"{side}_projected_m").softmax(dim=1)
        return torch.lerp(right_BM, soft_BM, self.soft_targets)

    def right(self, batch: WholeBatch) -> Tensor:
        """Which keys belong to each sample: (B, M). Those of its image, in the queue too."""
        queued_BK = batch.image_ids_N[batch.own_rows_B, None] == batch.shared["image_id_queue"]
        return torch.cat([batch.same_image(), queued_BK], dim=1)


class PairDistillation(Distillation):
    """The same where each sample's own pair alone is right, whatever the others show, as in BLIP's pre-training."""

    name = "pair_distillation"

    def right(self, batch: WholeBatch) -> Tensor:
        """The sample's own key."""
        keys = len(batch.image_ids_N) + batch.shared["image_id_queue"].shape[1]
        return batch.own_rows_B[:, None] == torch.arange(keys, device=batch.own_rows_B.device)


def _logits(batch: WholeBatch, side: Side, queries: str) -> Tensor:
    """Similarities of own features with the keys of the other side, over the temperature: (B, M)."""
    other = _OTHER[side]
    keys_ME = torch.cat([batch.everyone[f"{other}_projected_m"].flatten(1), batch.shared[f"{other}_queue"].T])
    return batch.own[queries].flatten(1) @ keys_ME.T / batch.shared["temperature"]
