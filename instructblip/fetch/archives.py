"""Unpack zip and tar archives that are not trusted: only below their folder, no links, a bounded number of bytes."""

import bz2
import contextlib
import fnmatch
import gzip
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from instructblip.errors import UserError
from instructblip.files import atomic_path

# How much an archive may grow: JSON compresses to a twentieth, zeros to a thousandth.
MAX_GROWTH = 100
MAX_BYTES = 1 << 38  # 256 GiB
_MAX_HEADER = 1 << 24  # of a tar's member, and of a single read
_COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
)


class ArchiveError(UserError):
    """An archive that is damaged, or unsafe to unpack."""


@dataclass(frozen=True)
class _Member:
    """One file of an archive: its name, its size in bytes, and how it is opened."""

    name: str
    size: int
    open: Callable[[], IO[bytes] | None]


def unpack(
    archive: Path,
    folder: Path,
    *,
    members: Sequence[str] = (),
    flat: bool = False,
    below: str = "",
    advance: Callable[[int], None] = lambda number: None,
) -> int:
    """Write the files of a zip or tar archive below `folder`, each whole or not at all, over what has the same name.

    Args:
        members: patterns of the wanted names (`*` stands for `/` too); empty: all.
        flat: write the files without their folders.
        below: the folder in the archive whose files are written, their names from there on; empty: all files.
        advance: called with the number of bytes of each file that has been written.

    Returns:
        How many files were written.

    Raises:
        ArchiveError: neither zip nor tar, damaged or encrypted, a member that points out of the folder, is a link or
            device, or has the name of another; more bytes than a sound archive of this size can hold.
        UserError: more bytes than the disk has free.
    """
    written: set[str] = set()
    size, limit, free = 0, _limit(archive), _free(folder)
    try:
        for member in _members(archive):
            if below and not member.name.startswith(f"{below}/"):
                continue
            name = member.name[len(below) + 1 :] if below else member.name
            if members and not any(fnmatch.fnmatchcase(name, pattern) for pattern in members):
                continue
            name = PurePosixPath(name).name if flat else str(PurePosixPath(name))
            if name in written:
                raise ArchiveError(f"{archive.name} has two members {name}; the archive is not to be trusted")
            written.add(name)
            size += member.size
            if size > limit:
                raise _too_large(archive.name, limit)
            if size > free:
                raise UserError(
                    f"{archive} unpacks to more than {free:,} bytes, which {folder} has free; free some space"
                )
            _write(member, folder / name)
            advance(member.size)
    except _DAMAGED as error:
        raise ArchiveError(f"{archive} is damaged ({error}); fetch it again") from None
    return len(written)


def check_zip_member(archive: str, member: zipfile.ZipInfo, path: str) -> None:
    """Refuse a member that is no regular file, or that has a name or would be written to a path out of its folder.

    Raises:
        ArchiveError: names archive and member.
    """
    _check_names(archive, member.filename, path)
    kind = stat.S_IFMT(member.external_attr >> 16)
    if member.is_dir() or kind not in (0, stat.S_IFREG):
        raise ArchiveError(f"{archive}: member {member.filename!r} is not a regular file; it is not to be trusted")


def _check_names(archive: str, *names: str) -> None:
    for name in names:
        if not name or name.startswith("/") or "\\" in name or ":" in name or ".." in PurePosixPath(name).parts:
            raise ArchiveError(f"{archive}: member {name!r} points out of its folder; it is not to be trusted")


def _members(archive: Path) -> Iterator[_Member]:
    """The regular files of an archive, in its order, each checked."""
    if zipfile.is_zipfile(archive):
        yield from _zip_members(archive)
    else:
        yield from _tar_members(archive)


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            if info.is_dir():
                _check_names(archive.name, info.filename)
                continue
            check_zip_member(archive.name, info, info.filename)
            if info.flag_bits & 1:
                raise ArchiveError(f"{archive.name}: member {info.filename!r} is encrypted; unpack it yourself")
            yield _Member(info.filename, info.file_size, lambda info=info: file.open(info))  # type: ignore[misc]


def _tar_members(archive: Path) -> Iterator[_Member]:
    with contextlib.closing(_Bounded(archive)) as source:
        try:
            file = tarfile.open(fileobj=source, mode="r:")  # type: ignore[call-overload]
        except (*_DAMAGED, OSError):
            raise ArchiveError(
                f"{archive} is neither a zip nor a tar archive; its server may have sent an error page instead"
            ) from None
        while (info := file.next()) is not None:
            file.members.clear()  # which `next` keeps: millions of empty ones take little room in an archive
            _check_names(archive.name, info.name)
            if info.isdir():
                continue
            if not info.isreg():
                raise ArchiveError(
                    f"{archive.name}: member {info.name!r} is not a regular file; it is not to be trusted"
                )
            yield _Member(info.name, info.size, lambda info=info: file.extractfile(info))  # type: ignore[misc]
        while source.read(1 << 20):
            pass  # a compressed tar's checksum stands at its end


class _Bounded:
    """The bytes of a tar as they come out of its compression, up to a bound.

    Sizes that members state are checked before these are unpacked. But headers, which may state any length too, are read
    into memory by the library itself, and members that are not wanted are decompressed to be passed over.
    """

    def __init__(self, archive: Path) -> None:
        with open(archive, "rb") as file:
            start = file.read(8)
        opener = next((opener for magic, opener in _COMPRESSED.items() if start.startswith(magic)), open)
        self._name, self._limit = archive.name, _limit(archive)
        self._source: IO[bytes] = opener(archive, "rb")

    def read(self, size: int) -> bytes:
        """The next bytes."""
        if not 0 <= size <= _MAX_HEADER:
            raise ArchiveError(f"{self._name} has a header of {size:,} bytes; it is not to be trusted")
        self._check(self.tell() + size)
        try:
            return self._source.read(size)
        except OSError as error:
            if error.errno is not None:
                raise
            raise tarfile.ReadError(str(error)) from None  # of bz2

    def seek(self, position: int) -> int:
        """Go on at another byte, counted from the first."""
        self._check(position)
        return self._source.seek(position)

    def tell(self) -> int:
        """The byte that comes next."""
        return self._source.tell()

    def close(self) -> None:
        """Close the archive."""
        self._source.close()

    def _check(self, position: int) -> None:
        if position > self._limit + _MAX_HEADER:
            raise _too_large(self._name, self._limit)


def _limit(archive: Path) -> int:
    """Bytes that a sound archive of this size may hold."""
    return min(MAX_BYTES, archive.stat().st_size * MAX_GROWTH + (1 << 20))


def _too_large(name: str, limit: int) -> ArchiveError:
    return ArchiveError(f"{name} would unpack to more than {limit:,} bytes; it is not to be trusted")


def _free(folder: Path) -> int:
    """Bytes free on the disk of a folder that need not be there yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _write(member: _Member, path: Path) -> None:
    """Write one file. The library itself refuses a member with more bytes than its header says."""
    with atomic_path(path, durable=False) as partial:  # not one by one: there may be a hundred thousand
        source = member.open()
        assert source is not None  # it is a regular file
        with source, open(partial, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        if os.path.getsize(partial) != member.size:
            raise zipfile.BadZipFile(f"{member.name} has another size than stated")
