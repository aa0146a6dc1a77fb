"""Raw folders of datasets in their official layout: the cases of `tests/data/readers`, and pictures for them.

A case is `<reader>/<case>/` with `raw/` (annotation files; a folder `NAME.tar` becomes a tar), `images.yaml` (names of
pictures and videos, made on the spot) and `expected.json` (what the reader makes of each split, as its card or the case
itself tells it). A case named as a dataset is that dataset's layout.
"""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from instructblip.data.cards import load_card
from instructblip.data.readers import READERS, FileSlice, Losses, MediaRecords, RawSplit
from instructblip.data.readers.base import Media
from instructblip.data.readers.files import VIDEO_EXTENSIONS
from tests.kit.own_tables import write_tar
from tests.kit.videos import write_video

CASES = sorted(path.parent for path in (Path(__file__).parents[1] / "data/readers").glob("*/*/expected.json"))


def write_raw(dataset: str, raw: Path) -> None:
    """The raw folder of a dataset: a few records and small real pictures."""
    write_case(next(case for case in CASES if case.name == dataset), raw)


def write_case(case: Path, raw: Path) -> None:
    """The raw folder of a case."""
    shutil.copytree(case / "raw", raw, dirs_exist_ok=True)
    names = yaml.safe_load((case / "images.yaml").read_text(encoding="utf-8")) or []
    for name in names:
        if name.rpartition(".")[2].lower() in VIDEO_EXTENSIONS:
            write_video(raw / name, ["red", "green", "blue", "white"] * 2)
    write_images(raw, *(name for name in names if not (raw / name).exists()))
    for folder in sorted(raw.rglob("*.tar")):
        members = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.*"))}
        shutil.rmtree(folder)
        write_tar(folder, members)


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
    card = load_card(dataset)
    return _read(card.reader, RawSplit(raw, split, card.splits[split].files, card.reader_options | options))


def read_case(case: Path, raw: Path, split: str) -> dict[str, Any]:
    """What the reader of a case makes of a split, in the form of `expected.json`."""
    media, losses = _read(case.parent.name, source_of(case, raw, split))
    found = [
        {
            "key": item.key,
            "id": item.media_id,
            "file": _file(item.media, raw),
            "records": [record.to_dict() for record in item.records],
        }
        for item in media
    ]
    result: dict[str, Any] = json.loads(json.dumps({"media": found, "lost": losses}))
    return result


def _file(media: Media | tuple[Media, ...], raw: Path) -> str | list[str]:
    if isinstance(media, tuple):
        return [str(_file(one, raw)) for one in media]
    return media.name if isinstance(media, FileSlice) else str(media.relative_to(raw))


def source_of(case: Path, raw: Path, split: str) -> RawSplit:
    """What the reader of a case is given: files and options of its card, or those that the case says itself."""
    said = expected_of(case)
    options = said.get("options", {})
    if "dataset" not in said:
        return RawSplit(raw, split, {role: tuple(places) for role, places in said["files"].items()}, options, raw)
    card = load_card(said["dataset"])
    return RawSplit(raw, split, card.splits[split].files, card.reader_options | options)


@functools.cache
def expected_of(case: Path) -> dict[str, Any]:
    """`dataset` (or `files`), perhaps `options`, and `splits`: split -> `media` and `lost`."""
    expected: dict[str, Any] = json.loads((case / "expected.json").read_text(encoding="utf-8"))
    return expected


def records_of(media: list[MediaRecords]) -> dict[str, list[dict[str, Any]]]:
    """Media id -> its records, as they stand in a shard."""
    return {item.media_id: [record.to_dict() for record in item.records] for item in media}


def _read(reader: str, source: RawSplit) -> tuple[list[MediaRecords], dict[str, tuple[int, int]]]:
    losses = Losses()
    media = list(READERS[reader](source, losses))
    return media, {loss["reason"]: (loss["count"], loss["records"]) for loss in losses.to_list()}
