"""Training steps of BLIP, on LAVIS's samples and weights or on tiny random ones."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from instructblip.data.batching import Batch
from instructblip.models.blip import BLIP, BLIPRetrieval, Momentum
from instructblip.models.vision import VisionEncoder
from instructblip.objectives.base import PartnerRows, WholeBatch
from instructblip.objectives.matching import PairMatching
from instructblip.training.backward import image_number
from tests.kit.blip import tiny_pretrain
from tests.kit.stage1 import WORDS, noted
from tests.kit.tiny import tiny_images
from tests.kit.vectors import case

SAMPLES = 16


class WatchedPairMatching(PairMatching):
    """Pre-training's matching that notes what it drew: by position, the positions of the image and of the text."""

    def __init__(self, weight: float = 1.0, among: int | None = None) -> None:
        super().__init__(weight, among)
        self.drawn: dict[int, tuple[int, int]] = {}

    def draw(self, batch: WholeBatch, seed: int) -> PartnerRows:
        return noted(self.drawn, batch, super().draw(batch, seed))


def lavis_batch(name: str, rows: Sequence[int], targets: Sequence[str], **columns: Any) -> Batch:
    """Samples of a case of `blip_med`, pictures by their numbers, see `show`."""
    count = len(case("blip_med", name)["inputs"]["image"])
    pictures = torch.arange(count, dtype=torch.uint8)[:, None, None, None, None].expand(-1, 1, 3, 32, 32)
    ids = columns.pop("image_ids", range(count))
    return Batch(
        ids=[str(row) for row in rows],
        datasets=["coco"] * len(rows),
        instructions=columns.pop("instructions", [""] * len(rows)),
        targets=[targets[row] for row in rows],
        images=pictures[list(rows)],
        places=list(range(len(rows))),
        image_ids=[str(ids[row]) for row in rows],
        positions=list(rows),
        **columns,
    )


def show(model: BLIP, name: str) -> None:
    """Let the encoder, and its copy, see a case's normalised pixels, which no picture has, in place of numbered pictures."""
    pixels = case("blip_med", name)["inputs"]["image"]

    def look_up(vision: VisionEncoder) -> None:
        def forward(images_B3HW: Tensor) -> Tensor:
            tokens: Tensor = vision.backbone.forward_features(pixels[images_B3HW[:, 0, 0, 0].long()])
            return tokens

        vision.forward = forward  # type: ignore[method-assign]

    look_up(model.vision)
    if isinstance(model, BLIPRetrieval):
        look_up(momentum_of(model).vision)


def momentum_of(model: BLIPRetrieval) -> Momentum:
    """The copies and the queue of a model that has them."""
    assert isinstance(model.momentum, Momentum)
    return model.momentum


def image_numbers(ids: Tensor) -> Tensor:
    """LAVIS's image ids as training numbers images; -100 stays, it is of no image."""
    numbers = [-100 if number == -100 else image_number(str(number)) for number in ids.flatten().tolist()]
    return torch.tensor(numbers).view(ids.shape)


def tiny_blip(parts: Sequence[str] = ("vision", "text"), *, queue_size: int = 24, **options: Any) -> BLIPRetrieval:
    """A tiny model of pre-training whose copies differ from what they follow, in training mode; as `tiny_pretrain`."""
    model = tiny_pretrain(queue_size=queue_size, **options)
    return model.choose_trained(parts).train()


def tiny_batch(rows: Sequence[int], *, first: int = 0) -> Batch:
    """Samples of sixteen made-up ones; every fourth shows the image of the one before. The first one's position is given."""
    image_of = [row - (row % 4 == 3) for row in range(SAMPLES)]
    return Batch(
        ids=[str(row) for row in rows],
        datasets=["captions"] * len(rows),
        instructions=[""] * len(rows),
        targets=[f"{WORDS[row % 8]} and {WORDS[row // 2]}" for row in rows],
        images=tiny_images(SAMPLES)[image_of][list(rows)],
        places=list(range(len(rows))),
        image_ids=[str(image_of[row]) for row in rows],
        positions=[first + row for row in rows],
    )
