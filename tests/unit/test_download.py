"""Downloads from a server on the loopback: cut, resumed, changed, refused; never a wrong or half file under the name."""

import gzip
import hashlib
import os
import socket
import subprocess
import sys
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from instructblip.errors import UserError
from instructblip.fetch import download as module
from instructblip.fetch import http
from instructblip.fetch.download import Wanted, WrongFileError, download
from instructblip.fetch.streams import DownloadError, NotThereError, joined, shown
from instructblip.files import write_json
from tests.kit.servers import FileServer, answer, file_server

CONTENT = bytes(range(256)) * 40  # 10,240 bytes


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    with file_server() as running:
        running.files["/a.bin"] = CONTENT
        yield running


def _get(server: FileServer, path: Path, *, name: str = "a.bin", show: bool = False, **facts: Any) -> None:
    download(Wanted(f"{server.url}/{name}", **facts), path, show=show)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_whole_file_comes_in_one_request(server: FileServer, tmp_path: Path) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    _get(server, tmp_path / "new/a.bin", size=len(CONTENT), sha256=digest, show=True)
    assert (tmp_path / "new/a.bin").read_bytes() == CONTENT
    assert _names(tmp_path / "new") == ["a.bin"]
    assert server.requests == [("/a.bin", None, None)]


def test_a_cut_connection_is_taken_up_where_it_broke(server: FileServer, tmp_path: Path) -> None:
    server.cuts = [1000, 0, 500, 0, 0]
    _get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    asked = [None, "bytes=1000-", "bytes=1000-", "bytes=1500-", "bytes=1500-", "bytes=1500-"]
    assert [wanted for _, wanted, _ in server.requests] == asked
    assert {condition for _, _, condition in server.requests[1:]} == {'"one"'}


def test_a_connection_that_keeps_breaking_is_one_line_and_the_next_call_goes_on(
    server: FileServer, tmp_path: Path
) -> None:
    server.cuts = [3000, *[0] * module.TRIES]
    with pytest.raises(DownloadError, match=r"a\.bin cannot be fetched \(the connection ended after 3,000 of 10,240"):
        _get(server, tmp_path / "a.bin")
    assert _names(tmp_path) == ["a.bin.partial", "a.bin.partial.json"]
    server.requests.clear()
    _get(server, tmp_path / "a.bin")
    assert server.requests == [("/a.bin", "bytes=3000-", '"one"')]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_killed_download_goes_on(server: FileServer, tmp_path: Path) -> None:
    server.cuts, server.stalls = [4096], 1
    code = "import sys; from pathlib import Path; from instructblip.fetch.download import Wanted, download;"
    code += "download(Wanted(sys.argv[1]), Path(sys.argv[2]), show=False)"
    child = subprocess.Popen(
        [sys.executable, "-c", code, f"{server.url}/a.bin", str(tmp_path / "a.bin")], cwd=Path(__file__).parents[2]
    )
    try:
        partial = tmp_path / "a.bin.partial"
        for _ in range(12_000):
            if partial.exists() and partial.stat().st_size == 4096:
                break
            server.going_on.wait(0.01)
        else:
            pytest.fail("the child fetched nothing")
    finally:
        child.kill()
        child.wait()
    server.going_on.set()
    assert not (tmp_path / "a.bin").exists()
    _get(server, tmp_path / "a.bin")
    assert [wanted for _, wanted, _ in server.requests] == [None, "bytes=4096-"]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert _names(tmp_path) == ["a.bin"]


def _half(server: FileServer, folder: Path) -> Path:
    """A download that broke off after 2,000 bytes."""
    server.cuts = [2000, *[0] * module.TRIES]
    with pytest.raises(DownloadError):
        _get(server, folder / "a.bin")
    server.requests.clear()
    server.cuts.clear()
    return folder / "a.bin"


