"""A file elsewhere that is read once, from first byte to last, and kept nowhere: of a set too large for the disk."""

import io
import time
from collections.abc import Generator
from typing import Any

from instructblip.fetch.download import TRIES, Wanted, seconds_to_pause
from instructblip.fetch.filesystem import open_file
from instructblip.fetch.http import open_http
from instructblip.fetch.streams import BrokenOffError, DownloadError, is_http, shown


class RemoteFile(io.RawIOBase):
    """The bytes behind an address. A transfer that breaks off goes on at its byte, as often as it takes.

    Args:
        url: of a web server, or any that fsspec reads.

    Reading raises:
        NotThereError: there is no such file.
        DownloadError: refused, changed on the way, no connection, or one that keeps breaking.
    """

    def __init__(self, url: str) -> None:
        self._pieces = _pieces(url)
        self._left = memoryview(b"")

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes; 0 at the end."""
        if not self._left:
            self._left = memoryview(next(self._pieces, b""))
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def close(self) -> None:
        """End the transfer."""
        self._pieces.close()
        super().close()


def _pieces(url: str) -> Generator[bytes, None, None]:
    open_stream = open_http if is_http(url) else open_file
    done, fruitless, validator = 0, 0, None
    while True:
        try:
            with open_stream(url, done, validator) as stream:
                if done and (validator is None or stream.validator != validator):
                    raise DownloadError(f"{shown(url)} broke off, and whether it is the same file now, nobody says")
                validator, passed = stream.validator, stream.start
                while piece := stream.read():
                    new = piece[max(0, done - passed) :]  # of a server that begins anew what was there before
                    passed += len(piece)
                    if new:
                        done, fruitless = done + len(new), 0
                        yield new
                if stream.total is None or passed >= stream.total:
                    return
                raise BrokenOffError(f"the connection ended after {passed:,} of {stream.total:,} bytes")
        except BrokenOffError as error:
            fruitless += 1
            if fruitless == TRIES:
                raise DownloadError(f"{shown(url)} cannot be fetched ({error}); go on with resume=auto") from None
            time.sleep(seconds_to_pause(Wanted(url), error, fruitless))
