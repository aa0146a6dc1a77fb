"""What a recipe's phases must keep of the objectives that exist; refused before anything is loaded."""

from instructblip.config.schema import ArchitectureConfig, ModelConfig, PhaseConfig, TrainConfig
from instructblip.config.validate import nearest
from instructblip.errors import UserError
from instructblip.models.facts import outputs_of
from instructblip.objectives import OBJECTIVES, Objective, ObjectiveSettings, make_objectives
from instructblip.objectives.base import BatchObjective, PairedObjective
from instructblip.objectives.distillation import COPIES, Distillation
from instructblip.objectives.matching import Matching


def check_objectives(config: TrainConfig) -> None:
    """Refuse phases whose objectives are unknown, are none, teach nothing, or do not fit the model or their batches.

    Raises:
        UserError: names the phase's key.
    """
    for phase_name, phase in config.recipe.phases.items():
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
        _check_outputs(key, objectives, config)
        _check_reached(key, objectives, config)
        _check_queue(key, objectives, config.model)
        _check_whole_batch(key, phase, objectives)
        _check_settings(key, phase, objectives)


def _check_outputs(key: str, objectives: tuple[Objective, ...], model: ModelConfig) -> None:
    for objective in objectives:
        given = outputs_of(model)
        # What its loss is made of says more than what it only looks at.
        if missing := sorted(objective.outputs - given) or sorted(objective.needed() - given):
            fitting = [name for name, other in OBJECTIVES.items() if other.needed() <= given]
            raise UserError(
                f"{key}.objectives.{objective.name} needs {missing[0]}, which {model.said()} does not give; "
                f"choose from {', '.join(fitting)}"
            )


def _check_reached(key: str, objectives: tuple[Objective, ...], config: TrainConfig) -> None:
    """What is computed in front of the LLM's layers has no gradient where nothing trains but adapters on these."""
    if config.train.parts(config) != ("llm",) or config.train.adapted(config) != ("llm",):
        return
    if not any("answer_logits" in objective.outputs for objective in objectives):
        names = " and ".join(objective.name for objective in objectives)
        raise UserError(
            f"{key} would teach nothing: {names} leaves the LLM's layers out, and train.llm=lora trains adapters on them "
            f"alone; leave the phase out (~{key}), or add {key}.objectives.language_modeling=1"
        )


def _check_queue(key: str, objectives: tuple[Objective, ...], model: ArchitectureConfig) -> None:
    for objective in objectives:
        if model.queue_size is None and objective.needed() & COPIES:
            raise UserError(
                f"model.queue_size=null leaves {objective.name} nothing to compare with, no copies and no queue; set "
                f"it, or leave {key}.objectives.{objective.name} out"
            )


def _check_whole_batch(key: str, phase: PhaseConfig, objectives: tuple[Objective, ...]) -> None:
    comparing = [objective for objective in objectives if isinstance(objective, BatchObjective | PairedObjective)]
    if comparing and phase.batch_size < 2:
        raise UserError(
            f"{key}.batch_size={phase.batch_size} leaves {comparing[0].name} nothing to compare a sample with; set it to 2 "
            "or more"
        )
    if len(drawing := [item.name for item in objectives if isinstance(item, PairedObjective)]) > 1:
        raise UserError(
            f"{key}.objectives {' and '.join(drawing)} draw the wrong pairs in different ways, and a batch has one draw; "
            f"leave {key}.objectives.{drawing[-1]} out"
        )
    if phase.gather == "detached" and not any(_has_keys_with_gradient(objective) for objective in objectives):
        raise UserError(
            f"{key}.gather=detached is of objectives over the whole batch, and there are none; leave it out"
        )


def _has_keys_with_gradient(objective: Objective) -> bool:
    return isinstance(objective, BatchObjective) and not isinstance(objective, Distillation)


def _check_settings(key: str, phase: PhaseConfig, objectives: tuple[Objective, ...]) -> None:
    plain, distils = ObjectiveSettings(), any(isinstance(objective, Distillation) for objective in objectives)
    for name in ("soft_targets", "soft_targets_ramp"):
        if getattr(phase, name) != getattr(plain, name) and not distils:
            raise UserError(f"{key}.{name} is of objectives that distil, and there are none; leave it out")
    if (among := phase.negatives_among) is None:
        return
    if not any(isinstance(objective, Matching) for objective in objectives):
        raise UserError(f"{key}.negatives_among is of objectives that match, and there are none; leave it out")
    if among < 2 or phase.batch_size % among:
        raise UserError(
            f"{key}.negatives_among={among} does not cut {key}.batch_size={phase.batch_size} into equal parts of two and "
            "more samples; change one of them"
        )
