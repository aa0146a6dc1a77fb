"""The curves of a run as one picture."""

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from instructblip.figures import as_written, write_figure
from instructblip.training.metrics_log import Entry, MetricsLog

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
# Of an entry, what its curves show; the rest, most of it sample ids, would fill the memory.
_DRAWN = ("step", "phase", "loss", "loss_by_dataset", "validation", "lr", "samples_per_second")
_LETTER = 0.014  # of a panel's width, of a phase's name


def draw_curves(metrics_path: Path, out_path: Path, title: str) -> None:
    """Draw a run's `metrics.jsonl` as one PNG picture: losses, validation, learning rate, speed.

    Reads from each entry, where present: "phase", "loss", "loss_by_dataset" {name: loss}, "lr", "samples_per_second", and
    "validation" {name: score on the tables' scale}. What was never recorded is named as such in its panel; of several phases
    each stands between lines, and says in the panel of validation if it has none.

    Raises:
        UserError: the picture cannot be written.
    """
    entries = [{key: entry[key] for key in _DRAWN if key in entry} for entry in MetricsLog(metrics_path).read()]
    write_figure(out_path, partial(_draw, entries=entries, title=title), figsize=(13, 7), dpi=110)


def _draw(figure: "Figure", entries: list[Entry], title: str) -> None:
    figure.suptitle(as_written(title), x=0.01, ha="left", fontsize=13, fontweight="bold")
    # Margins by hand: measuring every label for a constrained layout costs as much as drawing.
    grid = figure.add_gridspec(
        2, 6, height_ratios=(3, 2), left=0.05, right=0.99, top=0.89, bottom=0.07, wspace=0.65, hspace=0.32
    )
    panels = [figure.add_subplot(place) for place in (grid[0, :2], grid[0, 2:4], grid[0, 4:], grid[1, :3], grid[1, 3:])]
    _draw_loss(panels[0], entries)
    _draw_by_dataset(panels[1], entries, "loss_by_dataset", "Loss by dataset", smooth=True)
    _draw_by_dataset(panels[2], entries, "validation", "Validation score (%)", smooth=False)
    _draw_single(panels[3], entries, "lr", "Learning rate")
    _draw_single(panels[4], entries, "samples_per_second", "Samples per second")
    for panel in panels:
        _draw_phases(panel, phases_of(entries), named=panel in panels[:3], names_unvalidated=panel is panels[2])


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average over about `span` values, bias corrected at the start as in Adam (arXiv 1412.6980)."""
    decay, total, weight, result = 1 - 2 / (span + 1), 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        result.append(total / weight)
    return result


class DrawnPhase(NamedTuple):
    """A phase's name, its first and last step, and whether it was validated."""

    name: str
    first: int
    last: int
    validated: bool


def phases_of(entries: Sequence[Entry]) -> list[DrawnPhase]:
    """The phases that a run has been in, in their order; none of entries that name none."""
    named = [entry for entry in entries if entry.get("phase") is not None]
    found = []
    for name, group in groupby(named, key=lambda entry: str(entry["phase"])):
        steps = list(group)
        found.append(
            DrawnPhase(name, steps[0]["step"], steps[-1]["step"], any(step.get("validation") for step in steps))
        )
    return found


def _draw_phases(axes: "Axes", phases: Sequence[DrawnPhase], *, named: bool, names_unvalidated: bool) -> None:
    """A line where a phase begins, its name, and where validation is drawn what has none."""
    if len(phases) < 2:
        return
    axes.set_xlim(0, phases[-1].last * 1.01)
    for phase in phases:
        if phase.first > phases[0].first:
            axes.axvline(phase.first - 0.5, color="#9a9a94", linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
        share = (phase.last - phase.first + 1) / phases[-1].last
        text = f"{phase.name}: not validated" if names_unvalidated and not phase.validated else phase.name
        if names_unvalidated and not phase.validated:
            axes.axvspan(phase.first - 0.5, phase.last + 0.5, color="#f3f3ee", zorder=0, linewidth=0)
        if not named:
            continue
        fits = len(text) * _LETTER < share
        axes.text(
            (phase.first + phase.last) / 2,
            1.01 if fits else 0.98,  # above the panel no curve runs through it
            as_written(text),
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom" if fits else "top",
            rotation=0 if fits else 90,
            fontsize=7.5,
            color="#777777",
        )


def _series(entries: list[Entry], key: str) -> tuple[list[int], list[float]]:
    pairs = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _span(count: int) -> float:
    return max(5.0, count / 25)


def _draw_loss(axes: "Axes", entries: list[Entry]) -> None:
    steps, losses = _series(entries, "loss")
    axes.plot(steps, losses, color="#8fa8c4", linewidth=0.7, alpha=0.6)
    axes.plot(steps, smoothed(losses, _span(len(losses))), color="#1f4e79", linewidth=1.8)
    _finish(axes, "Training loss", bool(steps))
    if losses:
        ordered = sorted(losses)
        axes.set_ylim(min(0.0, ordered[0]), 1.05 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))])


def _draw_by_dataset(axes: "Axes", entries: list[Entry], key: str, title: str, smooth: bool) -> None:
    from matplotlib import colormaps

    rows = [entry for entry in entries if entry.get(key)]
    names = sorted({name for row in rows for name in row[key]})
    colors = colormaps["tab10" if len(names) <= 10 else "tab20"]
    marker = None if smooth else "o"
    for number, name in enumerate(names):
        steps, values = _series([{"step": row["step"], name: row[key].get(name)} for row in rows], name)
        values = smoothed(values, _span(len(values))) if smooth else values
        color = colors(number % colors.N)
        axes.plot(steps, values, color=color, linewidth=1.5, marker=marker, markersize=4, label=as_written(name))
    _finish(axes, title, bool(names))
    scores = [value for row in rows for value in row[key].values() if value is not None]
    axes.set_ylim(0, None if smooth or max(scores, default=0.0) > 100 else 102)  # CIDEr goes beyond 100
    if names:
        axes.legend(fontsize=7.5, frameon=False, ncols=1 + len(names) // 9, loc="best")


def _draw_single(axes: "Axes", entries: list[Entry], key: str, title: str) -> None:
    steps, values = _series(entries, key)
    axes.plot(steps, values, color="#1f4e79", linewidth=1.4)
    _finish(axes, title, bool(steps))
    axes.set_ylim(bottom=0)


def _finish(axes: "Axes", title: str, has_data: bool) -> None:
    axes.set_title(title, fontsize=10, loc="left", pad=16)  # between it and the panel stand phases' names
    axes.set_xlabel("step", fontsize=8.5)
    axes.tick_params(labelsize=8.5)
    axes.grid(True, color="#e4e4e0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    axes.set_xlim(left=0)
    if not has_data:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color="#777777")
