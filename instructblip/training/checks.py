"""What a recipe's phases must keep of the objectives that exist; refused before anything is loaded."""

from instructblip.config.schema import ModelKind, PhaseConfig, RecipeConfig
from instructblip.config.validate import nearest
from instructblip.errors import UserError
from instructblip.objectives import OBJECTIVES, Objective, make_objectives
from instructblip.objectives.base import BatchObjective, PairedObjective
from instructblip.weights.parts import MODELS


def check_objectives(recipe: RecipeConfig, kind: ModelKind) -> None:
    """Refuse phases whose objectives are unknown, are none, or do not fit the model or their batches.

    Raises:
        UserError: names the phase's key.
    """
    for phase_name, phase in recipe.phases.items():
        key = f"recipe.phases.{phase_name}"
        for name in phase.objectives:
            if name not in OBJECTIVES:
                raise UserError(f"{key}.objectives.{name} is no objective{nearest(name, OBJECTIVES)}")
        objectives = make_objectives(phase.objectives)
        if not objectives:
            raise UserError(
                f"{key}.objectives has no weight above 0, so the phase has no loss; set {key}.objectives.NAME=1"
            )
        if phase.batching == "packed" and not any("answer_logits" in objective.outputs for objective in objectives):
            raise UserError(f"{key}.batching=packed packs rows of the LLM, which the phase leaves out; set it to fixed")
        _check_outputs(key, objectives, kind)
        _check_whole_batch(key, phase, objectives)


def _check_outputs(key: str, objectives: tuple[Objective, ...], kind: ModelKind) -> None:
    for objective in objectives:
        if missing := sorted(objective.outputs - MODELS[kind].OUTPUTS):
            fitting = [name for name, other in OBJECTIVES.items() if other.outputs <= MODELS[kind].OUTPUTS]
            raise UserError(
                f"{key}.objectives.{objective.name} needs {missing[0]}, which model={kind} does not give; "
                f"choose from {', '.join(fitting)}"
            )


def _check_whole_batch(key: str, phase: PhaseConfig, objectives: tuple[Objective, ...]) -> None:
    comparing = [objective for objective in objectives if isinstance(objective, BatchObjective | PairedObjective)]
    if comparing and phase.batch_size < 2:
        raise UserError(
            f"{key}.batch_size={phase.batch_size} leaves {comparing[0].name} nothing to compare a sample with; set it to 2 "
            "or more"
        )
    if phase.gather == "detached" and not any(isinstance(objective, BatchObjective) for objective in objectives):
        raise UserError(
            f"{key}.gather=detached is of objectives over the whole batch, and there are none; leave it out"
        )
