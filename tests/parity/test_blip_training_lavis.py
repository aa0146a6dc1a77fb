"""A training step of BLIP has LAVIS's losses and gradients, and leaves its momentum encoders and queues."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from instructblip.models.blip import BLIPRetrieval
from instructblip.objectives import Objective
from instructblip.objectives.base import WholeBatch
from instructblip.objectives.distillation import Distillation, PairDistillation
from instructblip.objectives.language_modeling import Answering, Captioning
from instructblip.objectives.matching import Matching, PairMatching
from instructblip.weights.names import foreign_names
from tests.kit.blip_training import image_numbers, lavis_batch, momentum_of, show
from tests.kit.stage1 import GivenPartners, Step, step
from tests.kit.vectors import TOLERANCE, blip_caption, blip_pretrain, blip_retrieval, blip_vqa, case, tensors

SPLITS: list[list[list[int]]] = [[[0, 1, 2, 3, 4, 5]], [[0, 1], [2, 3], [4, 5]], [[3], [5, 4, 0], [1, 2]]]
PRETRAINING = ("pretrain_losses", "pretrain_losses_ramp")


def of(name: str) -> dict[str, Any]:
    return case("blip_med", name)


def assert_like_lavis(model: Any, found: Step, expected: Mapping[str, Any]) -> None:
    """Gradients by LAVIS's names: norms and first numbers; none where LAVIS has none."""
    theirs = foreign_names((name for name in model.state_dict()), "lavis_blip")
    gradients = {theirs[name]: gradient for name, gradient in found.gradients.items()}
    for name, stored in expected.items():
        if stored is None:
            assert name not in gradients or not gradients[name].any(), name
            continue
        scale = max(stored["norm"], 1.0)
        start = gradients[name].flatten()[:8]
        torch.testing.assert_close(start, torch.tensor(stored["first8"]), rtol=1e-4, atol=3e-4 * scale, msg=name)
        assert float(gradients[name].norm()) == pytest.approx(stored["norm"], rel=1e-4), name


# --- captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_captions(split: list[list[int]]) -> None:
    """The prompt is not supervised, and tokens of the whole batch count alike."""
    vectors, model = of("caption_loss"), blip_caption()
    show(model, "caption_loss")
    captions = [text.removeprefix(model.prompt) for text in vectors["texts"]]
    found = step(model, [lavis_batch("caption_loss", rows, captions) for rows in split], [Captioning()])
    assert found.result.loss == pytest.approx(vectors["expected"]["loss"], abs=3e-4)
    assert found.result.tokens == int((vectors["expected"]["labels"] != -100).sum())
    assert_like_lavis(model, found, vectors["expected"]["gradients"])


# --- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [[[0, 1, 2]], [[2], [0, 1]], [[1], [0], [2]]])
def test_questions_with_several_weighted_answers(split: list[list[int]]) -> None:
    vectors, model = of("vqa_loss"), blip_vqa()
    show(model, "vqa_loss")
    texts = iter(zip(vectors["answers"], vectors["inputs"]["weight"].tolist(), strict=True))
    answers = [tuple(next(texts) for _ in range(count)) for count in vectors["inputs"]["n_answers"].tolist()]
    batches = [
        lavis_batch(
            "vqa_loss",
            rows,
            [""] * 3,
            instructions=[vectors["questions"][row] for row in rows],
            answers=[answers[row] for row in rows],
        )
        for rows in split
    ]
    found = step(model, batches, [Answering()])
    assert found.result.loss == pytest.approx(vectors["expected"]["loss"], rel=3e-5)
    assert found.result.tokens == 3
    assert_like_lavis(model, found, vectors["expected"]["gradients"])


# --- pre-training and retrieval --------------------------------------------------------------------------------------


def given(name: str, kind: type[Distillation]) -> dict[str, Objective]:
    """LAVIS's losses by its names, its negatives, and its share of soft targets at that step."""
    vectors = of(name)
    ramp, number = 2 * vectors["num_iters_per_epoch"], vectors["epoch"] * vectors["num_iters_per_epoch"]
    objectives: dict[str, Objective] = {
        "loss_itc": kind(soft_targets=0.4, ramp=ramp).at(number + vectors["iters"]),
        "loss_itm": GivenPartners(vectors["draw"]["negative_image_of_text"], vectors["draw"]["negative_text_of_image"]),
    }
    return objectives | ({"loss_lm": Captioning()} if "loss_lm" in vectors["expected"] else {})


