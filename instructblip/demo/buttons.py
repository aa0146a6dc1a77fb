"""What each button of the page does: what a visitor gave goes in, texts and HTML for the page come out.

The first value that comes out is what is wrong, one line a mistake; behind it stands one for each checkpoint that is able.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from instructblip.config.schema import DemoLimitsConfig
from instructblip.demo.asking import ABILITIES, Ability, Subject
from instructblip.demo.heat import panels
from instructblip.demo.inputs import read_candidates, read_number, read_picture, read_text
from instructblip.errors import UserError
from instructblip.html import page_environment
from instructblip.weights.load import LoadedModel

_CAN = {
    "generate": "writes answers",
    "rank": "ranks candidates",
    "attention": "shows where its queries look",
    "match": "matches texts",
}
_UNITS = {"sum": "nats", "mean": "nats a token"}


class Buttons:
    """The buttons over some checkpoints.

    Args:
        subjects: one, or two side by side.
        limits: of what a visitor gives.
    """

    def __init__(self, subjects: Sequence[Subject], limits: DemoLimitsConfig) -> None:
        self.subjects, self.limits = subjects, limits

    @cached_property
    def _pieces(self) -> Any:
        return page_environment(Path(__file__).parent).get_template("pieces.html.jinja").module

    def able(self, ability: Ability) -> list[Subject]:
        """The checkpoints that have a head for it."""
        return [subject for subject in self.subjects if ability in subject.abilities]

    def header(self) -> str:
        """What each checkpoint is, can, and cannot."""
        return str(self._pieces.header([_described(subject) for subject in self.subjects]))

    def lack(self, subject: Subject, ability: Ability) -> str:
        """What stands in the place of a checkpoint's answer that has no head for it."""
        return str(self._pieces.lack(subject.label, subject.lack(ability)))

    def how(self, num_beams: float, max_new_tokens: float) -> str:
        """How an answer is chosen."""
        most = f"at most {max_new_tokens:.0f} tokens"
        if num_beams == 1:
            return str(self._pieces.quiet(f"Greedy: the likeliest token each time, shown as it is written, {most}."))
        return str(self._pieces.quiet(f"{num_beams:.0f} beams: shown when the search has ended, {most}."))

    def answer(
        self, path: str | None, prompt: str | None, num_beams: float, max_new_tokens: float
    ) -> Iterator[list[str]]:
        """The answers as they are written, one checkpoint after the other."""
        able = self.able("generate")
        texts = [""] * len(able)
        wrong: list[str] = []
        try:
            beams = read_number("the number of beams", num_beams, self.limits.beams)
            tokens = read_number("the number of tokens", max_new_tokens, self.limits.new_tokens)
            picture = read_picture(path, self.limits)
            asked = self._prompt(prompt, able)
        except UserError as error:
            yield [self._problems([str(error)]), *texts]
            return
        for number, subject in enumerate(able):
            try:
                _check_prompted(subject, asked)
                for text in subject.written(picture, asked, num_beams=beams, max_new_tokens=tokens):
                    texts[number] = text
                    yield [self._problems(wrong), *texts]
                if not texts[number]:
                    wrong.append(f"{subject.label} wrote an empty answer")
            except UserError as error:
                wrong.append(f"{subject.label}: {error}")
            yield [self._problems(wrong), *texts]

    def rank(self, path: str | None, prompt: str | None, candidates: str | None, normalize: str) -> list[str]:
        """The candidates with their probabilities."""
        able = self.able("rank")

        def ask(subject: Subject, picture: Image.Image) -> str:
            _check_prompted(subject, asked)
            rows = subject.rank(picture, asked, texts, normalize)
            return str(self._pieces.bars(subject.label, rows, _UNITS[normalize]))

        try:
            if normalize not in _UNITS:
                raise UserError(f"candidates are compared by the {' or the '.join(_UNITS)} over their tokens")
            texts = read_candidates(candidates, self.limits)
            asked = self._prompt(prompt, able)
        except UserError as error:
            return [self._problems([str(error)]), *[""] * len(able)]
        return self._each(able, path, ask)

    def look(self, path: str | None, prompt: str | None, query: float) -> list[str]:
        """Where queries look; 0: all of them, their mean."""
        able = self.able("attention")

        def ask(subject: Subject, picture: Image.Image) -> str:
            _check_prompted(subject, asked)
            return str(self._pieces.panels(subject.label, panels(picture, subject.attention(picture, asked), number)))

        try:
            number = 0 if query == 0 else read_number("the query", query, self.queries)
            asked = self._prompt(prompt, able)
        except UserError as error:
            return [self._problems([str(error)]), *[""] * len(able)]
        return self._each(able, path, ask)

    def match(self, path: str | None, text: str | None) -> list[str]:
        """How well a text matches the picture."""
        able = self.able("match")

        def ask(subject: Subject, picture: Image.Image) -> str:
            return str(self._pieces.match(subject.label, subject.match(picture, given)))

        try:
            given = read_text("text", text, self.limits, needed=True)
        except UserError as error:
            return [self._problems([str(error)]), *[""] * len(able)]
        return self._each(able, path, ask)

    @property
    def queries(self) -> int:
        """Of the Q-Former that has most of them."""
        return max(subject.model.qformer.query_tokens.shape[1] for subject in self.able("attention"))

    def _each(self, able: Sequence[Subject], path: str | None, ask: Callable[[Subject, Image.Image], str]) -> list[str]:
        """What each says to the picture."""
        found, wrong = [""] * len(able), []
        try:
            picture = read_picture(path, self.limits)
        except UserError as error:
            return [self._problems([str(error)]), *found]
        for number, subject in enumerate(able):
            try:
                found[number] = ask(subject, picture)
            except UserError as error:
                wrong.append(f"{subject.label}: {error}")
        return [self._problems(wrong), *found]

    def _prompt(self, prompt: str | None, able: Sequence[Subject]) -> str:
        needed = all(subject.prompting == "must" for subject in able)
        return read_text("prompt", prompt, self.limits, needed=needed)

    def _problems(self, lines: Sequence[str]) -> str:
        return str(self._pieces.problems(lines)) if lines else ""


def _check_prompted(subject: Subject, prompt: str) -> None:
    if subject.prompting == "must" and not prompt:
        raise UserError("it reads a prompt, and there is none; write one")


def _described(subject: Subject) -> dict[str, str]:
    can = [_CAN[ability] for ability in ABILITIES if ability in subject.abilities]
    lacks = [lack.partition(" has ")[2] for ability in ABILITIES if (lack := subject.lack(ability))]
    return {
        "label": subject.label,
        "facts": _facts(subject.loaded),
        "can": _listed(can) + ("" if subject.prompting != "none" else ", and reads no prompt") if can else "",
        "lacks": f"has {_listed(lacks)}" if lacks else "",
    }


def _facts(loaded: LoadedModel) -> str:
    """What it is made of, on one line."""
    parts = [part.name for part in loaded.parts.values()]
    facts = [f"{loaded.model.title} of {_listed(parts)}"] if parts else [loaded.model.title]
    facts += [f"step {loaded.step:,}"] if loaded.step else []
    facts += [f"adapters of {loaded.adapter}"] if loaded.adapter else []
    facts += [f"{part} never trained" for part in loaded.standing.untrained]
    return ", ".join(facts)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""
