"""What the runs of a study say: scores by seed, differences to the reference, costs."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructblip.config.schema import StudyCommandConfig
from instructblip.errors import UserError
from instructblip.evaluation.report.compare import paired_scores
from instructblip.evaluation.results_file import StoredRun, read_run
from instructblip.evaluation.statistics import Paired, Spread, compare_paired, spread
from instructblip.study.carrying import measured_of, results_of, splits_of
from instructblip.study.plan import StudyPlan, StudyRun
from instructblip.weights.checkpoint import checkpoint_folders

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Scores:
    """The scores of one condition on one dataset.

    Attributes:
        by_seed: on the table's scale.
        baselines: name -> mean over seeds.
        count: samples, of each seed.
    """

    condition: str
    dataset: str
    by_seed: Mapping[int, float]
    baselines: Mapping[str, float]
    count: int

    @property
    def over_seeds(self) -> Spread:
        """Of the scores; their interval is over seeds."""
        return spread(list(self.by_seed.values()))


@dataclass(frozen=True)
class Difference:
    """A condition minus the reference, on one dataset.

    Attributes:
        by_seed: of the seeds that both have.
        by_sample: of the samples' means over those seeds, images resampled: how far the difference of these very runs
            depends on the questions that were asked.
        better, worse: seeds in which the samples of that seed alone say so, p below `SIGNIFICANT`; of a metric that counts
            mistakes a smaller score is the better one.
    """

    condition: str
    dataset: str
    by_seed: Mapping[int, float]
    by_sample: Paired
    better: int
    worse: int

    @property
    def over_seeds(self) -> Spread:
        """Of the differences: the paired t test over seeds."""
        return spread(list(self.by_seed.values()))


@dataclass(frozen=True)
class Cost:
    """What the runs of a condition or stage took, one a seed.

    Attributes:
        name: the condition's or stage's.
        starts_from: what had to be trained before, if anything.
        evaluates: the condition whose run it evaluates, where it trains nothing.
        measured: of each run; see `carrying`.
    """

    name: str
    starts_from: str | None
    evaluates: str | None
    measured: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Findings:
    """All that a study's report shows.

    Attributes:
        scores: by (condition, dataset).
        differences: likewise, without the reference.
        costs: of stages, then of conditions.
        missing: (condition, seed) without scores.
    """

    datasets: Sequence[str]
    conditions: Sequence[str]
    seeds: Sequence[int]
    scores: Mapping[tuple[str, str], Scores]
    differences: Mapping[tuple[str, str], Difference]
    costs: Sequence[Cost]
    missing: Sequence[tuple[str, int]]
    made_up: bool

    @property
    def reference(self) -> str:
        """What the others are compared with."""
        return self.conditions[0]


def find(config: StudyCommandConfig, plan: StudyPlan) -> Findings:
    """Read the runs that have ended, and compare them.

    Raises:
        UserError: none has, runs of one study read other data or were asked other questions, a dataset that none has a
            score of.
    """
    ended = {place: read_run(folder) for place, run in plan.scored.items() if (folder := _ended(plan.runs[run]))}
    if not ended:
        raise UserError(f"no run of study={config.study.name} has ended, so there is nothing to compare")
    _check_same_data([plan.runs[one] for one in dict.fromkeys([*plan.stages.values(), *plan.trained.values()])])
    datasets = _datasets(config.study.datasets, list(ended.values()))
    _check_same_questions(datasets, list(ended.values()))
    conditions = list(config.study.conditions)
    scores = {(name, dataset): _scores(name, dataset, ended) for name in conditions for dataset in datasets}
    pairs = [(name, dataset) for name in conditions[1:] for dataset in datasets]
    found = {(name, dataset): _difference(name, conditions[0], dataset, ended) for name, dataset in pairs}
    return Findings(
        datasets,
        conditions,
        plan.seeds,
        {place: item for place, item in scores.items() if item is not None},
        {place: item for place, item in found.items() if item is not None},
        _costs(config, plan),
        [place for place in plan.scored if place not in ended],
        any(score.made_up for run in ended.values() for score in run.scores.values()),
    )


def _ended(run: StudyRun) -> Path | None:
    return results_of(run) if measured_of(run) is not None else None


def _datasets(wanted: Sequence[str], runs: Sequence[StoredRun]) -> list[str]:
    """Those that are compared, in the study's order, or in that of the first run."""
    scored = [name for run in runs for name, score in run.scores.items() if score.value is not None]
    if unknown := [name for name in wanted if name not in scored]:
        known = ", ".join(dict.fromkeys(scored)) or "none"
        raise UserError(f"study.datasets: no run has a score of {unknown[0]}; those with one: {known}")
    return list(wanted) or list(dict.fromkeys(scored))


def _check_same_data(runs: Sequence[StudyRun]) -> None:
    """Refuse to compare runs that were trained on splits of one name with other contents."""
    seen: dict[str, tuple[str, StudyRun]] = {}
    for run in runs:
        if (measured := measured_of(run)) is None:
            continue
        for split, fingerprint in _splits(run, measured).items():
            before, other = seen.setdefault(split, (fingerprint, run))
            if before != fingerprint:
                raise UserError(
                    f"{other.folder} and {run.folder} were trained on two versions of {split}; delete those of the version "
                    "that is not to be compared, and run the same command again"
                )


