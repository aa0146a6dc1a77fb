"""The report's content on one task: its row, sub-scores, breakdowns and samples."""

from collections.abc import Iterator, Mapping, Sequence

from instructblip.data.records import Record
from instructblip.evaluation.metrics import Interval, Outcome, group_means
from instructblip.evaluation.outcomes import TaskResult
from instructblip.evaluation.protocol import EvaluationSample, as_json
from instructblip.evaluation.report.page import (
    FoundPictures,
    FoundText,
    Picture,
    ReportExample,
    ReportRow,
    ReportSection,
    contact_sheet,
    thumbnail,
)
from instructblip.evaluation.report.table import MADE_UP_DATA, ComparabilityNote, comparison_marks
from instructblip.evaluation.statistics import score_interval
from instructblip.tracking import TrackedSample

_FULL = 100 - 1e-6  # on the tables' scale
_FAILURES_SHOWN = 5
_TEXTS_FOUND = 5  # shown of a sample in retrieval
_CAPTIONS_SHOWN = 2  # whose images are shown
_PICTURES_FOUND = 4
_MODES = {"rank": "ranking", "generate": "open generation", "retrieve": "retrieval", "match": "matching"}


def report_row(result: TaskResult, baselines: Mapping[str, float], *, trained_on: bool = False) -> ReportRow:
    """The dataset's line of the summary table; `trained_on`: the model was, whatever the card says."""
    card, protocol = result.task.card, result.task.protocol
    return ReportRow(
        dataset=card.name,
        title=card.title,
        task=card.task_group + (f", {'trained on' if trained_on else 'held out'}" if card.role == "held-out" else ""),
        mode=_MODES[protocol.mode],
        metric=result.task.metric.title,
        count=len(result.samples) if result.score is None else result.score.count,
        value=result.value,
        low=result.low,
        high=result.high,
        baselines=dict(baselines),
        paper=card.published,
        marks=_marks(result),
    )


def _marks(result: TaskResult) -> dict[ComparabilityNote, str]:
    """Why the score must not be compared with the paper's, and details."""
    marks = {MADE_UP_DATA: ""} if result.task.made_up else {}
    if result.score is not None:
        marks |= comparison_marks(result.task.card, as_json(result.task.protocol), result.records)
    return marks


def report_section(result: TaskResult, examples: int) -> ReportSection:
    """The dataset's part of the page.

    Args:
        examples: samples shown, half of them not right where there are as many, spread evenly over the split.

    Raises:
        UserError: a picture that cannot be read.
    """
    outcomes = [outcome(result, number) for number in range(len(result.samples))]
    chosen = shown(_good(result, outcomes), examples)
    pictures: dict[tuple[str, int], Picture] = {}
    return ReportSection(
        dataset=result.task.card.name,
        protocol={**result.task.protocol.describe(), "records": result.records.describe()},
        parts=parts(result),
        breakdowns=breakdowns(result),
        notes=_notes(result),
        examples=[_example(result, number, outcomes[number], pictures) for number in chosen],
    )


def part_scores(result: TaskResult) -> dict[str, dict[str, float | int | None]]:
    """Value, 95% interval (None where there is none) and number of samples of each part, on the tables' scale."""
    if result.score is None:
        return {}
    images = [sample.image_key for sample in result.samples]
    found: dict[str, dict[str, float | int | None]] = {}
    for name, part in result.score.parts.items():
        low, high = score_interval(part, images, result.task.metric.interval) or (None, None)
        found[name] = {"value": part.table_value, "low": low, "high": high, "count": part.count}
    return found


def parts(result: TaskResult) -> list[tuple[str, str, str]]:
    """(name, value, interval) of what the metric says besides the score; no interval where there is none."""
    if result.score is None:
        return []
    rows = [
        (name, f"{part['value']:.1f}", "" if part["low"] is None else f"{part['low']:.1f} to {part['high']:.1f}")
        for name, part in part_scores(result).items()
    ]
    for name, value in result.score.details.items():
        if name in result.score.parts or isinstance(value, Mapping):
            continue
        text = f"{value:.3f}" if isinstance(value, float) else "not computed" if value is None else str(value)
        rows.append((name.replace("_", " "), text, ""))
    return rows


