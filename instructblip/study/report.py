"""A study's findings as Markdown, ready to stand in a document."""

import json
import shlex
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from instructblip.config.folders import further_option
from instructblip.config.schema import StudyCommandConfig
from instructblip.data.synthetic import NOTE
from instructblip.evaluation.statistics import Paired, Spread
from instructblip.study.findings import SIGNIFICANT, Cost, Difference, Findings, Scores

_Item = TypeVar("_Item", Scores, Difference)
_LINE = 125  # characters of a line of prose
_MARK = "†"  # of a cost that is not whole


def markdown(config: StudyCommandConfig, findings: Findings, plot: str) -> str:
    """Question, scores, differences, costs, what the intervals are of, and where it was run.

    Args:
        config: the study's.
        findings: of its runs.
        plot: file name of the picture that stands beside it.
    """
    study = config.study
    failed = "; ".join(f"{name}, seed {seed}" for name, seed in findings.missing)
    parts = [
        f"## {study.name}: `{command(config)}`{NOTE if findings.made_up else ''}",
        textwrap.fill(study.question, _LINE),
        *([f"**Not in the tables, since it failed: {failed}.**"] if failed else []),
        f"![{study.name}: scores by seed, their means and 95% intervals]({plot})",
        _scores_table(findings),
        f"Minus {findings.reference}:",
        _differences_table(findings),
        "What it took:",
        _costs_table(findings.costs),
        _notes(config, findings),
        provenance(findings.costs),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def command(config: StudyCommandConfig) -> str:
    """What was run, without what changes no result."""
    given = [*further_option(), f"study={config.study.name}"]
    given += [f"form={config.form}"] if config.form != "reduced" else []
    given += [f"seeds={config.seeds}".replace(" ", "")] if config.seeds is not None else []
    given += [f"{key}={values}" for key, values in _extra(config).items()]
    return " ".join(["python -m instructblip.study", *map(shlex.quote, given)])


def _extra(config: StudyCommandConfig) -> dict[str, str]:
    """Overrides that were given with the command, but for where data lie."""
    given = {"train": config.train, "evaluate": config.evaluate}
    kept = {
        name: [item for item in values if not item.startswith(("data.shards=", "data.sources."))]
        for name, values in given.items()
    }
    return {name: f"[{','.join(map(json.dumps, values))}]" for name, values in kept.items() if values}


# --- tables ----------------------------------------------------------------------------------------------------------


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)


def _scores_table(findings: Findings) -> str:
    baselines = list(dict.fromkeys(name for item in findings.scores.values() for name in item.baselines))
    rows = [
        [
            dataset,
            condition,
            _listed(item.by_seed, findings.seeds, "{:.1f}"),
            _interval(item.over_seeds),
            *(f"{item.baselines[name]:.1f}" if name in item.baselines else "" for name in baselines),
        ]
        for dataset, condition, item in _in_order(findings, findings.scores, findings.conditions)
    ]
    seeds = ", ".join(map(str, findings.seeds))
    seeds = f"seed{'s' * (len(findings.seeds) > 1)} {seeds}"
    return _table(["dataset", "condition", seeds, "mean ± SD [95%]", *baselines], _said_once(rows))


def _differences_table(findings: Findings) -> str:
    others = findings.conditions[1:]
    rows = [
        [
            dataset,
            condition,
            _listed(item.by_seed, findings.seeds, "{:+.1f}"),
            _interval(item.over_seeds, "{:+.1f}"),
            _p(item.over_seeds.p),
            _sample_interval(item.by_sample),
            _p(item.by_sample.p),
            f"{item.better} / {item.worse} of {len(item.by_seed)}",
        ]
        for dataset, condition, item in _in_order(findings, findings.differences, others)
    ]
    headings = ["dataset", "condition", "each seed", "mean ± SD [95%], by seed", "p", "[95%], by sample", "p"]
    return _table([*headings, "seeds better / worse by sample"], _said_once(rows))


