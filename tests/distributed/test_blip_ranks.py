"""BLIP's training on several ranks has the losses, gradients, negatives, queue and momentum copies of one process."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from instructblip.data.batching import Batch
from instructblip.distributed import Ranks, whole_tensors
from instructblip.models.blip import BLIP
from instructblip.objectives import Objective
from instructblip.objectives.distillation import Distillation, PairDistillation
from instructblip.objectives.language_modeling import Answering, Captioning
from instructblip.training.parallel import StepContext, parallelize
from tests.kit.blip import tiny_vqa
from tests.kit.blip_training import WatchedPairMatching, tiny_batch, tiny_blip
from tests.kit.ranks import on_ranks
from tests.kit.stage1 import Step, WatchedMatching, assert_gradients, step

pytestmark = pytest.mark.slow


def share(ranks: Ranks, micro_batch: int, first: int = 0) -> list[Batch]:
    """This rank's micro-batches of sixteen samples."""
    count = 16 // ranks.world_size
    rows = list(range(ranks.rank * count, (ranks.rank + 1) * count))
    return [tiny_batch(rows[start : start + micro_batch], first=first) for start in range(0, count, micro_batch)]


def on_this(model: BLIP, ranks: Ranks, batches: Sequence[Batch], objectives: Sequence[Objective], kind: str) -> Step:
    """A step of a model that is laid over the ranks as a run lays it."""
    wanted = frozenset[str]().union(*(objective.outputs for objective in objectives))
    unused = not model.uses_every_weight(wanted)
    wrapped = parallelize(model, ranks, kind="single" if ranks.world_size == 1 else kind, some_unused=unused)
    return step(model, batches, objectives, context=StepContext(ranks=ranks, wrapped=wrapped))


def pre_training(ranks: Ranks, micro_batch: int, parts: Sequence[str], kind: str = "ddp") -> dict[str, Any]:
    """A step; the queue has room for one and a half batches."""
    model, matching = tiny_blip(parts), WatchedPairMatching(0.8, among=8)
    objectives = (PairDistillation(1.3), matching, Captioning(0.5))
    found = on_this(model, ranks, share(ranks, micro_batch, first=32), objectives, kind)
    return as_values(model, found, matching.drawn)


def retrieval(ranks: Ranks, micro_batch: int) -> dict[str, Any]:
    model, matching = tiny_blip(), WatchedMatching(0.8)
    return as_values(
        model, on_this(model, ranks, share(ranks, micro_batch), (Distillation(1.3), matching), "ddp"), matching.drawn
    )


def questions(ranks: Ranks, micro_batch: int) -> dict[str, Any]:
    """Two answers to every third question, one to the others."""
    model = tiny_vqa().train()
    batches = []
    for plain in share(ranks, micro_batch):
        given = [
            (("a cat", 0.7), ("two dogs", 0.3)) if place % 3 == 0 else ((text, 0.4),)
            for place, text in zip(plain.positions, plain.targets, strict=True)
        ]
        batches.append(plain._replace(instructions=["a man"] * len(given), answers=given))
    return as_values(model, on_this(model, ranks, batches, (Answering(),), "ddp"), {})


def as_values(model: BLIP, found: Step, drawn: dict[int, tuple[int, int]]) -> dict[str, Any]:
    return {
        "losses": found.result.loss_by_objective,
        "norm": found.result.grad_norm,
        "gradients": whole_tensors(found.gradients, keep=True),
        "drawn": drawn,
        "momentum": model.part_state("momentum") if "momentum" in model.PARTS else {},
    }


def assert_alike(alone: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    assert {position: pair for found in results for position, pair in found["drawn"].items()} == alone["drawn"]
    for found in results:
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        assert found["norm"] == pytest.approx(alone["norm"], rel=1e-5)
        assert_gradients(found["gradients"], alone["gradients"])
        assert found["momentum"].keys() == alone["momentum"].keys()
        for name, tensor in found["momentum"].items():
            torch.testing.assert_close(tensor, alone["momentum"][name], rtol=1e-6, atol=1e-6, msg=name)
            assert torch.equal(tensor, results[0]["momentum"][name])


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "parts", "kind"),
    [
        (2, 8, ("vision", "text"), "ddp"),
        (2, 3, ("vision", "text"), "fsdp"),
        (4, 2, ("text",), "ddp"),
    ],
)
def test_pre_training_on_ranks_is_that_of_one_process(
    ranks: int, micro_batch: int, parts: Sequence[str], kind: str
) -> None:
    assert_alike(pre_training(Ranks(), 16, parts), on_ranks(ranks, pre_training, micro_batch, parts, kind))


def test_retrieval_on_ranks_is_that_of_one_process() -> None:
    assert_alike(retrieval(Ranks(), 16), on_ranks(2, retrieval, 4))


def test_questions_on_ranks_are_those_of_one_process() -> None:
    assert_alike(questions(Ranks(), 16), on_ranks(2, questions, 4))