def breakdowns(result: TaskResult) -> dict[str, list[tuple[str, int, float]]]:
    """(label, samples, score) by each tag of the records (question type, domain, relation, ...), commonest labels first.

    Left out are tags that say the same of all samples, or something else of most: those are names, not groups. A metric
    whose score of a group is no mean over its samples (`Metric.groups`) is broken down by what it was computed by, one of
    pairs not at all. Where all samples are ranked among the same few classes, also by the answer.
    """
    score, task = result.score, result.task
    if score is None or task.metric.interval is Interval.PAIRS:
        return {}
    if task.metric.groups is not None:
        groups_of_parts = [(name, part.count, part.table_value) for name, part in score.parts.items()]
        return {task.metric.groups: sorted(groups_of_parts, key=lambda row: -row[1])} if groups_of_parts else {}
    scored = [number for number, value in enumerate(result.per_sample) if value is not None]
    records = [result.samples[number].record for number in scored]
    values = [value for value in result.per_sample if value is not None]
    groups = {
        name.replace("_", " "): [record.tags.get(name, "not stated") for record in records]
        for name in dict.fromkeys(name for record in records for name in record.tags)
    }
    if task.protocol.candidates_from == "card":
        groups["answer"] = [next((text for text, _ in answers_of(record)), "not stated") for record in records]
    found = {}
    for name, labels in groups.items():
        if 2 <= len(set(labels)) <= len(labels) / 2:
            means = group_means(values, labels)
            rows = [(str(label), count, value) for label, (value, count) in means.items()]
            found[name] = sorted(rows, key=lambda row: (-row[1], row[0]))
    return found


def outcome(result: TaskResult, number: int) -> str:
    """`right`, `partial` or `wrong`; empty where the metric knows none or the sample has no score."""
    decided_by, value = result.task.metric.outcome, result.per_sample[number]
    if value is None or decided_by is Outcome.NONE:
        return ""
    if decided_by is Outcome.CHOICE:
        answers = {text for text, _ in answers_of(result.samples[number].record)}
        return "right" if result.predictions[number].prediction in answers else "wrong"
    marks = value if result.task.metric.higher_is_better else 100 - value
    return "right" if marks >= _FULL else "partial" if marks > 0 else "wrong"


def answers_of(record: Record) -> list[tuple[str, int]]:
    """What a prediction is held against, with how many annotators said it."""
    if record.answers:
        weights = record.answer_weights or (1.0,) * len(record.answers)
        return [(text, round(weight)) for text, weight in zip(record.answers, weights, strict=True)]
    if record.captions:
        return [(text, 1) for text in record.captions]
    if record.choices and record.label is not None:
        return [(record.choices[record.label], 1)]
    return []


