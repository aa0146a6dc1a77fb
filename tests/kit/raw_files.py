"""Raw folders of datasets in their official layout, made by hand: a few records and small real images."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from instructblip.data.cards import load_card
from instructblip.data.readers import READERS, Losses, MediaRecords, RawSplit


def write_raw_json(path: Path, value: Any) -> None:
    """A JSON file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_images(folder: Path, *names: str, mode: str = "RGB") -> None:
    """Small noisy pictures, each in the format that its name says; their content does not repeat itself."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20, 16), 80).convert(mode).save(path)


def read_raw(
    dataset: str, raw: Path, split: str, **options: Any
) -> tuple[list[MediaRecords], dict[str, tuple[int, int]]]:
    """What the reader of a dataset's card makes of a raw folder: the media, and reason -> (count, records) of the losses."""
    card, losses = load_card(dataset), Losses()
    source = RawSplit(raw, split, card.splits[split].files, card.reader_options | options)
    media = list(READERS[card.reader](source, losses))
    return media, {loss["reason"]: (loss["count"], loss["records"]) for loss in losses.to_list()}


def records_of(media: list[MediaRecords]) -> dict[str, list[dict[str, Any]]]:
    """Media id -> its records, as they stand in a shard."""
    return {item.media_id: [record.to_dict() for record in item.records] for item in media}
