"""A model's loss on a few samples, without a training loop."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from instructblip.models.base import Inputs, Model, PassWorkload
from instructblip.objectives import OBJECTIVES, make_objectives
from instructblip.objectives.base import SampleObjective, Term

LANGUAGE = make_objectives({"language_modeling": 1.0})
ALIGNMENT = make_objectives({"alignment": 1.0})


class Samples(NamedTuple):
    """A micro-batch as a model takes it."""

    images: Tensor
    instructions: Sequence[str]
    targets: Sequence[str]
    image_ids: Sequence[str] = ()
    positions: Sequence[int] = ()
    pixel_ids: Sequence[int] = ()


def inputs_of(model: Model, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> Inputs:
    """The samples, prepared."""
    return model.prepare(Samples(images, prompts, targets))


def term_of(
    model: Model,
    images: Tensor,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    objective: str = "language_modeling",
    packed: bool = False,
) -> Term:
    """One objective's term."""
    return term_and_workload(model, images, prompts, targets, objective=objective, packed=packed)[0]


def term_and_workload(
    model: Model,
    images: Tensor,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    objective: str = "language_modeling",
    packed: bool = False,
) -> tuple[Term, PassWorkload]:
    """One objective's term, and what the pass went through."""
    wanted = OBJECTIVES[objective]()
    assert isinstance(wanted, SampleObjective)
    inputs = inputs_of(model, images, prompts, targets)
    outputs = model(inputs, wanted.outputs, packed=packed)
    return wanted.term(outputs.tensors, inputs), outputs.workload
