"""The global sequence of a run is one and the same on any number of ranks and workers, and from any restart on."""

import random
from collections.abc import Iterator
from functools import partial

import pytest

from instructblip.data import mixture as order
from instructblip.data.batching import Batching
from instructblip.data.loader import LoadedStep, load_batches
from instructblip.data.mixture_dataset import MixtureDataset
from instructblip.training.schedule import Phase, rank_positions, step_batching, total_steps
from tests.kit.losses import LANGUAGE
from tests.kit.mixtures import jpeg, mixture_of, write_split


def _phase(steps: int, batch_size: int, micro_batch_size: int) -> Phase:
    return Phase(
        name="phase",
        steps=steps,
        batch_size=batch_size,
        batching=Batching(micro_batch_size=micro_batch_size),
        learning_rate=1.0,
        warmup_steps=0,
        warmup_learning_rate=0.0,
        final_learning_rate=0.0,
        new_parts_scale=1.0,
        objectives=LANGUAGE,
    )


pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores

PHASES = (_phase(5, 16, 2), _phase(4, 8, 8))
STEPS = total_steps(PHASES)

# id, dataset, instruction (which the template makes), target, and the augmented pixels
Row = tuple[str, str, str, str, bytes]


def _rows(step: LoadedStep) -> list[Row]:
    return [
        row
        for batch in step.batches
        for row in zip(
            batch.ids,
            batch.datasets,
            batch.instructions,
            batch.targets,
            [image.numpy().tobytes() for image in batch.images],
            strict=True,
        )
    ]


def _rank(dataset: MixtureDataset, start: int, rank: int, world: int, workers: int) -> Iterator[LoadedStep]:
    positions = rank_positions(PHASES, start, rank=rank, world_size=world)
    return load_batches(dataset, positions, batching=partial(step_batching, PHASES), workers=workers)


def _sequence(
    dataset: MixtureDataset, *, world: int = 1, workers: int = 0, start: int = 0, stop: int = STEPS
) -> list[tuple[int, list[Row], list[tuple[str, str]]]]:
    """Step, rows of all ranks in their order, and what was lost, as the ranks together see it."""
    ranks = [_rank(dataset, start, rank, world, workers) for rank in range(world)]
    found = []
    for _ in range(start, stop):
        parts = [next(rank) for rank in ranks]
        assert len({part.step for part in parts}) == 1
        lost = [(sample.dataset, sample.key) for part in parts for sample in part.lost]
        found.append((parts[0].step, [row for part in parts for row in _rows(part)], lost))
    for rank in ranks:
        rank.close()
    return found


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MixtureDataset]:
    """Three datasets, one of them larger than a window, one with damaged images, one that may not be flipped."""
    folder = tmp_path_factory.mktemp("splits")
    images = [jpeg(seed) for seed in range(30)]
    sizes = {"large": 30, "damaged": 12, "small": 5}
    folders = {
        name: write_split(
            folder / name, name, images[:count], damaged={3: b"", 7: images[0][:300]} if count == 12 else {}
        )
        for name, count in sizes.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "WINDOW", 20)
        yield mixture_of(folders, kinds={"small": ("a",)}, flip={"small": False})


@pytest.fixture(scope="module")
def whole(dataset: MixtureDataset) -> list[tuple[int, list[Row], list[tuple[str, str]]]]:
    return _sequence(dataset)


def test_the_sequence_has_what_it_is_to_show(whole: list[tuple[int, list[Row], list[tuple[str, str]]]]) -> None:
    rows = [row for _, step, _ in whole for row in step]
    assert len(rows) == 5 * 16 + 4 * 8
    assert {row[1] for row in rows} == {"large", "damaged", "small"}
    assert {row[2].split("what")[0] for row in rows} == {"", "Q: ", "Question: "}
    assert {name for _, _, lost in whole for name, _ in lost} == {"damaged"}
    ids = {sample_id for sample_id, *_ in rows}
    seen = [[row[4] for row in rows if row[0] == sample_id] for sample_id in ids]
    assert any(len(set(pixels)) > 1 for pixels in seen)  # another view at another position
    assert not ids & {f"damaged/{image}-{place}" for image in (3, 7) for place in range(3)}


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(
    "world", [1, 2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_any_number_of_ranks_and_workers(
    dataset: MixtureDataset, whole: list[tuple[int, list[Row], list[tuple[str, str]]]], world: int, workers: int
) -> None:
    assert _sequence(dataset, world=world, workers=workers) == whole


@pytest.mark.slow
def test_twenty_stops_and_restarts_with_another_number_of_ranks(
    dataset: MixtureDataset, whole: list[tuple[int, list[Row], list[tuple[str, str]]]]
) -> None:
    stream = random.Random(0)
    for _ in range(20):
        stop = stream.randrange(1, STEPS)
        before, after = stream.sample([1, 2, 4, 8], 2)
        first = _sequence(dataset, world=before, stop=stop)
        assert first + _sequence(dataset, world=after, start=stop) == whole


@pytest.mark.slow
def test_records_of_one_image_together_are_one_sequence_too(dataset: MixtureDataset) -> None:
    folders = {item.name: item.split.folder for item in dataset.sets}
    together = mixture_of(folders, kinds={"small": ("a",)}, flip={"small": False}, group=4)
    whole = _sequence(together)
    assert _sequence(together, world=4, workers=1) == whole
    first = _sequence(together, world=2, stop=4)
    assert first + _sequence(together, world=8, start=4) == whole
    assert {name for _, _, lost in whole for name, _ in lost} == {"damaged"}
    rows = [row for _, step, _ in whole for row in step]
    groups = [rows[start : start + 4] for start in range(0, len(rows), 4)]
    pixels = sum(len({row[4] for row in group}) for group in groups)
    assert pixels < 0.7 * len(rows)


def test_another_seed_gives_another_sequence(dataset: MixtureDataset, whole: list) -> None:
    folders = {item.name: item.split.folder for item in dataset.sets}
    other = _sequence(mixture_of(folders, kinds={"small": ("a",)}, flip={"small": False}, seed=12))
    assert [row[0] for _, rows, _ in other for row in rows] != [row[0] for _, rows, _ in whole for row in rows]
