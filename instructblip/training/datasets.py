"""A run's training data from its configuration: datasets opened, the plan over them, and how their images are made."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from instructblip.config.schema import DataConfig, MixtureConfig
from instructblip.data.cards import TRAIN_SPLIT, Card, OwnCard, check_prepared_from
from instructblip.data.feature_cache import FeatureCache
from instructblip.data.mixture import Mixture, MixtureEntry, MixtureSegment
from instructblip.data.mixture_dataset import MakeImage, TrainingSet, cached, decoded
from instructblip.data.shards import PreparedSplit, open_split
from instructblip.data.streaming import StreamSet
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


def check_mixture(config: MixtureConfig, cards: Sequence[Card]) -> None:
    """Refuse the cards of a mixture, in its order, for what they say of training.

    Raises:
        UserError: a card that occurs twice, is held out, has no split to train on or no templates.
    """
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
    config: MixtureConfig, sets: Sequence[TrainingSet] | Sequence[StreamSet], phases: Iterable[CutSteps], *, seed: int
) -> Mixture:
    """The plan of a run over these datasets, in the mixture's order, and phases.

    Raises:
        UserError: weights, multipliers or groups that cannot be planned.
    """
    items: list[TrainingSet | StreamSet] = [*sets]
    entries = [
        MixtureEntry(
            item.name, len(item), entry.multiplier, item.shard_records, item.images if config.per == "image" else None
        )
        for item, entry in zip(items, config.datasets, strict=True)
    ]
    segments = []
    for phase in phases:
        groups = {
            "sample": 1,
            "image": config.image_records,
            "step": phase.batch_size,
            "batch": phase.micro_batch_size or phase.batch_size,
        }
        group = groups[config.per]
        segments.append(MixtureSegment(phase.steps * phase.batch_size, group))
    try:
        return Mixture(entries, weighting=config.weights, temperature=config.temperature, seed=seed, segments=segments)
    except ValueError as error:
        raise UserError(f"mixture {config.name}: {error}") from None


def data_fingerprints(
    sets: Sequence[TrainingSet] | Sequence[StreamSet], validation: Sequence[Task], shards: Path
) -> Inputs:
    """What a run reads on its way, by name.

    The prepared `splits`; of each of its `cards` what makes samples of them; and the `protocols` that it is watched by,
    whose scores decide which step is the best.
    """
    splits = {item.source: item.fingerprint for item in sets}
    for task in validation:
        split = open_split(shards / task.card.source / task.protocol.split)
        splits[f"{split.dataset}/{split.split}"] = split.fingerprint
    return {
        "splits": splits,
        "cards": {item.name: _card_fingerprint(item) for item in sets},
        "protocols": {task.card.name: _protocol_fingerprint(task) for task in validation},
    }


def _card_fingerprint(item: TrainingSet | StreamSet) -> str:
    rules = [item.kinds, dataclasses.asdict(item.templates), item.flip]
    return hashlib.sha256(json.dumps(rules).encode()).hexdigest()


def _protocol_fingerprint(task: Task) -> str:
    """Of the rules alone: `splits` has the data."""
    rules = dataclasses.replace(
        task.protocol, samples=None, samples_sha256="", vocabulary_size=0, vocabulary_sha256="", frames=0
    )
    return rules.sha256()


def make_images(config: DataConfig, image_size: int, cache: FeatureCache | None) -> MakeImage:
    """How the images of drawn samples are made: from the cache of their tokens, or decoded under the transform."""
    return decoded(config.transform, image_size) if cache is None else cached(cache.tokens)
