"""Questions made of classes: what the name of a photo's class says of it, asked in several ways.

A photo of a dress gives, by the kind of the records:

* `classification`: the class itself, without a question;
* `present`: "is this a dress?", yes;
* `absent`: the same of one other class, drawn for this photo, no; `more_absent`: of all other classes;
* `statement`: "This is a dress.", true, and that of the class that `absent` asks for, false;
* `choice`: the class and three others, drawn for this photo.

Draws follow from the photo's path alone, without its extension: not from the other photos, nor from their format.

Classes may be kept as novel, which a training without them neither shows nor names. A record that names a novel class is of
a kind of its own, `present_of_novel`; one that shows a photo of a novel class and names others only, `absent_on_novel`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from instructblip.data.records import Record
from instructblip.data.typed import WrongValueError, is_text
from instructblip.errors import UserError

OPTIONS = ("named", "novel")  # what a card says of them in reader_options
CHOICES = 4  # of a `choice`, or all classes where there are fewer


@dataclass(frozen=True)
class ClassQuestions:
    """How the questions about a photo's class are made.

    Attributes:
        named: class -> how a sentence names one: `a dress`, `a pair of shoes`.
        novel: the classes that are kept as novel.
    """

    named: Mapping[str, str]
    novel: frozenset[str] = frozenset()

    @classmethod
    def told(cls, options: Mapping[str, Any]) -> Self | None:
        """The questions that a card's `reader_options` ask for; None where they say nothing of them.

        Raises:
            UserError: no such names.
        """
        named, novel = options.get("named", {}), options.get("novel", [])
        if not isinstance(named, dict) or not all(is_text(name) for name in named.values()):
            raise UserError("reader_options.named must say of each class how a sentence names it, {hat: a hat}")
        if not isinstance(novel, list) or not set(novel) <= named.keys():
            raise UserError("reader_options.novel must be a list of classes that reader_options.named has")
        if named and len(named) - len(novel) < 2:
            raise UserError("reader_options.named needs two classes that are not novel: nothing could be told apart")
        return cls(named, frozenset(novel)) if named else None

    def records(self, media_id: str, label: str) -> list[Record]:
        """The records of a photo besides its `classification`.

        Raises:
            WrongValueError: a class that has no name.
        """
        if label not in self.named:
            raise WrongValueError("class is none of those that the card names", repr(label))
        stem = media_id.rpartition(".")[0] or media_id
        wrong, *more = _drawn(f"{stem} is", [name for name in self.named if name != label])
        asked = [("present", label), ("absent", wrong), *(("more_absent", name) for name in more)]
        return [
            *(self._question(media_id, label, name, kind) for kind, name in asked),
            *(self._statement(media_id, label, name) for name in (label, wrong)),
            self._choice(media_id, label, stem),
        ]

    def kind(self, kind: str, label: str, named: Sequence[str]) -> str:
        """The kind of a record that shows a photo of the class `label` and names these."""
        if self.novel.intersection(named):
            return f"{kind}_of_novel"
        return f"{kind}_on_novel" if label in self.novel else kind

    def _question(self, media_id: str, label: str, asked: str, kind: str) -> Record:
        answer = "yes" if asked == label else "no"
        question = f"is this {self.named[asked]}?"
        return Record(f"{media_id}-is-{asked}", self.kind(kind, label, [asked]), question, answers=(answer,))

    def _statement(self, media_id: str, label: str, asked: str) -> Record:
        truth = int(asked == label)
        return Record(
            f"{media_id}-is-{asked}-statement",
            self.kind("statement", label, [asked]),
            f"This is {self.named[asked]}.",
            answers=(("false", "true")[truth],),
            label=truth,
        )

    def _choice(self, media_id: str, label: str, stem: str) -> Record:
        others = _drawn(f"{stem} or", [name for name in self.named if name != label])
        choices = tuple(_drawn(f"{stem} among", [label, *others[: CHOICES - 1]]))
        return Record(
            f"{media_id}-choice",
            self.kind("choice", label, choices),
            "which of these is shown?",
            choices=choices,
            label=choices.index(label),
        )


def _drawn(draw: str, names: Sequence[str]) -> list[str]:
    """The names in an order of this draw's own."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{draw} {name}".encode()).digest())
