"""Prepared shards at a URL: s3://, gs://, https:// and whatever else fsspec reads.

Manifests and indexes are mirrored into a local folder; `remote.json` beside them says where their tars are. A tar is fetched
whole on its first read, into a cache of limited size under its SHA-256, which all processes of the machine share
(docs/data.md, "Shards that lie elsewhere").
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock, Timeout

from instructblip.errors import UserError
from instructblip.files import exclusive, is_disk_full, read_json, sha256_file, write_atomically, write_json

REMOTE_NAME = "remote.json"
_MANIFEST_NAME = "manifest.json"
_TRIES = 3
_TOUCH_SECONDS = 30  # a tar's time of last use is renewed at most this often
_PENDING = ".partial"


def is_url(shards: str) -> bool:
    """Whether `shards` is a URL, not a local folder."""
    return "://" in shards


# --- manifests and indexes -------------------------------------------------------------------------------------------


def mirror_datasets(
    url: str, splits: Sequence[tuple[str, str]], cache: Path, limit: int
) -> tuple[Path, set[tuple[str, str]]]:
    """Mirror (dataset, split) pairs from a URL; return the local folder above them, and the pairs that the URL has.

    Args:
        url: of a copy of what prepare.py wrote.
        splits: datasets and splits that are wanted.
        cache: the folder that mirrors and tars are kept in.
        limit: of the tars in it, bytes.

    Raises:
        UserError: the place cannot be read, an index is not the one of its manifest, or a cache without room.
    """
    if limit < 1:
        raise UserError(f"data.remote_cache_bytes={limit} is too small; give the bytes of several shards")
    url = url.rstrip("/")
    root = cache / "mirrors" / "".join(sign if sign.isalnum() else "_" for sign in url)
    found = {
        (dataset, split)
        for dataset, split in splits
        if _mirror_split(f"{url}/{dataset}/{split}", root / dataset / split, cache / "tars", limit)
    }
    return root, found


def _mirror_split(url: str, folder: Path, tars: Path, limit: int) -> bool:
    """Fetch a split's manifest and indexes into a folder for `open_split`; False if the URL has no such split."""
    with exclusive(folder.parent / f".{folder.name}.lock", f"reading {url}"):
        try:
            manifest = _attempt(url, lambda files, place: files.cat_file(f"{place}/{_MANIFEST_NAME}"))
        except FileNotFoundError:
            return False
        try:
            entries = json.loads(manifest)["shards"]
            indexes = {f"{Path(entry['name']).stem}.index.safetensors": entry["index_sha256"] for entry in entries}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{url}/{_MANIFEST_NAME} is no manifest; give the URL of what prepare.py wrote") from None
        folder.mkdir(parents=True, exist_ok=True)
        _mirror_indexes(url, folder, indexes)
        write_json(folder / REMOTE_NAME, {"url": url, "tars": str(tars.absolute()), "limit": limit})
        write_atomically(
            folder / _MANIFEST_NAME, manifest
        )  # last: `open_split` takes a folder with a manifest for complete
    return True


def _mirror_indexes(url: str, folder: Path, wanted: dict[str, str]) -> None:
    """Fetch the indexes that are not there yet, many at a time."""
    missing = [name for name, sha256 in wanted.items() if not _is(folder / name, sha256)]
    if not missing:
        return
    partial = [str(folder / (name + _PENDING)) for name in missing]
    try:
        _attempt(url, lambda files, place: files.get([f"{place}/{name}" for name in missing], partial))
    except FileNotFoundError as error:
        raise UserError(f"{url} lacks an index of its manifest ({error}); copy the whole folder there again") from None
    for name in missing:
        path = folder / (name + _PENDING)
        if not _is(path, wanted[name]):
            raise UserError(f"{url}/{name} is not the index that the manifest lists; copy the whole folder there again")
        os.replace(path, folder / name)


