"""A study's scores as one picture: a panel for each dataset, a row for each condition."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from instructblip.figures import as_written, write_figure
from instructblip.study.findings import Findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
_WITHHELD = "images withheld"
_WIDTH, _ROW, _EDGES = 3.2, 0.42, 1.5  # inches: of a panel, of a row, above and below the rows
_ROW_OF_PANELS = 4
_COLOURS = ("#1f5a92", "#8a8a8a")  # of scores, of what is withheld


def draw(findings: Findings, question: str, path: Path) -> None:
    """Draw a point for each seed, the mean with its 95% interval over seeds, and the mean with the images withheld.

    Raises:
        UserError: the picture cannot be written.
    """
    write_figure(path, partial(_draw, findings=findings, question=question), dpi=110, layout="constrained")


def _draw(figure: "Figure", findings: Findings, question: str) -> None:
    columns = min(_ROW_OF_PANELS, len(findings.datasets))
    lines = -(-len(findings.datasets) // columns)
    figure.set_size_inches(_WIDTH * columns + 1.5, lines * (_ROW * len(findings.conditions) + _EDGES))
    figure.suptitle(as_written(question), x=0.01, ha="left", fontsize=10, wrap=True)
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for number, axes in enumerate(panels.flat):
        if number < len(findings.datasets):
            _draw_panel(axes, findings, findings.datasets[number])
        else:
            axes.set_axis_off()
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), fontsize=8, frameon=False)


def _draw_panel(axes: "Axes", findings: Findings, dataset: str) -> None:
    own, grey = _COLOURS
    for row, condition in enumerate(findings.conditions):
        item = findings.scores.get((condition, dataset))
        if item is None:
            continue
        first, values, found = row == 0, list(item.by_seed.values()), item.over_seeds
        axes.plot(
            values, [row] * len(values), "o", color=own, alpha=0.35, markersize=5, label="a seed" if first else None
        )
        axes.plot(
            [found.mean], [row], "|", color=own, markersize=16, markeredgewidth=2, label="mean" if first else None
        )
        if found.low is not None and found.high is not None:
            axes.plot([found.low, found.high], [row, row], color=own, linewidth=1.5, label="95%" if first else None)
        if _WITHHELD in item.baselines:
            axes.plot(
                [item.baselines[_WITHHELD]], [row], "x", color=grey, markersize=6, label=_WITHHELD if first else None
            )
    axes.set_title(as_written(dataset), fontsize=9)
    axes.set_yticks(range(len(findings.conditions)), [as_written(name) for name in findings.conditions], fontsize=8)
    axes.set_ylim(len(findings.conditions) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
