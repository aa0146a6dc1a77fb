"""A file server on the loopback, as good or as bad as a test needs it."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FileServer:
    """Serves `files` (path -> content) over HTTP and keeps a list of what was asked for.

    Attributes:
        files: "/name" -> bytes.
        headers: sent with every file; an ETag by default.
        ranges: whether Range is obeyed, provided that If-Range names the ETag.
        cuts: for each coming answer, after how many bytes its connection ends; none left: at the end.
        stalls: how many coming answers stop there without ending the connection, until `going_on` is set.
        statuses: for each coming answer, a status to send in place of the file.
        answers: for each coming request, a function that answers it, whatever is asked for.
        requests: (path, Range, If-Range) of each request.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {"ETag": '"one"'}
        self.ranges = True
        self.cuts: list[int] = []
        self.stalls = 0
        self.going_on = threading.Event()
        self.statuses: list[int] = []
        self.answers: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.requests: list[tuple[str, str | None, str | None]] = []

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Send one answer."""
        wanted, condition = handler.headers["Range"], handler.headers["If-Range"]
        self.requests.append((handler.path, wanted, condition))
        if self.answers:
            self.answers.pop(0)(handler)
            return
        status = self.statuses.pop(0) if self.statuses else 200 if handler.path in self.files else 404
        if status != 200:
            handler.send_error(status)
            return
        content, start = self.files[handler.path], 0
        if wanted and self.ranges and condition in (self.headers.get("ETag"), self.headers.get("Last-Modified")):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                handler.send_error(416)
                return
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            handler.send_response(200)
        for name, value in {"Content-Length": str(len(content) - start), **self.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        end = start + self.cuts.pop(0) if self.cuts else len(content)
        handler.wfile.write(content[start:end])
        handler.wfile.flush()
        if self.stalls:
            self.stalls -= 1
            self.going_on.wait(60)


def answer(
    status: int, content: bytes = b"", *, times: int = 1, every: float = 0.0, **headers: str
) -> Callable[[BaseHTTPRequestHandler], None]:
    """An answer for `FileServer.answers`: it ends with the connection, where no Content_Length says when.

    Args:
        times: how often the content is sent.
        every: seconds before each time.
        headers: with `_` in place of `-`.
    """

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        for _ in range(times):
            time.sleep(every)
            handler.wfile.write(content)
            handler.wfile.flush()

    return send


@contextlib.contextmanager
def file_server() -> Iterator[FileServer]:
    """A server on a port that the system picks, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(ConnectionError):  # the other side may have been killed
                served.answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served = FileServer(server.server_port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield served
        finally:
            served.going_on.set()
            server.shutdown()
            thread.join()
