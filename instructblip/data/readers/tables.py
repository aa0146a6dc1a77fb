"""Tables of one's own, row by row in flat memory: JSON lines, a JSON list, CSV, TSV, Parquet, and folders of Arrow files as
Hugging Face's `save_to_disk` writes them.

Rows that cannot be read are counted, and those after them keep their numbers.
"""

import codecs
import contextlib
import csv
import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructblip.data.readers.base import Losses
from instructblip.data.readers.files import (
    BROKEN,
    DELIMITERS,
    check_not_packed,
    every_json_line,
    first_bytes,
    stream_list,
    text_lines,
)
from instructblip.data.typed import Fields, WrongValueError, file_name, kind_of, parse_json, texts
from instructblip.errors import UserError
from instructblip.fetch.archives import MAX_GROWTH
from instructblip.files import read_json

if TYPE_CHECKING:
    import pyarrow

MAX_CELL = 1 << 26  # characters of a cell of CSV; a quote that is not closed ends there
_TOLD = re.compile(r"sep=(.)\r?")
_LOOKED_AT = 100  # rows of JSON, whose keys are the columns
_BUFFER = 1 << 20  # bytes of a column of Parquet that are read at once; else all of a row group's are
_MAX_SMALL = 1 << 24  # bytes that even a tiny file of Parquet may unpack to
_MAX_BATCH = 1 << 28  # bytes of rows that are read at once, where one row has less
_ROWS_AT_ONCE = 64  # at most, of Parquet and Arrow; a row may hold a picture
_BEFORE_JSON = codecs.BOM_UTF8 + codecs.BOM_UTF16_LE + b" \t\r\n"
# What Hugging Face's libraries write into the schema of a file: the names of classes, which its cells say as numbers.
_FEATURES = b"huggingface"

Rows = Iterator[tuple[str, Any]]  # (where it stands, its values by column, or BROKEN)


@dataclass(frozen=True)
class Table:
    """The columns of a table, and its rows."""

    columns: tuple[str, ...]
    rows: Rows


def open_table(path: Path, split: str, wanted: Collection[str], losses: Losses) -> Table:
    """A table of any of these kinds.

    Args:
        split: which of several splits in a folder of `save_to_disk`.
        wanted: columns that are read where they are there; by them the delimiter of CSV is told.

    Raises:
        UserError: a file that is missing, empty, packed or of none of these kinds; a folder without that split; pyarrow is
            not installed. On reaching the bad place: not whole, not UTF-8.
    """
    if path.is_dir():
        return _open_folder(path, split, wanted)
    check_not_packed(path)
    start = first_bytes(path)
    if not start.strip():
        raise UserError(f"{path} is empty; copy or fetch it again")
    if start.startswith(b"PAR1"):
        return _open_parquet(path, wanted)
    if path.suffix.lower() in (".csv", ".tsv", ".tab"):
        return _open_csv(path, wanted, losses)
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        is_list = start.replace(b"\0", b"").lstrip(_BEFORE_JSON).startswith(b"[")
        return _open_json(_entries(path) if is_list else every_json_line(path, losses), path, losses)
    raise UserError(
        f"{path} is no table that is read; give .jsonl, .json, .csv, .tsv, .parquet or a folder of save_to_disk"
    )


# --- JSON ------------------------------------------------------------------------------------------------------------


def _entries(path: Path) -> Rows:
    return ((f"{path.name} entry {number}", entry) for number, entry in enumerate(stream_list(path)))


def _open_json(rows: Rows, path: Path, losses: Losses) -> Table:
    """The columns are the keys of the first rows."""
    first_place, row = next(rows, ("", None))
    if row is BROKEN and path.suffix.lower() == ".json":  # an object over several lines, most likely
        raise UserError(f"{path} must hold a list of objects, or an object on each line; {first_place} is none")
    objects = _objects(itertools.chain([(first_place, row)] if first_place else [], rows), losses)
    first = list(itertools.islice(objects, _LOOKED_AT))
    if not first:
        raise UserError(f"{path} has no rows; copy or fetch it again")
    columns = dict.fromkeys(key for _, row in first if row is not BROKEN for key in row)
    return Table(tuple(columns), itertools.chain(first, objects))


def _objects(rows: Rows, losses: Losses) -> Rows:
    for place, value in rows:
        if value is not BROKEN and not isinstance(value, dict):
            losses.add("row is no object of keys and values", f"{place}: {kind_of(value)}")
            value = BROKEN
        yield place, value


# --- CSV -------------------------------------------------------------------------------------------------------------


def _open_csv(path: Path, wanted: Collection[str], losses: Losses) -> Table:
    """The first line names the columns, with any of `DELIMITERS` between them.

    Before it may stand the line that tells spreadsheets the delimiter, `sep=;`.
    """
    csv.field_size_limit(MAX_CELL)
    lines = text_lines(path)
    first = next(lines, "")
    told = _TOLD.fullmatch(first)
    if told:
        first = next(lines, "")
    tabs = path.suffix.lower() != ".csv"
    delimiter = (
        told[1]
        if told
        else max(DELIMITERS, key=lambda mark: (len(set(_header(first, mark)) & set(wanted)), tabs and mark == "\t"))
    )
    columns = _header(first, delimiter)
    if twice := next((name for name in columns if columns.count(name) > 1 and name in wanted), None):
        raise UserError(f"{path} has two columns {twice}; rename one of them")
    return Table(tuple(columns), _csv_rows(path, delimiter, columns, losses, before=1 if told else 0))