def test_a_file_that_has_changed_is_begun_anew(server: FileServer, tmp_path: Path) -> None:
    path = _half(server, tmp_path)
    server.files["/a.bin"], server.headers = CONTENT[::-1], {"ETag": '"two"'}
    _get(server, path)
    assert server.requests == [("/a.bin", "bytes=2000-", '"one"')]
    assert path.read_bytes() == CONTENT[::-1]


def test_a_kill_between_an_old_and_a_new_file_does_not_mix_them(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _half(server, tmp_path)
    server.files["/a.bin"], server.headers = CONTENT[::-1], {"ETag": '"two"'}
    write = module.write_json

    def killed(*arguments: Any) -> None:
        write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            _get(server, path)
    _get(server, path)
    assert path.read_bytes() == CONTENT[::-1]


def test_a_server_without_ranges_sends_all_of_it_again(server: FileServer, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts = [9000, 100]
    _get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("headers", "asked"),
    [
        ({}, (None, None)),
        ({"ETag": 'W/"weak"'}, (None, None)),
        ({"Last-Modified": "Sat, 21 Nov 2026 12:00:00 GMT"}, ("bytes=2000-", "Sat, 21 Nov 2026 12:00:00 GMT")),
    ],
)
def test_only_what_is_certainly_the_same_file_is_gone_on_with(
    server: FileServer, tmp_path: Path, headers: dict[str, str], asked: tuple[str | None, str | None]
) -> None:
    server.headers = headers
    path = _half(server, tmp_path)
    _get(server, path)
    assert server.requests == [("/a.bin", *asked)]
    assert path.read_bytes() == CONTENT


def test_another_address_does_not_go_on_with_the_old_bytes(server: FileServer, tmp_path: Path) -> None:
    path = _half(server, tmp_path)
    server.files["/b.bin"] = CONTENT[::-1]
    _get(server, path, name="b.bin")
    assert server.requests == [("/b.bin", None, None)]
    assert path.read_bytes() == CONTENT[::-1]


def test_what_was_whole_before_a_kill_is_not_fetched_again(server: FileServer, tmp_path: Path) -> None:
    path = _half(server, tmp_path)
    (tmp_path / "a.bin.partial").write_bytes(CONTENT)
    _get(server, path, sha256=hashlib.sha256(CONTENT).hexdigest())
    assert server.requests == []
    assert path.read_bytes() == CONTENT


def test_a_shorter_file_than_the_bytes_that_are_there_is_begun_anew(server: FileServer, tmp_path: Path) -> None:
    path = _half(server, tmp_path)
    server.files["/a.bin"] = CONTENT[:1500]  # under the same ETag: a broken server
    _get(server, path)
    assert [wanted for _, wanted, _ in server.requests] == ["bytes=2000-", None]
    assert path.read_bytes() == CONTENT[:1500]


def test_a_wrong_hash_or_size_names_both_and_leaves_nothing(server: FileServer, tmp_path: Path) -> None:
    found = hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(DownloadError, match=f"has sha256 {found}, expected {'0' * 64}"):
        _get(server, tmp_path / "a.bin", sha256="0" * 64)
    with pytest.raises(DownloadError, match="has 10,240 bytes, expected 99: the file was changed at its source"):
        _get(server, tmp_path / "a.bin", size=99)
    server.headers = {"Transfer-Encoding": "identity", "Content-Length": ""}  # says no length
    with pytest.raises(DownloadError, match="sends more than 99 bytes, which is all it may have"):
        _get(server, tmp_path / "a.bin", size=99)
    assert _names(tmp_path) == []


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_refused_file_is_one_line_at_once(server: FileServer, tmp_path: Path, status: int) -> None:
    server.statuses = [status]
    with pytest.raises(DownloadError, match=rf"/a\.bin cannot be fetched \(HTTP {status} ") as caught:
        _get(server, tmp_path / "a.bin")
    assert "\n" not in str(caught.value)
    assert (len(server.requests), _names(tmp_path)) == (1, [])


def test_a_busy_server_is_asked_again(server: FileServer, tmp_path: Path) -> None:
    server.statuses = [503, 429]
    _get(server, tmp_path / "a.bin")
    assert len(server.requests) == 3
    server.statuses = [503] * 10
    with pytest.raises(DownloadError, match="HTTP 503"):
        _get(server, tmp_path / "b.bin")


def test_no_network_is_one_line_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module.time, "sleep", lambda seconds: pytest.fail("waited for a network that is not there"))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(DownloadError, match=r"cannot be fetched \(no connection: .*refused"):
            download(Wanted(f"http://127.0.0.1:{port}/a.bin"), tmp_path / "a.bin", show=False)


