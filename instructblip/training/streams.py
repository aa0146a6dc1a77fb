"""A run's training data as streams: prepared splits without their indexes, and tars that nobody prepared."""

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from instructblip.config.schema import DataConfig
from instructblip.data.cards import TRAIN_SPLIT, Card, OwnCard, check_prepared_from, source_facts
from instructblip.data.readers.base import found, without_braces
from instructblip.data.readers.columns import Columns
from instructblip.data.readers.files import check_not_packed
from instructblip.data.shards import PreparedSplit, read_manifest
from instructblip.data.streaming import (
    StreamSet,
    TarPlace,
    foreign_reader,
    look_at_foreign,
    prepared_places,
    prepared_reader,
)
from instructblip.data.templates import TemplateSet, load_templates
from instructblip.errors import UserError
from instructblip.fetch.shard_cache import is_url, remote_tars
from instructblip.fetch.streams import shown

_FOREIGN = "webdataset"  # the reader of such tars


def streamed_as_they_are(cards: Sequence[Card], data: DataConfig, missing: Collection[str]) -> frozenset[str]:
    """Names of the cards, among those that are not prepared, whose tars a run may stream: own ones of webdataset tars."""
    own = [card for card in cards if isinstance(card, OwnCard) and card.view_of is None and data.stream]
    return frozenset(card.name for card in own if card.name in missing and card.reader == _FOREIGN)


def open_streams(
    cards: Sequence[Card], shards: Path, foreign: Collection[str], templates: str | None = None
) -> list[StreamSet]:
    """Open the training splits of these cards to read them from first to last.

    Args:
        shards: the folder of prepared datasets.
        foreign: names of those whose tars are read as they are.
        templates: names a set in place of the cards' own.

    Raises:
        UserError: a split that was prepared from another card; tars that are not there, or of which nobody says how many
            records they hold.
    """
    sets = []
    for card in cards:
        wanted = card.template_set() if templates is None else load_templates(templates)
        is_raw, folder = card.name in foreign, shards / card.source / TRAIN_SPLIT
        sets.append(_foreign(card, wanted) if is_raw else _prepared(card, folder, wanted))
    return sets


def _prepared(card: Card, folder: Path, templates: TemplateSet) -> StreamSet:
    split = PreparedSplit(folder, read_manifest(folder), ())
    check_prepared_from(card, split.manifest)
    return StreamSet(
        name=card.name,
        source=f"{split.dataset}/{split.split}",
        places=prepared_places(folder, split.manifest["shards"], remote_tars(folder)),
        read=prepared_reader(card.kinds),
        records=sum(split.record_counts(card.kinds)),
        templates=templates,
        flip=card.training.flip,
        kinds=card.kinds,
        fingerprint=split.fingerprint,
    )


def _foreign(card: Card, templates: TemplateSet) -> StreamSet:
    records = card.expected_records(TRAIN_SPLIT)
    if not records:
        key = f"splits.{TRAIN_SPLIT}.records{'_by_kind' if card.kinds else ''}"
        raise UserError(
            f"{card.reference}: key {key} is missing; its tars are streamed, and the mixture weighs it by how many records "
            "it has: say about how many"
        )
    places = _tars(card)
    columns = Columns(card.told["task"], TRAIN_SPLIT, card.told["columns"])
    look_at_foreign(columns, places[0])
    stated = [source_facts(card, TRAIN_SPLIT), records, [place.name for place in places]]
    return StreamSet(
        name=card.name,
        source=f"{card.source}/{TRAIN_SPLIT}",
        places=places,
        read=foreign_reader(columns, card.kinds),
        records=records,
        templates=templates,
        flip=card.training.flip,
        kinds=card.kinds,
        fingerprint=hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest(),
    )


def _tars(card: Card) -> tuple[TarPlace, ...]:
    """All tars that a card names: below its folder, or at URLs."""
    assert isinstance(card, OwnCard)  # see `streamed_as_they_are`
    raw, places = Path(card.path).expanduser().parent, list[TarPlace]()
    for named in card.splits[TRAIN_SPLIT].files["shards"]:
        if is_url(named):
            if set(named) & set("*["):
                raise UserError(
                    f"{shown(named)} cannot be looked through; name its tars by braces: {{00000..00331}}.tar"
                )
            places += [TarPlace(_path(url), url) for url in without_braces(named)]
            continue
        if not (paths := found(raw, named)):
            raise UserError(f"{raw} lacks {named} (shards of split {TRAIN_SPLIT}); put it there, or correct the card")
        for path in paths:
            check_not_packed(path)
        places += [TarPlace(path.relative_to(raw).as_posix(), str(path)) for path in paths]
    return tuple(places)


def _path(url: str) -> str:
    """What an address says behind its server."""
    return shown(url).partition("://")[2].partition("/")[2]