def _said_once(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rows whose first cell is empty where it is that of the row above."""
    above = [None, *(row[0] for row in rows)]
    return [["" if row[0] == last else row[0], *row[1:]] for row, last in zip(rows, above, strict=False)]


def _in_order(
    findings: Findings, items: Mapping[tuple[str, str], _Item], conditions: Sequence[str]
) -> list[tuple[str, str, _Item]]:
    places = [(dataset, condition) for dataset in findings.datasets for condition in conditions]
    return [
        (dataset, condition, items[condition, dataset])
        for dataset, condition in places
        if (condition, dataset) in items
    ]


def _costs_table(costs: Sequence[Cost]) -> str:
    rows = [
        [
            cost.name + (f", evaluates {cost.evaluates}" if cost.evaluates else ""),
            cost.starts_from or "",
            _same(cost, "steps"),
            _same(cost, "samples"),
            _range(cost, "tokens", lambda value: f"{value:,.0f}"),
            _same(cost, "parameters"),
            _seconds(cost),
        ]
        for cost in costs
    ]
    headings = ["run", "starts from", "steps", "samples", "tokens learned", "parameters trained", "seconds"]
    return _table(headings, rows)


def _same(cost: Cost, key: str) -> str:
    values = dict.fromkeys(item[key] for item in cost.measured if key in item)
    return ", ".join(f"{value:,}" for value in values)


def _range(cost: Cost, key: str, shown: Callable[[float], str]) -> str:
    values = [item[key] for item in cost.measured if item.get(key) is not None]
    if not values:
        return ""
    ends = dict.fromkeys((shown(min(values)), shown(max(values))))
    return f"{shown(statistics.fmean(values))} ({' to '.join(ends)})" if len(ends) > 1 else next(iter(ends))


def _seconds(cost: Cost) -> str:
    on_gpu = any(item["gpu_seconds"] is not None for item in cost.measured)
    text = _range(
        cost,
        "gpu_seconds" if on_gpu else "cpu_seconds",
        lambda value: f"{value:.3g}" if value < 100 else f"{value:,.0f}",
    )
    cut = any(item["attempts"] > 1 for item in cost.measured)
    return f"{text} {'GPU' if on_gpu else 'CPU'}{_MARK * cut}"


# --- numbers ---------------------------------------------------------------------------------------------------------


def _listed(by_seed: Mapping[int, float], seeds: Sequence[int], form: str) -> str:
    """A value for each seed in its place; a dash for one that failed."""
    return ", ".join(form.format(by_seed[seed]) if seed in by_seed else "-" for seed in seeds)


def _interval(found: Spread, form: str = "{:.1f}") -> str:
    if found.deviation is None:
        return form.format(found.mean)
    if found.low is None or found.high is None:
        return f"{form.format(found.mean)} ± {found.deviation:.1f}"
    ends = f"{form.format(found.low)}, {form.format(found.high)}"
    return f"{form.format(found.mean)} ± {found.deviation:.1f} [{ends}]"


def _sample_interval(found: Paired) -> str:
    return "" if found.low is None else f"[{found.low:+.1f}, {found.high:+.1f}]"


def _p(p: float | None) -> str:
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


# --- words -----------------------------------------------------------------------------------------------------------


def _notes(config: StudyCommandConfig, findings: Findings) -> str:
    counts = sorted({item.count for item in findings.scores.values()})
    asked = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    compared = len(findings.differences)
    seeds = len(findings.seeds)
    lines = [
        f"Scores of {asked} samples a dataset. "
        + (
            f"Intervals by seed are Student's t over {seeds} seeds, and p is of the paired t test: they say how far another "
            "training run would differ."
            if seeds > 1
            else "One seed says nothing of how far another training run would differ."
        ),
        "Intervals by sample are of the mean over these very runs, images resampled: they say how far other questions "
        f"would. A seed is better or worse where its own samples say so (p < {SIGNIFICANT:g}).",
        f"{compared} differences are tested, and p is not corrected for that: of as many that are 0, "
        f"{compared * SIGNIFICANT:.1f} are expected below {SIGNIFICANT:g}.",
    ]
    if config.form != "full" and "full" in config.study.forms:
        lines.append(
            "The runs are shortened; `form=full` has the recipe's own length. What a short run has not learned says nothing "
            "of what a long one learns."
        )
    if any(item["attempts"] > 1 for cost in findings.costs for item in cost.measured):
        lines.append(f"{_MARK} A run of these was interrupted: what it spent before is not in its seconds.")
    return "\n".join(textwrap.fill(f"* {line}", _LINE, subsequent_indent="  ") for line in lines)


def provenance(costs: Sequence[Cost]) -> str:
    """When, where and with what the runs were made, as they say themselves."""
    measured: list[Mapping[str, Any]] = [item for cost in costs for item in cost.measured]
    days = sorted({item["ended"] for item in measured})
    machines = sorted({f"{item['machine']}, {_threads(item['threads'])}" for item in measured})
    versions = sorted({", ".join(f"{name} {item}" for name, item in entry["versions"].items()) for entry in measured})
    return f"{' to '.join(dict.fromkeys((days[0], days[-1])))}; {'; '.join(machines)}; {'; '.join(versions)}."


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"
