"""Pictures to begin with: those that a run was scored on, where its prepared data are at hand, or a folder's."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from instructblip.config.schema import DataConfig, SuiteConfig
from instructblip.config.validate import build, read_sections
from instructblip.data.card_evaluation import Evaluation
from instructblip.data.cards import Card, load_card
from instructblip.data.records import Record
from instructblip.data.shards import MANIFEST_NAME, open_split
from instructblip.data.templates import render_prompt
from instructblip.errors import UserError
from instructblip.images import decode_image
from instructblip.weights.load import LoadedModel

logger = logging.getLogger(__name__)

EXAMPLES = 6
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_SIDE = 768  # pixels of the longer side


class Example(NamedTuple):
    """A picture with what its dataset asks of it.

    Attributes:
        picture: a file.
        prompt: as an evaluation asks; empty where it is not known.
        candidates: that an evaluation ranks; none where the model writes freely.
    """

    picture: Path
    prompt: str = ""
    candidates: tuple[str, ...] = ()


def find_pictures(folder: Path) -> list[Path]:
    """The first pictures of a folder, by name.

    Raises:
        UserError: no folder, or none in it.
    """
    if not folder.is_dir():
        raise UserError(f"examples={folder} is no folder; give one with pictures in it")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not found:
        raise UserError(
            f"examples={folder} has no pictures in it ({', '.join(sorted(_SUFFIXES))}); give another folder"
        )
    return found[:EXAMPLES]


def examples_of_pictures(paths: Sequence[Path], folder: Path) -> list[Example]:
    """Pictures without a prompt.

    Args:
        paths: of the pictures.
        folder: where copies of them are written: the page shows no file of another place.

    Raises:
        UserError: one that is no picture.
    """
    return [Example(_written(path.read_bytes(), str(path), number, folder)) for number, path in enumerate(paths)]


def examples_of_run(loaded: LoadedModel, folder: Path) -> list[Example]:
    """Samples of the datasets that a run was scored on, in turn; none where they are not at hand.

    Args:
        loaded: a checkpoint; only a run says what it was scored on.
        folder: where the pictures are written.
    """
    config = Path(loaded.source).parents[1] / "config.yaml" if loaded.config is not None else None
    if config is None or not config.is_file():
        return []
    try:
        return list(_drawn(config, folder))
    except (UserError, ValueError) as error:  # data that were moved, a card that is gone: the page does without
        logger.warning("no examples: %s", error)
        return []


def _drawn(config: Path, folder: Path) -> Iterator[Example]:
    stored = read_sections(config, "a run's configuration")
    if not {"suite", "data"} <= stored.keys():  # converted weights, say
        return
    suite: SuiteConfig = build(SuiteConfig, stored["suite"], str(config), "suite")
    data: DataConfig = build(DataConfig, stored["data"], str(config), "data")
    shards = Path(data.shards)
    cards = [load_card(name) for name in (*suite.held_in, *suite.held_out)]
    cards = [card for card in cards if card.evaluation and (_split(card, shards) / MANIFEST_NAME).is_file()]
    for number, card in zip(range(EXAMPLES if cards else 0), cards * EXAMPLES, strict=False):
        if example := _example(card, _split(card, shards), number, folder):
            yield example


def _split(card: Card, shards: Path) -> Path:
    assert card.evaluation is not None
    return shards / card.source / card.evaluation.split


def _example(card: Card, split: Path, number: int, folder: Path) -> Example | None:
    """The record of a card that lies at the given part of the first shard."""
    assert card.evaluation is not None
    shard = open_split(split).shards[0]
    chosen = shard.records_of(card.evaluation.kinds or card.kinds)
    if not len(chosen):
        return None
    at = chosen[len(chosen) * (2 * number + 1) // (2 * EXAMPLES)]
    row, place = (int(shard.arrays[name][at]) for name in ("record_image", "record_number"))
    frames, record = shard.read_record(row, place)
    path = _written(frames[0], f"{shard.path}:{row}", number, folder)
    prompt = render_prompt(card.evaluation.prompt, record, may_be_empty=card.evaluation.may_be_empty)
    return Example(path, prompt, _candidates(card.evaluation, record))


def _written(data: bytes, where: str, number: int, folder: Path) -> Path:
    """A picture as a file of the page's own, no larger than the page shows it."""
    picture = decode_image(data, where)
    picture.thumbnail((_SIDE, _SIDE))
    path = folder / f"example_{number}.png"
    picture.save(path)
    return path


def _candidates(rules: Evaluation, record: Record) -> tuple[str, ...]:
    """What an evaluation ranks, as far as the card and the record say it."""
    if rules.candidates_from == "choices":
        return record.choices
    return rules.candidates or tuple(text for texts in rules.verbalizers.values() for text in texts)
