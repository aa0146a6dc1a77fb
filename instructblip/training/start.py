"""The weights that a new run begins with."""

from instructblip.config.checks import STAYS_DRAWN
from instructblip.config.schema import TrainConfig
from instructblip.errors import UserError
from instructblip.models.base import Model
from instructblip.models.blip import BLIP
from instructblip.weights.heads import check_heads
from instructblip.weights.init_blip import start_blip_from, start_blip_new
from instructblip.weights.init_from import Begun, start_from, start_new
from instructblip.weights.init_sources import check_pinned, find_start, read_start
from instructblip.weights.partner import NOTHING_GIVEN, given_weights


def begin_run(model: Model, config: TrainConfig) -> Begun:
    """Put the weights of `init_from` into a new model; the run does not need their source again.

    Raises:
        UserError: none are given where the Q-Former has none of its own, they do not fit, or the vision encoder stays drawn.
    """
    begun = _begin_blip(model, config) if isinstance(model, BLIP) else _begin(model, config)
    if config.vision.init == "scratch" and "vision" not in model.full_parts | model.held_parts:
        raise UserError(STAYS_DRAWN)
    return begun


def _begin(model: Model, config: TrainConfig) -> Begun:
    qformer = config.q_former() if config.has_qformer() else None
    given = given_weights(config.init_from, qformer)
    if not given:
        if qformer is not None and qformer.init == "given":
            raise UserError(NOTHING_GIVEN)
        return Begun(start_new(model))
    weights = [read_start(find_start(source)) for source in given]
    check_pinned(weights, config.init_sha256)
    begun = start_from(model, weights, qformer, config.llm)
    begun.lines.extend(check_heads(model, weights, config))
    if not config.init_from:
        begun.lines.insert(0, f"qformer.stage1 and stage2 are another spelling of init_from=[{','.join(given)}]")
    return begun


def _begin_blip(model: BLIP, config: TrainConfig) -> Begun:
    if not config.init_from:
        return Begun(start_blip_new(model))
    weights = [read_start(find_start(source)) for source in config.init_from]
    check_pinned(weights, config.init_sha256)
    begun = start_blip_from(model, weights)
    begun.lines.extend(check_heads(model, weights, config))
    return begun
