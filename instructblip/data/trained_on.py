"""Which datasets a run was trained on, as its configuration says."""

from collections.abc import Mapping
from pathlib import Path

from instructblip.config.validate import read_yaml
from instructblip.data.cards import Card, load_card
from instructblip.errors import UserError


def run_mixture(file: Path) -> dict[str, Card | None]:
    """The datasets of a run's mixture; None for cards that are not there any more, nothing for runs that were converted.

    Args:
        file: config.yaml of the run.
    """
    stored = read_yaml(file)
    mixture = stored.get("mixture") if isinstance(stored, dict) else None
    found: dict[str, Card | None] = {}
    for item in (mixture or {}).get("datasets", []):
        try:
            card = load_card(item["name"])
        except UserError:
            found[Path(item["name"]).stem] = None
        else:
            found[card.name] = card
    return found


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
