"""Texts of a picture: which of them are judged, and which are kept."""

from collections.abc import Sequence
from typing import NamedTuple

from instructblip.capfilt.settings import Settings
from instructblip.data.records import Record
from instructblip.data.text_processors import TEXT_PROCESSORS

SOURCES = ("synthetic", "web")


class Text(NamedTuple):
    """A text about a picture, and whether it is `synthetic` or of the `web`."""

    text: str
    source: str


class Scored(NamedTuple):
    """A text with what the filter says of it."""

    text: str
    source: str
    score: float


def web_texts(records: Sequence[Record]) -> list[str]:
    """What the web says of a picture: the captions among its records, in one line each."""
    said = [
        text for record in records for text in record.captions or (record.answers if record.kind == "caption" else ())
    ]
    return [one_line(text) for text in said]


def one_line(text: str) -> str:
    return " ".join(text.split())


def texts_to_judge(
    captions: Sequence[str], web: Sequence[str], text_processor: str
) -> tuple[list[Text], list[tuple[str, str]]]:
    """The texts of a picture that differ and say something, the web's first; and (source, reason) of the others."""
    found: dict[str, Text] = {}
    left_out = []
    for source, texts in (("web", web), ("synthetic", captions)):
        for text in texts:
            if not TEXT_PROCESSORS[text_processor](text).strip():
                left_out.append((source, "empty"))
            elif text in found:
                left_out.append((source, "repeats another text"))
            else:
                found[text] = Text(text, source)
    return list(found.values()), left_out


def choose_texts(texts: Sequence[Scored], settings: Settings) -> list[Scored]:
    """The texts that are kept, in their order, or the best ones first; of equals the first."""
    if settings.threshold is not None:
        return [item for item in texts if item.score > settings.threshold]
    return sorted(texts, key=lambda item: -item.score)[: settings.kept]
