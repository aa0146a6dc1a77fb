"""Training steps of BLIP-2's first stage, on LAVIS's samples and weights or on tiny random ones."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from instructblip.data.batching import Batch
from instructblip.models.base import Model
from instructblip.models.blip2 import BLIP2
from instructblip.objectives import Objective
from instructblip.objectives.base import PartnerRows, WholeBatch
from instructblip.objectives.matching import Matching
from instructblip.training.loop import StepResult, train_step
from instructblip.training.optim import make_adamw
from instructblip.training.parallel import StepContext
from tests.kit.tiny import redraw, tiny_images, tiny_qformer, tiny_vision
from tests.kit.vectors import bert_tokenizer, case

WORDS = ("a man", "two dogs", "a small red car", "people in the snow", "a cat", "a woman is eating", "a bus", "a tree")


class GivenPartners(Matching):
    """Matching with the negatives that someone else drew: rows of the global batch, by position."""

    def __init__(self, images: Sequence[int], texts: Sequence[int], weight: float = 1.0) -> None:
        super().__init__(weight)
        self.images, self.texts = images, texts

    def draw(self, batch: WholeBatch, seed: int) -> PartnerRows:
        places = batch.positions_N[batch.own_rows_B].tolist()
        row_of = {position: row for row, position in enumerate(batch.positions_N.tolist())}
        images, texts = ([row_of[wrong[place]] for place in places] for wrong in (self.images, self.texts))
        return PartnerRows(images, texts)


class WatchedMatching(Matching):
    """Matching that notes what it drew: by position, the positions of the image and of the text."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.drawn: dict[int, tuple[int, int]] = {}

    def draw(self, batch: WholeBatch, seed: int) -> PartnerRows:
        return noted(self.drawn, batch, super().draw(batch, seed))


def noted(drawn: dict[int, tuple[int, int]], batch: WholeBatch, found: PartnerRows) -> PartnerRows:
    """Note by position what was drawn, and give it on."""
    positions = batch.positions_N.tolist()
    for row, image, text in zip(batch.own_rows_B.tolist(), found.images, found.answers, strict=True):
        drawn[positions[row]] = positions[image], positions[text]
    return found


class Step(NamedTuple):
    """A training step: its result, and the gradients by name."""

    result: StepResult
    gradients: dict[str, Tensor]


def lavis_batch(rows: Sequence[int], image_ids: Sequence[object] = range(6)) -> Batch:
    """Samples of LAVIS's case `losses`."""
    vectors = case("blip2_stage1", "losses")
    return _batch(rows, vectors["texts"], vectors["inputs"]["image_tokens"][:, None], image_ids)


def tiny_stage1(seed: int = 0, *, dropout: float = 0.0, **options: Any) -> BLIP2:
    """A whole model with random weights that all matter, in training mode."""
    torch.manual_seed(seed)
    vision, tokenizer = tiny_vision(), bert_tokenizer()
    model = BLIP2(
        vision=vision,
        vision_norm=nn.LayerNorm(vision.width),
        qformer=tiny_qformer(
            vision_width=vision.width,
            dropout=dropout,
            text_outputs=True,
            language_model_head=True,
            vocab_size=len(tokenizer),
        ),
        tokenizer=tokenizer,
        feature_width=16,
        **options,
    )
    redraw(model.qformer, std=0.3)
    return model.train()


def tiny_batch(rows: Sequence[int], image_ids: Sequence[object] | None = None) -> Batch:
    """Samples of sixteen made-up ones; every fourth shows the image of the one before."""
    ids = [row - (row % 4 == 3) for row in range(16)] if image_ids is None else image_ids
    texts = [f"{WORDS[row % 8]} and {WORDS[row // 2]}" for row in range(16)]
    return _batch(rows, texts, tiny_images(16)[[row - (row % 4 == 3) for row in range(16)]], ids)


def step(
    model: Model,
    batches: Sequence[Batch],
    objectives: Sequence[Objective],
    *,
    seed: int = 0,
    context: StepContext | None = None,
    rate: float = 0.0,
) -> Step:
    """One optimiser step, dropout drawn from `seed`."""
    optimizer = make_adamw(model.named_parameters(), weight_decay=0.0, betas=(0.9, 0.999))
    torch.manual_seed(seed)
    result = train_step(
        model.train(),
        optimizer,
        batches,
        objectives=objectives,
        rate=rate,
        clip_norm=None,
        seed=seed,
        context=context or StepContext(),
    )
    return Step(result, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def assert_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float = 1e-5) -> None:
    """Equal by name up to a share of the largest."""
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=bound, atol=bound * scale, msg=name)


def _batch(rows: Sequence[int], texts: Sequence[str], images: Tensor, image_ids: Sequence[object]) -> Batch:
    return Batch(
        ids=[str(row) for row in rows],
        datasets=["captions"] * len(rows),
        instructions=[""] * len(rows),
        targets=[texts[row] for row in rows],
        images=images[list(rows)],
        places=list(range(len(rows))),
        image_ids=[str(image_ids[row]) for row in rows],
        positions=list(rows),
    )
