"""How many records there are at each step from a dataset's card to a score, so that none goes missing silently."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from instructblip.data.cards import Card
from instructblip.data.shards import PreparedSplit


@dataclass(frozen=True)
class RecordCounts:
    """Records of a split, of the kinds that are scored.

    Attributes:
        expected: what the card says; None: it does not know.
        prepared: in the shards.
        lost: could not be kept in preparing; of all kinds together, for manifests do not tell them apart.
        failed: could not be read when they were asked.
        answered: what the model was asked and answered; fewer than prepared where only a part was chosen.
        scored: of these, what the metric counts; its own rules may leave some out, and answers may not be public.
        vocabulary: of the train split, where the candidates are its answers; all of what was prepared is answered.
    """

    expected: int | None
    prepared: int
    lost: int
    failed: int = 0
    answered: int = 0
    scored: int = 0
    vocabulary: "RecordCounts | None" = None

    @property
    def whole(self) -> int:
        """The whole split: what is expected; where nobody knows, what was prepared and lost."""
        return max(self.prepared, self.prepared + self.lost if self.expected is None else self.expected)

    def shortfall(self) -> str:
        """What of the whole split was answered, and where the rest went; empty when all of it was."""
        if self.answered >= self.whole:
            return ""
        gone = {"prepared": self.prepared if self.prepared < self.whole else 0, "failed": self.failed}
        gone["lost in preparing"] = self.lost
        reasons = ", ".join(f"{number:,} {what}" for what, number in gone.items() if number)
        return f"{self.answered:,} of {self.whole:,} records" + (f" ({reasons})" if reasons else "")

    def describe(self) -> str:
        """All of them in a line, as a report shows them."""
        expected = "not known how many are expected" if self.expected is None else f"{self.expected:,} expected"
        steps = [f"{self.prepared:,} prepared", f"{self.lost:,} lost in preparing", f"{self.failed:,} failed"]
        text = ", ".join([expected, *steps, f"{self.answered:,} answered", f"{self.scored:,} scored"])
        if self.vocabulary is None:
            return text
        return f"{text}; candidates from {self.vocabulary.answered:,} of {self.vocabulary.whole:,} records of train"

    def to_json(self) -> dict[str, Any]:
        """As it stands in results.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> "RecordCounts":
        """Read `to_json`.

        Raises:
            ValueError: a number is missing or is none.
        """
        names = [part.name for part in fields(cls)]
        if not isinstance(values, Mapping) or not set(names) <= values.keys():
            raise ValueError(f"not whole; it needs {', '.join(names)}")
        for name in names:
            if (name == "expected" and values[name] is None) or name == "vocabulary":
                continue
            if type(values[name]) is not int or values[name] < 0:
                raise ValueError(f"not whole: {name} is {values[name]!r}")
        vocabulary = None if values["vocabulary"] is None else cls.from_json(values["vocabulary"])
        return cls(**{name: values[name] for name in names} | {"vocabulary": vocabulary})


def prepared_counts(card: Card, opened: PreparedSplit, kinds: Sequence[str]) -> RecordCounts:
    """The counts of a split as it was prepared, before anything is asked; of these kinds (none: the card's own)."""
    kinds, by_kind = kinds or card.kinds, opened.manifest["records_by_kind"]
    expected = card.expected_records(opened.split, kinds) if opened.split in card.splits else None
    prepared = sum(number for kind, number in by_kind.items() if not kinds or kind in kinds)
    return RecordCounts(expected, prepared, sum(loss["records"] for loss in opened.manifest.get("lost", [])))
