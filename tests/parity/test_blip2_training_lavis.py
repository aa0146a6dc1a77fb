"""A training step of BLIP-2's first stage has LAVIS's losses and gradients, with its own detached gather and without."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from instructblip.objectives import Objective
from instructblip.objectives.base import WholeBatch
from instructblip.objectives.contrastive import Contrastive
from instructblip.objectives.language_modeling import Captioning
from instructblip.objectives.matching import Matching
from instructblip.weights.names import foreign_names
from tests.kit.stage1 import GivenPartners, Step, lavis_batch, step
from tests.kit.vectors import case, stage1_model

CASES = ("losses", "losses_second_draw", "losses_image_ids", "losses_image_ids_second_draw")
NAMES = {"contrastive": "loss_itc", "matching": "loss_itm", "captioning": "loss_lm"}
SPLITS: list[list[list[int]]] = [[[0, 1, 2, 3, 4, 5]], [[0, 1], [2, 3], [4, 5]], [[3], [5, 4, 0], [1, 2]]]


def objective(loss: str, draw: Mapping[str, list[int]]) -> Objective:
    if loss == "loss_itm":
        return GivenPartners(draw["negative_image_of_text"], draw["negative_text_of_image"])
    return Contrastive() if loss == "loss_itc" else Captioning()


def trained(
    split: Sequence[Sequence[int]], objectives: Sequence[Objective], image_ids: Sequence[object] = range(6)
) -> Step:
    return step(stage1_model(), [lavis_batch(rows, image_ids) for rows in split], objectives)


def assert_like_lavis(found: Step, expected: Mapping[str, Any], whole: Mapping[str, Tensor] | None = None) -> None:
    """Gradients by LAVIS's names: norms and first numbers, and where they are stored, all of them."""
    theirs = foreign_names(stage1_model().held_state(), "lavis")
    gradients = {theirs[name]: gradient for name, gradient in found.gradients.items()}
    for name, stored in expected.items():
        if stored is None or not stored["norm"]:  # LAVIS also computes the text states that nothing reads
            assert name not in gradients or not gradients[name].any(), name
            continue
        scale = max(stored["norm"], 1.0)
        torch.testing.assert_close(
            gradients[name].flatten()[:8], torch.tensor(stored["first8"]), rtol=1e-4, atol=3e-4 * scale, msg=name
        )
        assert float(gradients[name].norm()) == pytest.approx(stored["norm"], rel=1e-4), name
    for name, tensor in (whole or {}).items():
        torch.testing.assert_close(gradients[name], torch.as_tensor(tensor), rtol=1e-4, atol=3e-4, msg=name)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", CASES)
def test_losses(name: str, split: list[list[int]]) -> None:
    vectors = case("blip2_stage1", name)
    objectives = [objective(loss, vectors["draw"]) for loss in NAMES.values()]
    result = trained(split, objectives, vectors.get("image_id", range(6))).result
    for ours, loss in NAMES.items():
        assert result.loss_by_objective[ours] == pytest.approx(vectors["expected"][loss], abs=3e-4), loss
    assert result.loss == pytest.approx(vectors["expected"]["loss"], abs=6e-4)


@pytest.mark.parametrize("loss", NAMES.values())
def test_gradients_of_each_loss(loss: str) -> None:
    expected, draw = case("blip2_stage1", "gradients")["expected"], case("blip2_stage1", "losses")["draw"]
    wanted = objective(loss, draw)
    if isinstance(wanted, Contrastive):
        wanted = Contrastive(gather="detached")
    whole = {key.removeprefix(f"full.{loss}."): t for key, t in expected.items() if key.startswith(f"full.{loss}.")}
    assert whole
    assert_like_lavis(trained(SPLITS[1], [wanted]), expected["lavis_one_rank"][loss], whole)


@pytest.mark.slow
def test_the_contrastive_gradient_is_the_whole_batchs_unless_it_is_detached() -> None:
    expected = case("blip2_stage1", "gradients")["expected"]
    mark = "full.loss_itc_whole_batch."
    whole = {key.removeprefix(mark): tensor for key, tensor in expected.items() if key.startswith(mark)}
    assert_like_lavis(trained(SPLITS[1], [Contrastive()]), expected["loss_itc_whole_batch"], whole)
    with_ids = case("blip2_stage1", "losses_image_ids")
    found = trained(SPLITS[2], [Contrastive(gather="detached")], with_ids["image_id"])
    assert_like_lavis(found, with_ids["expected"]["gradient_loss_itc_lavis_one_rank"])


def test_the_gradient_of_all_three_together() -> None:
    expected, draw = case("blip2_stage1", "gradients")["expected"], case("blip2_stage1", "losses")["draw"]
    found = trained(SPLITS[2], [objective(loss, draw) for loss in NAMES.values()])
    assert_like_lavis(found, expected["loss_total_whole_batch"])


@pytest.mark.parametrize("name", [pytest.param("losses", marks=pytest.mark.slow), "losses_image_ids"])
def test_negatives_are_drawn_as_often_as_lavis_weights_them(name: str) -> None:
    """Over 1,000 seeds, each candidate within four standard deviations of its share; samples of the same image never."""
    vectors = case("blip2_stage1", name)
    batch = whole_batch(vectors.get("image_id", range(6)))
    seeds, matching = 1000, Matching()
    counts_BN = torch.zeros(2, 6, 6)
    for seed in range(seeds):
        for number, drawn in enumerate(matching.draw(batch, seed)):
            counts_BN[number, range(6), drawn] += 1
    for counts, weights in zip(counts_BN, ("weights_t2i", "weights_i2t"), strict=True):
        shares = vectors["expected"][weights]
        assert bool((counts[shares == 0] == 0).all())
        assert bool(((counts / seeds - shares).abs() <= 4 * (shares * (1 - shares) / seeds).sqrt() + 1e-3).all())


def whole_batch(image_ids: Sequence[int]) -> WholeBatch:
    model, batch = stage1_model(), lavis_batch(range(6))
    wanted = {"image_projected", "text_projected", "temperature"}
    with torch.no_grad():
        rows = dict(model(model.prepare(batch), wanted).tensors)
    shared = {"temperature": rows.pop("temperature")}
    places = torch.arange(6)
    return WholeBatch(rows, rows, shared, torch.tensor(list(image_ids)), places, places)
