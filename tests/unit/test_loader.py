"""Positions decide what a step holds: not workers, ranks, micro-batches or the step a run was resumed at."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from instructblip.data.batching import Batch, Batching, Item, collate, split_further
from instructblip.data.loader import LoadedStep, load_batches
from instructblip.data.mixture import Mixture, MixtureEntry
from instructblip.data.mixture_dataset import MixtureDataset, Texts, TrainingSet, decoded
from instructblip.data.records import Record
from instructblip.data.shards import PreparedSplit, ShardReader, ShardWriter, open_split, shard_path
from instructblip.data.templates import TemplateSet
from instructblip.errors import UserError
from instructblip.images import decode_image, resize_square
from instructblip.training.schedule import Phase, rank_positions, step_batching, total_steps
from tests.kit.losses import LANGUAGE

TEMPLATES = TemplateSet("two", "", ("{question}", "Q: {question} A:"))
IMAGES = 7


def _phase(steps: int, batch_size: int, micro_batch_size: int) -> Phase:
    return Phase(
        name=f"{steps} of {batch_size}",
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


PHASES = (_phase(3, 8, 4), _phase(4, 4, 4), _phase(2, 12, 3))
POSITIONS = 3 * 8 + 4 * 4 + 2 * 12


def _png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (number * 30, 255 - number * 20, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def _write_split(folder: Path) -> PreparedSplit:
    """Seven images in two shards, a record of one kind each and two of another."""
    entries = []
    for shard, numbers in enumerate((range(4), range(4, IMAGES))):
        path = shard_path(folder, shard)
        with ShardWriter.open(path) as writer:
            for number in numbers:
                records = [Record(f"{number}-c", "color", f"color of {number}?", answers=(f"c{number}", "other"))]
                records += [Record(f"{number}-y{k}", "yes_no", f"is {number} {k}?", answers=("yes",)) for k in range(2)]
                writer.add(f"image_{number}", {"png": _png(number)}, str(number), records)
        entry = {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        entries.append(entry | {"records_by_kind": ShardReader(path).records_by_kind()})
    manifest = {"format": 1, "dataset": "tiny", "split": "train", "shards": entries}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"records_by_kind": {"color": 7, "yes_no": 14}}))
    return open_split(folder)


def _pixels(shard: ShardReader, row: int) -> Tensor:
    return resize_square(decode_image(shard.read(row)[0][0], "image"), 4)[None]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> MixtureDataset:
    split = _write_split(tmp_path_factory.mktemp("train"))
    sets = [TrainingSet(kind, split, (kind,), TEMPLATES) for kind in ("color", "yes_no")]
    mixture = Mixture([MixtureEntry(item.name, len(item)) for item in sets], seed=11)
    return MixtureDataset(mixture, sets, decoded("resize_square", 4))


Row = tuple[str, str, str, str, list[int]]


def _rows(steps: Iterable[LoadedStep]) -> list[tuple[int, list[Row]]]:
    """Each step's samples in order: id, dataset, instruction, target, pixels."""
    return [(step, [row for batch in batches for row in _batch_rows(batch)]) for step, batches, *_ in steps]


def _batch_rows(batch: Batch) -> list[Row]:
    pixels = batch.images.flatten(1).tolist()
    return list(zip(batch.ids, batch.datasets, batch.instructions, batch.targets, pixels, strict=True))


def _load(dataset: MixtureDataset, start: int = 0, workers: int = 0, rank: int = 0, world: int = 1) -> list:
    positions = rank_positions(PHASES, start, rank=rank, world_size=world)
    return _rows(load_batches(dataset, positions, batching=partial(step_batching, PHASES), workers=workers))


@pytest.fixture(scope="module")
def whole(dataset: MixtureDataset) -> list[tuple[int, list[Row]]]:
    return _load(dataset)


def test_the_sequence_is_that_of_the_mixture(dataset: MixtureDataset, whole: list[tuple[int, list[Row]]]) -> None:
    rows = [row for _, step_rows in whole for row in step_rows]
    assert len(rows) == POSITIONS
    for position, (sample_id, name, instruction, target, pixels) in enumerate(rows):
        draw = dataset.mixture.draw(position)
        chosen = dataset.sets[draw.dataset]
        shard, row, place = chosen.split.records(chosen.kinds)[draw.record].tolist()
        assert chosen.locate(draw.record) == (shard, row, place)
        record = chosen.split.read(shard, row)[1][place]
        assert (name, sample_id) == (chosen.name, f"{chosen.name}/{record.id}")
        assert instruction in [
            template.replace("{question}", record.question or "") for template in TEMPLATES.templates
        ]
        assert target in record.answers
        assert pixels == _pixels(chosen.split.shards[shard], row).flatten().tolist()
    assert {row[1] for row in rows} == {"color", "yes_no"}
    assert {row[2].startswith("Q: ") for row in rows} == {True, False}


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(dataset: MixtureDataset, whole: list[tuple[int, list[Row]]], workers: int) -> None:
    assert _load(dataset, workers=workers) == whole


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_take_slices_of_the_same_global_batches(
    dataset: MixtureDataset, whole: list[tuple[int, list[Row]]], world: int
) -> None:
    ranks = [_load(dataset, rank=rank, world=world) for rank in range(world)]
    joined = [(parts[0][0], [row for _, step_rows in parts for row in step_rows]) for parts in zip(*ranks, strict=True)]
    assert joined == whole
    assert all(len(ranks[0][step][1]) * world == len(whole[step][1]) for step in range(len(whole)))


