"""Language modelling: a text's tokens given the image, by an LLM (InstructBLIP, section 2.3) or a Q-Former (BLIP-2, 3.1)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from instructblip.models.base import Inputs
from instructblip.objectives.base import SampleObjective, Term, summed_cross_entropy


class LanguageModeling(SampleObjective):
    """Cross-entropy of each token of the answer, its end included."""

    name = "language_modeling"
    unit = "supervised tokens"
    outputs = frozenset({"answer_logits"})
    label_smoothing: ClassVar[float] = 0.0

    def count(self, inputs: Inputs) -> int:
        """Tokens of the answers."""
        return sum(map(len, inputs.answers))

    def term(self, outputs: Mapping[str, Tensor], inputs: Inputs) -> Term:
        """From `answer_logits` (S, V), one row a token of an answer."""
        logits_SV = outputs["answer_logits"]
        labels_S = torch.tensor([token for ids in inputs.answers for token in ids], device=logits_SV.device)
        counts = [len(ids) for ids in inputs.answers]
        return summed_cross_entropy(logits_SV, labels_S, counts, label_smoothing=self.label_smoothing)


class Captioning(LanguageModeling):
    """Image-grounded text generation of BLIP-2's first stage: each token of the caption, its end included.

    Smoothed labels are the released code's (LAVIS, Qformer.py).
    """

    name = "captioning"
    label_smoothing = 0.1