def _is(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_file(path) == sha256


def _attempt(url: str, work: Callable[[Any, str], Any]) -> Any:
    """Call `work` with the file system of a URL and the path within it; try again a few times on an error.

    Raises:
        FileNotFoundError: it is not there, for certain.
        UserError: no such file system, the disk is full, or the last try failed too.
    """
    try:
        files, place = fsspec.core.url_to_fs(url)  # anew each time: a file system does not outlive a fork
    except ImportError as error:
        raise UserError(f"{url} needs a package that is not installed ({error})") from None
    except ValueError as error:
        raise UserError(f"{url} cannot be read ({error}); give a folder, or a URL such as s3://BUCKET/FOLDER") from None
    for tries in range(1, _TRIES + 1):
        try:
            return work(files, place)
        except FileNotFoundError:
            raise
        except Exception as error:  # each file system raises errors of its own, with no class in common
            if is_disk_full(error):
                advice = "free some space, or lower data.remote_cache_bytes"
                raise UserError(f"disk full while fetching from {url}; {advice}") from None
            if tries == _TRIES:
                reason = f"{type(error).__name__} {error}".strip()
                raise UserError(f"{url} cannot be read ({reason}); look at the connection and run again") from None
    raise AssertionError("unreachable")


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
        path = self.cache / f"{sha256}.tar"
        descriptor = _open(path)
        return self._fetch(name, path, size) if descriptor is None else descriptor

    def _fetch(self, name: str, path: Path, size: int) -> int:
        if size > self.limit:
            raise UserError(
                f"shard {self.url}/{name} has {size:,} bytes, data.remote_cache_bytes={self.limit}; raise that, "
                "best to the bytes of many shards"
            )
        self.cache.mkdir(parents=True, exist_ok=True)
        with FileLock(_lock(path)):  # one process fetches this tar, the others wait
            descriptor = _open(path)
            if descriptor is not None:
                return descriptor
            partial = path.with_name(f"{path.stem}.{size}{_PENDING}")
            partial.unlink(missing_ok=True)  # of a process that was killed
            self._take_room(partial, size)
            try:
                self._download(name, partial, path.stem, size)
                descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
                os.replace(partial, path)  # the cache may drop it from now on; the descriptor stays readable
                return descriptor
            finally:
                partial.unlink(missing_ok=True)

    def _download(self, name: str, partial: Path, sha256: str, size: int) -> None:
        def work(files: Any, place: str) -> None:
            files.get_file(f"{place}/{name}", str(partial))
            found = partial.stat().st_size
            if found < size:
                raise OSError(f"the download of {name} was cut after {found:,} of {size:,} bytes")

        try:
            _attempt(self.url, work)
        except FileNotFoundError:
            raise UserError(f"shard {self.url}/{name} is gone; copy the whole folder there again") from None
        if partial.stat().st_size != size or sha256_file(partial) != sha256:
            raise UserError(f"shard {self.url}/{name} does not match its index; copy the whole folder there again")

    def _take_room(self, partial: Path, size: int) -> None:
        """Drop the tars that were used longest ago until a new one fits, and begin it; its name says how large it gets."""
        while True:
            with FileLock(self.cache / "room.lock"):
                if self._drop_oldest(size):
                    partial.touch()
                    return
            time.sleep(0.1)  # others fetch into the room that is left; a killed process gives its room back

    def _drop_oldest(self, size: int) -> bool:
        pending = [part for part in self.cache.glob(f"*{_PENDING}") if not _is_left_over(part)]
        taken = sum(int(part.name.split(".")[1]) for part in pending)
        tars = []
        for path in self.cache.glob("*.tar"):
            state = path.stat()
            tars.append((state.st_mtime_ns, path, state.st_size))
        taken += sum(bytes_of for _, _, bytes_of in tars)
        for _, path, bytes_of in sorted(tars):
            if taken + size <= self.limit:
                break
            path.unlink()  # nothing else removes a tar, and the room's lock is held
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


def _is_left_over(partial: Path) -> bool:
    """Remove a partial tar whose process was killed; return whether it was one."""
    try:
        with FileLock(_lock(partial), timeout=0):
            partial.unlink(missing_ok=True)
    except Timeout:
        return False
    return True


def remote_tars(folder: Path) -> RemoteTars | None:
    """How to open the tars of a mirrored split; None for a folder that holds its tars itself."""
    path = folder / REMOTE_NAME
    if not path.is_file():
        return None
    stated = read_json(path)
    return RemoteTars(stated["url"], Path(stated["tars"]), int(stated["limit"]))
