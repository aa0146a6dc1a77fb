"""What every source of bytes gives the downloader: a stream from some byte on, and the ways in which it can fail."""

from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import quote, urlsplit, urlunsplit

from instructblip.errors import UserError

CHUNK_BYTES = 1 << 20


class DownloadError(UserError):
    """A file that could not be fetched, or is not the one that was expected."""


class NotThereError(DownloadError):
    """The source answers, and has no such file."""


class BrokenOffError(Exception):
    """The transfer broke off, and another try may succeed; the message is a short reason.

    Attributes:
        wait: seconds after which the source wants to be asked again; None: it does not say.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class NoAnswerError(BrokenOffError):
    """The source gave no answer at all."""


class CannotResumeError(BrokenOffError):
    """The source does not go on at the byte that was asked for; another try begins with the first."""


class Stream(NamedTuple):
    """An open source of bytes.

    Attributes:
        start: the byte of the file that the stream begins with.
        total: bytes of the whole file; None: the source does not say.
        validator: a text that is another one once the file has changed; None: there is none, so nothing can be resumed.
        read: gives the next bytes, `CHUNK_BYTES` at most; none at the end.
    """

    start: int
    total: int | None
    validator: str | None
    read: Callable[[], bytes]


def is_http(url: str) -> bool:
    """Whether a web server is asked, which is done here; fsspec reads all other addresses."""
    return url.partition("://")[0].lower() in ("http", "https")


def shown(url: str) -> str:
    """An address as it may be printed: without a login, and without a query, which may be a signature."""
    scheme, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    path = path.partition("?")[0] if is_http(url) else path
    return scheme + mark + host.rpartition("@")[2] + slash + path


def joined(url: str, *names: str) -> str:
    """The address of a file below a folder; a web address keeps its query, behind the path."""
    if not is_http(url):
        return "/".join([url.rstrip("/"), *names])
    parts = urlsplit(url)
    path = "/".join([parts.path.rstrip("/"), *(quote(name, safe="") for name in names)])
    return urlunsplit(parts._replace(path=path))
