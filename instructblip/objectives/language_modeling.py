"""Language modelling: a text's tokens given the image, by an LLM (InstructBLIP, section 2.3), a Q-Former (BLIP-2, 3.1), or a
BERT that reads images (BLIP, 3.2)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from instructblip.devices import on_device
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
        labels_S = on_device([token for ids in inputs.answers for token in ids], logits_SV.device)
        counts = [sum(map(len, answers)) for answers in inputs.answers_by_sample()]
        return summed_cross_entropy(logits_SV, labels_S, counts, label_smoothing=self.label_smoothing)


class Captioning(LanguageModeling):
    """Image-grounded text generation, BLIP's and that of BLIP-2's first stage: each token of the caption, its end included.

    Smoothed labels are the released code's (LAVIS, Qformer.py and med.py).
    """

    name = "captioning"
    label_smoothing = 0.1


class Answering(SampleObjective):
    """Visual question answering of BLIP: all answers of a question, each by its weight.

    The smoothed cross-entropies of an answer's tokens are added up, not averaged: a long answer counts for more. Weights are
    shares of the people who gave the answer (BLIP, vqa_dataset.py).
    """

    name = "answering"
    unit = "questions"
    outputs = frozenset({"answer_logits"})

    def count(self, inputs: Inputs) -> int:
        """Questions."""
        return len(inputs)

    def term(self, outputs: Mapping[str, Tensor], inputs: Inputs) -> Term:
        """From `answer_logits` (S, V), one row a token of an answer, answer after answer."""
        logits_SV = outputs["answer_logits"]
        labels_S = on_device([token for ids in inputs.answers for token in ids], logits_SV.device)
        losses_S = F.cross_entropy(logits_SV, labels_S, reduction="none", label_smoothing=Captioning.label_smoothing)
        of_sample, weights = [], []
        places = iter(inputs.answer_weights or [1.0] * len(inputs.answers))
        for sample, answers in enumerate(inputs.answers_by_sample()):
            for ids in answers:
                of_sample += [sample] * len(ids)
                weights += [next(places)] * len(ids)
        weighted_S = losses_S * on_device(weights, losses_S.device)
        sample_S = on_device(of_sample, losses_S.device)
        per_sample_B = losses_S.new_zeros(len(inputs)).index_add(0, sample_S, weighted_S.detach())
        return Term(weighted_S.sum(), per_sample_B, torch.ones(len(inputs), dtype=torch.int64))
