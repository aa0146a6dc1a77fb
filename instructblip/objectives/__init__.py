"""What is trained for: objectives turn a model's named outputs into loss terms.

To add one, write its class in a file here and name it in `OBJECTIVES`; a recipe's phase then weights it by that name.
"""

from collections.abc import Mapping

from instructblip.objectives.alignment import Alignment
from instructblip.objectives.base import Objective
from instructblip.objectives.language_modeling import LanguageModeling

OBJECTIVES: dict[str, type[Objective]] = {
    "language_modeling": LanguageModeling,
    "alignment": Alignment,
}
_DEFAULT = {LanguageModeling.name: 1.0}


def make_objectives(weights: Mapping[str, float]) -> tuple[Objective, ...]:
    """The objectives of a phase, by name and weight: language modelling where none is named; 0 leaves one out."""
    return tuple(OBJECTIVES[name](weight) for name, weight in (weights or _DEFAULT).items() if weight)


__all__ = ["OBJECTIVES", "Objective", "make_objectives"]
