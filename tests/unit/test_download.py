"""Downloads from a server on the loopback: cut, resumed, changed, refused; never a wrong or half file under the name."""

import hashlib
import os
import socket
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instructblip.errors import UserError
from instructblip.fetch import http as module
from instructblip.fetch.http import DownloadError, download
from tests.kit.servers import FileServer, file_server

CONTENT = bytes(range(256)) * 40  # 10,240 bytes


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with file_server() as running:
        running.files["/a.bin"] = CONTENT
        yield running


def _get(server: FileServer, path: Path, **options: Any) -> None:
    download(f"{server.url}/a.bin", path, **{"show": False, "pause": 0} | options)


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
    server.cuts = [3000, 0, 0, 0, 0]
    with pytest.raises(DownloadError, match=r"a\.bin cannot be fetched \(the connection ended after 3,000 of 10,240"):
        _get(server, tmp_path / "a.bin")
    assert _names(tmp_path) == ["a.bin.partial", "a.bin.partial.json"]
    server.requests.clear()
    _get(server, tmp_path / "a.bin")
    assert server.requests == [("/a.bin", "bytes=3000-", '"one"')]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_killed_download_goes_on(server: FileServer, tmp_path: Path) -> None:
    server.cuts, server.stalls = [4096], 1
    code = "import sys; from pathlib import Path; from instructblip.fetch.http import download;"
    code += "download(sys.argv[1], Path(sys.argv[2]), show=False)"
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
    server.cuts = [2000, 0, 0, 0, 0]
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
    download(f"{server.url}/b.bin", path, show=False, pause=0)
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
    with pytest.raises(DownloadError, match="has 10,240 bytes, expected 99"):
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
            download(f"http://127.0.0.1:{port}/a.bin", tmp_path / "a.bin", show=False)


def test_an_encoded_file_is_refused(server: FileServer, tmp_path: Path) -> None:
    server.headers = {"Content-Encoding": "gzip"}
    with pytest.raises(DownloadError, match="comes encoded as gzip"):
        _get(server, tmp_path / "a.bin")


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
    with pytest.raises(UserError, match=r"disk full while writing .*/a\.bin; free some space"):
        _get(server, small_disk / "a.bin")
    assert not (small_disk / "a.bin").exists()
