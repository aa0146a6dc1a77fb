"""What a metric is: a record of its function and of every fact that evaluation and reports need to know about it.

`registry.METRICS` holds them by the names that dataset cards use:

    score = METRICS[card.evaluation.metric](outputs, records)

`outputs[i]` is what the model made of `records[i]`: a text, and, where it ranked candidates, their log-likelihoods. The
metric's function takes from the records what it compares with. A record that lacks that (its answers are not public, say)
raises ValueError with its id. `Score.table_value` is on the scale of papers' tables for all metrics.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from instructblip.data.records import Record
from instructblip.evaluation.metrics.score import Score, same_length


@dataclass(frozen=True)
class ModelOutput:
    """What a model made of one record.

    Attributes:
        text: what it wrote, or the class with the highest score.
        classes: what it chose from: the record's choices in their order, or the names of the classes; empty when it wrote
            freely.
        scores: log-likelihood of each of `classes`, in nats (of a class with several texts: of any of them); empty where it
            chose from more than are kept.
        ranks: in retrieval, the place of the image's first right caption, then that of the image for each of its captions;
            0 is the best, None was not found.
    """

    text: str
    classes: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    ranks: tuple[int | None, ...] = ()


Outputs = Sequence[ModelOutput]
Records = Sequence[Record]
Reference = tuple[str, ...] | tuple[int, ...]
SubmissionRow = Callable[[ModelOutput, Record], dict[str, Any]]


class Interval(StrEnum):
    """What a score is, which decides how its 95% interval is made (`statistics.score_interval`).

    SHARE: a mean of values that lie between 0 and 100 on the tables' scale, such as an accuracy.
    MEAN: a mean of values whose scale has another end, such as CIDEr.
    PAIRS: a statistic of pairs of samples, such as AUROC; `Score.resampled` gives it for a resample.
    """

    SHARE = "share"
    MEAN = "mean"
    PAIRS = "pairs"


class Outcome(StrEnum):
    """What makes a sample right or wrong in a report.

    SCORE: its own score, between 0 and 100: full marks are right, none are wrong, the rest is partly right.
    CHOICE: whether the answer that was chosen is the right one; the score says how well it was ranked.
    NONE: the metric knows no right and wrong.
    """

    SCORE = "score"
    CHOICE = "choice"
    NONE = "none"


def answers_of_record(record: Record) -> Reference:
    """Accepted answers; empty where they are not public."""
    return record.answers


def captions_of_record(record: Record) -> Reference:
    """Reference captions; empty where they are not public."""
    return record.captions


def texts_of_record(record: Record) -> Reference:
    """Answers, or captions where there are none; empty where neither is public."""
    return record.answers or record.captions


def label_of_record(record: Record) -> Reference:
    """The number of the right choice or class; empty where it is not public."""
    return () if record.label is None else (record.label,)


def any_reference(record: Record) -> Reference:
    """Answers, captions or label, whichever a record has; empty where none is public."""
    return texts_of_record(record) or label_of_record(record)


def one_of(candidates: int) -> float:
    """Score of an even draw among so many candidates where one is right, in percent."""
    return 100.0 / candidates


@dataclass(frozen=True)
class Metric:
    """One metric, with all that is particular to it.

    Attributes:
        name: as cards give it.
        title: as reports print it.
        function: the score of a model's outputs against the records.
        references: what a record is compared with; empty where that is not public.
        interval: see `Interval`.
        best: the best score there is, on the tables' scale.
        higher_is_better: whether larger scores are better ones.
        chance: number of candidates -> the expected score of drawing evenly among them, on the tables' scale; None: not
            known.
        needs_scores: a text alone is not enough, candidates must be ranked.
        needs_ranks: it scores what `retrieve` mode finds, and nothing else does.
        needs_both_labels: it is not defined over samples of one label.
        annotators: how many people's answers to a question its official scorer counts on; None: it does not count people.
        fewest_annotators: a record with fewer of them is refused, for a right answer could not get full marks.
        outcome: see `Outcome`. Where a metric does not say it, its own score decides if that is a share of right answers: of
            mistakes, and of means, nobody knows from which value on a sample is wrong.
        groups: name of what `Score.parts` are split by, where the score of a group of samples is no mean over them
            (CIDEr's domains); None: means of groups are scores of groups.
        submissions: dataset -> the row of its leaderboard's file, for those whose answers this metric would score.
    """

    name: str
    title: str
    function: Callable[[Outputs, Records], Score]
    references: Callable[[Record], Reference] = answers_of_record
    interval: Interval = Interval.SHARE
    best: float = 100.0
    higher_is_better: bool = True
    chance: Callable[[int], float] | None = one_of
    needs_scores: bool = False
    needs_ranks: bool = False
    needs_both_labels: bool = False
    annotators: int | None = None
    fewest_annotators: int = 1
    outcome: Outcome | None = None
    groups: str | None = None
    submissions: Mapping[str, SubmissionRow] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.outcome is None:
            share = self.interval is Interval.SHARE and self.higher_is_better
            object.__setattr__(self, "outcome", Outcome.SCORE if share else Outcome.NONE)

    def __call__(self, outputs: Outputs, records: Records) -> Score:
        """The score of the outputs, one a record.

        `details["fewer_annotators"]` is the number of records with fewer answers than the official scorer counts on.

        Raises:
            ValueError: different lengths, a record without what is needed, or a score that is not defined.
        """
        same_length("records", outputs, records)
        fewer = self.count_fewer_annotators(records)
        score = self.function(outputs, records)
        return score.with_details(fewer_annotators=fewer) if fewer else score

    def count_fewer_annotators(self, records: Records) -> int:
        """How many records have fewer people's answers than the official scorer counts on.

        Raises:
            ValueError: one has fewer than `fewest_annotators`.
        """
        if self.annotators is None:
            return 0
        counts = [len(given) for given in all_answers(records)]
        for record, count in zip(records, counts, strict=True):
            if count < self.fewest_annotators:
                raise ValueError(
                    f"record {record.id!r} has the answers of too few people for {self.name} ({count} of at least "
                    f"{self.fewest_annotators}); give the card another metric, such as accuracy"
                )
        return sum(count < self.annotators for count in counts)


# --- what functions take from outputs and records ---------------------------------------------------------------------


def texts_of(outputs: Outputs) -> list[str]:
    """The text of each output."""
    return [output.text for output in outputs]


def all_answers(records: Records) -> list[list[str]]:
    """All annotators' answers of each record, repeated as often as given; a blank one is the empty text.

    Raises:
        ValueError: a record without answers, or whose answer weights count no people.
    """
    found = []
    for record in records:
        answers = _public_answers(record)
        weights = record.answer_weights or (1.0,) * len(answers)
        if len(weights) != len(answers) or any(weight < 1 or weight != int(weight) for weight in weights):
            raise ValueError(f"record {record.id!r}: answer weights must count annotators, got {weights}")
        given = [answer for answer, n in zip(answers, weights, strict=True) for _ in range(int(n))]
        found.append(given + [""] * ((record.annotators or len(given)) - len(given)))
    return found


def accepted_answers(records: Records) -> list[tuple[str, ...]]:
    """The answers of each record, each once: what somebody left blank is none.

    Raises:
        ValueError: a record without answers.
    """
    return [_public_answers(record) for record in records]


def _public_answers(record: Record) -> tuple[str, ...]:
    if not record.answers:
        raise ValueError(f"record {record.id!r} has no answers; they may not be public")
    return record.answers


def only_answers(records: Records) -> list[str]:
    """The answer of each record.

    Raises:
        ValueError: a record that has not exactly one.
    """
    for record in records:
        if len(record.answers) != 1:
            raise ValueError(
                f"record {record.id!r} needs exactly one answer for this metric, has {len(record.answers)}"
            )
    return [record.answers[0] for record in records]


def labels_of(records: Records) -> list[int]:
    """The label of each record.

    Raises:
        ValueError: a record without one.
    """
    labels = []
    for record in records:
        if record.label is None:
            raise ValueError(f"record {record.id!r} has no label; it may not be public")
        labels.append(record.label)
    return labels
