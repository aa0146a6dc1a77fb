"""How fast a loader is when nothing else is to be done, and what its time goes into."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice

import torch
from torch import Tensor

from instructblip.data.batching import Batching
from instructblip.data.loader import DrawnImage, MixtureDataset, load_batches
from instructblip.data.mixture import position_generator
from instructblip.data.transforms import AUGMENTATIONS, decode_for, decode_image, draw_view, image_size

_STEP = 32  # samples that a worker reads at a time
_WARM_UP = 2  # steps of each worker before the clock starts
_DECODED = 64  # samples whose decoding is timed apart


def loading_seconds(dataset: MixtureDataset, samples: int, workers: int) -> float:
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


def loading_parts(dataset: MixtureDataset, transform: str, size: int, samples: int, workers: int) -> dict[str, float]:
    """Seconds of one process that a sample takes: to decode, to transform, and for all else.

    Decoding and transforming are timed in this process; the rest is what the loader takes where every image is the same.

    Args:
        transform, size: what `dataset` makes of its images.
        samples, workers: as of `loading_seconds`.
    """
    blank = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    idle = MixtureDataset(dataset.mixture, dataset.sets, _Always(blank))
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


def _image_seconds(dataset: MixtureDataset, transform: str, size: int) -> tuple[float, float]:
    """Seconds a sample for decoding its frames, and for making its image, decoding included."""
    decode = made = 0.0
    for position in range(_DECODED):
        sample, _ = dataset[position]
        chosen = dataset.sets[dataset.mixture.draw(position).dataset]
        number, row = sample.image_location
        random = position_generator(dataset.mixture.seed, position)
        image = DrawnImage(chosen.split.shards[number], row, sample.frames, random, chosen.flip)
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
