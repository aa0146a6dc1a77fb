"""A step of BLIP-2's first stage depends on the global batch alone, however it is cut; negatives on seed and position."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from instructblip.distributed import ALONE
from instructblip.errors import UserError
from instructblip.models.base import Partners
from instructblip.models.blip2 import BLIP2
from instructblip.models.qformer import QFormer
from instructblip.objectives import make_objectives
from instructblip.objectives.base import WholeBatch
from instructblip.objectives.contrastive import Contrastive
from instructblip.objectives.language_modeling import Captioning
from instructblip.objectives.matching import Matching
from instructblip.training.parallel import StepContext, parallelize
from instructblip.weights.bert import initialize_like_bert
from tests.kit.stage1 import (
    Step,
    WatchedMatching,
    assert_gradients,
    step,
    tiny_batch,
    tiny_stage1,
)
from tests.kit.tiny import tiny_vision
from tests.kit.vectors import bert_tokenizer

ROWS = list(range(16))
SPLITS = {size: [ROWS[start : start + size] for start in range(0, 16, size)] for size in (1, 2, 4, 8, 16)} | {
    0: [[9, 2, 5], [15, 0, 1, 3, 4, 14], [6], [8, 7, 10, 13, 12, 11]]
}


def trained(
    split: Sequence[Sequence[int]], *, model: BLIP2 | None = None, seed: int = 0
) -> tuple[Step, WatchedMatching]:
    """A step with all three objectives, none of weight 1, and what was drawn."""
    matching = WatchedMatching(0.8)
    objectives = (Contrastive(1.3), matching, Captioning(0.5))
    return step(model or tiny_stage1(), [tiny_batch(rows) for rows in split], objectives, seed=seed), matching


@pytest.fixture(scope="module")
def whole() -> tuple[Step, WatchedMatching]:
    return trained(SPLITS[16])


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 1, 2, 4, 8])
def test_any_micro_batches_give_the_same_losses_gradient_and_negatives(
    size: int, whole: tuple[Step, WatchedMatching]
) -> None:
    (expected, drawn), (found, matching) = whole, trained(SPLITS[size])
    assert matching.drawn == drawn.drawn
    assert found.result.loss == pytest.approx(expected.result.loss, rel=1e-6)
    assert found.result.loss_by_objective == pytest.approx(expected.result.loss_by_objective, rel=1e-6)
    assert found.result.loss_by_dataset == pytest.approx(expected.result.loss_by_dataset, rel=1e-6)
    assert_gradients(found.gradients, expected.gradients)


def test_every_weight_that_trains_has_a_gradient_and_the_vision_encoder_none(
    whole: tuple[Step, WatchedMatching],
) -> None:
    model = tiny_stage1()
    assert model.uses_every_weight(
        {"image_projected", "text_projected", "temperature", "answer_logits", "match_logits"}
    )
    assert not model.uses_every_weight({"image_projected", "text_projected", "temperature"})
    assert whole[0].gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("vision.") for name in whole[0].gradients)


@pytest.mark.slow
def test_a_vision_encoder_that_trains_has_the_same_gradient_for_any_micro_batches() -> None:
    def model() -> BLIP2:
        return tiny_stage1().choose_trained(("vision", "qformer"))

    (expected, drawn), (found, matching) = trained(SPLITS[16], model=model()), trained(SPLITS[4], model=model())
    assert matching.drawn == drawn.drawn
    assert any(name.startswith("vision.") and bool(tensor.any()) for name, tensor in expected.gradients.items())
    assert_gradients(found.gradients, expected.gradients, bound=1e-4)  # a CNN's sums over pixels


def test_recomputed_activations_give_the_same_gradient(whole: tuple[Step, WatchedMatching]) -> None:
    """The captions' pass reads keys and values of another pass, which is recomputed too."""
    model = tiny_stage1()
    parallelize(model, ALONE, kind="single", activation_checkpointing=True)
    found, matching = trained(SPLITS[8], model=model)
    assert matching.drawn == whole[1].drawn
    assert_gradients(found.gradients, whole[0].gradients)


def test_partners_are_of_other_images_and_follow_seed_and_position(whole: tuple[Step, WatchedMatching]) -> None:
    image_of = [row - (row % 4 == 3) for row in ROWS]
    drawn = whole[1].drawn
    assert drawn.keys() == set(ROWS)
    assert all(image_of[other] != image_of[row] for row, pair in drawn.items() for other in pair)
    assert trained(SPLITS[16], seed=1)[1].drawn != drawn
    assert any(image != text for image, text in drawn.values())


