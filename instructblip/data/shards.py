"""Shards: plain WebDataset tars with an index of byte offsets beside them, so that a record is read by its number.

An image is stored once, with the JSON of all its records. A video stores its frames in order; "image" means either below.
Equal input gives equal bytes. docs/data.md, "Shards", describes the files.

Letters in shapes: N images of a shard, F frames of them all (one for a picture), R records, n records selected.
"""

import contextlib
import hashlib
import json
import os
import re
import struct
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from instructblip.data.records import Record, parse_records
from instructblip.data.tars import tar_writer, write_member
from instructblip.data.typed import Fields, WrongValueError, parse_json
from instructblip.errors import DamagedSample, UserError
from instructblip.fetch.shard_cache import RemoteTars, remote_tars
from instructblip.files import atomic_path, read_json, sha256_file, write_atomically

if TYPE_CHECKING:
    from webdataset.writer import TarWriter

Int64Array = npt.NDArray[np.int64]
Opened = TypeVar("Opened")

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1
INDEX_VERSION = "2"
FRAME_ARRAYS = ("frame_offset", "frame_size", "frame_image")
JSON_ARRAYS = ("json_offset", "json_size")
RECORD_ARRAYS = ("record_image", "record_number", "record_kind")
INDEX_NAMES = ("kinds", "keys", "extensions")
ARRAYS_BY_LENGTH = (FRAME_ARRAYS, JSON_ARRAYS, RECORD_ARRAYS)
INDEX_ARRAYS = (*FRAME_ARRAYS, *JSON_ARRAYS, *RECORD_ARRAYS)
KEY = re.compile(r"[A-Za-z0-9_-]+")
_EXTENSION = re.compile(r"(?:[0-9]+\.)?[a-z0-9]+")
_SHARD_NAME = re.compile(r"shard-[0-9]{6,9}\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_READERS_KEPT = 256  # open indexes of a split: more than the shards that training has in hand at a time


def shard_path(folder: Path, number: int) -> Path:
    """Where shard `number` of a split folder stands."""
    return folder / f"shard-{number:06d}.tar"


def index_path(shard: Path) -> Path:
    """The index beside a shard."""
    return shard.with_suffix(".index.safetensors")


# --- writing ---------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Write one shard and its index: `with ShardWriter.open(path) as writer: writer.add(...)`.

    Attributes:
        notes: further texts for the index's metadata, to be set before the end.
    """

    def __init__(self, path: Path, tar: "TarWriter") -> None:
        self.path = path
        self.notes: dict[str, str] = {}
        self._tar = tar
        self._keys: dict[str, None] = {}  # in order
        self._extensions: list[str] = []  # of each frame
        self._frames: list[tuple[int, int, int]] = []  # offset, size, image row
        self._json: list[tuple[int, int]] = []
        self._records: list[tuple[int, int, str]] = []  # image row, number within the image, kind

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[Self]:
        """Give a writer. Both files appear whole at the end, the index last: a shard with an index that matches it is
        a finished shard. Leaving by an exception leaves nothing.

        Raises:
            UserError: the disk is full or the folder may not be written.
        """
        with atomic_path(path) as partial:
            with open(partial, "wb") as file, tar_writer(file) as tar:
                writer = cls(path, tar)
                yield writer
            tar_sha256, tar_bytes = sha256_file(partial), partial.stat().st_size
        write_atomically(index_path(path), writer._index(tar_sha256, tar_bytes))

    def add(self, key: str, frames: Mapping[str, bytes], image_id: str, records: Sequence[Record]) -> None:
        """Append one image with its records.

        Args:
            key: its name in the tar.
            frames: extension -> encoded bytes: `jpg` or `png` of a picture; `0.jpg`, `1.jpg`, ... of a video, in order.
            image_id: its id in the source.

        Raises:
            ValueError: a key that WebDataset would read otherwise (a dot, a slash), or one that was used before.
        """
        if not KEY.fullmatch(key) or key in self._keys:
            raise ValueError(f"{self.path}: image key {key!r} is used twice or is not of letters, digits, _ and -")
        text = image_json(image_id, records)
        row = len(self._keys)
        for extension, frame in frames.items():
            self._frames.append((write_member(self._tar, key, extension, frame), len(frame), row))
        self._json.append((write_member(self._tar, key, "json", text), len(text)))
        self._keys[key] = None
        self._extensions += frames
        self._records += [(row, number, record.kind) for number, record in enumerate(records)]

    def _index(self, tar_sha256: str, tar_bytes: int) -> bytes:
        kinds = sorted({kind for _, _, kind in self._records})
        records = [(row, number, kinds.index(kind)) for row, number, kind in self._records]
        columns: list[Int64Array] = []
        for names, rows in ((FRAME_ARRAYS, self._frames), (JSON_ARRAYS, self._json), (RECORD_ARRAYS, records)):
            columns += list(np.array(rows, dtype=np.int64).reshape(-1, len(names)).T)
        metadata = {
            **self.notes,
            "version": INDEX_VERSION,
            "kinds": json.dumps(kinds),
            "keys": json.dumps(list(self._keys)),
            "extensions": json.dumps(self._extensions),
            "tar_sha256": tar_sha256,
            "tar_bytes": str(tar_bytes),
        }
        return safetensors_bytes(dict(zip(INDEX_ARRAYS, columns, strict=True)), metadata)


def image_json(image_id: str, records: Sequence[Record]) -> bytes:
    """What stands beside an image: its id in the source, and all its records."""
    fields = {"image_id": image_id, "records": [record.to_dict() for record in records]}
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def safetensors_bytes(arrays: dict[str, Int64Array], metadata: dict[str, str]) -> bytes:
    """A safetensors file of int64 arrays.

    The library's own writer orders the metadata by chance, so equal indexes would differ in bytes from run to run.
    Format: 8 bytes header length (little endian), JSON header padded with spaces to a multiple of 8, then the arrays.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name, array in arrays.items():
        end = position + 8 * array.size
        header[name] = {"dtype": "I64", "shape": list(array.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = b"".join(np.ascontiguousarray(array, dtype="<i8").tobytes() for array in arrays.values())
    return struct.pack("<Q", len(text)) + text + content


# --- reading ---------------------------------------------------------------------------------------------------------


class ShardReader:
    """Read images and records of one shard at the offsets of its index; nothing is unpacked.

    Each read opens the tar, reads one span and closes it: no state, so readers may be forked, pickled and shared among
    threads, and a data set of many thousand shards does not run into the limit of open files. Beside decoding an image
    the cost is nothing. Each read also looks at the tar's own headers of what it reads, so an index of another tar is
    noticed even where both have as many bytes.

    Args:
        path: the tar; the index lies beside it.
        remote: where the tar comes from, if it is not the file at `path`.

    Attributes:
        kinds, keys, extensions: lists of the index, of all kinds, images and frames.
        arrays: the int64 arrays of the index (`INDEX_ARRAYS`), [F], [N] or [R].

    Raises:
        UserError: shard or index missing, unreadable, cut short, or not belonging together.
    """

    def __init__(self, path: Path, remote: RemoteTars | None = None) -> None:
        self.path = path
        self._remote = remote
        self.metadata, self.arrays = _read_index(index_path(path))
        self.kinds, self.keys, self.extensions = (_names_in(self.metadata, name) for name in INDEX_NAMES)
        self.tar_sha256 = self.metadata["tar_sha256"]
        self.tar_bytes = int(self.metadata["tar_bytes"])
        if remote is None:
            _check_tar(path, self.tar_bytes)
        self._records_of: dict[tuple[str, ...], Int64Array] = {}
        self._first_frame: list[int] = np.searchsorted(self.arrays["frame_image"], np.arange(len(self) + 1)).tolist()

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self.keys)

    def frames_of(self, row: int) -> slice:
        """Where the frames of row `row` in [0, N) stand among all F frames of the shard."""
        return slice(self._first_frame[row], self._first_frame[row + 1])

    def extension(self, row: int) -> str:
        """Of the first frame of row `row` in [0, N)."""
        return self.extensions[self._first_frame[row]]

    def read(self, row: int) -> tuple[tuple[bytes, ...], list[Record]]:
        """The encoded frames (one of a picture) of row `row` in [0, N) and all its records.

        Raises:
            UserError: the shard has changed since it was opened, or the member is damaged.
        """
        frames, text = self.read_encoded(row)
        return frames, self._records(row, text)

    def read_record(self, row: int, place: int) -> tuple[tuple[bytes, ...], Record]:
        """The encoded frames of row `row` and the record at `place` among its own.

        Raises:
            UserError: as `read`.
            DamagedSample: the record is not there, or damaged.
        """
        frames, text = self.read_encoded(row)
        return frames, self._records(row, text, slice(place, place + 1))[0]

    def read_records(self, row: int) -> list[Record]:
        """The records of row `row` alone, without reading its frames."""
        return self._records(row, self._read_text(row))

    def image_id(self, row: int) -> str:
        """What the source calls the image of row `row`, whose records are sound."""
        return parse_records(self._read_text(row))[0]

    def _read_text(self, row: int) -> bytes:
        """The JSON text of row `row`."""
        offset, size = (int(self.arrays[name][row]) for name in JSON_ARRAYS)
        span = self._read_span(offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE + size)
        self._check_header(span, f"{self.keys[row]}.json", size)
        return span[tarfile.BLOCKSIZE :]

    def read_encoded(self, row: int) -> tuple[tuple[bytes, ...], bytes]:
        """The encoded frames and the JSON text of row `row`, as they are stored."""
        places = self.frames_of(row)
        members = [
            (f"{self.keys[row]}.{extension}", offset, size)
            for extension, offset, size in zip(
                self.extensions[places],
                self.arrays["frame_offset"][places].tolist(),
                self.arrays["frame_size"][places].tolist(),
                strict=True,
            )
        ]
        json_offset, json_size = (int(self.arrays[name][row]) for name in JSON_ARRAYS)
        members.append((f"{self.keys[row]}.json", json_offset, json_size))
        start = min(offset for _, offset, _ in members) - tarfile.BLOCKSIZE
        span = self._read_span(start, json_offset + json_size - start)
        contents = []
        for name, offset, size in members:
            at = offset - start
            self._check_header(span[at - tarfile.BLOCKSIZE : at], name, size)
            contents.append(span[at : at + size])
        return tuple(contents[:-1]), contents[-1]

    def _records(self, row: int, text: bytes, wanted: slice = slice(None)) -> list[Record]:
        """The wanted ones of a row's records; those of a slice must be there."""
        try:
            found = parse_records(text)[1]
            if wanted.stop is not None and len(found) < wanted.stop:
                raise WrongValueError("there are fewer than the index says")
            return [Record.from_dict(record) for record in found[wanted]]
        except WrongValueError as error:
            line = _broken(self.path, f"image {self.keys[row]} has damaged records ({error})")
            raise DamagedSample(str(line)) from None

    def _check_header(self, header: bytes, name: str, size: int) -> None:
        """A tar member's header of 512 bytes: the name at 0, cut at 100 bytes, the size at 124 as octal digits."""
        found = header[:100].rstrip(b"\0")
        digits = header[124:136].rstrip(b"\0 ")
        if found != name.encode()[:100] or not digits.isdigit() or digits != b"%011o" % size:
            raise _broken(self.path, f"does not match its index: {name} is not where that says")

    def _read_span(self, offset: int, size: int) -> bytes:
        try:
            if self._remote is None:
                descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            else:
                descriptor = self._remote.open(self.path.name, self.tar_sha256, self.tar_bytes)
            try:
                _check_size(self.path, os.fstat(descriptor).st_size, self.tar_bytes)
                content = os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _broken(self.path, f"cannot be read ({error.strerror})") from None
        if len(content) != size:
            raise _broken(self.path, f"gave {len(content)} of {size} bytes at {offset}")
        return content

    def records_of(self, kinds: Sequence[str] = ()) -> Int64Array:
        """Which of the R records are of these kinds (none given: all), in stored order."""
        key = tuple(kinds)
        if key not in self._records_of:
            wanted = [number for number, kind in enumerate(self.kinds) if not kinds or kind in kinds]
            self._records_of[key] = np.flatnonzero(np.isin(self.arrays["record_kind"], wanted))
        return self._records_of[key]

    def records_by_kind(self) -> dict[str, int]:
        """Number of records of each kind, kinds sorted."""
        counts = Counter(self.arrays["record_kind"].tolist())
        return {kind: counts[row] for row, kind in enumerate(self.kinds)}


def _check_tar(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise _broken(path, f"cannot be read ({error.strerror})") from None
    _check_size(path, found, size)


def _check_size(path: Path, found: int, size: int) -> None:
    if found != size:
        raise _broken(path, f"has {found:,} bytes where its index says {size:,}")


def _broken(shard: Path, what: str) -> UserError:
    return UserError(f"shard {shard} {what}; run prepare.py again with the same raw= and out= to mend it")


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, Int64Array]]:
    """Metadata and arrays of an index, checked for completeness and for lengths that fit together."""
    metadata = _index_metadata(path)
    tar = _tar_of(path)
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in INDEX_ARRAYS}
    except (OSError, SafetensorError) as error:
        raise _no_index(path, error) from None
    try:
        kinds, images, frames = (len(_names_in(metadata, name)) for name in INDEX_NAMES)
        _check_arrays(arrays, kinds, images, frames, int(metadata["tar_bytes"]))
    except WrongValueError as error:
        raise _broken(tar, f"has a damaged index: {error} in {path.name}") from None
    return metadata, arrays


