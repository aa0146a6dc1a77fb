"""The language model that weights were trained beside, and what of a start is known before any weights are opened."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from instructblip.config.schema import LLMConfig, QFormerConfig

NOTHING_GIVEN = (
    "qformer.init=given has no weights of its own; give some to start from: init_from=RUN, FOLDER, HUB_ID or FILE.pth, or "
    "BLIP-2's two stages: init_from=[blip2_pretrained.pth, blip2_pretrained_<llm>.pth]"
)


@dataclass(frozen=True)
class Partner:
    """The language model that Q-Former and projection were trained beside, as far as a source says.

    Attributes:
        name: in configs/llm.
        projection: LAVIS's name of the projection, which tells the family.
        width: of its embeddings, which the projection leads into.
        weights: tensors of it under this code's names; empty where the source has none.
    """

    name: str | None = None
    projection: str | None = None
    width: int | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def other_than(self, llm: LLMConfig, width: int) -> str | None:
        """What it is called where it cannot be `llm`, whose embeddings are of that width; None where it may be."""
        if self.projection is not None and llm.lavis_projection not in (None, self.projection):
            return f"an LLM of LAVIS's {self.projection}"
        if self.name not in (None, llm.name):
            return self.name
        return None if self.width in (None, width) else f"{self.name or 'an LLM'} of width {self.width}"


def given_weights(init_from: Sequence[str], qformer: QFormerConfig | None) -> list[str]:
    """What a configuration wants to start from; `qformer.stage1` and `stage2` are another spelling of it."""
    if qformer is None:
        return list(init_from)
    return [path for path in (qformer.stage1, qformer.stage2) if path is not None] or list(init_from)


def is_here(given: str) -> bool:
    """Whether weights to start from lie on this machine, by their path."""
    return Path(given).expanduser().exists()


def said_partner(qformer: QFormerConfig | None) -> str | None:
    """The LLM that the user says the weights were trained with."""
    return None if qformer is None else qformer.aligned_to


def declared(partner: Partner | None, aligned_to: str | None) -> Partner | None:
    """With the name that the user gave, where the source says none and has no weights of it to compare."""
    if partner is None or partner.name is not None or partner.weights:
        return partner
    return dataclasses.replace(partner, name=aligned_to)