@pytest.mark.parametrize("start", range(total_steps(PHASES) + 1))
def test_any_start_is_the_tail_of_the_whole(
    dataset: MixtureDataset, whole: list[tuple[int, list[Row]]], start: int
) -> None:
    assert _load(dataset, start=start) == whole[start:]


def test_samples_say_where_they_were_drawn_and_which_image_they_show(dataset: MixtureDataset) -> None:
    """An image is the same in every view of its dataset; sorted and cut batches keep both beside their samples."""
    batching = Batching("bucketed", micro_batch_size=3, length=lambda prompt, target, frames: len(prompt))
    steps = [(0, list(range(20, 40)))]
    ((_, batches, *_),) = load_batches(dataset, steps, batching=lambda step: batching)
    drawn: dict[str, set[str]] = {}
    positions = []
    for batch in batches:
        for name, sample, image, position, place in zip(
            batch.datasets, batch.ids, batch.image_ids, batch.positions, batch.places, strict=True
        ):
            assert image == f"tiny/image_{sample.split('/')[1].split('-')[0]}"
            assert position == 20 + place
            assert sample == dataset[position][0].id
            drawn.setdefault(image, set()).add(name)
            positions.append(position)
    assert positions != sorted(positions) and sorted(positions) == list(range(20, 40))
    assert {"color", "yes_no"} in drawn.values()


def test_targets_are_processed_as_the_released_code_does(tmp_path: Path) -> None:
    with ShardWriter.open(shard_path(tmp_path, 0)) as writer:
        record = Record("0", "color", "What?", answers=('A dog (small): "Rex".  It runs!',))
        writer.add("image_0", {"png": _png(0)}, "0", [record])
    entry = {"name": "shard-000000.tar", "sha256": hashlib.sha256(shard_path(tmp_path, 0).read_bytes()).hexdigest()}
    manifest = {"format": 1, "dataset": "tiny", "split": "train", "shards": [entry | {"records_by_kind": {"color": 1}}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"records_by_kind": {"color": 1}}))
    sets, mixture = [TrainingSet("color", open_split(tmp_path), (), TEMPLATES)], Mixture([MixtureEntry("color", 1)])
    for processor, expected in (("none", record.answers[0]), ("blip_caption", "a dog small rex it runs")):
        dataset = MixtureDataset(mixture, sets, decoded("resize_square", 4), Texts(processor))  # type: ignore[arg-type]
        sample, _ = dataset[0]
        assert sample.target == expected
        assert "What?" in sample.instruction


def test_a_sample_has_all_its_answers_where_a_model_learns_them_all(tmp_path: Path) -> None:
    """Each with the share of the people who gave it, of whom some gave none; questions as the released code cleans them."""
    asked = Record(
        "0", "color", 'What (color) is "it"?', answers=("red", "A dog."), answer_weights=(6.0, 3.0), annotators=10
    )
    plain = Record("1", "color", "Which?", answers=("blue",))
    with ShardWriter.open(shard_path(tmp_path, 0)) as writer:
        writer.add("image_0", {"png": _png(0)}, "0", [asked, plain])
    entry = {"name": "shard-000000.tar", "sha256": hashlib.sha256(shard_path(tmp_path, 0).read_bytes()).hexdigest()}
    manifest = {"format": 1, "dataset": "tiny", "split": "train", "shards": [entry | {"records_by_kind": {"color": 2}}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"records_by_kind": {"color": 2}}))
    bare, mixture = TemplateSet("bare", "", ("{question}",)), Mixture([MixtureEntry("color", 2)])
    sets = [TrainingSet("color", open_split(tmp_path), (), bare)]

    def drawn(**options: Any) -> dict[str, Item]:
        dataset = MixtureDataset(mixture, sets, decoded("resize_square", 4), Texts("blip_caption", **options))
        return {item[0].id: item for item in (dataset[place] for place in range(2))}

    items = drawn(all_answers=True, prompt_processor="blip_question")
    assert items["color/0"][0].instruction == "what color is it?"
    batch = collate([items["color/0"], items["color/1"]])
    assert [dict(answers) for answers in batch.answers] == [{"red": 0.6, "a dog": 0.3}, {"blue": 1.0}]
    assert [part.answers for part in split_further([batch], 2)] == [batch.answers[:1], batch.answers[1:]]
    assert not collate(list(drawn().values())).answers


def test_micro_batches_have_their_size(dataset: MixtureDataset) -> None:
    sizes = {
        step: [len(batch.ids) for batch in batches]
        for step, batches, *_ in load_batches(
            dataset, rank_positions(PHASES, 0), batching=partial(step_batching, PHASES)
        )
    }
    assert (sizes[0], sizes[3], sizes[8]) == ([4, 4], [4], [3, 3, 3, 3])


def test_videos_have_their_frames_and_do_not_mix_with_pictures(dataset: MixtureDataset) -> None:
    sample, image = dataset[0]
    video = image.expand(4, -1, -1, -1)
    assert collate([(sample, video), (sample, video)]).images.shape == (2, 4, 3, 4, 4)
    other = dataclasses.replace(sample, dataset="clips")
    with pytest.raises(UserError, match=f"one number of frames, but has clips 4, {sample.dataset} 1; set"):
        collate([(other, video), (sample, image)])
    assert sample.frames == dataset.sets[0].split.read(*sample.image_location)[0]


def test_images_have_one_frame(dataset: MixtureDataset) -> None:
    loaded = next(load_batches(dataset, rank_positions(PHASES, 0), batching=partial(step_batching, PHASES)))
    batch = loaded.batches[0]
    assert batch.images.shape == (4, 1, 3, 4, 4)
    assert batch.images.dtype == torch.uint8
