"""What is trained for: objectives turn a model's named outputs into loss terms.

To add one, write its class in a file here and name it in `OBJECTIVES`; a recipe's phase then weights it by that name.
"""

from collections.abc import Mapping

from instructblip.config.schema import Gather
from instructblip.objectives.alignment import Alignment
from instructblip.objectives.base import BatchObjective, Objective
from instructblip.objectives.contrastive import Contrastive
from instructblip.objectives.language_modeling import Captioning, LanguageModeling
from instructblip.objectives.matching import Matching

OBJECTIVES: dict[str, type[Objective]] = {
    "language_modeling": LanguageModeling,
    "alignment": Alignment,
    "contrastive": Contrastive,
    "matching": Matching,
    "captioning": Captioning,
}
_DEFAULT = {LanguageModeling.name: 1.0}


def make_objectives(weights: Mapping[str, float], gather: Gather = "gradient") -> tuple[Objective, ...]:
    """The objectives of a phase, by name and weight: language modelling where none is named; 0 leaves one out.

    `gather` is of those over the whole batch, see `BatchObjective`.
    """
    return tuple(_make(OBJECTIVES[name], weight, gather) for name, weight in (weights or _DEFAULT).items() if weight)


def _make(kind: type[Objective], weight: float, gather: Gather) -> Objective:
    return kind(weight, gather) if issubclass(kind, BatchObjective) else kind(weight)


__all__ = ["OBJECTIVES", "Objective", "make_objectives"]
