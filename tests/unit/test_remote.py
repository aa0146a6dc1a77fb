"""Shards behind a URL give what local ones give, through a cache that stays bounded and never holds half a tar."""

import contextlib
import io
import itertools
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from rich.console import Console

from instructblip.config.entry import compose_config
from instructblip.config.schema import DataConfig, InspectConfig
from instructblip.data.batching import Batching
from instructblip.data.cards import load_card
from instructblip.data.loader import load_batches
from instructblip.data.mixture_dataset import MixtureDataset
from instructblip.data.prepare.command import Needed, shards_folder
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.data.shards import open_split
from instructblip.errors import UserError
from instructblip.fetch import download as module
from instructblip.fetch import shard_cache as remote
from instructblip.fetch import stamps
from instructblip.fetch.shard_cache import RemoteTars, mirror_datasets
from instructblip.training.inspection import inspect
from tests.kit.mixtures import jpeg, mixture_of, write_split
from tests.kit.tiny import write_easy_vqa

ROOMY = 10**9


class Server:
    """Serves a folder over loopback; counts what is asked for and can break off its answers.

    Attributes:
        asked: path -> how often it was asked for.
        cuts: how many of the next tars are cut off in the middle.
        endless: names of files that are answered without a length and without an end.
        sent: bytes of such answers.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder = folder
        self.asked: Counter[str] = Counter()
        self.cuts = self.sent = 0
        self.endless: set[str] = set()
        outer = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.rsplit("/", 1)[1]
                outer.asked[name] += 1
                if name in outer.endless:
                    self.send_response(200)
                    self.end_headers()
                    with contextlib.suppress(ConnectionError):
                        while True:
                            self.wfile.write(bytes(1 << 16))
                            outer.sent += 1 << 16
                    return
                if self.path.endswith(".tar") and outer.cuts > 0:
                    outer.cuts -= 1
                    content = (folder / self.path.lstrip("/")).read_bytes()
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content[: len(content) // 2])
                    return
                super().do_GET()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=str(folder)))
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def tars(self) -> dict[str, int]:
        """How often each tar was asked for."""
        return {name: count for name, count in sorted(self.asked.items()) if name.endswith(".tar")}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A dataset `set` of 12 images in 3 shards."""
    write_split(tmp_path / "there/set/train", "set", [jpeg(seed) for seed in range(12)])
    served = Server(tmp_path / "there")
    yield served
    served.close()


def _mirror(server: Server, tmp_path: Path, limit: int = ROOMY) -> Path:
    root, found = mirror_datasets(server.url + "/", [("set", "train"), ("set", "test")], tmp_path / "cache", limit)
    assert found == {("set", "train")}
    return root / "set/train"


def _tars(tmp_path: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (tmp_path / "cache/tars").glob("*") if path.suffix != ".lock"}


def _batching(step: int) -> Batching:
    return Batching()


def sequence(dataset: MixtureDataset, workers: int) -> list[tuple[str, str, bytes]]:
    """Ids, instructions and pixels of eight steps."""
    steps = ((step, list(range(6 * step, 6 * step + 6))) for step in range(8))
    return [
        (batch.ids[row], batch.instructions[row], batch.images[row].numpy().tobytes())
        for loaded in load_batches(dataset, steps, batching=_batching, workers=workers)
        for batch in loaded.batches
        for row in range(len(batch.ids))
    ]


# --- the same as local ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_sequence_is_that_of_local_shards(server: Server, tmp_path: Path, workers: int) -> None:
    local = mixture_of({"set": server.folder / "set/train"})
    folder = _mirror(server, tmp_path)
    assert not server.tars  # opening fetches no tar
    assert sequence(mixture_of({"set": folder}), workers) == sequence(local, 0)
    assert server.tars == {f"shard-{number:06d}.tar": 1 for number in range(3)}  # once for all processes
    assert open_split(folder).sha256 == open_split(server.folder / "set/train").sha256


def test_a_second_mirror_fetches_manifests_only(server: Server, tmp_path: Path) -> None:
    _mirror(server, tmp_path)
    assert sum(count for name, count in server.asked.items() if name.endswith("safetensors")) == 3
    before = dict(server.asked)
    _mirror(server, tmp_path)
    assert dict(server.asked - Counter(before)) == {"manifest.json": 2}  # there is a train, and no test


