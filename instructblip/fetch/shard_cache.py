"""Prepared shards at a URL: s3://, gs://, https:// and whatever else fsspec reads.

Manifests and indexes are mirrored into a local folder; `remote.json` beside them says where their tars are. A tar is fetched
whole on its first read, into a cache of limited size under its SHA-256, which all processes of the machine share
(docs/data.md, "Shards that lie elsewhere").
"""

import functools
import hashlib
import os
import re
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from instructblip.errors import UserError
from instructblip.fetch.download import Wanted, WrongFileError, download, fetch_partial, note_of
from instructblip.fetch.stamps import Stamps
from instructblip.fetch.streams import NotThereError, joined, shown
from instructblip.files import exclusive, read_json, sha256_digits, write_json
from instructblip.progress import progress_bar

REMOTE_NAME = "remote.json"
_MANIFEST_NAME = "manifest.json"
_STAMPS_NAME = "stamps.json"
_MAX_MANIFEST_BYTES = 1 << 26  # 64 MiB: a line for each of 200,000 shards
# An index says what lies where in its tar, in fewer bytes than lie there; besides it names what was lost on preparing.
_MAX_INDEX_EXCESS = 1 << 22
_AT_A_TIME = 16  # indexes, which are small
_TOUCH_SECONDS = 30  # a tar's time of last use is renewed at most this often
_PENDING = ".partial"
_COUNTED = re.compile(r"[0-9a-f]{64}\.(tar|[0-9]+\.partial)")  # files of the cache that take room
_AGAIN = "copy the whole folder there again"


def is_url(shards: str) -> bool:
    """Whether `shards` is a URL, not a local folder."""
    return "://" in shards


# --- manifests and indexes -------------------------------------------------------------------------------------------


def mirror_datasets(
    url: str,
    splits: Sequence[tuple[str, str]],
    cache: Path,
    limit: int,
    streamed: Collection[tuple[str, str]] = (),
) -> tuple[Path, set[tuple[str, str]]]:
    """Mirror (dataset, split) pairs from a URL; return the local folder above them, and the pairs that the URL has.

    Args:
        url: of a copy of what prepare.py wrote.
        splits: datasets and splits that are wanted.
        cache: the folder that mirrors and tars are kept in.
        limit: of the tars in it, bytes.
        streamed: those of which no index is needed.

    Raises:
        UserError: the place cannot be read, an index is not the one of its manifest, or a cache without room.
    """
    if limit < 1:
        raise UserError(f"data.remote_cache_bytes={limit} is too small; give the bytes of several shards")
    url = url if "?" in url else url.rstrip("/")
    root = cache / "mirrors" / _mirror_name(url)
    found = {
        (dataset, split)
        for dataset, split in splits
        if _mirror_split(
            joined(url, dataset, split),
            root / dataset / split,
            cache / "tars",
            limit,
            indexes=(dataset, split) not in streamed,
        )
    }
    return root, found


def _mirror_name(url: str) -> str:
    """The folder of a URL's mirror: one a URL, whatever signs it has, and so that a person finds it."""
    words = "".join(sign if sign.isascii() and sign.isalnum() else "_" for sign in shown(url))
    return f"{words[:80]}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


def _mirror_split(url: str, folder: Path, tars: Path, limit: int, *, indexes: bool) -> bool:
    """Fetch a split's manifest, perhaps its indexes, into a folder to open it from; False if the URL has no such split."""
    new = folder.parent / f".{folder.name}.{_MANIFEST_NAME}"
    with exclusive(folder.parent / f".{folder.name}.lock", f"reading {shown(url)}"):
        try:
            download(Wanted(joined(url, _MANIFEST_NAME), limit=_MAX_MANIFEST_BYTES), new, show=False)
        except NotThereError:
            return False
        try:
            listed = _listed_indexes(new)
        except (UserError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{shown(url)}/{_MANIFEST_NAME} is no manifest; give the URL of what prepare.py wrote"
            ) from None
        folder.mkdir(parents=True, exist_ok=True)
        if indexes:
            _mirror_indexes(url, folder, listed)
        write_json(folder / REMOTE_NAME, {"url": url, "tars": str(tars.absolute()), "limit": limit})
        os.replace(new, folder / _MANIFEST_NAME)  # last: `open_split` takes a folder with a manifest for complete
    return True


class _Index(NamedTuple):
    name: str
    sha256: str
    limit: int  # bytes that it has at most


def _listed_indexes(manifest: Path) -> list[_Index]:
    """The indexes that a manifest lists.

    Raises:
        UserError, ValueError, KeyError, TypeError: it is no manifest.
    """
    indexes = {}
    for entry in read_json(manifest)["shards"]:
        name = f"{Path(entry['name']).stem}.index.safetensors"
        indexes[name] = _Index(name, sha256_digits(entry["index_sha256"]), int(entry["bytes"]) + _MAX_INDEX_EXCESS)
    return list(indexes.values())


