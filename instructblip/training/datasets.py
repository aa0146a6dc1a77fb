"""A run's training data from its configuration: datasets opened, the plan over them, and how their images are made."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from instructblip.config.schema import DataConfig, MixtureConfig
from instructblip.data.cards import TRAIN_SPLIT, Card
from instructblip.data.feature_cache import FeatureCache
from instructblip.data.mixture import Mixture, MixtureEntry, MixtureSegment
from instructblip.data.mixture_dataset import MakeImage, TrainingSet, cached, decoded
from instructblip.data.shards import PreparedSplit, open_split
from instructblip.data.templates import load_templates
from instructblip.errors import UserError


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
        UserError: a card that occurs twice, is held out or has no templates.
    """
    for number, card in enumerate(cards):
        if card.name in [other.name for other in cards[:number]]:
            raise UserError(f"mixture {config.name} names {card.name} twice; give it one multiplier")
        if card.role == "held-out" and not config.finetuning:
            raise UserError(
                f"mixture {config.name} trains on {card.name}, which is held out; remove it, or set mixture.finetuning=true "
                "and take its scores for no zero-shot ones"
            )
        if card.templates is None:
            raise UserError(f"card {card.name} names no templates and cannot be trained on")


def open_sets(cards: Sequence[Card], shards: Path) -> list[TrainingSet]:
    """Open the training splits of these cards; views of one dataset share it.

    Raises:
        UserError: a split is not prepared, or damaged.
    """
    splits: dict[str, PreparedSplit] = {}
    sets = []
    for card in cards:
        if card.source not in splits:
            splits[card.source] = open_split(shards / card.source / TRAIN_SPLIT)
        assert card.templates is not None
        templates = load_templates(card.templates)
        sets.append(TrainingSet(card.name, splits[card.source], card.kinds, templates, card.training.flip))
    return sets


def make_mixture(
    config: MixtureConfig, sets: Sequence[TrainingSet], phases: Iterable[CutSteps], *, seed: int
) -> Mixture:
    """The plan of a run over these datasets and phases.

    Raises:
        UserError: weights, multipliers or groups that cannot be planned.
    """
    multipliers = {entry.name: entry.multiplier for entry in config.datasets}
    entries = [MixtureEntry(item.name, len(item), multipliers[item.name], item.shard_records) for item in sets]
    segments = []
    for phase in phases:
        groups = {"sample": 1, "step": phase.batch_size, "batch": phase.micro_batch_size or phase.batch_size}
        group = groups[config.per]
        segments.append(MixtureSegment(phase.steps * phase.batch_size, group))
    try:
        return Mixture(entries, weighting=config.weights, temperature=config.temperature, seed=seed, segments=segments)
    except ValueError as error:
        raise UserError(f"mixture {config.name}: {error}") from None


def make_images(config: DataConfig, image_size: int, cache: FeatureCache | None) -> MakeImage:
    """How the images of drawn samples are made: from the cache of their tokens, or decoded under the transform."""
    return decoded(config.transform, image_size) if cache is None else cached(cache.tokens)
