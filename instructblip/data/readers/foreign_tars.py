"""WebDataset tars of others, as CC3M, SBU and LAION are published by img2dataset: `000000012.jpg`, `.txt`, `.json` in turn.

The webdataset library says which members belong together. Nothing is unpacked to the disk and nothing is decoded but text
and JSON, so that a pickle stays the bytes it is; pictures are read from their place in the tar once they are converted.

Reader options, which the card gives: dataset (its name), task, columns.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from instructblip.config.schema import CardTask
from instructblip.data.readers.base import FileSlice, Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.columns import COLUMNS, Columns, Row
from instructblip.data.readers.common import media_key
from instructblip.data.readers.files import PICTURE_EXTENSIONS, VIDEO_EXTENSIONS, check_not_packed
from instructblip.data.readers.records import own_files
from instructblip.data.tars import MAX_TEXT_BYTES, Sample, TarMember, grouped, tar_members
from instructblip.data.typed import WrongValueError, parse_json

_TEXTS = ("txt", "text", "caption", "cls", "json")
_COLUMN_OF_TEXT = {"txt": "caption", "text": "caption", "cls": "label"}
_LOOKED_AT = 100  # samples whose members are the columns
_MEDIA = (*PICTURE_EXTENSIONS, *VIDEO_EXTENSIONS)


def read_foreign_tars(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the samples of all tars in their order, those of one tar in its order.

    The id of an image is `<tar>/<key>`, with the tar's path below the raw folder; it is the record's too, where JSON says
    no other.

    Raises:
        UserError: a tar is missing, packed or cut short; a column that the task needs is nowhere.
    """
    yield from _samples(source, *_opened(source, losses), losses)


def read_foreign_tar(source: RawSplit, path: Path, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the samples of one of the tars, which may be empty, or lack what others have: `look_at_tars` sees to those.

    Raises:
        UserError: it is missing, packed or cut short.
    """
    yield from _samples(source, _columns(source), _rows(path, source.raw, losses), losses)


def look_at_tars(source: RawSplit) -> None:
    """Look at the first samples for the columns that the task needs.

    Raises:
        UserError: as `read_foreign_tars`, apart from what is wrong further on.
    """
    _opened(source, Losses())


def _samples(source: RawSplit, columns: Columns, rows: Iterator[Row], losses: Losses) -> Iterator[MediaRecords]:
    for row in rows:
        example = columns.example(row, losses)
        if example is not None:
            media = tuple(part for part in example.media if isinstance(part, FileSlice))
            key = media_key(source.options["dataset"], row.name)
            yield MediaRecords(
                key, row.name, media if len(media) > 1 else media[0], list(example.records), example.video
            )


def _columns(source: RawSplit) -> Columns:
    return Columns(source.options["task"], source.split, source.options["columns"])


def _opened(source: RawSplit, losses: Losses) -> tuple[Columns, Iterator[Row]]:
    tars, columns = own_files(source, "shards"), _columns(source)
    rows = (row for path in tars for row in _rows(path, source.raw, losses))
    first = list(itertools.islice(rows, _LOOKED_AT))
    columns.check({name for row in first for name in row.values}, tars[0], losses)
    return columns, itertools.chain(first, rows)


def _rows(path: Path, raw: Path, losses: Losses) -> Iterator[Row]:
    tar = path.relative_to(raw).with_suffix("").as_posix()

    def repeated(name: str) -> None:
        losses.add("member occurs twice in its sample", f"{path.name}: {name}", records=0)

    for sample in grouped(_members(path, losses), repeated):
        place = f"{path.name}: {sample['__key__']}"
        with losses.counting(place):
            yield sample_row(sample, tar, place)


def _members(path: Path, losses: Losses) -> Iterator[Sample]:
    """The members of a tar as the library takes them: text as bytes, pictures as where they stand, others as None."""
    check_not_packed(path)
    with open(path, "rb") as file:
        for member in tar_members(file, str(path)):
            place = f"{path.name}: {member.name}"
            if member.refusal:
                losses.add(member.refusal, place, records=0)
            else:
                yield {"fname": member.name, "data": _content(member, path, place), "__url__": str(path)}


def _content(member: TarMember, path: Path, place: str) -> FileSlice | bytes | None:
    if is_media(member.name):
        return FileSlice(path, member.offset, member.size, place)
    return member.read() if is_text(member) else None


def is_media(name: str) -> bool:
    """Whether a member's name is that of a picture or a video."""
    return name.rpartition(".")[2].lower() in _MEDIA


def is_text(member: TarMember) -> bool:
    """Whether a member is text or JSON, of a size that these have."""
    return member.name.rpartition(".")[2].lower() in _TEXTS and member.size <= MAX_TEXT_BYTES


# --- a sample as a row -----------------------------------------------------------------------------------------------


def sample_row(sample: Sample, tar: str, place: str) -> Row:
    """A sample as a row of a table. Its media are what `sample` has in their place: bytes, or where they stand.

    Args:
        sample: as `grouped` gives it; of what is not to be read it has None.
        tar: what the tar is called in the row's name.
        place: where it stands, for messages.

    Raises:
        WrongValueError: text that is not UTF-8, no JSON, several pictures that are not numbered.
    """
    return Row(f"{tar}/{sample['__key__']}", place, _values(sample))


def _values(sample: Sample) -> dict[str, Any]:
    """Columns of a sample: the keys of its JSON, its texts by extension, and its picture, pictures or video."""
    members = {name: content for name, content in sample.items() if not name.startswith("__") and content is not None}
    media = {name: content for name, content in members.items() if is_media(name)}
    texts = {name: _text(name, content) for name, content in members.items() if name not in media}
    values: dict[str, Any] = {}
    if "json" in texts:
        said = parse_json(texts.pop("json"), constant=lambda _: None)
        values |= said if isinstance(said, dict) else {"json": said}
    values |= {_COLUMN_OF_TEXT[name]: text for name, text in texts.items() if name in _COLUMN_OF_TEXT}
    videos = [name for name in media if name.rpartition(".")[2] in VIDEO_EXTENSIONS]
    pictures = [name for name in media if name not in videos]
    for column, names in (("image", pictures), ("video", videos)):
        values.pop(column, None)
        if names:
            values[column] = _one_or_numbered({name: media[name] for name in names}, column)
    return values | texts


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise WrongValueError(f"{name} is not UTF-8") from None


def _one_or_numbered(media: dict[str, Any], column: str) -> Any:
    """`jpg` alone or before `mask.png`; or all of `0.jpg`, `1.jpg`, in the order of their numbers."""
    if len(plain := [content for name, content in media.items() if "." not in name]) == 1:
        return plain[0]
    numbers = [name.partition(".")[0] for name in media]
    if not plain and all(number.isdecimal() for number in numbers):
        return [
            content for _, content in sorted(zip(map(int, numbers), media.values(), strict=True), key=lambda it: it[0])
        ]
    if len(media) == 1:
        return next(iter(media.values()))
    raise WrongValueError(f"sample has several files for {column}", ", ".join(media))


READERS = {
    "webdataset": Reader(
        read_foreign_tars,
        needs=("shards",),
        options=("task", "columns"),
        tasks=get_args(CardTask),
        columns=COLUMNS,
        look=look_at_tars,
    )
}