def _mirror_indexes(url: str, folder: Path, indexes: Sequence[_Index]) -> None:
    """Fetch the indexes that are not there yet, many at a time."""
    stamps = Stamps(folder / _STAMPS_NAME)
    missing = [index for index in indexes if not stamps.has(folder / index.name, index.name, index.sha256)]
    with (
        progress_bar("indexes", show=len(missing) > _AT_A_TIME) as bar,
        ThreadPoolExecutor(_AT_A_TIME) as pool,
    ):
        task = bar.add_task(f"reading {shown(url)}", total=len(missing))
        try:
            for _ in pool.map(functools.partial(_fetch_index, url, folder), missing):
                bar.advance(task)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    for index in missing:
        stamps.has(folder / index.name, index.name, index.sha256)
    stamps.save()


def _fetch_index(url: str, folder: Path, index: _Index) -> None:
    wanted = Wanted(joined(url, index.name), sha256=index.sha256, limit=index.limit, patient=True)
    try:
        download(wanted, folder / index.name, show=False)
    except NotThereError:
        raise UserError(f"{shown(url)} lacks {index.name}, an index of its manifest; {_AGAIN}") from None
    except WrongFileError:
        line = f"{shown(url)}/{index.name} is not the index that the manifest lists; {_AGAIN}"
        raise UserError(line) from None


# --- tars ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoteTars:
    """Opens the tars of one split; may be pickled, forked and used by many processes at a time.

    Attributes:
        url: of the split's folder.
        cache: the folder that tars are kept in, shared by all splits.
        limit: of the bytes in it.
    """

    url: str
    cache: Path
    limit: int

    def open(self, name: str, sha256: str, size: int) -> int:
        """A file descriptor of a tar, which stays readable even if the tar leaves the cache.

        Raises:
            UserError: it is gone, not the one of its index, larger than the cache, or the disk is full.
        """
        path = self.cache / f"{sha256_digits(sha256)}.tar"
        descriptor = _open(path)
        return self._fetch(name, path, size) if descriptor is None else descriptor

    def _fetch(self, name: str, path: Path, size: int) -> int:
        if size > self.limit:
            raise UserError(
                f"shard {self._shown(name)} has {size:,} bytes, data.remote_cache_bytes={self.limit}; raise that, "
                "best to the bytes of many shards"
            )
        self.cache.mkdir(parents=True, exist_ok=True)
        with FileLock(_lock(path)):  # one process fetches this tar, the others wait
            descriptor = _open(path)
            if descriptor is not None:
                return descriptor
            partial = path.with_name(f"{path.stem}.{size}{_PENDING}")
            self._take_room(partial, size)
            self._download(name, partial, path.stem, size)
            descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
            os.replace(partial, path)  # the cache may drop it from now on; the descriptor stays readable
            note_of(partial).unlink(missing_ok=True)
            return descriptor

    def _download(self, name: str, partial: Path, sha256: str, size: int) -> None:
        wanted = Wanted(joined(self.url, name), size=size, sha256=sha256, patient=True)
        try:
            fetch_partial(wanted, partial, name, show=False)
        except NotThereError:
            partial.unlink()
            raise UserError(f"shard {self._shown(name)} is gone; {_AGAIN}") from None
        except WrongFileError:
            raise UserError(f"shard {self._shown(name)} does not match its index; {_AGAIN}") from None

    def _shown(self, name: str) -> str:
        return f"{shown(self.url)}/{name}"

    def _take_room(self, partial: Path, size: int) -> None:
        """Drop what was used longest ago until a new tar fits, and begin it; its name says how large it gets."""
        while True:
            with FileLock(self.cache / "room.lock"):
                if self._drop_oldest(size, partial):
                    partial.touch()
                    return
            time.sleep(0.1)  # others fetch into the room that is left; a killed process gives its room back

    def _drop_oldest(self, size: int, own: Path) -> bool:
        """Make room for a tar whose partial file is `own`; return whether there is enough. The room's lock is held."""
        taken, idle = 0, []
        for path in (path for path in self.cache.iterdir() if _COUNTED.fullmatch(path.name) and path != own):
            if path.suffix == _PENDING and _is_held(path):
                taken += int(path.name.split(".")[1])  # what it is about to be
                continue
            try:
                state = path.stat()
            except FileNotFoundError:  # fetched by now, and renamed: look again
                return False
            idle.append((state.st_mtime_ns, path, state.st_size))
            taken += state.st_size
        for _, path, bytes_of in sorted(idle):
            if taken + size <= self.limit:
                break
            path.unlink()
            note_of(path).unlink(missing_ok=True)
            taken -= bytes_of
        return taken + size <= self.limit


def _open(path: Path) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if time.time() - os.fstat(descriptor).st_mtime > _TOUCH_SECONDS:
        os.utime(descriptor)
    return descriptor


def _lock(path: Path) -> Path:
    return path.parent / f"{path.name.split('.')[0]}.lock"


def _is_held(partial: Path) -> bool:
    """Whether a process fetches a tar; else it was killed, or gave up, and what it got may be gone on with."""
    try:
        with FileLock(_lock(partial), timeout=0):
            return False
    except Timeout:
        return True


def remote_tars(folder: Path) -> RemoteTars | None:
    """How to open the tars of a mirrored split; None for a folder that holds its tars itself."""
    path = folder / REMOTE_NAME
    if not path.is_file():
        return None
    stated = read_json(path)
    return RemoteTars(stated["url"], Path(stated["tars"]), int(stated["limit"]))
