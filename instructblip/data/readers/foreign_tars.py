"""WebDataset tars of others, as CC3M, SBU and LAION are published by img2dataset: `000000012.jpg`, `.txt`, `.json` in turn.

The webdataset library says which members belong together. Nothing is unpacked to the disk and nothing is decoded but text
and JSON, so that a pickle stays the bytes it is; pictures are read from their place in the tar once they are converted.

Reader options, which the card gives: dataset (its name), task, columns.
"""

import contextlib
import itertools
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

from instructblip.config.schema import CardTask
from instructblip.data.readers.base import FileSlice, Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.columns import COLUMNS, Columns, Row
from instructblip.data.readers.common import media_key
from instructblip.data.readers.files import PICTURE_EXTENSIONS, VIDEO_EXTENSIONS, check_not_packed
from instructblip.data.readers.records import own_files
from instructblip.data.typed import WrongValueError, parse_json, path_below
from instructblip.errors import UserError

MAX_TEXT_BYTES = 1 << 24  # of a member of text or JSON
_TEXTS = ("txt", "text", "caption", "cls", "json")
_COLUMN_OF_TEXT = {"txt": "caption", "text": "caption", "cls": "label"}
_LOOKED_AT = 100  # samples whose members are the columns

Sample = dict[str, Any]  # extension -> content, beside `__key__` and `__url__` as the library calls them


def read_foreign_tars(source: RawSplit, losses: Losses) -> Iterator[MediaRecords]:
    """Yield the samples of all tars in their order, those of one tar in its order.

    The id of an image is `<tar>/<key>`, with the tar's path below the raw folder; it is the record's too, where JSON says
    no other.

    Raises:
        UserError: a tar is missing, packed or cut short; a column that the task needs is nowhere; no webdataset library.
    """
    columns, rows = _opened(source, losses)
    for row in rows:
        example = columns.example(row, losses)
        if example is not None:
            media = tuple(part for part in example.media if isinstance(part, FileSlice))
            key = media_key(source.options["dataset"], row.name)
            yield MediaRecords(
                key, row.name, media if len(media) > 1 else media[0], list(example.records), example.video
            )


def look_at_tars(source: RawSplit) -> None:
    """Look at the first samples for the columns that the task needs.

    Raises:
        UserError: as `read_foreign_tars`, apart from what is wrong further on.
    """
    _opened(source, Losses())


def _opened(source: RawSplit, losses: Losses) -> tuple[Columns, Iterator[Row]]:
    tars = own_files(source, "shards")
    columns = Columns(source.options["task"], source.split, source.options["columns"])
    rows = (row for path in tars for row in _rows(path, source.raw, losses))
    first = list(itertools.islice(rows, _LOOKED_AT))
    columns.check({name for row in first for name in row.values}, tars[0], losses)
    return columns, itertools.chain(first, rows)


def _rows(path: Path, raw: Path, losses: Losses) -> Iterator[Row]:
    tar = path.relative_to(raw).with_suffix("").as_posix()
    with _tar_errors(path):
        for sample in _grouped()(_members(path, losses), handler=_Repeats(path, losses)):
            key = sample["__key__"]
            with losses.counting(f"{path.name}: {key}"):
                yield Row(f"{tar}/{key}", f"{path.name}: {key}", _values(sample))


def _grouped() -> Callable[..., Iterator[Sample]]:
    """The library's rule of which members are one sample."""
    try:
        from webdataset.tariterators import group_by_keys
    except ModuleNotFoundError:
        raise UserError(
            "reader webdataset needs the library webdataset; install it with: pip install -r requirements-records.txt"
        ) from None
    grouped: Callable[..., Iterator[Sample]] = group_by_keys
    return grouped


class _Repeats:
    """Counts what the library finds wrong with a member: that its name was there before."""

    def __init__(self, path: Path, losses: Losses) -> None:
        self._path = path
        self._losses = losses

    def __call__(self, error: Exception) -> bool:
        if not isinstance(error, ValueError):
            raise error
        name = str(error.args[0]).partition(":")[0]
        self._losses.add("member occurs twice in its sample", f"{self._path.name}: {name}", records=0)
        return True


def _members(path: Path, losses: Losses) -> Iterator[Sample]:
    """The members of a tar as the library takes them: text as bytes, pictures as where they stand, others as None."""
    check_not_packed(path)
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else it remembers them all; the library does so too
            name = member.name.removeprefix("./")
            if member.isdir() or name.startswith("__"):  # the library's names for facts about the whole tar
                continue
            place, extension = f"{path.name}: {name}", name.rpartition(".")[2].lower()
            if path_below(name) is None:
                losses.add("member name leads out of its folder", place, records=0)
            elif not member.isreg() or member.issparse():
                losses.add("member is no regular file", place, records=0)
            elif extension in (*PICTURE_EXTENSIONS, *VIDEO_EXTENSIONS):
                content = FileSlice(path, member.offset_data, member.size, place)
                yield {"fname": name, "data": content, "__url__": str(path)}
            else:
                read = extension in _TEXTS and member.size <= MAX_TEXT_BYTES
                file = tar.extractfile(member) if read else None
                yield {"fname": name, "data": None if file is None else file.read(), "__url__": str(path)}
        end = tar.offset
    with open(path, "rb") as whole:
        whole.seek(end)
        if whole.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a broken header for the end
            raise tarfile.ReadError(f"it is cut short or damaged at byte {end:,}")


@contextlib.contextmanager
def _tar_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path} is no whole tar ({error}); copy or fetch it again") from None


# --- a sample as a row -----------------------------------------------------------------------------------------------


def _values(sample: Sample) -> dict[str, Any]:
    """Columns of a sample: the keys of its JSON, its texts by extension, and its picture, pictures or video.

    Raises:
        WrongValueError: text that is not UTF-8, no JSON, several pictures that are not numbered.
    """
    texts = {name: _text(name, content) for name, content in sample.items() if isinstance(content, bytes)}
    values: dict[str, Any] = {}
    if "json" in texts:
        said = parse_json(texts.pop("json"), constant=lambda _: None)
        values |= said if isinstance(said, dict) else {"json": said}
    values |= {_COLUMN_OF_TEXT[name]: text for name, text in texts.items() if name in _COLUMN_OF_TEXT}
    media = {name: content for name, content in sample.items() if isinstance(content, FileSlice)}
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


def _one_or_numbered(media: dict[str, FileSlice], column: str) -> FileSlice | list[FileSlice]:
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
