"""What is trained for: objectives turn a model's named outputs into loss terms.

To add one, write its class in a file here and name it in `OBJECTIVES`; a recipe's phase then weights it by that name.
"""

from collections.abc import Mapping

from instructblip.objectives.alignment import Alignment
from instructblip.objectives.base import Objective, ObjectiveSettings
from instructblip.objectives.contrastive import Contrastive
from instructblip.objectives.distillation import Distillation, PairDistillation
from instructblip.objectives.language_modeling import Answering, Captioning, LanguageModeling
from instructblip.objectives.matching import Matching, PairMatching

OBJECTIVES: dict[str, type[Objective]] = {
    "language_modeling": LanguageModeling,
    "alignment": Alignment,
    "contrastive": Contrastive,
    "matching": Matching,
    "captioning": Captioning,
    "answering": Answering,
    "distillation": Distillation,
    "pair_distillation": PairDistillation,
    "pair_matching": PairMatching,
}
_DEFAULT = {LanguageModeling.name: 1.0}
_PLAIN = ObjectiveSettings()


def make_objectives(weights: Mapping[str, float], settings: ObjectiveSettings = _PLAIN) -> tuple[Objective, ...]:
    """The objectives of a phase, by name and weight: language modelling where none is named; 0 leaves one out."""
    return tuple(OBJECTIVES[name].of(weight, settings) for name, weight in (weights or _DEFAULT).items() if weight)


__all__ = ["OBJECTIVES", "Objective", "ObjectiveSettings", "make_objectives"]
