"""What a recipe's phases must keep of the objectives that exist; refused before anything is loaded."""

from instructblip.config.schema import RecipeConfig
from instructblip.config.validate import nearest
from instructblip.errors import UserError
from instructblip.objectives import OBJECTIVES, make_objectives


def check_objectives(recipe: RecipeConfig) -> None:
    """Refuse phases whose objectives are unknown, are none, or do not fit their batching.

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