def _names_in(metadata: Mapping[str, str], name: str) -> list[str]:
    """The kinds, keys or extensions of an index.

    Raises:
        WrongValueError: no list of them, or a key or extension that makes no member's name.
    """
    names = parse_json(metadata[name])
    form = None if name == "kinds" else KEY if name == "keys" else _EXTENSION
    if not isinstance(names, list) or not all(isinstance(text, str) for text in names):
        raise WrongValueError(f"{name} is no list of texts")
    if form is not None and not all(form.fullmatch(text) for text in names):
        raise WrongValueError(f"{name} holds what makes no member's name")
    return names


def _check_arrays(arrays: Mapping[str, Int64Array], kinds: int, images: int, frames: int, tar_bytes: int) -> None:
    """Compare the arrays of an index with each other and with the size of its tar."""
    lengths = [{array.shape for array in map(arrays.__getitem__, names)} for names in ARRAYS_BY_LENGTH]
    if any(array.dtype != np.int64 for array in arrays.values()):
        raise WrongValueError("an array is not of int64")
    if lengths[:2] != [{(frames,)}, {(images,)}] or len(lengths[2]) != 1 or len(next(iter(lengths[2]))) != 1:
        raise WrongValueError("the lengths differ")
    for of, size in (("frame_offset", "frame_size"), ("json_offset", "json_size")):
        offset, length = arrays[of], arrays[size]
        # Not their sum, which might overflow.
        if np.any((offset < tarfile.BLOCKSIZE) | (offset > tar_bytes) | (length < 0) | (length > tar_bytes - offset)):
            raise WrongValueError("an offset is outside of the tar")
    for name, count in (("frame_image", images), ("record_image", images), ("record_kind", kinds)):
        if np.any((arrays[name] < 0) | (arrays[name] >= count)):
            raise WrongValueError(f"{name} is out of range")
    if np.any(np.diff(arrays["frame_image"]) < 0) or len(np.unique(arrays["frame_image"])) != images:
        raise WrongValueError("the frames are not in the order of their images, one at least of each")
    if np.any(arrays["record_number"] < 0):
        raise WrongValueError("record_number is out of range")