def shown(good: Sequence[bool], limit: int) -> list[int]:
    """At most `limit` samples, half of them not good ones where there are as many, spread evenly, in the split's order."""
    bad_ones = [number for number, value in enumerate(good) if not value]
    good_ones = [number for number, value in enumerate(good) if value]
    chosen = _spread(bad_ones, max(limit // 2, limit - len(good_ones)))
    return sorted(chosen + _spread(good_ones, limit - len(chosen)))


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """`count` of the numbers at even distances, all where there are no more."""
    if count >= len(numbers):
        return list(numbers)
    return [numbers[place * len(numbers) // count] for place in range(count)]


def tracked_samples(result: TaskResult, limit: int) -> Iterator[TrackedSample]:
    """At most `limit` samples for an experiment tracker, spread evenly: the same of each evaluation of a task.

    Raises:
        UserError: a picture that cannot be read.
    """
    for number in _spread(range(len(result.samples)), limit):
        sample, score = result.samples[number], result.per_sample[number]
        frames, _ = sample.shard.read(sample.row)
        lines = [f"asked: {sample.prompt}", f"answered: {result.predictions[number].prediction}"]
        if answers := answers_of(sample.record):
            lines.append(f"right: {', '.join(text for text, _ in answers)}")
        if score is not None:
            lines.append(f"score: {score:g}")
        yield TrackedSample(contact_sheet(frames, f"{sample.id} in {sample.shard.path}"), "\n".join(lines))


def _good(result: TaskResult, outcomes: Sequence[str]) -> list[bool]:
    """Which samples count as good ones when the gallery is chosen: right ones, or those better than the mean."""
    if any(outcomes):
        return [text == "right" for text in outcomes]
    sign = 1 if result.task.metric.higher_is_better else -1
    return [value is not None and sign * value > sign * (result.value or 0.0) for value in result.per_sample]


def _notes(result: TaskResult) -> list[str]:
    notes = []
    if result.score is None:
        notes.append("The answers of this split are not public: the leaderboard scores submission.json.")
    left_out = sum(value is None for value in result.per_sample) if result.score is not None else 0
    if left_out:
        notes.append(f"The metric leaves out {left_out:,} of {len(result.samples):,} samples.")
    metric = result.task.metric
    if fewer := result.score.details.get("fewer_annotators") if result.score is not None else None:
        notes.append(
            f"{fewer:,} samples have the answers of fewer than {metric.annotators} people, which {metric.title} counts on: "
            "their scores are coarser, and not comparable with official ones."
        )
    if result.failures:
        named = "; ".join(f"{item.id}: {item.reason}" for item in result.failures[:_FAILURES_SHOWN])
        more = len(result.failures) - _FAILURES_SHOWN
        notes.append(f"{len(result.failures):,} samples failed ({named}{f'; {more:,} more' if more > 0 else ''}).")
    return notes


def _example(result: TaskResult, number: int, outcome: str, pictures: dict[tuple[str, int], Picture]) -> ReportExample:
    sample, prediction = result.samples[number], result.predictions[number]
    retrieves = result.task.protocol.mode == "retrieve"
    return ReportExample(
        picture=_picture(sample, pictures),
        question=sample.record.question or "",
        instruction=sample.prompt,
        answers=answers_of(sample.record),
        prediction=prediction.prediction,
        outcome=outcome,
        score=result.per_sample[number],
        scores=[] if retrieves else result.candidate_scores(number),
        texts=_found_texts(result, number) if retrieves else [],
        pictures=_found_pictures(result, number, pictures) if retrieves else [],
    )


def _found_texts(result: TaskResult, number: int) -> list[FoundText]:
    own = set(result.samples[number].record.captions)
    return [FoundText(text, score, text in own) for text, score in result.candidate_scores(number)[:_TEXTS_FOUND]]


def _found_pictures(result: TaskResult, number: int, pictures: dict[tuple[str, int], Picture]) -> list[FoundPictures]:
    """The best images of the sample's first captions."""
    # Numbers are places among all of the task's samples, which are those that were answered: retrieval leaves none out.
    sample = result.samples[number]
    return [
        FoundPictures(
            text,
            None if found.rank is None else found.rank + 1,
            [
                (_picture(result.samples[other], pictures), score, other == number)
                for other, score in list(zip(found.ranked, found.scores, strict=True))[:_PICTURES_FOUND]
            ],
        )
        for text, found in list(zip(sample.record.captions, result.predictions[number].captions, strict=True))[
            :_CAPTIONS_SHOWN
        ]
    ]


def _picture(sample: EvaluationSample, pictures: dict[tuple[str, int], Picture]) -> Picture:
    """A sample's picture; each is made once."""
    place = (str(sample.shard.path), sample.row)
    if place not in pictures:
        frames, _ = sample.shard.read(sample.row)
        pictures[place] = thumbnail(frames, f"{sample.id} in {sample.shard.path}")
    return pictures[place]