def _check_same_questions(datasets: Sequence[str], runs: Sequence[StoredRun]) -> None:
    """Refuse to compare runs that were asked about other samples, or about other versions of samples of one name."""
    for dataset in datasets:
        asked: dict[str, StoredRun] = {}
        for run in runs:
            if dataset in run.scores:
                asked.setdefault(run.scores[dataset].protocol["samples_sha256"], run)
        if len(asked) > 1:
            one, other = list(asked.values())[:2]
            raise UserError(
                f"{dataset}: {one.folder} and {other.folder} were asked about other samples, or other versions of them; "
                "delete those that are not to be compared, and run the same command again"
            )


def _splits(run: StudyRun, measured: Mapping[str, Any]) -> Mapping[str, str]:
    """What a run was trained on. Its checkpoints say so, too, and may be deleted once it has ended."""
    if "splits" in measured:
        found: Mapping[str, str] = measured["splits"]
        return found
    checkpoints = checkpoint_folders(run.folder / "checkpoints")
    if not checkpoints:
        raise UserError(
            f"{run.folder} has no checkpoints, which say what it was trained on; delete the folder, and the same command "
            "trains it again"
        )
    return splits_of(checkpoints[0])


def _scores(condition: str, dataset: str, runs: Mapping[tuple[str, int], StoredRun]) -> Scores | None:
    found = {
        seed: run.scores[dataset] for (name, seed), run in runs.items() if name == condition and dataset in run.scores
    }
    values = {seed: score.value for seed, score in found.items() if score.value is not None}
    if not values:
        return None
    first = next(iter(found.values()))
    baselines = {name: statistics.fmean(score.baselines[name] for score in found.values()) for name in first.baselines}
    return Scores(condition, dataset, values, baselines, first.count)


def _difference(
    condition: str, reference: str, dataset: str, runs: Mapping[tuple[str, int], StoredRun]
) -> Difference | None:
    by_seed = {}
    for seed in (seed for name, seed in runs if name == condition):
        own, other = (_value(runs, side, seed, dataset) for side in (condition, reference))
        if own is not None and other is not None:
            by_seed[seed] = own - other
    if not by_seed:
        return None
    seeds = list(by_seed)
    pairs = {seed: paired_scores(dataset, runs[reference, seed], runs[condition, seed]) for seed in seeds}
    (images, *others) = [pair.images for pair in pairs.values()]
    if any(other != images for other in others):
        raise UserError(
            f"{dataset}: the runs of {condition} and {reference} do not have scores of the same samples with every seed; "
            f"delete {runs[condition, seeds[0]].folder} and its like, and run the same command again"
        )
    sides = [[pair.first for pair in pairs.values()], [pair.second for pair in pairs.values()]]
    first, second = ([statistics.fmean(values) for values in zip(*side, strict=True)] for side in sides)
    alone = [compare_paired(pair.first, pair.second, pair.images) for pair in pairs.values()]
    sign = 1 if runs[reference, seeds[0]].scores[dataset].higher_is_better else -1
    return Difference(
        condition,
        dataset,
        by_seed,
        compare_paired(first, second, images),
        better=sum(pair.p < SIGNIFICANT and sign * pair.difference > 0 for pair in alone),
        worse=sum(pair.p < SIGNIFICANT and sign * pair.difference < 0 for pair in alone),
    )


def _value(runs: Mapping[tuple[str, int], StoredRun], condition: str, seed: int, dataset: str) -> float | None:
    """The score of a run; None where there is no such run, or none in it."""
    run = runs.get((condition, seed))
    return run.scores[dataset].value if run is not None and dataset in run.scores else None


def _costs(config: StudyCommandConfig, plan: StudyPlan) -> list[Cost]:
    study = config.study
    stages = {
        name: Cost(name, stage.starts_from, None, _measured(plan, plan.stages, name))
        for name, stage in study.stages.items()
    }
    conditions = {
        name: Cost(name, condition.starts_from, condition.evaluates, _measured(plan, plan.scored, name))
        for name, condition in study.conditions.items()
    }
    return [cost for cost in (*stages.values(), *conditions.values()) if cost.measured]


def _measured(plan: StudyPlan, runs: Mapping[tuple[str, int], str], name: str) -> list[Mapping[str, Any]]:
    found = [measured_of(plan.runs[identity]) for (owner, _), identity in runs.items() if owner == name]
    return [item for item in found if item is not None]


def as_json(config: StudyCommandConfig, plan: StudyPlan, findings: Findings) -> dict[str, Any]:
    """What was found, for other programs: each score, each difference, and the folder of each run."""
    return {
        "study": config.study.name,
        "question": config.study.question,
        "form": config.form,
        "reference": findings.reference,
        "runs": [
            {"condition": name, "seed": seed, "folder": plan.runs[identity].folder.name}
            for (name, seed), identity in plan.scored.items()
        ],
        "scores": [
            {
                "condition": item.condition,
                "dataset": item.dataset,
                "by_seed": _by_seed(item.by_seed),
                "baselines": dict(item.baselines),
                "count": item.count,
            }
            for item in findings.scores.values()
        ],
        "differences": [
            {
                "condition": item.condition,
                "dataset": item.dataset,
                "by_seed": _by_seed(item.by_seed),
                "over_seeds": vars(item.over_seeds),
                "by_sample": vars(item.by_sample),
                "seeds_better": item.better,
                "seeds_worse": item.worse,
            }
            for item in findings.differences.values()
        ],
    }


def _by_seed(values: Mapping[int, float]) -> dict[str, float]:
    return json.loads(json.dumps({str(seed): value for seed, value in values.items()}))
