"""Results of a task: predictions, the outputs that metrics read, and the score with its interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from instructblip.data.cards import OwnCard, as_stored
from instructblip.data.coverage import RecordCounts
from instructblip.errors import UserError
from instructblip.evaluation.metrics import ModelOutput, Score
from instructblip.evaluation.protocol import EvaluationSample, Protocol, Task, as_json
from instructblip.evaluation.statistics import score_interval


@dataclass(frozen=True)
class Ranking:
    """What an image or a caption found in `retrieve` mode.

    Attributes:
        ranked: numbers of the best captions (or images) of the split, best first; equal ones in their order.
        scores: theirs.
        rank: place of the first that is right, 0 for the best; None where it was not among those that were ranked anew.
    """

    ranked: tuple[int, ...]
    scores: tuple[float, ...]
    rank: int | None


@dataclass(frozen=True)
class Prediction:
    """The model's answer to one sample.

    Attributes:
        key: of the journal.
        id: the sample's.
        prediction: the text it wrote, or the class or candidate it found likeliest.
        scores: log-likelihoods of candidates, in nats.
        ranked: numbers of the candidates that `scores` are of, best first, where only the best were kept; empty: of all, in
            their order.
        rank, captions: in `retrieve` mode, where `ranked` are numbers of captions: see `Ranking`, and the image's captions'.
    """

    key: str
    id: str
    prediction: str
    scores: tuple[float, ...] = ()
    ranked: tuple[int, ...] = ()
    rank: int | None = None
    captions: tuple[Ranking, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A sample that could not be answered, and why; the run's tolerance let it pass."""

    key: str
    id: str
    reason: str


