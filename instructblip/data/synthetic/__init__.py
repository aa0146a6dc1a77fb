"""Made-up files of every known format, small and in the layouts of the official ones, to try a whole run on before a long
one.

`data=synthetic` writes and prepares them by themselves. Readers, templates, protocols and metrics meet what they will meet
in the official files; pictures and records are invented, and no score on them means anything. A card of a known format has
them without more ado: its reader says what they look like, its `files` where they lie.
"""

import hashlib
import importlib
import os
import pkgutil
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from instructblip.data.cards import Card
from instructblip.data.readers import RawSplit
from instructblip.data.synthetic.scenes import MadeUpSplit, make_scenes
from instructblip.errors import UserError

Writer = Callable[[Sequence[MadeUpSplit]], None]

# Reader -> writes what it reads, given the splits of a card; each module of this package says its own in `WRITERS`.
WRITERS: dict[str, Writer] = {}
for _module in pkgutil.iter_modules(__path__):
    WRITERS |= getattr(importlib.import_module(f"{__name__}.{_module.name}"), "WRITERS", {})

MADE_UP = "made up by instructblip.data.synthetic; no official file, and no score on it means anything"
NOTE = " (made-up data: scores mean nothing)"  # for titles of results
SCENES = 4  # pictures or clips a split
_NUMBERS_OF_A_SPLIT = 100
_NUMBERS_OF_A_DATASET = 1000
_DATASETS = 9000  # their numbers have seven digits


def write_synthetic(card: Card, raw: Path, scenes: int = SCENES) -> None:
    """Write the made-up raw folder of a dataset, all its splits; one that is there is whole and stays.

    Args:
        scenes: pictures or clips a split.

    Raises:
        UserError: its format has no made-up files.
    """
    if card.reader not in WRITERS:
        raise UserError(
            f"{card.source} has no made-up files (none of reader {card.reader}); leave out data=synthetic, or choose "
            "other datasets"
        )
    if raw.is_dir():
        return
    first, work = first_number(card.source), raw.with_name(f"{raw.name}.partial")
    splits = [
        MadeUpSplit(
            RawSplit(work, split, counts.files, card.reader_options),
            make_scenes(first + row * _NUMBERS_OF_A_SPLIT, scenes),
        )
        for row, (split, counts) in enumerate(card.splits.items())
    ]
    shutil.rmtree(work, ignore_errors=True)  # left by a killed process
    work.mkdir(parents=True)
    WRITERS[card.reader](splits)
    os.replace(work, raw)


def first_number(dataset: str) -> int:
    """The number of a dataset's first scene. It follows from the name, so that no picture of one dataset is in another: a
    scene follows from its number, and so do the ids of images of COCO, OpenImages and YouTube."""
    digest = hashlib.sha256(dataset.encode()).digest()
    return _NUMBERS_OF_A_DATASET * (1 + int.from_bytes(digest[:8]) % _DATASETS)


def is_made_up(manifest: Mapping[str, Any]) -> bool:
    """Whether a prepared split, by its manifest, holds made-up data."""
    return manifest.get("licence") == MADE_UP


def synthetic_card(card: Card) -> Card:
    """The card of the made-up files: no counts to expect, and a source that says what they are."""
    splits = {
        name: replace(counts, images=None, records=None, records_by_kind={}) for name, counts in card.splits.items()
    }
    return replace(card, splits=splits, homepage=MADE_UP, licence=MADE_UP, how_to_get=MADE_UP)
