"""BLIP-2's first stage on several ranks has the losses, gradients and negatives of LAVIS's two ranks, and of one process."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from instructblip.data.batching import Batch
from instructblip.distributed import Ranks
from instructblip.models.blip2 import BLIP2
from instructblip.objectives import Objective
from instructblip.objectives.contrastive import Contrastive
from instructblip.objectives.language_modeling import Captioning
from instructblip.training.parallel import StepContext, parallelize
from instructblip.weights.names import foreign_names
from tests.kit.ranks import on_ranks
from tests.kit.stage1 import (
    GivenPartners,
    Step,
    WatchedMatching,
    assert_gradients,
    lavis_batch,
    step,
    tiny_batch,
    tiny_stage1,
)
from tests.kit.vectors import case, stage1_model

CASES = ("two_ranks_plain", "two_ranks_image_ids")
LOSSES = {"contrastive": "loss_itc", "matching": "loss_itm", "captioning": "loss_lm"}


def trained(model: BLIP2, ranks: Ranks, batches: Sequence[Batch], objectives: Sequence[Objective]) -> Step:
    """A step of a model that is laid over the ranks as a run lays it."""
    wanted = frozenset().union(*(objective.outputs for objective in objectives))
    unused = not model.uses_every_weight(wanted)
    wrapped = parallelize(model, ranks, kind="single" if ranks.world_size == 1 else "ddp", some_unused=unused)
    return step(model, batches, objectives, context=StepContext(ranks=ranks, wrapped=wrapped))


# --- LAVIS's two ranks -----------------------------------------------------------------------------------------------


def lavis_step(ranks: Ranks) -> dict[str, Any]:
    """By case and objective: loss and gradients of a step on three pairs a rank, contrast with both gathers."""
    found: dict[str, Any] = {}
    rows = [3 * ranks.rank + number for number in range(3)]
    for name in CASES:
        vectors = case("blip2_stage1", name)
        drawn = [rank["draw"] for rank in vectors["expected"]["per_rank"]]
        images, texts = (
            [row for draw in drawn for row in draw[key]] for key in ("negative_image_of_text", "negative_text_of_image")
        )
        for key, objective in {
            "loss_itc": Contrastive(),
            "detached": Contrastive(gather="detached"),
            "loss_itm": GivenPartners(images, texts),
            "loss_lm": Captioning(),
        }.items():
            if name == "two_ranks_plain" and not isinstance(objective, Contrastive):
                continue  # image ids change nothing there but which partners may be drawn
            model = stage1_model()
            batches = [lavis_batch(part, vectors["image_id"] or range(6)) for part in (rows[:1], rows[1:])]
            done = trained(model, ranks, batches, [objective])
            names = foreign_names(model.held_state(), "lavis")
            found[f"{name}/{key}"] = (
                done.result.loss,
                {names[ours]: (float(tensor.norm()), tensor.flatten()[:8]) for ours, tensor in done.gradients.items()},
            )
    return found


@pytest.mark.slow
def test_two_ranks_have_lavis_losses_and_gradients() -> None:
    """Its own where `gather=detached`, else those of the whole batch, which its captions' mean per rank is not."""
    first, second = on_ranks(2, lavis_step)
    for name in CASES:
        expected = case("blip2_stage1", name)["expected"]
        whole, lavis = expected["whole_batch"], expected["mean_over_ranks_gradient"]
        for key, gradients in {
            "loss_itc": whole["gradient"]["loss_itc"],
            "detached": lavis["loss_itc"],
            "loss_itm": lavis["loss_itm"],
            "loss_lm": whole["gradient"]["loss_lm"],
        }.items():
            if f"{name}/{key}" not in first:
                continue
            loss, found = first[f"{name}/{key}"]
            assert loss == second[f"{name}/{key}"][0]
            assert loss == pytest.approx(whole["loss_itc" if key == "detached" else key], abs=3e-4), key
            for parameter, stored in gradients.items():
                if stored is None or not stored["norm"]:
                    continue
                norm, start = found[parameter]
                assert norm == pytest.approx(stored["norm"], rel=1e-4), (name, key, parameter)
                expected_start = torch.tensor(stored["first8"])
                torch.testing.assert_close(start, expected_start, rtol=1e-4, atol=3e-4 * max(stored["norm"], 1.0))
    norms = [first[f"two_ranks_plain/{key}"][1]["query_tokens"][0] for key in ("loss_itc", "detached")]
    assert norms[0] > 5 * norms[1]


# --- one process -----------------------------------------------------------------------------------------------------


def tiny_step(ranks: Ranks, micro_batch: int, parts: Sequence[str]) -> dict[str, Any]:
    """A step on this rank's share of sixteen samples."""
    share = 16 // ranks.world_size
    rows = list(range(ranks.rank * share, (ranks.rank + 1) * share))
    model = tiny_stage1()
    model.choose_trained(parts)
    matching = WatchedMatching(0.8)
    batches = [tiny_batch(rows[start : start + micro_batch]) for start in range(0, share, micro_batch)]
    done = trained(model, ranks, batches, (Contrastive(1.3), matching, Captioning(0.5)))
    return {
        "loss": done.result.loss,
        "by_objective": done.result.loss_by_objective,
        "gradients": done.gradients,
        "drawn": matching.drawn,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "micro_batch", "parts"),
    [(2, 8, ("qformer",)), (2, 3, ("vision", "qformer")), (4, 2, ("qformer",))],
)
def test_ranks_compute_what_one_process_computes(ranks: int, micro_batch: int, parts: Sequence[str]) -> None:
    alone = tiny_step(Ranks(), 16, parts)
    results = on_ranks(ranks, tiny_step, micro_batch, parts)
    drawn = {position: pair for found in results for position, pair in found["drawn"].items()}
    assert drawn == alone["drawn"]
    for found in results:
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        assert found["by_objective"] == pytest.approx(alone["by_objective"], rel=1e-6)
        assert_gradients(found["gradients"], alone["gradients"], bound=1e-5 if "vision" not in parts else 1e-4)


# --- rows from other ranks -------------------------------------------------------------------------------------------


def take(ranks: Ranks) -> list[tuple[Tensor, Tensor]]:
    """Rows in several types as `take_rows` fetches them, beside those that hold all rows."""
    everyone = torch.arange(60).view(10, 2, 3)
    wanted = [[9, 0, 0, 4, 7, 9], [2], []][(ranks.rank + 1) % 3] if ranks.world_size > 1 else [3, 3, 1]
    share = 10 // ranks.world_size
    found = []
    for dtype in (torch.int64, torch.uint8, torch.float32, torch.bfloat16):
        own = everyone.to(dtype)[ranks.rank * share : (ranks.rank + 1) * share]
        found.append((ranks.take_rows(own, wanted), everyone.to(dtype)[wanted]))
    return found


@pytest.mark.slow
def test_rows_come_from_whatever_rank_has_them() -> None:
    for found in (take(Ranks()), *on_ranks(2, take)):
        for rows, expected in found:
            assert rows.dtype == expected.dtype
            assert torch.equal(rows, expected)