def trained(name: str, split: Sequence[Sequence[int]], objectives: Sequence[Objective]) -> tuple[BLIPRetrieval, Step]:
    vectors = of(name)
    model = blip_pretrain() if name in PRETRAINING else blip_retrieval()
    show(model, name)
    if name == "retrieval_losses":
        momentum_of(model).image_id_queue.copy_(image_numbers(vectors["inputs"]["idx_queue_before"]))
        momentum_of(model).pointer.fill_(vectors["queue_ptr_before"])
    ids = vectors.get("image_id", range(6))
    batches = [lavis_batch(name, rows, vectors["texts"], image_ids=ids) for rows in split]
    return model, step(model, batches, objectives)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", [*PRETRAINING, "retrieval_losses"])
def test_losses_of_a_step_and_what_it_leaves(name: str, split: list[list[int]]) -> None:
    expected = of(name)["expected"]
    objectives = given(name, PairDistillation if name in PRETRAINING else Distillation)
    model, found = trained(name, split, list(objectives.values()))
    for loss, objective in objectives.items():
        assert found.result.loss_by_objective[objective.name] == pytest.approx(expected[loss], abs=3e-4), loss
    momentum = momentum_of(model)
    assert int(momentum.pointer) == expected["queue_ptr_after"]
    for side in ("image_queue", "text_queue"):
        if f"{side}_after" in expected:
            torch.testing.assert_close(getattr(momentum, side), expected[f"{side}_after"], **TOLERANCE)
    if "idx_queue_after" in expected:
        assert torch.equal(momentum.image_id_queue, image_numbers(expected["idx_queue_after"]))
    names = {theirs: own for own, theirs in foreign_names(model.state_dict(), "lavis_blip").items()}
    for theirs, start in expected.get("momentum_after", {}).items():
        torch.testing.assert_close(model.state_dict()[names[theirs]].flatten()[:8], torch.tensor(start))


@pytest.mark.parametrize(
    ("name", "loss"),
    [(name, loss) for name in (*PRETRAINING, "retrieval_losses") for loss in of(name)["expected"]["gradients"]],
)
def test_gradients_of_each_loss(name: str, loss: str) -> None:
    objectives = given(name, PairDistillation if name in PRETRAINING else Distillation)
    model, found = trained(name, SPLITS[1], [objectives[loss]])
    assert_like_lavis(model, found, of(name)["expected"]["gradients"][loss])


@pytest.mark.parametrize("name", [pytest.param("pretrain_losses", marks=pytest.mark.slow), "retrieval_losses"])
def test_negatives_are_drawn_as_often_as_lavis_weights_them(name: str) -> None:
    """Over 1,000 seeds, each candidate within four standard deviations of its share; what may not be drawn never."""
    vectors, seeds = of(name), 1000
    matching, batch = (PairMatching() if name in PRETRAINING else Matching()), whole_batch(name)
    counts_B6 = torch.zeros(2, 6, 6)
    for seed in range(seeds):
        for number, drawn in enumerate(matching.draw(batch, seed)):
            counts_B6[number, range(6), drawn] += 1
    for counts, weights in zip(counts_B6, ("weights_t2i", "weights_i2t"), strict=True):
        shares = vectors["expected"][weights] / vectors["expected"][weights].sum(dim=1, keepdim=True)
        assert bool((counts[shares == 0] == 0).all())
        assert bool(((counts / seeds - shares).abs() <= 4 * (shares * (1 - shares) / seeds).sqrt() + 1e-3).all())


def whole_batch(name: str) -> WholeBatch:
    """What the objectives see of a case, as its step gathers it."""
    seen: list[WholeBatch] = []

    class Watched(PairDistillation):
        def batch_term(self, batch: WholeBatch) -> Any:
            seen.append(batch._replace(shared={name: tensor.clone() for name, tensor in batch.shared.items()}))
            return super().batch_term(batch)

    trained(name, SPLITS[0], [Watched()])
    return seen[0]


@pytest.mark.parametrize("name", [*PRETRAINING, "retrieval_losses"])
def test_targets_are_a_mixture_of_what_is_right_and_of_what_the_copies_find(name: str) -> None:
    objective, expected = given(name, PairDistillation if name in PRETRAINING else Distillation)["loss_itc"], of(name)
    assert isinstance(objective, Distillation)
    assert objective.soft_targets == pytest.approx(expected["alpha_in_effect"])
    batch = whole_batch(name)
    torch.testing.assert_close(objective.targets(batch, "image"), expected["expected"]["sim_i2t_targets"], **TOLERANCE)
    if "sim_t2i_targets" in expected["expected"]:
        torch.testing.assert_close(
            objective.targets(batch, "text"), expected["expected"]["sim_t2i_targets"], **TOLERANCE
        )


def test_the_files_hold_other_copies_than_weights() -> None:
    """So that what is read as a momentum copy cannot be the encoder itself."""
    weights = tensors("blip_med/pretrain_weights")
    assert not torch.equal(weights["vision_proj.weight"], weights["vision_proj_m.weight"])
