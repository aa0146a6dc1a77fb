"""What a card settles of a protocol by itself; the rest (samples, frames, whose OCR tokens) the prepared shards say."""

from collections.abc import Mapping
from typing import Any

from instructblip.data.card_evaluation import Evaluation
from instructblip.data.templates import MAX_OCR_TOKENS

_OWN_OCR = "the dataset's own"
_FROM_CARD = (
    "prompt",
    "aggregate",
    "normalize",
    "include_eos",
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "length_penalty",
    "repetition_penalty",
    "transform",
    "metric",
)


def stated(rules: Evaluation, mode: str) -> dict[str, Any]:
    """The choices of a `Protocol`, by name, that follow from a card's evaluation in this mode."""
    source = (rules.candidates_from or "card") if mode == "rank" else "none"
    verbalizers = tuple((text, label) for label, synonyms in rules.verbalizers.items() for text in synonyms)
    ranked = source == "card"
    return {name: getattr(rules, name) for name in _FROM_CARD} | {
        "mode": mode,
        "candidates_from": source,
        "candidates": rules.candidates + tuple(text for text, _ in verbalizers) if ranked else (),
        "classes": rules.candidates + tuple(label for _, label in verbalizers) if ranked else (),
        "verbalizers": verbalizers,
    }


def of_the_shards(rules: Evaluation) -> dict[str, Any]:
    """What a card expects of choices that the prepared shards make; without those that it leaves open."""
    expected: dict[str, Any] = {"frames": rules.frames}
    if rules.ocr is not None or not shows_ocr(rules.prompt):
        expected["ocr"] = describe_ocr(None) if shows_ocr(rules.prompt) else ""
    return expected


def shows_ocr(prompt: str) -> bool:
    """Whether OCR tokens stand in a prompt."""
    return "{ocr_tokens}" in prompt


def describe_ocr(made_by: Mapping[str, Any] | None) -> str:
    """Whose OCR tokens a prompt shows and how many at most; `made_by` is `options.ocr` of a manifest, None for own ones."""
    made = "{library} {version} on {runtime}, lines of score {threshold} and above"
    source = _OWN_OCR if made_by is None else made.format_map(made_by)
    return f"{source}, the first {MAX_OCR_TOKENS}"