# --- how long to wait -------------------------------------------------------------------------------------------------


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were to be waited; nothing waits."""
    found: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=found.append))
    return found


def test_a_busy_server_says_how_long_to_wait(server: FileServer, tmp_path: Path, waits: list[float]) -> None:
    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    for text in ("7", in_a_minute, "Sat, 21 Nov 2020 12:00:00 GMT", "soon"):
        server.answers.append(answer(429, Retry_After=text))
    _get(server, tmp_path / "a.bin")
    assert (waits[0], waits[2:]) == (7.0, [0.0, 0.0])
    assert 50 < waits[1] <= 60
    assert len(server.requests) == 5


def test_a_wait_of_hours_is_left_to_the_user(server: FileServer, tmp_path: Path, waits: list[float]) -> None:
    server.answers = [answer(503, Retry_After="7200")]
    with pytest.raises(DownloadError, match=r"HTTP 503 .*to be asked again in 7,200 seconds\); run the same command"):
        _get(server, tmp_path / "a.bin")
    assert waits == []


def test_pauses_double_and_no_two_processes_come_back_at_once(
    server: FileServer, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE_SECONDS", 1.0)
    server.statuses = [503] * module.TRIES
    with pytest.raises(DownloadError, match="HTTP 503"):
        _get(server, tmp_path / "a.bin")
    assert len(waits) == module.TRIES - 1
    for number, seconds in enumerate(waits):
        assert 0.75 * 2**number <= seconds <= 1.25 * 2**number
    assert len({seconds / 2**number for number, seconds in enumerate(waits)}) > 1


@pytest.mark.slow
def test_a_long_transfer_is_not_cut_off_and_a_silent_one_is(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "IDLE_SECONDS", 0.3)
    server.answers = [answer(200, CONTENT[:1024], times=10, every=0.05, Content_Length="10240")]  # half a second
    _get(server, tmp_path / "a.bin")
    assert len(server.requests) == 1
    server.cuts, server.stalls = [5000], 1
    _get(server, tmp_path / "b.bin")
    assert [wanted for _, wanted, _ in server.requests[1:]] == [None, "bytes=5000-"]
    assert (tmp_path / "b.bin").read_bytes() == CONTENT


def test_a_server_that_drips_is_as_good_as_silent(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "SLOW_SECONDS", 0.2)
    server.answers = [answer(200, b"x", times=1000, every=0.05, Content_Length="10240")]
    _get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert len(server.requests) == 2


# --- more than there should be ----------------------------------------------------------------------------------------


def _endless(status: int = 200, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    return answer(status, bytes(1 << 16), times=10_000, **headers)


def test_a_body_without_end_is_given_up_at_what_the_file_may_have(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(10**6, 0, 200_000))
    for facts, most in (({"size": 10_240}, "10,240"), ({"limit": 70_000}, "70,000"), ({}, "100,000")):
        server.answers = [_endless()]
        with pytest.raises(WrongFileError, match=rf"/a\.bin sends more than {most} bytes, which is all it may have"):
            _get(server, tmp_path / "a.bin", **facts)
        assert _names(tmp_path) == []


def test_a_stated_length_beyond_the_limit_is_not_begun(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(WrongFileError, match="has 10,240 bytes, allowed are 99"):
        _get(server, tmp_path / "a.bin", limit=99)
    assert _names(tmp_path) == []


def test_what_comes_encoded_is_decoded_and_bounded_too(server: FileServer, tmp_path: Path) -> None:
    for encoding, encoded in (("gzip", gzip.compress(CONTENT)), ("deflate", zlib.compress(CONTENT))):
        server.answers = [answer(200, encoded, Content_Encoding=encoding)]
        _get(server, tmp_path / "a.bin", size=len(CONTENT))
        assert (tmp_path / "a.bin").read_bytes() == CONTENT
    large = bytes(range(251)) * 20_000  # several pieces
    server.answers = [answer(200, gzip.compress(large), Content_Encoding="gzip", ETag='"one"')]
    _get(server, tmp_path / "a.bin", size=len(large))
    assert (tmp_path / "a.bin").read_bytes() == large
    server.answers = [answer(200, gzip.compress(bytes(50 << 20)), Content_Encoding="gzip")]
    with pytest.raises(WrongFileError, match="sends more than 2,000,000 bytes"):
        _get(server, tmp_path / "b.bin", limit=2_000_000)


def test_what_is_encoded_otherwise_than_stated_is_one_line(server: FileServer, tmp_path: Path) -> None:
    empty_blocks = b"\x78\x9c" + b"\x00\x00\x00\xff\xff" * 1_000_000
    for encoding, encoded, words in (
        ("gzip", CONTENT, r"is not gzip, as its server says"),
        ("br", CONTENT, "comes encoded as br; fetch it with a browser"),
        ("deflate", empty_blocks, "comes as deflate that holds nothing"),
    ):
        server.answers = [answer(200, encoded, Content_Encoding=encoding)]
        with pytest.raises(DownloadError, match=words):
            _get(server, tmp_path / "a.bin")
    server.answers = [answer(200, gzip.compress(CONTENT)[:-20], Content_Encoding="gzip")]
    _get(server, tmp_path / "a.bin")  # cut, and asked for again
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


# --- parts that do not fit --------------------------------------------------------------------------------------------


def test_a_part_that_was_not_asked_for_is_not_appended(server: FileServer, tmp_path: Path) -> None:
    for given in ("bytes 1999-10239/10240", "bytes 0-10239/10240", "bytes */10240", "all of it"):
        path = _half(server, tmp_path)
        server.answers = [answer(206, CONTENT[1999:], Content_Range=given)]
        _get(server, path)
        assert [wanted for _, wanted, _ in server.requests] == ["bytes=2000-", None]
        assert path.read_bytes() == CONTENT


def test_a_part_that_ends_early_is_not_taken_for_the_whole(server: FileServer, tmp_path: Path) -> None:
    path = _half(server, tmp_path)
    part = CONTENT[2000:3000]
    server.answers = [answer(206, part, Content_Range="bytes 2000-2999/10240", Content_Length="1000", ETag='"one"')]
    _get(server, path)
    assert [wanted for _, wanted, _ in server.requests] == ["bytes=2000-", "bytes=3000-"]
    assert path.read_bytes() == CONTENT


def test_with_a_hash_it_goes_on_without_a_validator_and_begins_anew_where_that_was_wrong(
    server: FileServer, tmp_path: Path
) -> None:
    server.headers = {}
    digest = hashlib.sha256(CONTENT).hexdigest().upper()
    rest = answer(206, CONTENT[2000:], Content_Range="bytes 2000-10239/10240")
    for before in (CONTENT[:2000], bytes(2000)):
        path = _half(server, tmp_path)
        (tmp_path / "a.bin.partial").write_bytes(before)
        server.answers = [rest]
        _get(server, path, sha256=digest)
        assert path.read_bytes() == CONTENT
        assert [wanted for _, wanted, _ in server.requests] == ["bytes=2000-", None][: 1 + (before != CONTENT[:2000])]


# --- where it comes from ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://127.0.0.1/a.bin", "data:,x"])
def test_a_redirect_leads_to_web_addresses_only(server: FileServer, tmp_path: Path, place: str) -> None:
    server.answers = [answer(302, Location=place)]
    with pytest.raises(DownloadError, match=r"/a\.bin cannot be fetched \(HTTP 302"):
        _get(server, tmp_path / "a.bin")
    assert _names(tmp_path) == []


def test_a_login_goes_to_its_server_alone_and_is_never_shown(server: FileServer, tmp_path: Path) -> None:
    seen: list[str | None] = []

    def redirect(handler: BaseHTTPRequestHandler) -> None:
        seen.append(handler.headers["Authorization"])
        answer(302, Location=f"{server.url}/a.bin")(handler)

    def refuse(handler: BaseHTTPRequestHandler) -> None:
        seen.append(handler.headers["Authorization"])
        answer(403)(handler)

    server.answers = [redirect, refuse]
    url = server.url.replace("//", "//user:s3cret%2F@") + "/a.bin?signature=s3cret"
    with pytest.raises(DownloadError) as caught:
        download(Wanted(url), tmp_path / "a.bin", show=False)
    assert seen == ["Basic dXNlcjpzM2NyZXQv", None]
    assert "s3cret" not in str(caught.value)


def test_addresses_with_spaces_and_other_letters(server: FileServer, tmp_path: Path) -> None:
    server.files["/my%20data/%C3%BC.bin?a=%20b"] = CONTENT
    _get(server, tmp_path / "a.bin", name="my data/ü.bin?a= b")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    with pytest.raises(DownloadError, match="is no address"):
        download(Wanted("http://[::1/a.bin"), tmp_path / "b.bin", show=False)


def test_addresses_are_joined_before_their_query_and_shown_without_it() -> None:
    signed = "https://me:pw@host/shards/?sig=x"
    assert joined(signed, "my set", "train") == "https://me:pw@host/shards/my%20set/train?sig=x"
    assert shown(signed) == "https://host/shards/"
    assert joined("s3://bucket/shards/", "my set", "train") == "s3://bucket/shards/my set/train"
    assert shown("s3://bucket/what?/x") == "s3://bucket/what?/x"


def test_a_file_that_is_not_there_is_told_from_one_that_is_refused(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(NotThereError, match="HTTP 404"):
        _get(server, tmp_path / "a.bin", name="nothing.bin")
    server.statuses = [403]
    with pytest.raises(DownloadError) as caught:
        _get(server, tmp_path / "a.bin")
    assert not isinstance(caught.value, NotThereError)


def test_what_fsspec_reads_comes_the_same_way(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/there/a.bin", CONTENT)
    wanted = Wanted("memory://there/a.bin", size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())
    (tmp_path / "a.bin.partial").write_bytes(CONTENT[:3000])
    write_json(tmp_path / "a.bin.partial.json", {"url": wanted.url, "validator": None, "bytes": len(CONTENT)})
    download(wanted, tmp_path / "a.bin", show=False)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    with pytest.raises(NotThereError):
        download(Wanted("memory://there"), tmp_path / "b.bin", show=False)
    with pytest.raises(WrongFileError, match="has 10,240 bytes, allowed are 99"):
        download(Wanted("memory://there/a.bin", limit=99), tmp_path / "b.bin", show=False)


# --- disks ------------------------------------------------------------------------------------------------------------


def test_too_little_space_is_said_before_anything_is_written(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 5000, 5000))
    with pytest.raises(UserError, match=r"has 5,000 bytes free, .*/a\.bin needs 10,240; free some space"):
        _get(server, tmp_path / "a.bin")
    assert not (tmp_path / "a.bin.partial").exists()


def test_a_disk_that_fills_up_is_one_line(
    server: FileServer, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(10**9, 0, 10**9))
    server.files["/a.bin"] = os.urandom(2 << 20)
    with pytest.raises(UserError, match=r"disk full while writing .*/a\.bin\.partial; free some space"):
        _get(server, small_disk / "a.bin")
    assert not (small_disk / "a.bin").exists()
