"""Tars in and out, through the webdataset library: its writer, and its rule of which members are one sample.

Its own reader of members, also in its secure mode, takes a member of any size into memory, lets a sparse one grow there,
keeps all that long headers say, and takes a broken header for the end of the tar. `tar_members` reads in its place, forward
only, so that a file and a stream are read alike. Nothing is opened by the library (`pipe:` addresses run a shell), and no
decoder of it runs: a pickle stays the bytes it is.
"""

import contextlib
import functools
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from instructblip.data.typed import path_below
from instructblip.errors import UserError

if TYPE_CHECKING:
    from webdataset.writer import TarWriter

MAX_PICTURE_BYTES = 1 << 28  # 256 MiB is more than the raw pixels of the largest picture read
MAX_SAMPLE_BYTES = MAX_PICTURE_BYTES  # of all members of a sample that are read
_MEMBER_BYTES = 1024  # that a member takes even where it is empty
MAX_TEXT_BYTES = 1 << 24  # of a member of text or JSON
_MAX_HEADER = 1 << 20
_PASSED = 1 << 20  # bytes that are passed over at a time

Sample = dict[str, Any]  # extension -> content, beside `__key__` and `__url__` as the library calls them


def tar_writer(file: BinaryIO) -> "TarWriter":
    """Write a tar whose bytes say nothing of this machine or moment: time 0, owner 0, mode 0644."""
    from webdataset.writer import TarWriter  # slow to import, and not needed to read

    return TarWriter(file, encoder=False, mtime=0, mode=0o644, user="", group="")


def write_member(tar: "TarWriter", key: str, extension: str, content: bytes) -> int:
    """Append a member `key.extension`; return the byte of the tar at which its content begins."""
    # One at a time: of several the library sorts the names, and frame 10 would stand before frame 2.
    tar.write({"__key__": key, extension: content})
    padded = -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return int(tar.tarstream.offset) - padded


# --- reading ---------------------------------------------------------------------------------------------------------


class TarMember(NamedTuple):
    """A member of a tar.

    Attributes:
        name: without `./` before it.
        offset, size: which bytes of the tar it is.
        refusal: why it is not to be read; empty: it may be.
        read: gives its content, before the next member is asked for.
    """

    name: str
    offset: int
    size: int
    refusal: str
    read: Callable[[], bytes]


def tar_members(file: BinaryIO, place: str) -> Iterator[TarMember]:
    """The members of a tar in its order, without folders and the library's `__facts__` about the whole tar.

    Args:
        file: is read forward only; what is not wanted is passed over, by seeking where that is possible.
        place: what the tar is called in an error.

    Raises:
        UserError: it is cut short, damaged, no tar, or made to fill the memory by its headers.
    """
    forward = _Forward(file)

    def content(member: tarfile.TarInfo) -> bytes:
        with _errors(place):
            return forward.content(member.offset_data, member.size)

    with _errors(place), tarfile.open(fileobj=forward, mode="r:") as tar:  # type: ignore[call-overload]
        while (member := tar.next()) is not None:
            tar.members, tar.pax_headers = [], {}  # else it keeps them all
            name = member.name.removeprefix("./")
            if not member.isdir() and not name.startswith("__"):
                read = functools.partial(content, member)
                yield TarMember(name, member.offset_data, member.size, _refusal(member, name), read)
        if forward.last != bytes(tarfile.BLOCKSIZE):  # tarfile takes a broken header for the end
            raise tarfile.ReadError(f"it is cut short or damaged at byte {tar.offset:,}")


@contextlib.contextmanager
def _errors(place: str) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{place} is no whole tar ({error}); copy or fetch it again") from None
    except RecursionError:  # header before header before header
        raise UserError(f"{place} is no tar to be trusted (its headers are nested too deep)") from None


def _refusal(member: tarfile.TarInfo, name: str) -> str:
    if path_below(name) is None:
        return "member name leads out of its folder"
    return "" if member.isreg() and not member.issparse() else "member is no regular file"


class _Forward:
    """A file as tarfile reads it, forward only and with headers of a bounded size."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._position = 0
        self._seekable = file.seekable()
        self.last = b""  # what was read last

    def tell(self) -> int:
        """The byte that comes next."""
        return self._position

    def read(self, size: int) -> bytes:
        """The next bytes, of a header."""
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes is not to be trusted")
        self.last = self._read(size)
        return self.last

    def seek(self, position: int) -> int:
        """Go on at a later byte; past the end there is nothing to read."""
        if position < self._position:  # a negative size, by which the library would go round for ever
            raise tarfile.ReadError(f"a member begins at byte {position:,}, before the end of another")
        if self._seekable:
            self._position = self._file.seek(position)
        while self._position < position and self._read(min(_PASSED, position - self._position)):
            pass
        return self._position

    def content(self, offset: int, size: int) -> bytes:
        """The content of a member."""
        self.seek(offset)
        content = self._read(max(size, 0))
        if len(content) != size:
            raise tarfile.ReadError("unexpected end of data")
        return content

    def _read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._position += len(content)
        return content


class SampleBytes:
    """How much of one sample has been read: its members may each be small, and too many."""

    def __init__(self) -> None:
        self._key = ""
        self._bytes = 0

    def refusal(self, member: TarMember) -> str:
        """Why a member is not to be read beside those before it; empty: it may be, and is counted."""
        if member.refusal:
            return member.refusal
        key = member.name.rpartition("/")[0] + "/" + member.name.rpartition("/")[2].partition(".")[0]
        self._key, self._bytes = key, self._bytes if key == self._key else 0
        if self._bytes + member.size > MAX_SAMPLE_BYTES:
            return f"sample has more than {MAX_SAMPLE_BYTES >> 20:,} MiB"
        self._bytes += member.size + _MEMBER_BYTES
        return ""


# --- samples ---------------------------------------------------------------------------------------------------------


def grouped(members: Iterable[Sample], repeated: Callable[[str], None]) -> Iterator[Sample]:
    """The samples of members, by the library's rule: those in a row whose names are the same up to the first dot.

    Args:
        members: `fname`, `data` and `__url__` of each, as the library has them.
        repeated: is told the name of a member that was there before.
    """
    from webdataset.tariterators import group_by_keys

    def handler(error: Exception) -> bool:
        if not isinstance(error, ValueError):
            raise error
        repeated(str(error.args[0]).partition(":")[0])
        return True

    yield from group_by_keys(members, handler=handler)
