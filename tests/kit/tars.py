"""Tars as other writers make them: the first writer of shards, servers that give a byte once, and whoever means harm."""

import io
import tarfile
from pathlib import Path


def as_tarfile_writes(shard: Path) -> bytes:
    """The members of a shard as its first writer wrote them, before webdataset's stood in its place."""
    buffer = io.BytesIO()
    with tarfile.open(shard) as read, tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for found in read:
            member = tarfile.TarInfo(found.name)
            member.size = found.size
            tar.addfile(member, read.extractfile(found))
    return buffer.getvalue()


class Pipe(io.RawIOBase):
    """Bytes that can be read once, forward, as they come from a server; the most that was asked for at a time is kept."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)
        self.most = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        assert size >= 0
        self.most = max(self.most, size)
        return self._file.read(size)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A member's head alone, in GNU's format, which can say any size."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


END = bytes(2 * tarfile.BLOCKSIZE)
