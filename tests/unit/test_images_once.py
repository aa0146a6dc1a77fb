"""Records of one image drawn together, and an image encoded once: the sequence, the pixels, the losses."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from instructblip.config.entry import compose_config
from instructblip.config.schema import TrainConfig
from instructblip.data import mixture as planning
from instructblip.data.batching import Batch, Batching, collate, split_further
from instructblip.data.mixture import Mixture, MixtureEntry, MixtureSegment, order_by_image
from instructblip.data.mixture_dataset import DrawnImage, MixtureDataset, TrainingSet, decoded
from instructblip.data.records import Record, Sample
from instructblip.data.shards import open_split
from instructblip.errors import UserError
from instructblip.models.base import Model
from instructblip.objectives import make_objectives
from instructblip.training.loop import StepResult
from tests.kit.mixtures import TEMPLATES, jpeg, write_split
from tests.kit.stage1 import assert_gradients, step
from tests.kit.tiny import tiny_images, tiny_model

GROUP = 5


def images_of(sizes: Sequence[int]) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


def images_in_groups(images: np.ndarray, lead: int) -> int:
    """How many images are encoded where each group encodes each of its images once."""
    groups = (np.arange(len(images)) - lead) // GROUP
    return len(set(zip(groups.tolist(), images.tolist(), strict=True)))


# --- the order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [0, 3])
@pytest.mark.parametrize(
    "sizes", [[5] * 40, [1, 4, 2, 3, 5, 7, 6] * 20, [3] * 50, [12] * 9, [1] * 33, [2], [1, 4] * 30]
)
def test_groups_hold_few_images_and_each_record_once(sizes: list[int], lead: int) -> None:
    images, stream = images_of(sizes), np.random.default_rng(0)
    order = order_by_image(images, GROUP, lead, stream)
    assert sorted(order.tolist()) == list(range(len(images)))
    least = sum(-(-size // GROUP) for size in sizes)
    found = images_in_groups(images[order], lead)
    # Units that fill no group together, and what stands in front and at the end, are in two.
    spare = len(sizes) if set(sizes) <= {2, 3, 12} else 0
    assert least <= found <= least + spare + 4 * (lead > 0) + 2
    if len(images) > 10:
        other = order_by_image(images, GROUP, lead, np.random.default_rng(1))
        assert order.tolist() != other.tolist()


def mixture(sizes: Sequence[Sequence[int]], *, shards: bool = False) -> Mixture:
    """A dataset for each list of the records that images have; by shards of three images."""
    entries = []
    for number, of_images in enumerate(sizes):
        table = images_of(of_images)
        counts = tuple(int(sum(of_images[at : at + 3])) for at in range(0, len(of_images), 3)) if shards else ()
        entries.append(MixtureEntry(str(number), len(table), 1.0, counts, table.__getitem__))
    return Mixture(entries, seed=3, segments=[MixtureSegment(10, GROUP), MixtureSegment(5, GROUP)])


@pytest.mark.slow
@pytest.mark.parametrize("window", [64, planning.WINDOW])
def test_a_position_is_a_function_of_itself_and_an_epoch_has_each_record_once(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "WINDOW", window)
    sizes = [[1, 4, 2, 3, 7] * 9, [5] * 11]
    plan, records = mixture(sizes, shards=True), [153, 55]
    draws = [plan.draw(position) for position in range(1500)]
    other = mixture(sizes, shards=True)
    asked = np.random.default_rng(0).permutation(1500)[:200].tolist()
    assert [other.draw(position) for position in asked] == [draws[position] for position in asked]
    for dataset, count in enumerate(records):
        drawn = [draw.record for draw in draws if draw.dataset == dataset]
        for epoch in range(len(drawn) // count):
            assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))
    groups = [draws[start : start + GROUP] for start in range(0, 1500, GROUP)]
    assert all(len({draw.dataset for draw in group}) == 1 for group in groups)
    encoded = sum(len({images_of(sizes[draw.dataset])[draw.record] for draw in group}) for group in groups)
    assert encoded < 0.45 * 1500  # drawn alone, 1,500
    assert plan.group(1237) == range(1235, 1240)


def test_shares_are_those_of_records() -> None:
    plan = mixture([[1, 4, 2, 3] * 9, [5] * 8])
    alone = Mixture([MixtureEntry(entry.name, entry.records) for entry in plan.entries], seed=3)
    assert plan.shares.tolist() == alone.shares.tolist() == pytest.approx([0.6, 0.4])
    drawn = Counter(plan.draw(position).dataset for position in range(3000))
    assert drawn[0] / 3000 == pytest.approx(0.6, abs=0.01)
    assert plan.counts(3000).tolist() == [drawn[0], drawn[1]]


# --- the pixels ------------------------------------------------------------------------------------------------------


def test_records_of_one_image_show_the_same_pixels(tmp_path: Path) -> None:
    split = open_split(write_split(tmp_path, "a", [jpeg(number) for number in range(12)]))
    chosen = TrainingSet("a", split, (), TEMPLATES)
    assert len(set(chosen.images(np.arange(len(chosen))).tolist())) == 12
    entry = MixtureEntry("a", len(chosen), 1.0, chosen.shard_records, chosen.images)
    plan = Mixture([entry], seed=3, segments=[MixtureSegment(3, 3)])
    made: list[int] = []

    def make(image: DrawnImage) -> Tensor:
        made.append(image.row)
        return decoded("blip_image_train", 16)(image)

    dataset = MixtureDataset(plan, [chosen], make)
    seen: dict[str, set[bytes]] = {}
    texts = []
    for start in range(0, 72, 3):
        items = [dataset[position] for position in reversed(range(start, start + 3))]
        for image in {sample.image_id for sample, _ in items}:
            pixels = {tensor.numpy().tobytes() for sample, tensor in items if sample.image_id == image}
            assert len(pixels) == 1
            seen.setdefault(image, set()).update(pixels)
        texts += [sample.instruction.split("what")[0] for sample, _ in items]
    assert max(map(len, seen.values())) > 1  # another view in another group
    assert len(set(texts)) == 3  # templates are drawn by position
    (batch,) = Batching(micro_batch_size=3).split([dataset[position] for position in range(3)])
    assert len(set(batch.pixel_ids)) == len(set(batch.image_ids)) < 3 == len(batch.images)
    assert len(made) < 0.7 * 75  # the others were at hand


# --- the losses ------------------------------------------------------------------------------------------------------


def batch_of(rows: Sequence[int], *, told: bool) -> Batch:
    """Questions about images of these numbers."""
    images = tiny_images(8)
    batch = collate(
        [
            (
                Sample(
                    id=str(place),
                    dataset="d",
                    record=Record(str(place), "q"),
                    frames=(),
                    image_location=(0, row),
                    image_id=str(row),
                    position=place,
                    instruction=f"what is {place}?",
                    target="a red cat" if place % 2 else "blue",
                    template="",
                ),
                images[row].clone(),
            )
            for place, row in enumerate(rows)
        ]
    )
    assert batch.pixel_ids == [rows.index(row) for row in rows]
    return batch if told else batch._replace(pixel_ids=())


class Encoded:
    """Counts what goes through a model's vision encoder."""

    def __init__(self, model: Model) -> None:
        self.frames = 0
        model.vision.register_forward_hook(self.count)

    def count(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.frames += len(output)


@pytest.mark.parametrize("trained", [("qformer",), ("vision", "qformer")])
def test_an_image_is_encoded_once_and_trains_the_same(trained: tuple[str, ...]) -> None:
    rows = [0, 0, 1, 1, 1, 2, 0, 3]
    results: list[tuple[StepResult, dict[str, Tensor], int]] = []
    for told in (False, True):
        model = tiny_model()
        model.choose_trained(trained)
        counted = Encoded(model)
        found, gradients = step(model, [batch_of(rows, told=told)], make_objectives({"language_modeling": 1.0}))
        results.append((found, gradients, counted.frames))
    (plain, expected, all_frames), (once, found_gradients, frames) = results
    assert (all_frames, frames) == (8, 4)
    assert [(result.work.encoded, result.work.frames) for result in (plain, once)] == [(8, 8), (4, 8)]
    assert once.loss == pytest.approx(plain.loss, abs=1e-6)
    assert ("vision.backbone.conv_stem.weight" in expected) is ("vision" in trained)
    assert_gradients(found_gradients, expected)


def test_tokens_encoded_before_are_cut_with_their_samples() -> None:
    batch = batch_of([0, 0, 1, 1], told=True)
    tokens = torch.arange(4.0).view(4, 1, 1, 1)
    parts = split_further([batch._replace(encoded=(tokens,))], 3)
    assert [part.ids for part in parts] == [["0"], ["1"], ["2", "3"]]
    assert torch.equal(torch.cat([part.encoded[0] for part in parts]), tokens)


def test_pixels_that_differ_are_encoded_each() -> None:
    images = tiny_images(2)
    batch = batch_of([0, 0], told=True)
    items = [
        (Sample("a", "d", Record("a", "q"), (), (0, 0), "same", 0, "?", "b", ""), image)
        for image in (*images, images[1])
    ]
    assert batch.pixel_ids == [0, 0]
    assert collate(items).pixel_ids == [0, 1, 1]
    assert collate([(sample, torch.zeros(1, 4, 8)) for sample, _ in items]).pixel_ids == ()


def test_cuts_by_length_keep_an_image_together() -> None:
    images, lengths = tiny_images(4), {"a": 9, "b": 1, "c": 8, "d": 7, "e": 2, "f": 6}
    items = [
        (Sample(name, "d", Record(name, "q"), (), (0, row), str(row), 0, name, "x", ""), images[row])
        for name, row in (("a", 0), ("b", 0), ("c", 1), ("d", 2), ("e", 1), ("f", 3))
    ]
    batching = Batching("packed", micro_batch_size=2, length=lambda text, *_: lengths[text])
    assert [batch.ids for batch in batching.split(items)] == [["a", "b"], ["c", "e"], ["d", "f"]]


def test_groups_fill_the_batch() -> None:
    settings = ["mixture.per=image", "mixture.image_records=4"]
    assert compose_config("train", TrainConfig, settings).mixture.per == "image"
    with pytest.raises(
        UserError, match=r"draws 7 records together, but .* a batch_size of .* change that or mixture.image"
    ):
        compose_config("train", TrainConfig, ["mixture.per=image", "mixture.image_records=7"])