def test_a_sample_draws_by_its_position_and_not_by_its_neighbours_draws() -> None:
    """The same samples drawn elsewhere in the run find other partners; each position's numbers are its own."""

    def draw(positions: list[int]) -> list[int]:
        return Matching().draw(even_batch(torch.tensor(positions)), seed=3).images

    first, later = draw([0, 1, 2, 3, 4, 5, 6, 7]), draw([8, 9, 10, 11, 12, 13, 14, 15])
    assert first != later
    mixed = draw([0, 9, 2, 11, 4, 13, 6, 15])
    order = sorted(range(8), key=[0, 9, 2, 11, 4, 13, 6, 15].__getitem__)
    # All are equally near: a number says the rank among candidates in the order of their positions.
    assert [order.index(mixed[row]) - (order.index(mixed[row]) > order.index(row)) for row in (0, 2, 4, 6)] == [
        first[row] - (first[row] > row) for row in (0, 2, 4, 6)
    ]


def even_batch(positions: Tensor) -> WholeBatch:
    """Samples of as many images, all equally near to each other."""
    count = len(positions)
    rows = {"image_projected": torch.ones(count, 2, 4), "text_projected": torch.ones(count, 4)}
    return WholeBatch(rows, rows, {"temperature": torch.tensor(1.0)}, positions, positions, torch.arange(count))


def test_a_batch_of_one_image_has_no_partners() -> None:
    batches = [tiny_batch(range(4), image_ids=[7] * 16)]
    with pytest.raises(UserError, match=r"4 samples shows a single image.*raise recipe\.phases\.NAME\.batch_size"):
        step(tiny_stage1(), batches, make_objectives({"matching": 1.0}))
    assert math.isfinite(step(tiny_stage1(), batches, make_objectives({"contrastive": 1.0})).result.loss)


def test_dropout_draws_the_same_in_both_passes() -> None:
    """Features of the first pass, which the gradient is of, are those of the second."""
    model = tiny_stage1(dropout=0.5)
    forward, seen = model.forward, []

    def watched(*arguments: object, **options: object) -> object:
        outputs = forward(*arguments, **options)  # type: ignore[arg-type]
        seen.append({name: tensor.detach() for name, tensor in outputs.tensors.items()})
        return outputs

    model.forward = watched  # type: ignore[method-assign, assignment]
    trained(SPLITS[8], model=model)
    first, second = seen[:2], seen[2:]
    assert len(seen) == 4
    for before, after in zip(first, second, strict=True):
        for name in ("image_projected", "text_projected"):
            assert torch.equal(before[name], after[name])


def test_bfloat16_passes_have_losses_in_float32(whole: tuple[Step, WatchedMatching]) -> None:
    objectives = (Contrastive(1.3), WatchedMatching(0.8), Captioning(0.5))
    batches, context = [tiny_batch(rows) for rows in SPLITS[8]], StepContext(autocast=torch.bfloat16)
    found = step(tiny_stage1(), batches, objectives, context=context).result.loss_by_objective
    expected = whole[0].result.loss_by_objective
    assert found["captioning"] == pytest.approx(expected["captioning"], rel=0.01)
    assert found["contrastive"] == pytest.approx(expected["contrastive"], rel=0.05)
    model = tiny_stage1()
    with torch.no_grad(), context.autocasting(model):
        outputs = model(model.prepare(tiny_batch(ROWS)), {"answer_logits"}).tensors
    assert outputs["answer_logits"].dtype == torch.float32


@pytest.mark.slow
def test_images_are_encoded_once_a_step() -> None:
    model, counts = tiny_stage1(), []
    model.vision.register_forward_hook(lambda module, inputs, output: counts.append(len(output)))
    trained(SPLITS[4], model=model)
    assert counts == [4, 4, 4, 4]


def test_before_training_losses_are_those_of_chance() -> None:
    """Real widths, vocabulary and queries: ln N, ln 2, ln 30,523 (BLIText's log: 6.93, 0.69, 10.1 to 10.3 at N = 1024)."""
    torch.manual_seed(0)
    vision = tiny_vision()
    qformer = QFormer(
        vocab_size=30523,
        width=768,
        layers=2,
        heads=12,
        hidden_width=3072,
        vision_width=vision.width,
        text_outputs=True,
        language_model_head=True,
    )
    initialize_like_bert(qformer)
    model = BLIP2(vision=vision, vision_norm=nn.LayerNorm(vision.width), qformer=qformer, tokenizer=bert_tokenizer())
    inputs, places = model.prepare(tiny_batch(range(8))), torch.arange(8)
    inputs = replace(inputs, partners=Partners(torch.as_tensor(inputs.images).flip(0), inputs.answers[::-1]))
    with torch.no_grad():
        outputs = model(inputs, BLIP2.OUTPUTS).tensors
        whole = WholeBatch(outputs, outputs, outputs, places, places, places)
        losses = [
            float(term.total / term.counts.sum())
            for term in (
                Contrastive().batch_term(whole),
                Matching().term(outputs, inputs),
                Captioning().term(outputs, inputs),
            )
        ]
    assert losses == pytest.approx([math.log(8), math.log(2), math.log(30523)], abs=0.2)
