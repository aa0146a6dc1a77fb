"""Language modelling: the answer's tokens given image and instruction (InstructBLIP, section 2.3)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from instructblip.models.base import Inputs
from instructblip.objectives.base import SampleObjective, Term, summed_cross_entropy


class LanguageModeling(SampleObjective):
    """Cross-entropy of each token of the answer, its end included."""

    name = "language_modeling"
    unit = "supervised tokens"
    outputs = frozenset({"answer_logits"})

    def count(self, inputs: Inputs) -> int:
        """Tokens of the answers."""
        return sum(map(len, inputs.answers))

    def term(self, outputs: Mapping[str, Tensor], inputs: Inputs) -> Term:
        """From `answer_logits` (S, V), one row a token of an answer."""
        logits_SV = outputs["answer_logits"]
        labels_S = torch.tensor([token for ids in inputs.answers for token in ids], device=logits_SV.device)
        return summed_cross_entropy(logits_SV, labels_S, [len(ids) for ids in inputs.answers])
