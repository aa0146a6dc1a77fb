"""Shards read from first to last: which records come, in which order, for how many readers, and what is refused."""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instructblip.config.entry import compose_config
from instructblip.config.schema import TrainConfig
from instructblip.data import streaming, tars
from instructblip.data.cards import load_card
from instructblip.data.lost import LostSamples
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.data.shards import index_path
from instructblip.data.stream_dataset import Readers
from instructblip.data.streaming import Deal, Place, Slot, StreamedRecord, StreamSet, shuffled
from instructblip.errors import UserError
from instructblip.fetch import download
from instructblip.fetch.shard_cache import mirror_datasets
from instructblip.training.streams import open_streams
from tests.kit.mixtures import jpeg
from tests.kit.own_tables import write_tar
from tests.kit.servers import FileServer, file_server
from tests.kit.streams import bytes_of, foreign_set, read_steps, steps_of, stream_of, times, web_members, write_web_tars
from tests.kit.tars import header

STEPS = 15  # of four samples: the thirty records of the web twice


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five tars of six samples, and their card."""
    return write_web_tars(tmp_path_factory.mktemp("web"))


@pytest.fixture(scope="module")
def web(card: Path) -> StreamSet:
    """They as a set."""
    return foreign_set(card)


# --- the order -------------------------------------------------------------------------------------------------------


def test_every_record_of_foreign_tars_comes_once_an_epoch_shard_by_shard(web: StreamSet) -> None:
    ids, _ = read_steps([web], 0, STEPS)
    assert times(ids) == {2: 30}
    names = [name for step in ids.values() for name in step]
    assert names[0].startswith("web/0000")
    shards = [name.split("/")[1] for name in names]
    runs = [shard for place, shard in enumerate(shards) if place == 0 or shards[place - 1] != shard]
    assert len(runs) in (9, 10)  # the last of an epoch may be the first of the next
    assert sorted(runs[:5]) == [f"{tar:05d}" for tar in range(5)] != runs[:5] != runs[-5:]
    assert names[:6] != sorted(names[:6])


def test_records_are_those_that_preparing_gives(card: Path, web: StreamSet, tmp_path: Path) -> None:
    prepare_dataset(load_card(card), card.parent, tmp_path, progress=False)
    (prepared,) = open_streams([load_card(card)], tmp_path, ())
    samples: list[dict[str, Any]] = []
    for item in (web, prepared):
        records = [found for place in item.places for found in item.read(place.open(), place)]
        samples.append({found.record.id: (found.record.answers, found.frames) for found in records if found.record})
    assert samples[0] == samples[1]
    assert len(samples[0]) == len(prepared) == 30


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_as_many_readers_go_on_with_the_same_samples_and_others_with_each_once(
    web: StreamSet, world: int, workers: int
) -> None:
    whole, _ = read_steps([web], 0, STEPS, world=world, workers=workers)
    begun, state = read_steps([web], 0, 4, world=world, workers=workers)
    rest, _ = read_steps([web], 4, STEPS, world=world, workers=workers, state=state)
    assert begun | rest == whole
    between, later = read_steps([web], 4, 7, world=4, state=state)
    end, _ = read_steps([web], 7, STEPS, state=later)
    assert times(begun | between | end) == {2: 30}


def test_templates_and_pixels_of_a_position_are_drawn_by_the_position(web: StreamSet) -> None:
    first, second = (next(steps_of(stream_of([web], transform="blip_image_train"), 0, 1)) for _ in range(2))
    assert first.batches[0].ids == second.batches[0].ids
    assert first.batches[0].images.equal(second.batches[0].images)
    other = next(steps_of(stream_of([web], seed=6), 0, 1))
    assert other.batches[0].ids != first.batches[0].ids


def test_slots_that_others_left_are_dealt_out_first_and_none_twice() -> None:
    random = np.random.default_rng(0)
    deal, places, finished = Deal(3), [Place()] * 3, set[int]()
    for readers in (1, 4, 2, 5, 3):
        for _ in range(25):
            reader = int(random.integers(deal.readers))
            place = places[reader]
            if random.random() < 0.5:
                places[reader] = Place(place.slots, place.taken + 1)
            else:
                slot = deal.slot(reader, place.slots).number
                assert slot not in finished
                finished.add(slot)
                places[reader] = Place(place.slots + 1, deal.slot(reader, place.slots + 1).taken)
        taken = {deal.slot(r, p.slots).number: p.taken for r, p in enumerate(places)}
        deal = Deal.from_json(json.loads(json.dumps(deal.again(places, readers).to_json())))
        places = [deal.begin(reader) for reader in range(readers)]
        assert {slot.number for slot in deal.left} == set(range(deal.frontier)) - finished
        assert all(slot.taken == taken[slot.number] for slot in deal.left if slot.number in taken)
    assert Deal(2, (Slot(3, 7), Slot(5)), 9).slot(1, 1) == Slot(10)


def test_the_buffer_is_bounded_in_number_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    held, most = 0, 0

    def records(size: int) -> Iterator[StreamedRecord]:
        nonlocal held, most
        for number in range(500):
            held += 1
            most = max(most, held)
            yield StreamedRecord(str(number), number, (b"x" * size,))

    monkeypatch.setattr(streaming, "BUFFERED_RECORDS", 40)
    monkeypatch.setattr(streaming, "BUFFERED_BYTES", 100_000)
    for size, bound in ((10, 40), (9000, 10)):
        held = most = 0
        keys = []
        for record in shuffled(records(size), np.random.default_rng(1)):
            held -= 1
            keys.append(int(record.key))
        assert sorted(keys) == list(range(500)) != keys
        assert most == bound


# --- where tars lie --------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as found:
        yield found


def test_tars_at_an_address_are_read_as_they_come_and_go_on_where_a_connection_broke(
    card: Path, web: StreamSet, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)
    server.files = {f"/{path.name}": path.read_bytes() for path in card.parent.glob("*.tar")}
    remote = write_web_tars(tmp_path, tars=0, shards=f"{server.url}/{{00000..00004}}.tar", records=30)
    item = foreign_set(remote)
    server.cuts = [700, 3000, 5000]
    ids, _ = read_steps([item], 0, STEPS)
    assert ids == read_steps([web], 0, STEPS)[0]
    assert [wanted for _, wanted, _ in server.requests if wanted] == ["bytes=700-", "bytes=3700-", "bytes=8700-"]
    assert list(tmp_path.rglob("*")) == [remote]
    del server.files["/00003.tar"]
    with pytest.raises(UserError, match=r"00003\.tar cannot be fetched \(HTTP 404"):
        read_steps([item], 0, STEPS)


def test_a_file_that_changes_on_the_way_is_not_gone_on_with(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)
    server.files, server.cuts, server.headers = {"/a.tar": bytes(4096)}, [600], {}
    place = streaming.TarPlace("a.tar", f"{server.url}/a.tar")
    with pytest.raises(UserError, match="broke off, and whether it is the same file now, nobody says"):
        place.open().read()


def test_prepared_shards_elsewhere_come_through_the_cache_without_their_indexes(
    card: Path, server: FileServer, tmp_path: Path
) -> None:
    prepare_dataset(load_card(card), card.parent, tmp_path / "shards", images_per_shard=8, progress=False)
    folder = tmp_path / "shards/web/train"
    server.files = {f"/web/train/{path.name}": path.read_bytes() for path in folder.iterdir()}
    pairs = [("web", "train")]
    root, found = mirror_datasets(server.url, pairs, tmp_path / "cache", 1 << 20, streamed=pairs)
    assert found == set(pairs)
    (remote,) = open_streams([load_card(card)], root, ())
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (local,) = open_streams([load_card(card)], tmp_path / "shards", ())
    assert read_steps([remote], 0, STEPS)[0] == read_steps([local], 0, STEPS)[0]
    assert not any(path.endswith(".safetensors") for path, *_ in server.requests)
    assert len(list((tmp_path / "cache/tars").glob("*.tar"))) == 4
    assert remote.fingerprint == local.fingerprint
    assert not index_path(folder / "shard-000000.tar").exists()


# --- what cannot be used ---------------------------------------------------------------------------------------------


def _set_of(folder: Path, content: bytes) -> StreamSet:
    write_tar(folder / "00000.tar", {})
    (folder / "00000.tar").write_bytes(content)
    return foreign_set(write_web_tars(folder, tars=0, records=6))


def test_damaged_samples_are_counted_and_the_next_of_the_dataset_takes_their_place(tmp_path: Path) -> None:
    members = web_members(0, 6)
    deep = b"[" * 100_000
    spoilt = {
        "a.jpg": b"<html>",
        "a.txt": b"no picture",
        "b.jpg": jpeg(1)[:300],
        "b.txt": b"half a picture",
        "c.txt": b"no picture at all",
        "d.jpg": jpeg(2),
        "d.json": deep,
        "e.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
        "e.txt": b"a program",
        "f.jpg": jpeg(3),
    }
    item = _set_of(tmp_path, bytes_of({**members, **spoilt}))
    lost = [missing for step in steps_of(stream_of([item]), 0, 3, ahead=0) for missing in step.lost]
    reasons = {missing.key: missing.reason for missing in lost}
    assert set(reasons) == {f"00000/{key}" for key in "abcdef"}
    for key, words in (
        ("a", "not an image"),
        ("b", "cannot be decoded"),
        ("c", "image is missing"),
        ("d", "nested too deep"),
        ("e", "is EPS, which is not read"),
        ("f", "caption is missing"),
    ):
        assert words in reasons[f"00000/{key}"]
    assert {missing.shard for missing in lost} == {str(tmp_path / "00000.tar")}
    counted = LostSamples(fraction=0.0, samples=5, say=lambda line: None)
    with pytest.raises(UserError, match=r"web has lost \d+ of 12 drawn samples"):
        counted.add(lost, {"web": 12})


def test_members_that_mean_harm_are_lost_samples_and_none_of_them_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = bytes_of(web_members(0, 6))
    harm = [
        header("../out.jpg", 0),
        header("/etc/passwd.txt", 0),
        header("link.jpg", 0, tarfile.SYMTYPE),
        header("hard.jpg", 0, tarfile.LNKTYPE),
        header("sparse.jpg", 0, tarfile.GNUTYPE_SPARSE),
    ]
    monkeypatch.setattr(tars, "MAX_SAMPLE_BYTES", 100_000)
    large = header("large.jpg", 200_192) + bytes(200_192) + header("large.txt", 0)
    many = b"".join(header(f"many.{number}.jpg", 512) + bytes(512) for number in range(100))
    item = _set_of(tmp_path, b"".join([*harm, large, many]) + sound)
    (records,) = [list(item.read(place.open(), place)) for place in item.places]
    refused = [found.lost for found in records if found.record is None]
    assert len(records) - len(refused) == 6
    for words in ("../out.jpg", "/etc/passwd.txt", "link.jpg", "hard.jpg", "sparse.jpg", "large.jpg", "many.99.jpg"):
        assert any(words in reason for reason in refused)
    monkeypatch.setattr(streaming, "_REFUSED_IN_A_ROW", 3)
    with pytest.raises(
        UserError, match=r"is not to be trusted: member is no regular file, as 4 of its members in a row"
    ):
        list(item.read(item.places[0].open(), item.places[0]))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:2500], r"00000\.tar is no whole tar \(unexpected end of data\)"),
        (lambda content: content[:512] + b"x" * 700, "is no whole tar"),
        (lambda content: header("x", 8 << 30, tarfile.XHDTYPE) + content, "a header of 8,589,934,592 bytes"),
    ],
)
def test_a_shard_that_is_cut_short_or_no_tar_ends_the_run_with_one_line(
    tmp_path: Path, damage: Any, words: str
) -> None:
    card = write_web_tars(tmp_path, tars=2)
    item = foreign_set(card)
    path = tmp_path / "00000.tar"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=words):
        read_steps([item], 0, 6)
    path.unlink()
    with pytest.raises(UserError, match=r"00000\.tar cannot be read \(No such file or directory\)"):
        read_steps([item], 0, 6, workers=1)


def test_what_no_stream_can_do_is_one_line(card: Path, tmp_path: Path) -> None:
    uncounted = write_web_tars(tmp_path / "a", tars=1, records=None)
    with pytest.raises(UserError, match=r"a/mine\.yaml: key splits\.train\.records is missing; its tars are streamed"):
        foreign_set(uncounted)
    with pytest.raises(UserError, match=r"lacks no\.tar \(shards of split train\); put it there"):
        foreign_set(write_web_tars(tmp_path / "b", tars=0, shards="no.tar", records=3))
    with pytest.raises(UserError, match=r"name its tars by braces"):
        foreign_set(write_web_tars(tmp_path / "c", tars=0, shards="https://a.org/*.tar", records=3))
    write_tar(tmp_path / "d/0.tar", {"a.mp4": b"x", "a.txt": b"a film", "b.jpg": jpeg(1), "b.txt": b"b"})
    with pytest.raises(UserError, match=r"is a video, which no stream decodes; prepare its dataset"):
        read_steps([foreign_set(write_web_tars(tmp_path / "d", tars=0, records=2))], 0, 2)
    write_tar(tmp_path / "e/0.tar", {"a.npy": b"x"})
    with pytest.raises(UserError, match=r"0\.tar has no column image or video"):
        foreign_set(write_web_tars(tmp_path / "e", tars=0, records=2))
    for override, words in (
        ("data.cache_features=true", "data.stream=true reads no image twice"),
        ("mixture.per=image", "mixture.per=image looks for the records of an image"),
    ):
        with pytest.raises(UserError, match=words):
            compose_config("train", TrainConfig, ["data.stream=true", "data.cache_features=false", override])


def test_kinds_that_no_shard_holds_are_one_line(card: Path, tmp_path: Path) -> None:
    prepare_dataset(load_card(card), card.parent, tmp_path, progress=False)
    (item,) = open_streams([load_card(card)], tmp_path, ())
    other = StreamSet("web", item.source, item.places, streaming.prepared_reader(("question",)), 3, item.templates)
    with pytest.raises(UserError, match=r"no shard of web \(1\) holds a record"):
        stream_of([other]).first(1)


def test_no_more_files_stay_open_than_there_are_datasets(web: StreamSet) -> None:
    stream = stream_of([web], Readers())
    before = len(os.listdir("/proc/self/fd"))
    for step in range(STEPS):
        stream.read_share(step, range(4 * step, 4 * step + 4))
        assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_fingerprint_says_what_the_card_says_and_names_no_folder(card: Path, tmp_path: Path) -> None:
    elsewhere = foreign_set(write_web_tars(tmp_path))
    assert elsewhere.fingerprint == foreign_set(card).fingerprint
    assert foreign_set(write_web_tars(tmp_path / "other", records=29)).fingerprint != elsewhere.fingerprint
    assert len(elsewhere.fingerprint) == len(hashlib.sha256().hexdigest())
