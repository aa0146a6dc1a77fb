"""Shards behind a URL give what local ones give, through a cache that stays bounded and never holds half a tar."""

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
from instructblip.fetch import shard_cache as remote
from instructblip.fetch.shard_cache import RemoteTars, mirror_datasets
from instructblip.training.inspect import inspect
from tests.kit.mixtures import jpeg, mixture_of, write_split
from tests.kit.tiny import write_easy_vqa

ROOMY = 10**9


class Server:
    """Serves a folder over loopback; counts what is asked for and can break off its answers.

    Attributes:
        asked: path -> how often it was asked for.
        cuts: how many of the next tars are cut off in the middle.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: Counter[str] = Counter()
        self.cuts = 0
        outer = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked[self.path.rsplit("/", 1)[1]] += 1
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

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def tars(self) -> dict[str, int]:
        """How often each tar was asked for."""
        return {name: count for name, count in sorted(self.asked.items()) if name.endswith(".tar")}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


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


def _sequence(dataset: MixtureDataset, workers: int) -> list[tuple[str, str, bytes]]:
    steps = ((step, list(range(6 * step, 6 * step + 6))) for step in range(8))
    return [
        (batch.ids[row], batch.instructions[row], batch.images[row].numpy().tobytes())
        for loaded in load_batches(dataset, steps, batching=_batching, workers=workers)
        for batch in loaded.batches
        for row in range(len(batch.ids))
    ]


# --- the same as local ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_the_sequence_is_that_of_local_shards(server: Server, tmp_path: Path, workers: int) -> None:
    local = mixture_of({"set": server.folder / "set/train"})
    folder = _mirror(server, tmp_path)
    assert not server.tars  # opening fetches no tar
    assert _sequence(mixture_of({"set": folder}), workers) == _sequence(local, 0)
    assert server.tars == {f"shard-{number:06d}.tar": 1 for number in range(3)}  # once for all processes
    assert open_split(folder).sha256 == open_split(server.folder / "set/train").sha256


def test_a_second_mirror_fetches_manifests_only(server: Server, tmp_path: Path) -> None:
    _mirror(server, tmp_path)
    assert sum(count for name, count in server.asked.items() if name.endswith("safetensors")) == 3
    before = dict(server.asked)
    _mirror(server, tmp_path)
    assert dict(server.asked - Counter(before)) == {"manifest.json": 2}  # there is a train, and no test


def test_what_changes_there_changes_here(server: Server, tmp_path: Path) -> None:
    assert open_split(_mirror(server, tmp_path)).read(0, 0)[0] == (jpeg(0),)
    write_split(server.folder / "set/train", "set", [jpeg(seed) for seed in range(20, 26)])
    split = open_split(_mirror(server, tmp_path))
    assert [split.read(shard, row)[0] for shard, row in ((0, 0), (1, 1))] == [(jpeg(20),), (jpeg(25),)]
    assert len(split.shards) == 2


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


def test_many_processes_share_a_cache_that_is_too_small_for_all(server: Server, tmp_path: Path) -> None:
    sizes = [shard.tar_bytes for shard in open_split(server.folder / "set/train").shards]
    folder = _mirror(server, tmp_path, max(sizes) + 10)  # one at a time
    orders = [list(order) * 3 for order in itertools.permutations(range(3))][:4]
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        found = list(pool.map(partial(_read_all, folder), orders))
    assert found == [[jpeg(4 * number + row) for number in order for row in range(4)] for order in orders]
    assert sum(_tars(tmp_path).values()) <= max(sizes) + 10


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
    other = tmp_path / f"{'0' * 64}.60.partial"
    other.touch()
    with FileLock(remote._lock(other)):
        holder = get_context("fork").Process(target=_exit_with, args=(partial(tars._drop_oldest, 50),))
        holder.start()
        holder.join(30)
        assert holder.exitcode == 0  # no room
        assert other.exists()
    assert tars._drop_oldest(50)
    assert not other.exists()


def _exit_with(work: partial) -> None:
    os._exit(int(work()))


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_download_that_is_cut_is_made_again(server: Server, tmp_path: Path) -> None:
    split = open_split(_mirror(server, tmp_path))
    server.cuts = 2
    assert split.read(0, 1)[0] == (jpeg(1),)
    assert server.tars == {"shard-000000.tar": 3}
    server.cuts = 3
    with pytest.raises(UserError, match=rf"{re.escape(server.url)}/set/train cannot be read \(.*\); look at the conn"):
        split.read(1, 0)
    assert list(_tars(tmp_path)) == [f"{split.shards[0].tar_sha256}.tar"]
    assert split.read(1, 0)[0] == (jpeg(4),)


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
    words = {"gone": "lacks an index of its manifest", "changed": "is not the index that the manifest lists"}[damage]
    with pytest.raises(UserError, match=rf"{words}.*; copy the whole folder there again"):
        _mirror(server, tmp_path)
    assert not list((tmp_path / "cache").rglob("manifest.json"))


def test_what_is_no_manifest(server: Server, tmp_path: Path) -> None:
    for text in ("<html>sign in</html>", "[]", json.dumps({"shards": [{"name": "a.tar"}]})):
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
        ("http://127.0.0.1:1/shards", "cannot be read (ClientConnector"),
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
