"""What a plan says of the weights that its run begins with."""

from collections.abc import Sequence
from functools import partial

from instructblip.config.schema import LLMConfig, QFormerConfig, TrainConfig
from instructblip.training.plan.memory import Plan
from instructblip.weights.partner import NOTHING_GIVEN, Partner, declared, given_weights, is_here, said_partner
from instructblip.weights.start import NO_LLM, not_aligned


def plan_start(config: TrainConfig, plan: Plan) -> list[str]:
    """A line where Q-Former and LLM are not aligned to each other at the start, or where a Q-Former has no weights at all.

    Raises:
        UserError: weights to start from that are here and cannot be opened.
    """
    qformer = config.q_former() if config.has_qformer() else None
    given = given_weights(config.init_from, qformer)
    if config.llm is None:
        line = NOTHING_GIVEN if _lacks_weights(given, qformer) else None
    else:
        line = plan_alignment(given, qformer, config.llm, plan.llm.get_input_embeddings().embedding_dim)
    return [] if line is None else [f"At the start: {line}."]


def plan_alignment(given: Sequence[str], qformer: QFormerConfig | None, llm: LLMConfig, llm_width: int) -> str | None:
    """A line where Q-Former and LLM are not aligned to each other; None where nothing speaks against it.

    Weights that are not on this machine are judged by `qformer.aligned_to` alone; a connector that is no Q-Former has none.

    Raises:
        UserError: weights that cannot be opened.
    """
    says = partial(not_aligned, llm=llm.name, qformer=qformer is not None)
    if not given:
        return NOTHING_GIVEN if _lacks_weights(given, qformer) else says(NO_LLM, projection_fits=False)
    name = said_partner(qformer)
    partner: Partner | None = Partner(name)
    if is_here(given[-1]):
        from instructblip.weights.init_sources import find_partner, find_start  # for whatever can be started from

        partner = declared(find_partner(find_start(given[-1])), name)
    if partner is None:
        return says(NO_LLM, projection_fits=False)
    other = partner.other_than(llm, llm_width)
    return None if other is None else says(other, projection_fits=partner.width in (None, llm_width))


def _lacks_weights(given: Sequence[str], qformer: QFormerConfig | None) -> bool:
    return not given and qformer is not None and qformer.init == "given"
