"""What decides the texts beside models and pictures."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from instructblip.config.schema import CapFiltConfig
from instructblip.errors import UserError

# How captioners draw as they were released, by kind of model; lengths are of new tokens. BLIP's own, 5 to 20, count its
# "[DEC] a picture of". Those of BLIP-2's second stage and of InstructBLIP are their defaults for captions.
_BLIP = {"max_new_tokens": 16, "min_new_tokens": 1, "repetition_penalty": 1.1}
CAPTIONERS: Mapping[str, Mapping[str, float]] = {
    "blip_caption": _BLIP,
    "blip_pretrain": _BLIP,
    "blip2_stage1": {"max_new_tokens": 29, "min_new_tokens": 9, "repetition_penalty": 1.0},
    "blip2": {"max_new_tokens": 30, "min_new_tokens": 1, "repetition_penalty": 1.0},
    "instructblip": {"max_new_tokens": 30, "min_new_tokens": 1, "repetition_penalty": 1.0},
}


@dataclass(frozen=True)
class Settings:
    """What decides the texts, beside models and pictures; as `CapFiltConfig`, with its defaults filled in.

    `threshold` is None where the best `kept` are taken, and the other way round.
    """

    variant: str
    captions: int
    prompt: str | None
    top_p: float
    max_new_tokens: int
    min_new_tokens: int
    repetition_penalty: float
    threshold: float | None
    kept: int | None
    text_processor: str
    seed: int

    @property
    def refusal(self) -> str:
        """What is said of a text that the filter does not keep."""
        return f"does not match: at most {self.threshold:g}" if self.kept is None else f"not among the best {self.kept}"


def settle(config: CapFiltConfig, captioner_kind: str) -> Settings:
    """Fill in what the configuration leaves to the variant and to the captioner.

    Raises:
        UserError: limits of length that contradict each other.
    """
    by_filter = config.variant == "blip"
    given = {name: getattr(config, name) for name in _BLIP}
    drawing: dict[str, Any] = {**CAPTIONERS[captioner_kind], **{k: v for k, v in given.items() if v is not None}}
    if drawing["min_new_tokens"] > drawing["max_new_tokens"]:
        raise UserError(
            f"the captioner writes {drawing['min_new_tokens']} tokens at least and {drawing['max_new_tokens']} at most; "
            "set min_new_tokens= and max_new_tokens="
        )
    return Settings(
        variant=config.variant,
        captions=config.captions or (1 if by_filter else 10),
        prompt=config.prompt,
        top_p=config.top_p,
        threshold=(0.5 if config.threshold is None else config.threshold) if by_filter else None,
        kept=None if by_filter else config.kept or 2,
        text_processor=config.text_processor or ("blip_caption" if by_filter else "none"),
        seed=config.seed,
        **drawing,
    )
