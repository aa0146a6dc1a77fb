"""A web server's answer as a stream. Only http and https, whatever is redirected to; a login stays with its server."""

import base64
import contextlib
import http.client
import io
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import IO, Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from instructblip.fetch.streams import (
    CHUNK_BYTES,
    BrokenOffError,
    CannotResumeError,
    DownloadError,
    NoAnswerError,
    NotThereError,
    Stream,
    is_http,
    shown,
)

IDLE_SECONDS = 60.0  # without a single byte
# A connection with hardly a byte is as good as none; so few in so long a time end it.
SLOW_SECONDS = 240.0
_SLOW_BYTES = 1024
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP answers after which the same request may succeed
_BROKEN = (OSError, http.client.HTTPException)  # OSError: connections, time limits, TLS
_ENCODINGS = {"gzip": zlib.MAX_WBITS | 16, "x-gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
_LONGEST_REASON = 200  # characters
_SAFE = "/%:@!$&'()*+,;=~"  # in a path, as they are; "%" since addresses come encoded


@contextlib.contextmanager
def open_http(url: str, start: int, validator: str | None) -> Iterator[Stream]:
    """Ask for a file from byte `start` on; the answer may begin with the first byte all the same.

    Args:
        validator: where given, the server is to go on only if the file still has it.

    Raises:
        BrokenOffError: the server cannot be reached, is busy, or breaks off.
        NotThereError: it has no such file.
        DownloadError: it refuses, or encodes the file in a way that is not known here.
    """
    request = _request(url)
    if start:
        request.add_header("Range", f"bytes={start}-")
        if validator:
            request.add_header("If-Range", validator)
    with _answer(request, url) as response:
        yield _stream(response, url, start)


def _request(url: str) -> urllib.request.Request:
    try:
        parts = urlsplit(url)
        login = (parts.username, parts.password)
    except ValueError as error:
        raise DownloadError(f"{shown(url)} is no address ({error})") from None
    place = parts._replace(
        netloc=parts.netloc.rpartition("@")[2],
        path=quote(parts.path, safe=_SAFE),
        query=quote(parts.query, safe=_SAFE + "?"),
        fragment="",
    )
    headers = {"Accept-Encoding": "identity", "User-Agent": "instructblip"}
    request = urllib.request.Request(urlunsplit(place), headers=headers)
    if login[0] is not None:
        text = ":".join(unquote(part or "") for part in login)
        # Not sent on to where the server redirects to.
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(text.encode()).decode()}")
    return request


