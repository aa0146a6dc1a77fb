"""Alignment: teach a new projection the language of the LLM's inputs, without a pass through the LLM."""

from collections.abc import Mapping

from torch import Tensor

from instructblip.devices import on_device
from instructblip.models.base import Inputs
from instructblip.objectives.base import SampleObjective, Term, summed_cross_entropy

# Inverse temperature: high enough that a cosine of 1 stands out among a vocabulary of 50,000 (log 50,000 = 10.8), low enough
# for an even loss; the LLM's own output head is several times as sharp.
_SCALE = 25.0


class Alignment(SampleObjective):
    """Among all input embeddings of the LLM, the visual tokens point nearest to that of the answer's first token.

    A cross-entropy over cosines, and the squared log of the ratio between the lengths of visual tokens and of embeddings.
    For a Q-Former and projection that have never met this LLM; costs a small part of a pass through it.
    """

    name = "alignment"
    unit = "samples"
    outputs = frozenset({"visual_prompt", "visual_cosines", "embedding_length"})
    validated = False  # the LLM's layers do not learn to listen: its answers would say nothing yet

    def count(self, inputs: Inputs) -> int:
        """Samples."""
        return len(inputs)

    def term(self, outputs: Mapping[str, Tensor], inputs: Inputs) -> Term:
        """From `visual_cosines` (B, V), `visual_prompt` (B, Q, L) and `embedding_length` ()."""
        logits_BV = _SCALE * outputs["visual_cosines"]
        first_B = on_device([ids[0] for ids in inputs.answers], logits_BV.device)
        term = summed_cross_entropy(logits_BV, first_B, [1] * len(inputs))
        # Directions alone would let the tokens' lengths drift far from anything the LLM knows.
        stretch_BQ = outputs["visual_prompt"].norm(dim=-1).div(outputs["embedding_length"]).log()
        return term._replace(total=term.total + stretch_BQ.square().mean(dim=1).sum())