def _index_metadata(path: Path) -> dict[str, str]:
    """What an index says beside its arrays, which are not read."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise _no_index(path, error) from None
    needed = {"version", "kinds", "keys", "extensions", "tar_sha256", "tar_bytes"}
    if not needed <= metadata.keys() or metadata["version"] != INDEX_VERSION:
        raise _broken(_tar_of(path), f"has an index of another version than {INDEX_VERSION}")
    if not _SHA256.fullmatch(metadata["tar_sha256"]) or not re.fullmatch("[0-9]{1,18}", metadata["tar_bytes"]):
        raise _broken(_tar_of(path), f"has a damaged index: {path.name} does not say what tar it is of")
    return metadata


def _tar_of(index: Path) -> Path:
    return index.with_name(index.name.removesuffix(".index.safetensors") + ".tar")


def _no_index(path: Path, error: Exception) -> UserError:
    reason = "is missing" if isinstance(error, FileNotFoundError) else "is damaged"
    return _broken(_tar_of(path), f"has no usable index: {path.name} {reason}")


class KeptOpen(Sequence[Opened]):
    """The files of a split, each opened when it is asked for; the last ones used stay open.

    Args:
        count: how many there are.
        open_file: opens the one of a number.
        kept: how many stay open. The indexes of 14 million images would be gigabytes in every process.
    """

    def __init__(self, count: int, open_file: Callable[[int], Opened], kept: int) -> None:
        self._count = count
        self._open = open_file
        self._most = kept
        self._kept: OrderedDict[int, Opened] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, number: int) -> Opened: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[Opened]: ...

    def __getitem__(self, number: int | slice) -> Opened | Sequence[Opened]:
        if isinstance(number, slice):
            return [self[place] for place in range(len(self))[number]]
        place = range(len(self))[number]
        if place not in self._kept:
            self._kept[place] = self._open(place)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(place)
        return self._kept[place]


def _open_shard(
    folder: Path, entries: Sequence[Mapping[str, Any]], remote: RemoteTars | None, number: int
) -> ShardReader:
    """The reader of a shard that a manifest lists among its entries."""
    entry = entries[number]
    index = index_path(folder / entry["name"])
    # Not on opening the split: that would read all of them at each start.
    if remote is not None and entry.get("index_sha256") != sha256_file(index):
        raise UserError(f"{index} is not the index that its manifest lists; delete {folder} to fetch it again")
    reader = ShardReader(folder / entry["name"], remote)
    if reader.tar_sha256 != entry["sha256"]:
        raise _broken(reader.path, "is not the one its manifest lists (another SHA-256 in the index)")
    return reader


@dataclass(frozen=True)
class PreparedSplit:
    """One split of one prepared dataset, ready to read by location.

    Attributes:
        folder: the split's folder.
        manifest: content of its `manifest.json`.
        shards: one reader per shard, in the manifest's order; opened when asked for.
    """

    folder: Path
    manifest: dict[str, Any]
    shards: Sequence[ShardReader]

    @property
    def dataset(self) -> str:
        """Name of the dataset (of the parent, where a card is a view)."""
        return str(self.manifest["dataset"])

    @property
    def split(self) -> str:
        """Name of the split."""
        return str(self.manifest["split"])

    @cached_property
    def sha256(self) -> str:
        """One hash of the whole split: of its shards' SHA-256, in order."""
        return hashlib.sha256("".join(entry["sha256"] for entry in self.manifest["shards"]).encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """One hash of all that decides what is read: shards, their indexes, and how many records of each kind they hold."""
        entries = self.manifest["shards"]
        stated = [[entry["sha256"], entry.get("index_sha256"), entry["records_by_kind"]] for entry in entries]
        return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()

    def records(self, kinds: Sequence[str] = ()) -> Int64Array:
        """Locations of all records of these kinds (none given: of all), in stored order.

        Returns:
            int64 [n, 3]: shard number, row of the image in the shard, number of the record within the image.

        Raises:
            UserError: a kind that does not occur in this split.
        """
        self._check_kinds(kinds)
        parts = [np.zeros((0, 3), dtype=np.int64)]
        for number, shard in enumerate(self.shards):
            chosen = shard.records_of(kinds)
            image, record = shard.arrays["record_image"][chosen], shard.arrays["record_number"][chosen]
            parts.append(np.stack([np.full_like(image, number), image, record], axis=1))
        return np.concatenate(parts)

    def record_counts(self, kinds: Sequence[str] = ()) -> tuple[int, ...]:
        """How many records of these kinds (none given: of all) each shard holds; no index is opened for it.

        Raises:
            UserError: as `records`.
        """
        self._check_kinds(kinds)
        counts = [entry["records_by_kind"] for entry in self.manifest["shards"]]
        return tuple(sum(number for kind, number in count.items() if not kinds or kind in kinds) for count in counts)

    def _check_kinds(self, kinds: Sequence[str]) -> None:
        present = self.manifest["records_by_kind"]
        if unknown := sorted(set(kinds) - present.keys()):
            raise UserError(f"{self.folder} has no records of kind {', '.join(unknown)}; it has {', '.join(present)}")

    def read(self, shard: int, row: int) -> tuple[tuple[bytes, ...], list[Record]]:
        """The encoded frames at (shard number, row) and all its records."""
        return self.shards[shard].read(row)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a split folder.

    Raises:
        UserError: no manifest there, or one of another format.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise UserError(f"{folder} is not a prepared split (no {MANIFEST_NAME}); make it with prepare.py dataset= out=")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise UserError(f"{path} is not a manifest of format {MANIFEST_FORMAT}; run prepare.py again")
    try:
        _check_manifest(Fields(manifest))
    except WrongValueError as error:
        raise UserError(f"{path} is no sound manifest ({error}); run prepare.py again") from None
    return manifest


def _check_manifest(manifest: Fields) -> None:
    """What reading relies on: names of shards that stay in their folder, hashes that are hashes, counts that are counts."""
    for name in ("dataset", "split"):
        manifest.file_name(name)
    shards = [Fields.of(entry, "a shard") for entry in manifest.items("shards")]
    for shard in shards:
        if not _SHARD_NAME.fullmatch(shard.file_name("name")) or not _SHA256.fullmatch(shard.text("sha256")):
            raise WrongValueError("a shard has another name or hash than shards have")
    for fields in (manifest, *shards):
        for name in ("images", "frames", "records", "bytes"):
            if fields.has(name):
                fields.whole(name)
        if fields.has("records_by_kind"):
            by_kind = Fields.of(fields.get("records_by_kind"), "records_by_kind")
            total = sum(by_kind.whole(kind) for kind in by_kind.values)
            if fields.get("records") not in (None, total):
                raise WrongValueError("records_by_kind is not what records says")
    for loss in manifest.items("lost") if manifest.has("lost") else []:
        Fields.of(loss, "a loss").whole("records")


def open_split(folder: Path) -> PreparedSplit:
    """Open a split folder: costs a look at its list of files, however many records they hold.

    An index is read, and compared with the manifest, when its shard is asked for.

    Raises:
        UserError: the folder is not prepared, or a shard is missing or has not as many bytes as the manifest lists.
    """
    manifest = read_manifest(folder)
    remote = remote_tars(folder)
    entries = manifest["shards"]
    shards = KeptOpen(len(entries), partial(_open_shard, folder, entries, remote), _READERS_KEPT)
    sizes = dict(_file_sizes(folder))
    for number, entry in enumerate(entries):
        tar_is_there = remote is not None or sizes.get(entry["name"]) == entry.get("bytes")
        if not tar_is_there or index_path(folder / entry["name"]).name not in sizes:
            shards[number]  # which says what is wrong with it
    return PreparedSplit(folder, manifest, shards)


def _file_sizes(folder: Path) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as files:
        for file in files:
            with contextlib.suppress(OSError):  # a link to nowhere
                yield file.name, file.stat().st_size
