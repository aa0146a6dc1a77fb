"""Tars as img2dataset writes them, a short card beside them, and streams over them for any number of readers."""

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from instructblip.data.batching import Batching
from instructblip.data.cards import load_card
from instructblip.data.loader import LoadedStep, load_batches
from instructblip.data.mixture import Mixture, MixtureEntry
from instructblip.data.mixture_dataset import Texts, decoded
from instructblip.data.stream_dataset import Readers, StreamDataset
from instructblip.data.streaming import StreamSet
from instructblip.training.streams import open_streams
from tests.kit.mixtures import jpeg
from tests.kit.own_data import write_card
from tests.kit.own_tables import write_tar

BATCH = 4
ALONE = Readers()


def web_members(tar: int, samples: int) -> dict[str, bytes]:
    """What one tar holds: picture, text and JSON of each sample."""
    members = {}
    for number in range(samples):
        key = f"{tar:05d}{number:04d}"
        facts = {"caption": f"text {key}", "url": f"http://a.org/{key}", "key": key, "status": "success"}
        members[f"{key}.jpg"] = jpeg(100 * tar + number, (24, 20))
        members[f"{key}.txt"] = f"text {key}".encode()
        members[f"{key}.json"] = json.dumps(facts).encode()
    return members


def write_web_tars(folder: Path, *, tars: int = 5, samples: int = 6, shards: Any = "*.tar", **said: Any) -> Path:
    """Write tars and a card, which says how many records there are; return the card's path."""
    for tar in range(tars):
        write_tar(folder / f"{tar:05d}.tar", web_members(tar, samples))
    split = {"shards": shards, "records": tars * samples, **said}
    return write_card(folder, name="web", reader="webdataset", task="captioning", splits={"train": split})


def foreign_set(card: Path) -> StreamSet:
    """The set of a card's tars, as they are."""
    return open_streams([load_card(card)], card.parent, {"web"})[0]


def stream_of(
    sets: Sequence[StreamSet], readers: Readers = ALONE, *, seed: int = 5, transform: str = "resize_square"
) -> StreamDataset:
    """A stream over sets, weighted by square roots."""
    mixture = Mixture([MixtureEntry(item.name, len(item)) for item in sets], seed=seed)
    return StreamDataset(mixture, sets, decoded(transform, 8), Texts(), readers)


def steps_of(stream: StreamDataset, start: int, stop: int, *, ahead: int = 2) -> Iterator[LoadedStep]:
    """This rank's share of steps; some more are read ahead and thrown away, as when a run is killed."""
    rank, world, workers = stream.readers
    share = BATCH // world
    firsts = ((step, step * BATCH + rank * share) for step in range(start, stop + ahead))
    steps = ((step, list(range(first, first + share))) for step, first in firsts)
    loaded = load_batches(stream, steps, batching=whole_step, workers=workers)
    try:
        for step in loaded:
            stream.read_ahead(step.step, step.places or ())
            if step.step < stop:
                yield step
    finally:
        loaded.close()


def whole_step(step: int) -> Batching:
    """One micro-batch a step."""
    return Batching()


def read_steps(
    sets: Sequence[StreamSet], start: int, stop: int, *, world: int = 1, workers: int = 0, state: Any = None
) -> tuple[dict[int, list[str]], Any]:
    """Sample ids of each step over all ranks, and what a checkpoint would keep then, as it comes back from JSON."""
    ids: dict[int, list[str]] = {step: [] for step in range(start, stop)}
    places = []
    for rank in range(world):
        stream = stream_of(sets, Readers(rank, world, workers))
        if state is not None:
            stream.restore(state)
        for step in steps_of(stream, start, stop):
            ids[step.step] += [name for batch in step.batches for name in batch.ids]
        places.append(json.loads(json.dumps(stream.places(stop))))
    return ids, json.loads(json.dumps(stream.state(places)))


def times(ids: dict[int, list[str]], dataset: str = "web") -> Counter[int]:
    """How many samples of a dataset came how many times."""
    counts = Counter(name for of_step in ids.values() for name in of_step if name.startswith(f"{dataset}/"))
    return Counter(counts.values())


def bytes_of(members: dict[str, bytes]) -> bytes:
    """A tar of files, as bytes."""
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
