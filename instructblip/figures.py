"""Pictures that matplotlib draws."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructblip.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_figure(path: Path, draw: "Callable[[Figure], None]", **options: Any) -> None:
    """Write what is drawn on a new figure as PNG.

    Args:
        path: of the picture.
        draw: gets the figure.
        options: of `Figure`.

    Raises:
        UserError: the picture cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import and needed once a run

    with atomic_path(path) as partial:
        figure = Figure(**options)
        draw(figure)
        figure.savefig(partial, format="png", metadata={"Software": None})  # the same numbers give the same bytes


def as_written(text: str) -> str:
    """A text for a figure, in which dollars begin no formula.

    The setting `text.parse_math` does not reach texts that are wrapped, which matplotlib 3.11 measures as formulas all the
    same.
    """
    return text.replace("$", r"\$")
