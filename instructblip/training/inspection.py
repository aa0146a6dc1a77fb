"""The work of `python -m instructblip.training.inspect`: the table, the samples, the loader's rate."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, islice

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from instructblip.config.schema import InspectConfig
from instructblip.data.batching import Batching, Item
from instructblip.data.cards import TRAIN_SPLIT, Card, load_cards
from instructblip.data.loader import load_batches
from instructblip.data.lost import LostSample
from instructblip.data.mixture import position_generator
from instructblip.data.mixture_dataset import DrawnImage, MixtureDataset, Texts, decoded
from instructblip.data.prepare.command import Needed, find_shards, shards_folder
from instructblip.data.stream_dataset import Readers, StreamDataset
from instructblip.data.transforms import AUGMENTATIONS, decode_for, draw_view
from instructblip.images import decode_image, image_size
from instructblip.training.datasets import check_mixture, make_mixture, open_sets
from instructblip.training.shares import shares_planned
from instructblip.training.streams import open_streams, streamed_as_they_are


def inspect(config: InspectConfig, console: Console) -> None:
    """Print the plan's table, the first samples of the sequence, and the loader's rate.

    Raises:
        UserError: data that is missing or damaged.
    """
    cards = load_cards(entry.name for entry in config.mixture.datasets)
    check_mixture(config.mixture, cards)
    dataset = _dataset(config, cards, console)
    console.print(shares_planned(dataset.mixture, [config]))
    first = dataset.first(config.samples)
    for item in first.items:
        _show(item, [missing for missing in first.lost if missing.position == item[0].position], console)
    console.print(_timing(dataset, config))


def _dataset(config: InspectConfig, cards: Sequence[Card], console: Console) -> MixtureDataset | StreamDataset:
    needed = [Needed(card, frozenset({TRAIN_SPLIT}), config.data.stream) for card in cards]
    images = decoded(config.data.transform, config.image_size)
    texts = Texts(config.data.text_processor, prompt_processor=config.data.prompt_processor)
    if not config.data.stream:
        sets = open_sets(cards, shards_folder(needed, config.data, console), config.mixture.templates)
        return MixtureDataset(make_mixture(config.mixture, sets, [config], seed=config.seed), sets, images, texts)
    found = find_shards(needed, config.data, console)
    foreign = streamed_as_they_are(cards, config.data, found.missing)
    if missing := found.missing.keys() - foreign:
        raise found.refusal(*missing)
    streams = open_streams(cards, found.folder, foreign, config.mixture.templates)
    mixture = make_mixture(config.mixture, streams, [config], seed=config.seed)
    return StreamDataset(mixture, streams, images, texts, Readers(workers=config.data.workers))


def _show(item: Item, lost: Sequence[LostSample], console: Console) -> None:
    sample, image = item
    lines = [
        f"{sample.position}: {sample.id}",
        f"  template     {sample.template!r}",
        f"  instruction  {sample.instruction!r}",
        f"  target       {sample.target!r}",
        f"  image        {len(image)} x {image.shape[2]} x {image.shape[3]} pixels",
        *(f"  in place of  {missing.key}: {missing.reason}" for missing in lost),
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _timing(dataset: MixtureDataset | StreamDataset, config: InspectConfig) -> Table:
    workers = config.data.workers
    whole = loading_seconds(dataset, config.timed, workers)
    parts = loading_parts(dataset, config.data.transform, config.image_size, config.timed, workers)
    table = Table(title=f"the loader alone: {1 / whole:,.0f} samples/s with {workers} workers")
    for name in ("part", "ms a sample and process", "share %"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for name, seconds in parts.items():
        table.add_row(name, f"{1e3 * seconds:.2f}", f"{100 * seconds / sum(parts.values()):.0f}")
    return table


_STEP = 32  # samples that a worker reads at a time
_WARM_UP = 2  # steps of each worker before the clock starts
_DECODED = 64  # samples whose decoding is timed apart


def loading_seconds(dataset: MixtureDataset | StreamDataset, samples: int, workers: int) -> float:
    """Seconds a sample that the loader takes to give so many samples in steps of 32."""
    steps = load_batches(dataset, _steps(), batching=_whole_step, workers=workers)
    try:
        for _ in islice(steps, _WARM_UP * max(workers, 1)):
            pass
        begun, loaded = time.perf_counter(), 0
        while loaded < samples:
            loaded += sum(len(batch.ids) for batch in next(steps).batches)
        return (time.perf_counter() - begun) / loaded
    finally:
        steps.close()


def loading_parts(
    dataset: MixtureDataset | StreamDataset, transform: str, size: int, samples: int, workers: int
) -> dict[str, float]:
    """Seconds of one process that a sample takes: to decode, to transform, and for all else.

    Decoding and transforming are timed in this process; the rest is what the loader takes where every image is the same.

    Args:
        transform, size: what `dataset` makes of its images.
        samples, workers: as of `loading_seconds`.
    """
    blank = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    idle = dataset.with_images(_Always(blank))
    decode, made = _image_seconds(dataset, transform, size)
    rest = loading_seconds(idle, samples, workers) * max(workers, 1)
    return {"decode": decode, "transform": max(made - decode, 0.0), "read, text and transport": rest}


class _Always:
    """Makes the same image of everything: what remains is the work around it."""

    def __init__(self, image: Tensor) -> None:
        self.image = image

    def __call__(self, image: DrawnImage) -> Tensor:
        return self.image


def _steps() -> Iterator[tuple[int, list[int]]]:
    return ((step, list(range(_STEP * step, _STEP * (step + 1)))) for step in count())


def _whole_step(step: int) -> Batching:
    return Batching(kind="fixed")


def _image_seconds(dataset: MixtureDataset | StreamDataset, transform: str, size: int) -> tuple[float, float]:
    """Seconds a sample for decoding its frames, and for making its image, decoding included."""
    decode = made = 0.0
    for sample, _ in dataset.first(_DECODED).items:
        chosen = dataset.sets[dataset.mixture.draw(sample.position).dataset]
        random = position_generator(dataset.mixture.seed, sample.position)
        image = DrawnImage(sample.id, sample.frames, random, chosen.flip)
        made += _seconds(partial(dataset.make_image, image))
        for frame in sample.frames:
            if transform in AUGMENTATIONS:
                view = draw_view(AUGMENTATIONS[transform], image_size(frame, sample.id), random)
                decode += _seconds(partial(decode_for, frame, sample.id, view, size))
            else:
                decode += _seconds(partial(decode_image, frame, sample.id))
    return decode / _DECODED, made / _DECODED


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
