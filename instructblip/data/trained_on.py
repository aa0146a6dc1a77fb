"""Which datasets a run was trained on, as its configuration says, and those of the runs that it started from."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from instructblip.config.validate import read_yaml
from instructblip.data.cards import Card, load_card
from instructblip.errors import UserError

logger = logging.getLogger(__name__)


def run_config(given: str) -> Path | None:
    """The config.yaml of a run, or of the one that a checkpoint folder is of; None of anything else.

    Above the folder of a model that others made lies whatever they have there.
    """
    folder = Path(given).expanduser().absolute()
    run = folder if (folder / "checkpoints").is_dir() else next(iter(folder.parents[1:2]), folder)
    is_of_run = run == folder or folder.parent.name == "checkpoints" or (folder / "state.json").is_file()
    return file if is_of_run and folder.is_dir() and (file := run / "config.yaml").is_file() else None


def run_mixture(file: Path) -> dict[str, Card | None]:
    """The datasets of a run's mixture, and of the runs in `init_from` that are still there, and so on.

    Args:
        file: config.yaml of the run.

    Returns:
        By name; None for cards that are not there any more. Nothing for runs that were converted: it is not known.
    """
    found: dict[str, Card | None] = {}
    for name in _names(file, set()):
        try:
            card = load_card(name)
        except UserError:
            found[Path(name).stem] = None
        else:
            found[card.name] = card
    return found


def _names(file: Path, seen: set[Path]) -> Iterator[str]:
    """Names and paths of cards, a run's own first; an earlier run whose file is damaged is told."""
    seen.add(file.resolve())
    try:
        stored = read_yaml(file)
    except UserError as error:
        if len(seen) == 1:
            raise
        logger.warning("what that run was trained on is not told: %s", error)
        return
    if not isinstance(stored, dict):
        return
    yield from (item["name"] for item in _section(stored, "mixture").get("datasets", []))
    qformer = _section(stored, "qformer")
    for given in (*(stored.get("init_from") or ()), qformer.get("stage1"), qformer.get("stage2")):
        before = run_config(given) if given else None
        if before is not None and before.resolve() not in seen:
            yield from _names(before, seen)


def _section(stored: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = stored.get(name)
    return found if isinstance(found, dict) else {}


def is_trained_on(name: str, mixture: Mapping[str, Card | None]) -> bool:
    """Whether the mixture has the dataset, or another view of the same images that asks for the same kinds of records."""
    if name in mixture:
        return True
    try:
        card = load_card(name)
    except UserError:  # a card of one's own, and no longer there
        return False
    alike = [other for other in mixture.values() if other is not None and other.source == card.source]
    return any(not card.kinds or not other.kinds or set(card.kinds) & set(other.kinds) for other in alike)
