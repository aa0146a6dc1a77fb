"""What is remembered of a start: the weights a run began with, what was new, and whether Q-Former and LLM fit together."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

NO_LLM = "no language model"
PROJECTION, QFORMER = "projection", "Q-Former"


@dataclass(frozen=True)
class Start:
    """What a run started from, as its checkpoints and results say it.

    Attributes:
        weights: `source`, `name` and `sha256` of each, in their order; none where each part came from its own files.
        new: what was drawn: parts of the model's part `qformer` or `connector`, or of BLIP's `text`, which the weights did
            not hold.
        aligned_to: the LLM that Q-Former and projection were trained beside, where it is not the run's; `NO_LLM` where there
            was none; None where it is the run's, or the run has none.
        text_branch: fingerprint of the Q-Former's text branch, which the run keeps beside its checkpoints for others that
            start from it, since its own model reads no text.
    """

    weights: tuple[dict[str, str], ...] = ()
    new: tuple[str, ...] = ()
    aligned_to: str | None = None
    text_branch: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As a checkpoint's state holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any] | None) -> "Start":
        """The reverse; a checkpoint without a record says nothing."""
        if stored is None:
            return cls()
        return cls(**{**stored, "weights": tuple(stored["weights"]), "new": tuple(stored["new"])})

    def untrained(self, trained_parts: Collection[str]) -> tuple[str, ...]:
        """What is still as it was drawn after steps that trained these parts."""
        return () if {"qformer", "connector", "text"} & set(trained_parts) else self.new


class Standing(NamedTuple):
    """How a model that is evaluated came to be.

    Attributes:
        start: of its run.
        aligned_to: the LLM that Q-Former and projection were trained beside, where it is not the model's.
        untrained: what of it was drawn and never trained.
    """

    start: Start = Start()
    aligned_to: str | None = None
    untrained: tuple[str, ...] = ()


PLAIN = Standing()


def not_aligned(aligned_to: str, llm: str, *, projection_fits: bool, qformer: bool = True) -> str:
    """Says in one line that Q-Former and projection, or another connector, speak to another language model than `llm`."""
    if aligned_to == NO_LLM:
        if not qformer:
            return f"the connector was aligned to no language model; llm={llm} needs it trained"
        return (
            f"the Q-Former was aligned to no language model; llm={llm} needs it trained, and the projection starts anew"
        )
    what, them = ("Q-Former and projection were", "them") if qformer else ("the connector was", "it")
    remark = "" if projection_fits else ", and the projection, into another width, starts anew"
    return f"{what} aligned to {aligned_to}; llm={llm} needs {them} trained{remark}"
