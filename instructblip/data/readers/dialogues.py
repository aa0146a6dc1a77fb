"""Dialogues as LLaVA and as chat models write them: turns of `from` and `value`, or of `role` and `content`."""

import re
from dataclasses import dataclass
from typing import Any

from instructblip.data.readers.base import Losses
from instructblip.data.typed import WrongValueError, is_text

SPEAKERS = (("human", "user"), ("gpt", "assistant"))  # who asks, who answers
# The place of an image stands before or after a question, on a line of its own.
_MARK = re.compile(r"<(?:image|video)>\n|\n<(?:image|video)>|<(?:image|video)>")


@dataclass(frozen=True)
class Dialogue:
    """What is said about an image.

    Attributes:
        system: the text before the first question, which speaks to the model; None without one.
        turns: (question, answer) pairs; questions without the marks of images, else both as they are.
    """

    system: str | None
    turns: tuple[tuple[str, str], ...]


def read_dialogue(conversation: Any, place: str, losses: Losses, images: int | None = None) -> Dialogue:
    """The turns of a dialogue, up to the first that is not whole: later ones would lack their history.

    Args:
        images: how many images it is about, where they are known; `<image>` must stand as often, or nowhere.

    Raises:
        WrongValueError: no turns, speakers that do not take turns, or another number of `<image>`.
    """
    said = [_speech(turn) for turn in conversation] if isinstance(conversation, list) else []
    system = said.pop(0)[1] if said and said[0][0] == "system" else None
    if not said or any(speaker not in SPEAKERS[number % 2] for number, (speaker, _) in enumerate(said)):
        raise WrongValueError("dialogue does not alternate between human and gpt")
    texts = [text for _, text in said]
    marks = sum(len(_MARK.findall(text)) for text in texts[0::2] if isinstance(text, str))
    if images is not None and marks not in (0, images):
        raise WrongValueError("dialogue has another number of <image> than images", f"{marks} for {images}")
    texts[0::2] = [_MARK.sub("", text) if isinstance(text, str) else text for text in texts[0::2]]
    texts[0] = texts[0].strip() if isinstance(texts[0], str) else texts[0]
    whole = 0
    while whole + 1 < len(texts) and is_text(texts[whole]) and is_text(texts[whole + 1]):
        whole += 2
    if lost := len(texts) // 2 - whole // 2:
        losses.add("turn is blank or no text, and so are lost those after it", f"{place} turn {whole}", records=lost)
    elif len(texts) % 2:
        losses.add("last question has no answer", place, records=0)
    turns = tuple(zip(texts[0:whole:2], texts[1:whole:2], strict=True))
    return Dialogue(system.strip() if is_text(system) else None, turns)


def count_answers(conversation: Any) -> int:
    """How many records a dialogue that is lost would have given."""
    turns = conversation if isinstance(conversation, list) else []
    return sum(_speech(turn)[0] in SPEAKERS[1] for turn in turns)


def _speech(turn: Any) -> tuple[Any, Any]:
    """Speaker and text of a turn; the parts of a chat model's content are joined, with a mark for each image."""
    if not isinstance(turn, dict):
        return None, None
    if "from" in turn:
        return turn["from"], turn.get("value")
    content = turn.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = "".join(
            f"<{part['type']}>" if part.get("type") in ("image", "video") else _text(part) for part in content
        )
    return turn.get("role"), content


def _text(part: dict[str, Any]) -> str:
    text = part.get("text")
    return text if isinstance(text, str) else ""