@dataclass(frozen=True)
class TaskResult:
    """Score of one task, its 95% interval, and what it was computed from.

    Attributes:
        task: what was run.
        samples: those that were answered, in stored order; all of the task's, but for `failures`.
        predictions: of `samples`.
        score: None where the answers are not public.
        low, high: the 95% interval of `value`, images resampled; None with it, and where there is none (`score_interval`).
        seconds: what the run took.
        failures: samples that could not be read.
        predictions_sha256: of the predictions.jsonl that holds them; None where nothing was kept.
    """

    task: Task
    samples: tuple[EvaluationSample, ...]
    predictions: tuple[Prediction, ...]
    score: Score | None
    low: float | None
    high: float | None
    seconds: float
    failures: tuple[Failure, ...] = ()
    predictions_sha256: str | None = None

    @property
    def value(self) -> float | None:
        """The score as papers print it; None where the answers are not public."""
        return None if self.score is None else self.score.table_value

    @property
    def records(self) -> RecordCounts:
        """How many records the score is of, and where the split's others went."""
        scored = 0 if self.score is None else self.score.count
        return replace(self.task.records, failed=len(self.failures), answered=len(self.samples), scored=scored)

    @cached_property
    def per_sample(self) -> tuple[float | None, ...]:
        """The score of each of `samples`, on the scale of `value`; None for those that the metric leaves out."""
        if self.score is None:
            return (None,) * len(self.samples)
        scored = range(len(self.samples)) if self.score.scored is None else self.score.scored
        values = dict(zip(scored, self.score.per_sample, strict=True))
        factor = self.score.table_factor
        return tuple(values[number] * factor if number in values else None for number in range(len(self.samples)))

    @property
    def outputs(self) -> list[ModelOutput]:
        """Of each of `samples`, as metrics and submissions read it."""
        return model_outputs(self.task, self.samples, self.predictions)

    def candidate_scores(self, number: int) -> list[tuple[str, float]]:
        """(text, log-likelihood in nats) of the candidates of sample `number`; empty where the model wrote freely."""
        candidates = self.task.candidates(self.samples[number].record)
        scores, ranked = self.predictions[number].scores, self.predictions[number].ranked
        return [(candidates[row], score) for row, score in zip(ranked or range(len(scores)), scores, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """The entry of this dataset in results.json; the value is null where the answers are not public."""
        protocol = self.task.protocol
        entry = {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "records": self.records.to_json(),
            "count": len(self.samples) if self.score is None else self.score.count,
            "made_up": self.task.made_up,
            "metric": protocol.metric,
            "higher_is_better": self.task.metric.higher_is_better,
            "metric_details": {} if self.score is None else dict(self.score.details),
            "protocol": as_json(protocol),
            "predictions_sha256": self.predictions_sha256,
            "failed": [{"id": failure.id, "reason": failure.reason} for failure in self.failures],
        }
        if isinstance(self.task.card, OwnCard):
            entry["card"] = as_stored(self.task.card)
        return entry if self.score is not None else entry | {"note": "answers not public"}


def score_task(
    task: Task,
    samples: Sequence[EvaluationSample],
    predictions: Sequence[Prediction],
    *,
    seconds: float,
    failures: Sequence[Failure] = (),
) -> TaskResult:
    """Score the predictions of a task.

    Raises:
        UserError: the metric is not defined for these samples, such as AUROC of one class.
    """
    score, ends = None, None
    if task.answers_public:
        try:
            records = [sample.record for sample in samples]
            score = task.metric(model_outputs(task, samples, predictions), records)
            check_finite(score)
            ends = score_interval(score, [sample.image_key for sample in samples], task.metric.interval)
        except ValueError as error:
            raise UserError(
                f"{task.card.name}: {task.metric.name} cannot be computed over {len(samples)} samples ({error})"
            ) from None
    low, high = ends or (None, None)
    return TaskResult(task, tuple(samples), tuple(predictions), score, low, high, seconds, tuple(failures))


def check_finite(score: Score) -> None:
    """Refuse a score with a number in it that is not finite.

    Raises:
        ValueError: says which.
    """
    for name, number in {"the score": score.value, **score.details}.items():
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{name} is {number}")
    if not all(map(math.isfinite, score.per_sample)):
        raise ValueError("the score of a sample is not finite")
    for part in score.parts.values():
        check_finite(part)


def model_outputs(
    task: Task, samples: Sequence[EvaluationSample], predictions: Sequence[Prediction]
) -> list[ModelOutput]:
    """Predictions as metrics read them: the log-likelihoods of several texts of one class become the class's."""
    outputs = []
    for sample, prediction in zip(samples, predictions, strict=True):
        if task.protocol.mode == "retrieve":
            ranks = (prediction.rank, *(ranking.rank for ranking in prediction.captions))
            outputs.append(ModelOutput(prediction.prediction, ranks=ranks))
            continue
        if not prediction.scores:
            outputs.append(ModelOutput(prediction.prediction))
            continue
        if prediction.ranked:  # the best scores alone were kept
            classes = tuple(dict.fromkeys(task.protocol.classes)) or task.candidates(sample.record)
            outputs.append(ModelOutput(prediction.prediction, classes))
            continue
        names, scores = class_scores(task.protocol, task.candidates(sample.record), prediction.scores)
        outputs.append(ModelOutput(prediction.prediction, names, scores))
    return outputs


def class_scores(
    protocol: Protocol, candidates: Sequence[str], scores: Sequence[float]
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The classes and their log-likelihoods: of the candidates themselves, or of classes with several texts each.

    Those are added up (`aggregate` sum: the probability that any of the texts is said) or the best counts (max).
    """
    if not protocol.classes:
        return tuple(candidates), tuple(scores)
    texts: dict[str, list[float]] = {}
    for name, score in zip(protocol.classes, scores, strict=True):
        texts.setdefault(name, []).append(score)
    together = max if protocol.aggregate == "max" else _log_sum_exp
    return tuple(texts), tuple(together(values) for values in texts.values())


def _log_sum_exp(values: Sequence[float]) -> float:
    peak = max(values)
    if len(values) == 1 or math.isinf(peak):
        return peak
    return peak + math.log(math.fsum(math.exp(value - peak) for value in values))