def test_a_second_mirror_reads_no_index_unless_it_was_touched(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    hash_of = stamps.sha256_file
    monkeypatch.setattr(stamps, "sha256_file", lambda path: (read.append(path.name), hash_of(path))[1])
    folder = _mirror(server, tmp_path)
    assert len(read) == 3
    read.clear()
    _mirror(server, tmp_path)
    assert read == []
    names = [f"shard-{number:06d}.index.safetensors" for number in range(3)]
    (folder / names[0]).touch()
    damaged = bytearray((folder / names[1]).read_bytes())
    damaged[-1] ^= 1
    (folder / names[1]).write_bytes(damaged)
    before = Counter(server.asked)
    _mirror(server, tmp_path)
    assert set(read) == set(names[:2])
    assert server.asked - before == Counter({"manifest.json": 2, names[1]: 1})
    (folder / "stamps.json").write_text("damaged")
    read.clear()
    _mirror(server, tmp_path)
    assert sorted(read) == names
    assert server.asked[names[0]] == 1


def test_an_index_that_is_damaged_under_its_stamp_is_found_when_it_is_opened(server: Server, tmp_path: Path) -> None:
    folder = _mirror(server, tmp_path)
    path = folder / "shard-000001.index.safetensors"
    state, damaged = path.stat(), bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    split = open_split(_mirror(server, tmp_path))
    assert split.read(0, 0)[0] == (jpeg(0),)
    with pytest.raises(
        UserError, match=rf"is not the index that .*; delete {re.escape(str(folder))} to fetch it again"
    ):
        split.read(1, 0)


def test_urls_that_differ_in_any_sign_have_mirrors_of_their_own(tmp_path: Path) -> None:
    urls = [
        "https://host/a/b", "https://host/a_b", "https://host/a-b", "https://host/a/b?x=1", "http://host/a/b",
        "https://host:80/a/b", "https://HOST/a/b", "s3://host/a/b", "https://me@host/a/b", "https://host/" + "a" * 300,
    ]  # fmt: skip
    names = [remote._mirror_name(url) for url in urls]
    assert len(set(names)) == len(urls)
    assert all(re.fullmatch(r"\w{1,80}-[0-9a-f]{16}", name) for name in names)


@pytest.mark.slow
def test_what_changes_there_changes_here(server: Server, tmp_path: Path) -> None:
    assert open_split(_mirror(server, tmp_path)).read(0, 0)[0] == (jpeg(0),)
    write_split(server.folder / "set/train", "set", [jpeg(seed) for seed in range(20, 26)])
    split = open_split(_mirror(server, tmp_path))
    assert [split.read(shard, row)[0] for shard, row in ((0, 0), (1, 1))] == [(jpeg(20),), (jpeg(25),)]
    assert len(split.shards) == 2


@pytest.mark.slow
def test_inspect_and_with_it_training_take_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_easy_vqa(tmp_path / "raw", images=12)
    prepare_dataset(load_card("easy_vqa"), tmp_path / "raw", tmp_path / "there", progress=False)
    monkeypatch.setenv("INSTRUCTBLIP_CACHE", str(tmp_path / "cache"))
    served, texts = Server(tmp_path / "there"), []
    for shards in (served.url, str(tmp_path / "there")):
        text = io.StringIO()
        options = [f"data.shards={shards}", "image_size=24", "timed=32", "steps=10", "batch_size=20", "samples=3"]
        inspect(compose_config("inspect", InspectConfig, options), Console(file=text, width=120))
        texts.append(text.getvalue().split("the loader alone")[0].rstrip())  # its table is as wide as its times
    served.close()
    assert texts[0] == texts[1]
    assert "0: easy_vqa_" in texts[0]
    assert served.tars == {"shard-000000.tar": 1}


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tar_used_longest_ago_makes_room(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_TOUCH_SECONDS", 0)
    split = open_split(server.folder / "set/train")
    sizes = [shard.tar_bytes for shard in split.shards]
    limit = max(a + b for a, b in itertools.combinations(sizes, 2))
    split = open_split(_mirror(server, tmp_path, limit))
    names = [f"{shard.tar_sha256}.tar" for shard in split.shards]
    for used, kept in ((0, {0}), (1, {0, 1}), (0, {0, 1}), (2, {0, 2}), (1, {1, 2}), (0, {0, 1})):
        assert split.read(used, 0)[0] == (jpeg(4 * used),)
        assert set(_tars(tmp_path)) == {names[number] for number in kept}
        assert sum(_tars(tmp_path).values()) <= limit
    assert server.tars == {"shard-000000.tar": 2, "shard-000001.tar": 2, "shard-000002.tar": 1}


def _read_all(folder: Path, order: list[int]) -> list[bytes]:
    split = open_split(folder)
    return [split.read(number, row)[0][0] for number in order for row in range(4)]


@pytest.mark.slow
def test_many_processes_share_a_cache_that_is_too_small_for_all(server: Server, tmp_path: Path) -> None:
    sizes = [shard.tar_bytes for shard in open_split(server.folder / "set/train").shards]
    folder = _mirror(server, tmp_path, max(sizes) + 10)  # one at a time
    orders = [list(order) * 3 for order in itertools.permutations(range(3))][:4]
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        found = list(pool.map(partial(_read_all, folder), orders))
    assert found == [[jpeg(4 * number + row) for number in order for row in range(4)] for order in orders]
    assert sum(_tars(tmp_path).values()) <= max(sizes) + 10


def test_a_tar_that_is_fetched_while_others_look_for_room_is_counted(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = open_split(_mirror(server, tmp_path)).shards
    cache, sizes = tmp_path / "cache/tars", [shard.tar_bytes for shard in shards]
    cache.mkdir(parents=True, exist_ok=True)
    tars = RemoteTars(f"{server.url}/set/train", cache, max(sizes) + 10)
    (cache / f"{shards[1].tar_sha256}.{sizes[1]}.partial").write_bytes(bytes(sizes[1]))

    def is_held_no_longer(partial: Path) -> bool:
        os.replace(partial, cache / f"{shards[1].tar_sha256}.tar")  # what its process does last
        return False

    monkeypatch.setattr(remote, "_is_held", is_held_no_longer)
    os.close(tars.open(shards[0].path.name, shards[0].tar_sha256, sizes[0]))
    assert [path.name for path in cache.glob("*.tar")] == [f"{shards[0].tar_sha256}.tar"]


def test_a_descriptor_outlives_its_tar(server: Server, tmp_path: Path) -> None:
    shard = open_split(_mirror(server, tmp_path)).shards[0]
    tars = RemoteTars(f"{server.url}/set/train", tmp_path / "cache/tars", ROOMY)
    descriptor = tars.open(shard.path.name, shard.tar_sha256, shard.tar_bytes)
    for path in (tmp_path / "cache/tars").glob("*.tar"):
        path.unlink()
    assert len(os.pread(descriptor, shard.tar_bytes, 0)) == shard.tar_bytes
    os.close(descriptor)
    assert shard.read(0)[0] == (jpeg(0),)  # fetched again


@pytest.mark.parametrize("of", ["this tar", "another"])
def test_what_a_killed_process_left_takes_no_room(server: Server, tmp_path: Path, of: str) -> None:
    shard = open_split(_mirror(server, tmp_path)).shards[0]
    folder = tmp_path / "cache/tars"
    folder.mkdir()
    sha256 = shard.tar_sha256 if of == "this tar" else "0" * 64
    left = folder / f"{sha256}.{shard.tar_bytes}.partial"
    left.write_bytes(b"half")
    tars = RemoteTars(f"{server.url}/set/train", folder, shard.tar_bytes)
    os.close(tars.open(shard.path.name, shard.tar_sha256, shard.tar_bytes))
    assert _tars(tmp_path) == {f"{shard.tar_sha256}.tar": shard.tar_bytes}
    assert not left.exists()


def test_what_another_process_fetches_keeps_its_room(server: Server, tmp_path: Path) -> None:
    tars = RemoteTars("", tmp_path, 100)
    own, other = (tmp_path / f"{digit * 64}.60.partial" for digit in "10")
    other.write_bytes(bytes(60))
    with FileLock(remote._lock(other)):
        holder = get_context("fork").Process(target=_exit_with, args=(partial(tars._drop_oldest, 50, own),))
        holder.start()
        holder.join(30)
        assert holder.exitcode == 0  # no room
        assert other.exists()
    assert tars._drop_oldest(40, own)
    assert other.exists()  # given up by its process, to be gone on with while there is room
    assert tars._drop_oldest(50, own)
    assert not other.exists()


def _exit_with(work: partial) -> None:
    os._exit(int(work()))


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_download_that_is_cut_is_made_again(server: Server, tmp_path: Path) -> None:
    split = open_split(_mirror(server, tmp_path))
    server.cuts = 2
    assert split.read(0, 1)[0] == (jpeg(1),)
    assert server.tars == {"shard-000000.tar": 3}
    server.cuts = 100
    where = rf"{re.escape(server.url)}/set/train/shard-000001\.tar"
    with pytest.raises(UserError, match=rf"{where} cannot be fetched \(the connection ended .*run the same command"):
        split.read(1, 0)
    tar, half = split.shards[1].tar_bytes, split.shards[1].tar_sha256
    assert _tars(tmp_path)[f"{half}.{tar}.partial"] == tar // 2  # to be gone on with
    server.cuts = 0
    assert split.read(1, 0)[0] == (jpeg(4),)
    assert sorted(_tars(tmp_path)) == sorted(f"{shard.tar_sha256}.tar" for shard in split.shards[:2])


@pytest.mark.slow
def test_a_server_that_is_away_for_a_moment_is_waited_for(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = open_split(_mirror(server, tmp_path))
    port = server.port
    server.close()
    back: list[Server] = []
    monkeypatch.setattr(
        module, "time", SimpleNamespace(sleep=lambda _: back or back.append(Server(server.folder, port)))
    )
    assert split.read(0, 0)[0] == (jpeg(0),)
    back[0].close()


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        ("gone", r"shard http://.*/set/train/shard-000001\.tar is gone; copy the whole folder there again"),
        ("other bytes", r"shard http://.*/set/train/shard-000001\.tar does not match its index; copy the whole folder"),
        ("longer", r"shard http://.*/set/train/shard-000001\.tar does not match its index; copy the whole folder"),
    ],
)
def test_a_tar_that_is_not_what_the_index_says(server: Server, tmp_path: Path, damage: str, line: str) -> None:
    split = open_split(_mirror(server, tmp_path))
    path = server.folder / "set/train/shard-000001.tar"
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + b"x" if damage == "other bytes" else content + b"x")
    with pytest.raises(UserError, match=line) as error:
        split.read(1, 0)
    assert "\n" not in str(error.value)
    assert _tars(tmp_path) == {}
    assert split.read(0, 0)[0] == (jpeg(0),)


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_an_index_that_is_not_the_manifests(server: Server, tmp_path: Path, damage: str) -> None:
    path = server.folder / "set/train/shard-000001.index.safetensors"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b" ")
    words = {
        "gone": "lacks shard-000001.*, an index of its manifest",
        "changed": "is not the index that the manifest lists",
    }[damage]
    with pytest.raises(UserError, match=rf"{words}.*; copy the whole folder there again"):
        _mirror(server, tmp_path)
    assert not list((tmp_path / "cache").rglob("manifest.json"))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("manifest.json", r"manifest\.json sends more than 1,000,000 bytes"),
        (
            "shard-000001.index.safetensors",
            r"shard-000001\.index\.safetensors is not the index that the manifest lists",
        ),
        ("shard-000001.tar", r"shard-000001\.tar does not match its index"),
    ],
)
def test_an_answer_without_end_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, line: str
) -> None:
    monkeypatch.setattr(remote, "_MAX_MANIFEST_BYTES", 1_000_000)
    server.endless = {name}
    with pytest.raises(UserError, match=line):
        open_split(_mirror(server, tmp_path)).read(1, 0)
    assert server.sent < 24_000_000  # what sockets hold, and for an index what it may be larger than its tar


