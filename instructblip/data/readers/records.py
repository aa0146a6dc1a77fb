"""Tables of one's own: JSON lines, JSON, CSV, TSV, Parquet, Hugging Face folders and datasets of its hub, with the columns
that docs/data.md lists. A row is about one image, about one with several records, or about several images.

The rows of an image may stand anywhere; an image comes where its first row stands. The path of a picture is looked for in
the card's `images`; without them, below the raw folder and beside the table.

Reader options, which the card gives: dataset (its name), task, columns.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from instructblip.config.schema import CardTask
from instructblip.data.readers.base import (
    REMOTE,
    Losses,
    MediaRecords,
    RawSplit,
    Reader,
    found,
    is_remote,
    unpack_hint,
)
from instructblip.data.readers.by_image import ImageRows, RowsByImage
from instructblip.data.readers.columns import COLUMNS, Columns, Example, Row
from instructblip.data.readers.common import MISSING_IMAGE, MISSING_VIDEO, image_folders, media_key
from instructblip.data.readers.files import BROKEN, find_image
from instructblip.data.readers.tables import open_table
from instructblip.errors import UserError
from instructblip.fetch.hub_datasets import hub_files


def read_records(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the images of all tables of a split in the order of their first rows.

    Raises:
        UserError: a table is missing, lacks a column that the task needs, or is damaged; no space to sort its rows.
    """
    tables = own_files(source, "records")
    columns = Columns(source.options["task"], source.split, source.options["columns"])
    beside = [source.raw, *dict.fromkeys(path.parent for path in tables)]
    folders = image_folders(source) if "images" in source.files else beside
    with RowsByImage.open(source.scratch) as rows:
        rows.add(_examples(tables, columns, losses))
        for image in rows.images():
            yield from _media(image, folders, source, losses)


def look_at_records(source: RawSplit) -> None:
    """Open all tables of a split and look for the columns that the task needs.

    Raises:
        UserError: as `read_records`, apart from what is wrong further on.
    """
    columns = Columns(source.options["task"], source.split, source.options["columns"])
    for path in own_files(source, "records"):
        columns.check(open_table(path, source.split, columns.wanted(), Losses()).columns, path, Losses())


def own_files(source: RawSplit, role: str) -> list[Path]:
    """All files and folders that the places of a role name.

    Raises:
        UserError: a place names none.
    """
    files = []
    for place in source.files[role]:
        if is_remote(place):
            files += hub_files(place.removeprefix(REMOTE), source.split)
            continue
        paths = found(source.raw, place)
        if not paths:
            raise UserError(
                f"{source.raw} lacks {place} ({role} of split {source.split}); {unpack_hint(source.raw)}put it there, or "
                f"correct raw= or the card; a dataset of the hub is written {REMOTE}OWNER/NAME"
            )
        files += paths
    return files


def _examples(tables: list[Path], columns: Columns, losses: Losses) -> Iterator[tuple[int, str, Example]]:
    number = -1
    for path in tables:
        table = open_table(path, columns.split, columns.wanted(), losses)
        columns.check(table.columns, path, losses)
        for place, values in table.rows:
            number += 1
            if (
                values is not BROKEN
                and (example := columns.example(Row(str(number), place, values), losses)) is not None
            ):
                yield number, place, example


def _media(image: ImageRows, folders: list[Path], source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    paths = [find_image(folders, [media]) if isinstance(media, str) else media for media in image.media]
    present = tuple(path for path in paths if path is not None)
    if len(present) < len(paths):
        name = image.media[paths.index(None)]
        losses.add(MISSING_VIDEO if image.video else MISSING_IMAGE, f"{image.place}: {name}", len(image.records))
        return
    media, key = present if len(present) > 1 else present[0], media_key(source.options["dataset"], image.media_id)
    yield MediaRecords(key, image.media_id, media, list(image.records), image.video)


READERS = {
    "records": Reader(
        read_records,
        needs=("records",),
        may_name=("images",),
        options=("task", "columns"),
        tasks=get_args(CardTask),
        columns=COLUMNS,
        look=look_at_records,
    )
}
