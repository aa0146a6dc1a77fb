"""The curves of a run as one picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from instructblip.files import atomic_path
from instructblip.training.metrics_log import Entry, MetricsLog

if TYPE_CHECKING:
    from matplotlib.axes import Axes
# Of an entry, what its curves show; the rest, most of it sample ids, would fill the memory.
_DRAWN = ("step", "loss", "loss_by_dataset", "validation", "lr", "samples_per_second")


def draw_curves(metrics_path: Path, out_path: Path, title: str) -> None:
    """Draw a run's `metrics.jsonl` as one PNG picture: losses, validation, learning rate, speed.

    Reads from each entry, where present: "loss", "loss_by_dataset" {name: loss}, "lr", "samples_per_second", and
    "validation" {name: accuracy, 0 to 100}. What was never recorded is named as such in its panel.

    Raises:
        UserError: the picture cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import and needed once a run

    entries = [{key: entry[key] for key in _DRAWN if key in entry} for entry in MetricsLog(metrics_path).read()]
    figure = Figure(figsize=(13, 7), dpi=110)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    # Margins by hand: measuring every label for a constrained layout costs as much as drawing.
    grid = figure.add_gridspec(
        2, 6, height_ratios=(3, 2), left=0.05, right=0.99, top=0.89, bottom=0.07, wspace=0.65, hspace=0.32
    )
    _draw_loss(figure.add_subplot(grid[0, :2]), entries)
    _draw_by_dataset(figure.add_subplot(grid[0, 2:4]), entries, "loss_by_dataset", "Loss by dataset", smooth=True)
    _draw_by_dataset(figure.add_subplot(grid[0, 4:]), entries, "validation", "Validation accuracy (%)", smooth=False)
    _draw_single(figure.add_subplot(grid[1, :3]), entries, "lr", "Learning rate")
    _draw_single(figure.add_subplot(grid[1, 3:]), entries, "samples_per_second", "Samples per second")
    with atomic_path(out_path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})  # the same numbers give the same bytes


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average over about `span` values, bias corrected at the start as in Adam (arXiv 1412.6980)."""
    decay, total, weight, result = 1 - 2 / (span + 1), 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        result.append(total / weight)
    return result


def _series(entries: list[Entry], key: str) -> tuple[list[int], list[float]]:
    pairs = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _span(count: int) -> float:
    return max(5.0, count / 25)


def _draw_loss(axes: "Axes", entries: list[Entry]) -> None:
    steps, losses = _series(entries, "loss")
    axes.plot(steps, losses, color="#8fa8c4", linewidth=0.7, alpha=0.6)
    axes.plot(steps, smoothed(losses, _span(len(losses))), color="#1f4e79", linewidth=1.8)
    _finish(axes, "Training loss (nats per answer token)", bool(steps))
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
        axes.plot(steps, values, color=color, linewidth=1.5, marker=marker, markersize=4, label=name)
    _finish(axes, title, bool(names))
    axes.set_ylim(0, None if smooth else 102)
    if names:
        axes.legend(fontsize=7.5, frameon=False, ncols=1 + len(names) // 9, loc="best")


def _draw_single(axes: "Axes", entries: list[Entry], key: str, title: str) -> None:
    steps, values = _series(entries, key)
    axes.plot(steps, values, color="#1f4e79", linewidth=1.4)
    _finish(axes, title, bool(steps))
    axes.set_ylim(bottom=0)


def _finish(axes: "Axes", title: str, has_data: bool) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=8.5)
    axes.tick_params(labelsize=8.5)
    axes.grid(True, color="#e4e4e0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    axes.set_xlim(left=0)
    if not has_data:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color="#777777")
