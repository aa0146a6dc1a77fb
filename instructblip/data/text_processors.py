"""What is done to a question before it is asked.

    blip_caption   lower case; each of . ! " ( ) * # : ; ~ becomes a space, runs of white space become one space
    blip_question  lower case; the same characters are removed
    capitalize     the first letter upper case, all others lower case (lmms-eval, TextVQA and VizWiz)
    none           the question as the source has it

The first two keep the first 50 words. Their names are LAVIS's (`lavis/processors/blip_processors.py`); all its evaluation
files of InstructBLIP name `blip_caption`.
"""

import re
from collections.abc import Callable

_MARKS = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")
_MAX_WORDS = 50


def blip_caption(text: str) -> str:
    """A text as LAVIS's `BlipCaptionProcessor` gives it."""
    spaced = _SPACES.sub(" ", _MARKS.sub(" ", text.lower()))
    return _first_words(spaced.rstrip("\n").strip(" "))


def blip_question(text: str) -> str:
    """A text as LAVIS's `BlipQuestionProcessor` gives it."""
    return _first_words(_MARKS.sub("", text.lower()).rstrip(" "))


def _first_words(text: str) -> str:
    return " ".join(text.split(" ")[:_MAX_WORDS])


TEXT_PROCESSORS: dict[str, Callable[[str], str]] = {
    "none": str,
    "blip_caption": blip_caption,
    "blip_question": blip_question,
    "capitalize": str.capitalize,
}