def _header(line: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _csv_rows(path: Path, delimiter: str, columns: list[str], losses: Losses, before: int) -> Rows:
    """The rows behind the header, which some lines stand before."""
    # A cell in quotes may go over several lines: each gets its line feed back.
    lines = itertools.islice(text_lines(path), before, None)
    reader = csv.reader((f"{line}\n" for line in lines), strict=True, delimiter=delimiter)
    next(reader, None)
    found = False
    while True:
        place = f"{path.name} line {before + reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:  # the reader goes on at the next line
            losses.add("row is not CSV", f"{place}: {error}")
            yield place, BROKEN
            continue
        if not any(cell.strip() for cell in cells):
            continue
        found = True
        if any(cell.strip() for cell in cells[len(columns) :]):
            losses.add("row has more cells than the table has columns", f"{place}: {len(cells)} for {len(columns)}")
            yield place, BROKEN
        else:
            yield place, dict(zip(columns, cells, strict=False))
    if not found:
        raise UserError(f"{path} has no rows below its header; copy or fetch it again")


# --- Parquet and Arrow -----------------------------------------------------------------------------------------------


def _open_parquet(path: Path, wanted: Collection[str]) -> Table:
    with _arrow_errors(path):
        from pyarrow import parquet

        file = parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
    if not file.metadata.num_rows:
        raise UserError(f"{path} has no rows; copy or fetch it again")
    names = file.schema_arrow.names
    read = [name for name in names if name in wanted]
    rows = _rows_at_once(path, file.metadata, read)
    batches = file.iter_batches(batch_size=rows, columns=read, use_threads=False)
    return Table(tuple(names), _arrow_rows(path, file.schema_arrow, batches))


def _rows_at_once(path: Path, facts: "pyarrow.parquet.FileMetaData", read: Collection[str]) -> int:
    """How many rows fit into memory: a text that is stored once may stand in each of them.

    Raises:
        UserError: the file would unpack to far more than it is; a text of a gigabyte may take a few bytes.
    """
    groups = (facts.row_group(number) for number in range(facts.num_row_groups))
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    sizes = [c.total_uncompressed_size for c in chunks if c.path_in_schema.partition(".")[0] in read] or [0]
    if sum(sizes) > path.stat().st_size * MAX_GROWTH + _MAX_SMALL:
        raise UserError(f"{path} would unpack to {sum(sizes):,} bytes; it is not to be trusted")
    return max(1, min(_ROWS_AT_ONCE, _MAX_BATCH // max(1, *sizes)))


def _open_folder(folder: Path, split: str, wanted: Collection[str]) -> Table:
    """A dataset as `save_to_disk` writes it, or one split of several."""
    if (folder / "dataset_dict.json").is_file():
        splits = Fields.of(read_json(folder / "dataset_dict.json")).get("splits") or []
        if split not in splits:
            raise UserError(
                f"{folder} has no split {split}, but {', '.join(map(str, splits))}; name one: {folder.name}/SPLIT"
            )
        folder = folder / split
    if not (folder / "state.json").is_file():
        raise UserError(f"{folder} is a folder without state.json, which save_to_disk writes; or name the files in it")
    files = [folder / name for name in _data_files(folder / "state.json")]
    schema = _read_schema(files[0])
    read = [name for name in schema.names if name in wanted]
    rows = (row for path in files for row in _arrow_rows(path, schema, _batches(path, read)))
    return Table(tuple(schema.names), rows)


def _data_files(state: Path) -> list[str]:
    content = read_json(state)
    listed = content.get("_data_files") if isinstance(content, dict) else None
    names = [file_name(entry.get("filename")) for entry in listed or [] if isinstance(entry, dict)]
    if not names or None in names or content.get("_indices_data_files"):
        raise UserError(
            f"{state} names no files of rows that are read as they stand; load the dataset and save it again"
        )
    return [name for name in names if name is not None]


def _read_schema(path: Path) -> "pyarrow.Schema":
    with _arrow_errors(path):
        import pyarrow

        with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
            return stream.schema


def _batches(path: Path, read: list[str]) -> "Iterator[pyarrow.RecordBatch]":
    import pyarrow

    with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
        for batch in stream:
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                yield batch.select(read).slice(start, _ROWS_AT_ONCE)


def _arrow_rows(path: Path, schema: "pyarrow.Schema", batches: "Iterator[pyarrow.RecordBatch]") -> Rows:
    classes, number = _class_names(schema), 0
    while True:
        with _arrow_errors(path):
            batch = next(batches, None)
            if batch is None:
                return
            rows = batch.to_pylist()
        for row in rows:
            for column, names in classes.items():
                label = row.get(column)
                if isinstance(label, int) and 0 <= label < len(names):
                    row[column] = names[label]
            yield f"{path.name} row {number}", row
            number += 1


def _class_names(schema: "pyarrow.Schema") -> Mapping[str, list[str]]:
    """Column -> the names of the classes that its numbers stand for, where Hugging Face's libraries wrote them."""
    try:
        said = parse_json((schema.metadata or {}).get(_FEATURES, b"{}"))
        features = Fields.of(said).inner("info").inner("features").values
    except WrongValueError:  # another program's own words under that name
        return {}
    found = {column: Fields(feature).get("names") for column, feature in features.items() if isinstance(feature, dict)}
    return {column: names for column, names in found.items() if isinstance(names, list) and texts(names)}


@contextlib.contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    """Say in one line that pyarrow is not installed, or what it finds wrong with a file."""
    try:
        yield
    except ModuleNotFoundError:
        raise UserError(f"{path} needs pyarrow; install it with: pip install -r requirements-records.txt") from None
    except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of both
        raise UserError(
            f"{path} cannot be read ({str(error).partition(chr(10))[0][:200]}); copy or fetch it again"
        ) from None