@pytest.mark.parametrize("stated", ["../" * 20 + "victim/" + "0" * 64, "", 7, "0" * 63 + "g", None])
def test_a_hash_that_is_none_names_no_file(server: Server, tmp_path: Path, stated: object) -> None:
    path = server.folder / "set/train/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["index_sha256"] = stated
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is no manifest"):
        _mirror(server, tmp_path)
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        RemoteTars("", tmp_path / "tars", ROOMY).open("a.tar", stated, 10)
    assert not (tmp_path / "tars").exists()


def test_what_is_no_manifest(server: Server, tmp_path: Path) -> None:
    for text in ("<html>sign in</html>", "[]", "[" * 100_000, json.dumps({"shards": [{"name": "a.tar"}]})):
        (server.folder / "set/train/manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"set/train/manifest\.json is no manifest; give the URL"):
            _mirror(server, tmp_path)


def test_a_cache_smaller_than_a_shard(server: Server, tmp_path: Path) -> None:
    split = open_split(_mirror(server, tmp_path, 5000))
    with pytest.raises(UserError, match=r"shard-000000\.tar has [\d,]+ bytes, data\.remote_cache_bytes=5000; raise"):
        split.read(0, 0)
    with pytest.raises(UserError, match=r"data\.remote_cache_bytes=0 is too small"):
        _mirror(server, tmp_path, 0)


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("{server}", "has no prepared easy_vqa (test); prepare it with prepare.py and copy its folder there"),
        ("{server}/nowhere", "has no prepared easy_vqa"),
        ("http://127.0.0.1:1/shards", "easy_vqa/test/manifest.json cannot be fetched (no connection"),
        ("nothing://shards", "cannot be read (Protocol not known: nothing"),
    ],
)
def test_places_that_cannot_be_used(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, line: str
) -> None:
    monkeypatch.setenv("INSTRUCTBLIP_CACHE", str(tmp_path / "cache"))
    data = DataConfig(shards=url.format(server=server.url))
    with pytest.raises(UserError, match=re.escape(line)) as error:
        shards_folder([Needed(load_card("easy_vqa"), frozenset({"test"}))], data, Console(quiet=True))
    assert "\n" not in str(error.value)
