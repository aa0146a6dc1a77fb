"""Objectives with other units than the product's own, to see that any mixes: per image, and over the whole batch."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from instructblip.models.base import Inputs
from instructblip.objectives import OBJECTIVES
from instructblip.objectives.base import BatchObjective, SampleObjective, Term, WholeBatch


class PromptNorm(SampleObjective):
    """The mean length of each image's visual tokens; a unit is an image, or a frame."""

    name = "prompt_norm"
    unit = "frames"
    outputs = frozenset({"visual_prompt"})

    def count(self, inputs: Inputs) -> int:
        assert isinstance(inputs.images, Tensor)
        return inputs.images.shape[0] * inputs.images.shape[1]

    def term(self, outputs: Mapping[str, Tensor], inputs: Inputs) -> Term:
        assert isinstance(inputs.images, Tensor)
        frames = inputs.images.shape[1]
        per_sample_B = outputs["visual_prompt"].float().norm(dim=-1).mean(dim=1) * frames
        counts_B = torch.full((len(inputs),), frames, device=per_sample_B.device)
        return Term(per_sample_B.sum(), per_sample_B.detach(), counts_B)


class PromptContrast(BatchObjective):
    """Tell each sample's visual prompt from all others of the global batch (InfoNCE of the prompt's two halves)."""

    name = "prompt_contrast"
    unit = "samples"
    outputs = frozenset({"visual_prompt"})
    rows = ("visual_prompt",)

    def count(self, inputs: Inputs) -> int:
        return len(inputs)

    def batch_term(self, batch: WholeBatch) -> Term:
        half = batch.own["visual_prompt"].shape[1] // 2
        left_BL = F.normalize(batch.own["visual_prompt"][:, :half].mean(dim=1), dim=-1)
        right_NL = F.normalize(batch.everyone["visual_prompt"][:, half:].mean(dim=1), dim=-1)
        logits_BN = left_BL @ right_NL.T / batch.shared.get("temperature", torch.tensor(0.1))
        losses_B = F.cross_entropy(logits_BN, batch.own_rows_B, reduction="none")
        return Term(losses_B.sum(), losses_B.detach(), torch.ones(len(left_BL), dtype=torch.long))


def register() -> None:
    """Make them known to recipes, in this process."""
    OBJECTIVES.update(prompt_norm=PromptNorm, prompt_contrast=PromptContrast)