@contextlib.contextmanager
def _answer(request: urllib.request.Request, url: str) -> Iterator[http.client.HTTPResponse]:
    try:
        response = _opener().open(request, timeout=IDLE_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        raise _refusal(error, url) from None
    except urllib.error.URLError as error:
        raise NoAnswerError(f"no connection: {error.reason}") from None
    except _BROKEN as error:
        raise NoAnswerError(f"no connection: {error}") from None
    with response:
        yield response


def _refusal(error: urllib.error.HTTPError, url: str) -> Exception:
    said = "".join(sign for sign in f"HTTP {error.code} {error.reason}"[:_LONGEST_REASON] if sign.isprintable())
    if error.code == 416:  # the file has changed, or all of it was there already
        return CannotResumeError("the server has no such part of the file")
    if error.code in _PASSING:
        return BrokenOffError(said, wait=_seconds_to_wait(error.headers.get("Retry-After")))
    kind = NotThereError if error.code in (404, 410) else DownloadError
    return kind(f"{shown(url)} cannot be fetched ({said})")


def _seconds_to_wait(text: str | None) -> float | None:
    """What Retry-After says: seconds, or a date."""
    if text is None:
        return None
    if re.fullmatch("[0-9]+", text.strip()):
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _stream(response: http.client.HTTPResponse, url: str, asked: int) -> Stream:
    if response.status not in (200, 206):
        raise DownloadError(f"{shown(url)} cannot be fetched (HTTP {response.status} {response.reason})")
    start, total = 0, None
    length = response.headers.get("Content-Length", "")
    if response.status == 206:
        part = re.match(r"bytes ([0-9]{1,18})-[0-9]+/([0-9]{1,18}|\*)", response.headers.get("Content-Range", ""))
        if not asked or part is None or int(part[1]) != asked:
            raise CannotResumeError("the server sent another part of the file than was asked for")
        start, total = asked, None if part[2] == "*" else int(part[2])
    if total is None and re.fullmatch("[0-9]{1,18}", length):
        total = start + int(length)
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        return Stream(start, total, _validator(response), _guarded(lambda: response.read1(CHUNK_BYTES)))
    if encoding not in _ENCODINGS:
        raise DownloadError(f"{shown(url)} comes encoded as {encoding}; fetch it with a browser")
    if start:
        raise CannotResumeError("the server encodes the file, and goes on in the midst of it")
    # Lengths and parts are those of what is sent, not of the file.
    return Stream(0, None, None, _guarded(_Decoded(response, encoding, url).read))


def _validator(response: http.client.HTTPResponse) -> str | None:
    """A value for If-Range: a strong ETag, or the date of the last change."""
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _guarded(read: Callable[[], bytes]) -> Callable[[], bytes]:
    def guarded() -> bytes:
        try:
            return read()
        except _BROKEN as error:
            raise BrokenOffError(f"the connection broke: {type(error).__name__} {error}".strip()) from None

    return guarded


class _Decoded:
    """What a server sends as gzip or deflate although the file itself was asked for, a bounded piece at a time."""

    def __init__(self, response: http.client.HTTPResponse, encoding: str, url: str) -> None:
        self._response, self._encoding, self._url = response, encoding, url
        self._decoder = zlib.decompressobj(_ENCODINGS[encoding])
        self._taken = self._given = 0
        self._held_back = False  # the decoder may have more without further bytes

    def read(self) -> bytes:
        """The next bytes of the file; none at its end.

        Raises:
            BrokenOffError: what is sent ends before the file does.
            DownloadError: it is no such encoding, or hardly anything but encoding.
        """
        while not self._decoder.eof:
            encoded = self._decoder.unconsumed_tail
            if not encoded and not self._held_back:
                encoded = self._response.read1(CHUNK_BYTES)
                self._taken += len(encoded)
                if not encoded:
                    raise BrokenOffError(f"the connection ended after {self._given:,} bytes")
            try:
                piece = self._decoder.decompress(encoded, CHUNK_BYTES)
            except zlib.error as error:
                raise DownloadError(
                    f"{shown(self._url)} is not {self._encoding}, as its server says ({error})"
                ) from None
            self._given += len(piece)
            self._held_back = len(piece) == CHUNK_BYTES
            if piece:
                return piece
            if self._taken > 2 * self._given + CHUNK_BYTES:  # empty blocks, which may go on for ever
                raise DownloadError(f"{shown(self._url)} comes as {self._encoding} that holds nothing")
        return b""


# --- connections -----------------------------------------------------------------------------------------------------


def _opener() -> urllib.request.OpenerDirector:
    """The usual one without file:, ftp: and data:, which a redirect or a card could name."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _WebOnly(),
        _Plain(),
        _Secure(),
    ):
        opener.add_handler(handler)
    return opener


class _WebOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not is_http(newurl):
            raise urllib.error.HTTPError(newurl, code, f"{msg}, to what is no web address", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Pace(io.RawIOBase):
    """Bytes of a socket, as long as they come at some pace: a time limit for each byte alone lets a server send one a
    minute for years."""

    def __init__(self, source: io.RawIOBase) -> None:
        self._source = source
        self._since, self._bytes = time.monotonic(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if time.monotonic() - self._since > SLOW_SECONDS:
            if self._bytes < _SLOW_BYTES:
                raise TimeoutError(f"{self._bytes} bytes in {SLOW_SECONDS:.0f} seconds")
            self._since, self._bytes = time.monotonic(), 0
        found = self._source.readinto(buffer)
        self._bytes += found or 0
        return int(found or 0)

    def close(self) -> None:
        self._source.close()
        super().close()


class _PacedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp: io.BufferedReader = io.BufferedReader(_Pace(self.fp.detach()))


class _PlainConnection(http.client.HTTPConnection):
    response_class = _PacedResponse


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _PacedResponse


class _Plain(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_PlainConnection, req)


class _Secure(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, req, context=ssl.create_default_context())
