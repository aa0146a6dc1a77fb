"""The cards of a run: loaded and checked together, and the folder that their shards are found in."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from instructblip.config.schema import TrainConfig
from instructblip.data.cards import TRAIN_SPLIT, Card, is_path, load_cards
from instructblip.data.prepare.command import Needed, find_shards
from instructblip.errors import UserError
from instructblip.evaluation.protocol import needed_splits, watched_split
from instructblip.evaluation.results_file import NotEvaluated
from instructblip.evaluation.suite_tasks import check_suite, split_missing
from instructblip.training.datasets import check_mixture
from instructblip.training.streams import streamed_as_they_are


@dataclass(frozen=True)
class RunCards:
    """What a run trains on and scores.

    Attributes:
        trained: the mixture's, in its order.
        watched, scored: of the suite, what is prepared: held-in ones, and all of them.
        absent: of the suite, what is not prepared.
        best_by: what decides which step is the best: None, `mean`, or the name of a watched one.
        shards: the folder of prepared datasets.
        foreign: names of the trained ones that are not prepared, whose tars are streamed as they are.
    """

    trained: list[Card]
    watched: list[Card]
    scored: list[Card]
    absent: list[NotEvaluated]
    best_by: str | None
    shards: Path
    foreign: frozenset[str] = frozenset()


def find_cards(config: TrainConfig, console: Console) -> RunCards:
    """Load the cards of a run, and have their shards in place.

    Raises:
        UserError: cards that are not there, are wrong or do not go together; data that are not prepared, all of them named.
    """
    names, suite = [entry.name for entry in config.mixture.datasets], config.suite
    every = load_cards([*names, *suite.held_in, *suite.held_out])
    trained, asked = every[: len(names)], every[len(names) :]
    held_in, held_out = asked[: len(suite.held_in)], asked[len(suite.held_in) :]
    check_mixture(config.mixture, trained)
    check_suite(suite, asked)
    best = _best_by(config.recipe.keep_best, held_in)
    found = find_shards(_needed(trained, held_in, held_out, streamed=config.data.stream), config.data, console)
    foreign = streamed_as_they_are(trained, config.data, found.missing)
    scored, absent = split_missing(
        asked, found, suite.missing, *(card.name for card in trained if card.name not in foreign)
    )
    for item in absent:
        console.print(f"not evaluated: {item.reason}", markup=False, highlight=False, soft_wrap=True)
    if best in {item.name for item in absent}:
        raise UserError(f"recipe.keep_best={config.recipe.keep_best} is not prepared, so no step can be best by it")
    watched = [card for card in held_in if card.name not in {item.name for item in absent}]
    return RunCards(trained, watched, scored, absent, best, found.folder, foreign)


def _needed(
    trained: Sequence[Card], held_in: Sequence[Card], held_out: Sequence[Card], *, streamed: bool
) -> list[Needed]:
    """The splits that a run opens of what it trains on, and of what it watches and scores."""
    return [
        *(Needed(card, frozenset({TRAIN_SPLIT}), streamed) for card in trained),
        *(Needed(card, needed_splits(card) | {watched_split(card)}) for card in held_in),
        *(Needed(card, needed_splits(card)) for card in held_out),
    ]


def _best_by(keep_best: str | None, held_in: Sequence[Card]) -> str | None:
    """The name of the dataset that `recipe.keep_best` says, which may be given by its card's path.

    Raises:
        UserError: no dataset of these.
    """
    if keep_best in (None, "mean"):
        return keep_best
    for card in held_in:
        if keep_best in (card.name, card.reference):
            return card.name
    raise UserError(f"recipe.keep_best={keep_best} is no dataset of suite.held_in; name one of them, or mean")


def with_absolute_cards(config: TrainConfig) -> TrainConfig:
    """The configuration with the paths of own cards made absolute: a run goes on from whichever folder it is started in."""
    datasets = [replace(entry, name=_absolute(entry.name)) for entry in config.mixture.datasets]
    held_in, held_out = ([_absolute(name) for name in names] for names in (config.suite.held_in, config.suite.held_out))
    best = config.recipe.keep_best
    return replace(
        config,
        mixture=replace(config.mixture, datasets=datasets),
        suite=replace(config.suite, held_in=held_in, held_out=held_out),
        recipe=replace(config.recipe, keep_best=best if best is None else _absolute(best)),
    )


def _absolute(name_or_path: str) -> str:
    return os.path.normpath(Path(name_or_path).expanduser().absolute()) if is_path(name_or_path) else name_or_path
