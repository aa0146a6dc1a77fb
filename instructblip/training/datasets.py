"""A run's training data from its configuration: datasets opened, the plan over them, and how their images are made."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from instructblip.config.schema import DataConfig, MixtureConfig, TrainConfig
from instructblip.data.cards import TRAIN_SPLIT, Card, OwnCard, check_prepared_from, is_path, load_cards
from instructblip.data.feature_cache import FeatureCache
from instructblip.data.mixture import Mixture, MixtureEntry, MixtureSegment
from instructblip.data.mixture_dataset import MakeImage, TrainingSet, cached, decoded
from instructblip.data.shards import PreparedSplit, open_split
from instructblip.data.templates import load_templates
from instructblip.errors import UserError
from instructblip.evaluation.protocol import Task

Inputs = dict[str, dict[str, str]]  # kind -> name -> fingerprint of what a run stands on, beside its weights


class Steps(Protocol):
    """So many steps of one batch size; a phase of training is that and more."""

    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...


class CutSteps(Steps, Protocol):
    """Steps whose micro-batches have a size of their own; None: that of the batch."""

    @property
    def micro_batch_size(self) -> int | None: ...


def mixture_cards(config: MixtureConfig) -> list[Card]:
    """The cards that a mixture trains on, in its order.

    Raises:
        UserError: a card that is not there, occurs twice, is held out or has no templates.
    """
    cards = load_cards(entry.name for entry in config.datasets)
    for number, card in enumerate(cards):
        if card.name in [other.name for other in cards[:number]]:
            raise UserError(f"mixture {config.name} names {card.name} twice; give it one multiplier")
        has_train = TRAIN_SPLIT in card.splits
        if card.role == "held-out" and not config.finetuning and (has_train or not isinstance(card, OwnCard)):
            raise UserError(
                f"mixture {config.name} trains on {card.name}, which is held out; remove it, or set mixture.finetuning=true "
                "and take its scores for no zero-shot ones"
            )
        if not has_train:
            raise UserError(
                f"card {card.reference} has no split {TRAIN_SPLIT} to train on, but {', '.join(card.splits)}"
            )
        if config.templates is None:
            card.template_set()  # or says that there is none
    return cards


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
    return str(Path(name_or_path).expanduser().absolute()) if is_path(name_or_path) else name_or_path


def best_by(keep_best: str | None, held_in: Sequence[Card]) -> str | None:
    """What decides which step is the best: None, `mean`, or the name of a dataset, which may be given by its card's path.

    Raises:
        UserError: no dataset of these.
    """
    if keep_best in (None, "mean"):
        return keep_best
    for card in held_in:
        if keep_best in (card.name, card.reference):
            return card.name
    raise UserError(f"recipe.keep_best={keep_best} is no dataset of suite.held_in; name one of them, or mean")


def open_sets(cards: Sequence[Card], shards: Path, templates: str | None = None) -> list[TrainingSet]:
    """Open the training splits of these cards; views of one dataset share it.

    `templates` names a set in place of the cards' own.

    Raises:
        UserError: a split is not prepared, damaged, or was prepared from another card.
    """
    splits: dict[str, PreparedSplit] = {}
    sets = []
    for card in cards:
        if card.source not in splits:
            splits[card.source] = open_split(shards / card.source / TRAIN_SPLIT)
        check_prepared_from(card, splits[card.source].manifest)
        wanted = card.template_set() if templates is None else load_templates(templates)
        sets.append(TrainingSet(card.name, splits[card.source], card.kinds, wanted, card.training.flip))
    return sets


def make_mixture(
    config: MixtureConfig, sets: Sequence[TrainingSet], phases: Iterable[CutSteps], *, seed: int
) -> Mixture:
    """The plan of a run over these datasets, in the mixture's order, and phases.

    Raises:
        UserError: weights, multipliers or groups that cannot be planned.
    """
    entries = [
        MixtureEntry(item.name, len(item), entry.multiplier, item.shard_records)
        for item, entry in zip(sets, config.datasets, strict=True)
    ]
    segments = []
    for phase in phases:
        groups = {"sample": 1, "step": phase.batch_size, "batch": phase.micro_batch_size or phase.batch_size}
        group = groups[config.per]
        segments.append(MixtureSegment(phase.steps * phase.batch_size, group))
    try:
        return Mixture(entries, weighting=config.weights, temperature=config.temperature, seed=seed, segments=segments)
    except ValueError as error:
        raise UserError(f"mixture {config.name}: {error}") from None


def data_fingerprints(sets: Sequence[TrainingSet], validation: Sequence[Task], shards: Path) -> Inputs:
    """What a run reads on its way, by name: the prepared `splits`, and of each of its `cards` what makes samples of them."""
    splits = {f"{item.split.dataset}/{item.split.split}": item.split.fingerprint for item in sets}
    for task in validation:
        split = open_split(shards / task.card.source / task.protocol.split)
        splits[f"{split.dataset}/{split.split}"] = split.fingerprint
    return {"splits": splits, "cards": {item.name: _card_fingerprint(item) for item in sets}}


def _card_fingerprint(item: TrainingSet) -> str:
    rules = [item.kinds, dataclasses.asdict(item.templates), item.flip]
    return hashlib.sha256(json.dumps(rules).encode()).hexdigest()


def make_images(config: DataConfig, image_size: int, cache: FeatureCache | None) -> MakeImage:
    """How the images of drawn samples are made: from the cache of their tokens, or decoded under the transform."""
    return decoded(config.transform, image_size) if cache is None else cached(cache.tokens)
