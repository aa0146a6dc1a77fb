"""Where a step lies, which positions it holds, and that any split of a batch gives the same gradient."""

import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from instructblip.data.batching import Batch, Batching
from instructblip.distributed import Ranks
from instructblip.errors import UserError
from instructblip.models.arguments import of_samples
from instructblip.models.instructblip import InstructBLIP
from instructblip.objectives import Objective
from instructblip.training.loop import TRACED_STEPS, StepResult, log_entry, run_steps, traced_steps, train_step
from instructblip.training.optim import learning_rate, make_adamw
from instructblip.training.parallel import StepContext
from instructblip.training.schedule import Phase, StepPosition, locate, rank_positions, total_steps
from tests.kit.losses import ALIGNMENT, LANGUAGE, term_of
from tests.kit.tiny import tiny_images, tiny_model

FIRST = Phase(
    name="first",
    steps=3,
    batch_size=4,
    batching=Batching(micro_batch_size=4),
    learning_rate=1e-3,
    warmup_steps=2,
    warmup_learning_rate=1e-8,
    final_learning_rate=1e-5,
    new_parts_scale=1.0,
    objectives=ALIGNMENT,
)
SECOND = replace(FIRST, name="second", steps=2, batch_size=6, warmup_steps=0, objectives=LANGUAGE)
PHASES = (FIRST, SECOND)

INSTRUCTIONS = ["what color?", "is there a red shape in the image?", "shape?", "what shape is in the image?"]
TARGETS = ["red", "yes", "rectangle", "a very long triangle"]  # of different lengths, so that means would not add up
NAMES = ["color", "yes_no", "shape", "shape"]


def _batch(rows: Sequence[int]) -> Batch:
    images = tiny_images(4, seed=1)
    return Batch(
        ids=[f"{NAMES[row]}/{row}" for row in rows],
        datasets=[NAMES[row] for row in rows],
        instructions=[INSTRUCTIONS[row] for row in rows],
        targets=[TARGETS[row] for row in rows],
        images=images[list(rows)],
        places=list(rows),
        image_ids=[str(row) for row in rows],
        positions=list(rows),
    )


def _step(
    split: Sequence[Sequence[int]], *, clip_norm: float | None = None, objectives: Sequence[Objective] = LANGUAGE
) -> tuple[StepResult, dict[str, torch.Tensor]]:
    """The result and the gradients of one step over a batch split in this way."""
    model = tiny_model(0).train()
    optimizer = _optimizer(model)
    batches = [_batch(rows) for rows in split]
    result = train_step(model, optimizer, batches, objectives=objectives, rate=1e-3, clip_norm=clip_norm)
    return result, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_sample_that_the_model_cannot_take_is_named_before_anything_is_trained() -> None:
    model = tiny_model(0).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [_batch([0, 1]), _batch([2, 3])]
    half = "\ud83d"  # of a character, as an answer that was cut has it
    batches[1] = batches[1]._replace(instructions=[INSTRUCTIONS[2], f"{half} what shape?"])
    with pytest.raises(UserError, match=r"^shape/3: its instruction is no text"):
        train_step(model, _optimizer(model), batches, objectives=LANGUAGE, rate=1e-3, clip_norm=None)
    model.llm.model.config.max_position_embeddings = 8
    model.llm.model.positions = nn.Embedding(8, 4)
    with pytest.raises(
        UserError, match=r"^color/0: its prompt needs \d+ positions .* shorten the prompt or the answer"
    ):
        train_step(model, _optimizer(model), [_batch([0, 1])], objectives=LANGUAGE, rate=1e-3, clip_norm=None)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items() if name in before)


def test_what_is_wrong_with_a_whole_batch_names_its_samples() -> None:
    names = [f"mine/{number}" for number in range(7)]
    assert str(of_samples(ValueError("images has two sizes"), names)) == (
        "the model cannot take mine/0, mine/1, mine/2, mine/3, mine/4 and 2 more: images has two sizes; "
        "correct them in their source, and prepare it again"
    )


def _optimizer(model: InstructBLIP) -> torch.optim.Optimizer:
    return make_adamw(model.named_parameters(), weight_decay=0.05, betas=(0.9, 0.999))


# --- places and positions --------------------------------------------------------------------------------------------


def test_locate() -> None:
    places = [locate(PHASES, step) for step in range(5)]
    assert [(place.phase.name, place.step, place.position) for place in places] == [
        ("first", 0, 0),
        ("first", 1, 4),
        ("first", 2, 8),
        ("second", 0, 12),
        ("second", 1, 18),
    ]
    assert total_steps(PHASES) == 5


def test_beyond_the_last_phase() -> None:
    with pytest.raises(ValueError, match="step 5 lies beyond"):
        locate(PHASES, 5)


def test_positions_of_one_rank() -> None:
    assert list(rank_positions(PHASES, 0)) == [
        (0, [0, 1, 2, 3]),
        (1, [4, 5, 6, 7]),
        (2, [8, 9, 10, 11]),
        (3, [12, 13, 14, 15, 16, 17]),
        (4, [18, 19, 20, 21, 22, 23]),
    ]
    assert list(rank_positions(PHASES, 3)) == list(rank_positions(PHASES, 0))[3:]
    assert list(rank_positions(PHASES, 5)) == []


def test_positions_of_two_ranks_are_the_halves_of_each_global_batch() -> None:
    ranks = [list(rank_positions(PHASES, 0, rank=rank, world_size=2)) for rank in range(2)]
    assert [ranks[0][3], ranks[1][3]] == [(3, [12, 13, 14]), (3, [15, 16, 17])]
    joined = [(step, [*first, *second]) for (step, first), (_, second) in zip(*ranks, strict=True)]
    assert joined == list(rank_positions(PHASES, 0))


def test_a_batch_that_does_not_divide_among_the_ranks() -> None:
    with pytest.raises(ValueError, match="a global batch of 4 does not divide among 3 ranks"):
        list(rank_positions(PHASES, 0, world_size=3))


def test_each_phase_has_its_own_schedule() -> None:
    expected = learning_rate(1, steps=3, peak=1e-3, warmup_steps=2, start=1e-8, final=1e-5)
    assert FIRST.rate(1) == expected == 1e-3
    assert (SECOND.rate(0), FIRST.rate(0)) == (1e-3, pytest.approx(5e-4, rel=1e-4))


# --- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objectives", [LANGUAGE, ALIGNMENT])
@pytest.mark.parametrize("split", [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 1, 2], [3]]])
def test_any_split_gives_the_same_gradient(split: list[list[int]], objectives: Sequence[Objective]) -> None:
    whole, gradients = _step([[0, 1, 2, 3]], objectives=objectives)
    parts, part_gradients = _step(split, objectives=objectives)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    assert (parts.tokens, parts.samples, parts.ids) == (whole.tokens, 4, whole.ids)
    assert parts.loss_by_dataset == pytest.approx(whole.loss_by_dataset, rel=1e-5)
    assert gradients.keys() == part_gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(part_gradients[name], gradient, rtol=1e-4, atol=1e-6 * largest)


def test_the_loss_is_the_mean_over_supervised_tokens() -> None:
    model = tiny_model(0).train()
    expected = term_of(model, tiny_images(4, seed=1), INSTRUCTIONS, TARGETS)
    result, _ = _step([[0, 1, 2, 3]])
    assert (
        result.tokens == int(expected.counts.sum()) == sum(len(model.llm.prompt_format.target_ids(t)) for t in TARGETS)
    )
    assert result.loss == pytest.approx(float(expected.total.detach()) / result.tokens, rel=1e-6)
    per_token = float(expected.per_sample[2:].sum() / expected.counts[2:].sum())
    assert result.loss_by_dataset["shape"] == pytest.approx(per_token, rel=1e-5)
    assert list(result.loss_by_dataset) == ["color", "shape", "yes_no"]


# --- means over micro-batches, as the released code has them ---------------------------------------------------------


@dataclass(frozen=True)
class TwoRanks(Ranks):
    """One of two ranks whose other one has said `other` of its micro-batches."""

    world_size: int = 2
    other: dict[str, Any] = field(default_factory=dict)

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other] if "passes" in value else [value]

    def any(self, own: torch.Tensor) -> torch.Tensor:
        return own


def _micro_batch_step(split: Sequence[Sequence[int]], context: StepContext) -> tuple[float, dict[str, torch.Tensor]]:
    model = tiny_model(0).train()
    batches, objectives = [_batch(rows) for rows in split], LANGUAGE
    context = replace(context, micro_batch_means=True)
    result = train_step(
        model, _optimizer(model), batches, objectives=objectives, rate=1e-3, clip_norm=None, context=context
    )
    return result.loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _mean_of_means(split: Sequence[Sequence[int]]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss as LAVIS computes it: each micro-batch's mean over tokens, divided by the number of micro-batches."""
    model = tiny_model(0).train()
    images, loss = tiny_images(4, seed=1), torch.zeros(())
    for rows in split:
        term = term_of(model, images[list(rows)], [INSTRUCTIONS[row] for row in rows], [TARGETS[row] for row in rows])
        loss = loss + term.total / term.counts.sum() / len(split)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("split", [[[0, 1], [2, 3]], [[0], [1, 2, 3]]])
def test_a_mean_over_micro_batches_is_that_of_the_released_code(split: list[list[int]]) -> None:
    expected, gradients = _mean_of_means(split)
    loss, found = _micro_batch_step(split, StepContext())
    assert loss == pytest.approx(expected, rel=1e-6)
    _assert_close(found, gradients)
    whole, _ = _step(split)
    assert abs(whole.loss - loss) > 0.01  # answers of different lengths weigh differently


def test_ranks_are_averaged_as_micro_batches_are() -> None:
    split = [[0], [1], [2, 3]]
    expected, gradients = _mean_of_means(split)
    first = TwoRanks(rank=0, other={"passes": 1, "units": [99]})
    second = TwoRanks(rank=1, other={"passes": 2, "units": [99]})
    losses, found = zip(
        _micro_batch_step(split[:2], StepContext(ranks=first)),
        _micro_batch_step(split[2:], StepContext(ranks=second)),
        strict=True,
    )
    assert sum(losses) == pytest.approx(expected, rel=1e-6)
    _assert_close({name: found[0][name] + found[1][name] for name in gradients}, gradients)


@pytest.mark.slow
def test_a_micro_batch_that_is_cut_for_sharded_ranks_keeps_its_mean() -> None:
    expected, gradients = _mean_of_means([[0, 1], [2], [3]])
    context = StepContext(ranks=TwoRanks(rank=0, other={"passes": 2, "units": [99]}), equal_passes=True)
    first_loss, first = _micro_batch_step([[0, 1]], context)  # in two passes, as the other rank has
    context = StepContext(ranks=TwoRanks(rank=1, other={"passes": 1, "units": [99]}), equal_passes=True)
    second_loss, second = _micro_batch_step([[2], [3]], context)
    assert first_loss + second_loss == pytest.approx(expected, rel=1e-6)
    _assert_close({name: first[name] + second[name] for name in gradients}, gradients)


def test_clipping_limits_the_norm_and_reports_the_one_before() -> None:
    free, gradients = _step([[0, 1, 2, 3]])
    clipped, clipped_gradients = _step([[0, 1, 2, 3]], clip_norm=free.grad_norm / 10)
    assert clipped.grad_norm == pytest.approx(free.grad_norm)
    total = math.sqrt(sum(float(gradient.square().sum()) for gradient in clipped_gradients.values()))
    assert total == pytest.approx(free.grad_norm / 10, rel=1e-4)
    assert math.sqrt(sum(float(g.square().sum()) for g in gradients.values())) == pytest.approx(
        free.grad_norm, rel=1e-5
    )


def test_only_what_is_trainable_moves() -> None:
    model = tiny_model(0).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_step(model, _optimizer(model), [_batch([0, 1])], objectives=LANGUAGE, rate=1e-3, clip_norm=1.0)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"projection.weight", "qformer.query_tokens"} <= moved
    assert not [name for name in moved if name.startswith(("vision.", "llm."))]


def test_a_second_step_starts_from_no_gradient() -> None:
    model = tiny_model(0).train()
    optimizer = _optimizer(model)
    options = {"objectives": LANGUAGE, "rate": 0.0, "clip_norm": None}
    first = train_step(model, optimizer, [_batch([0, 1])], **options)
    assert train_step(model, optimizer, [_batch([0, 1])], **options)[:5] == first[:5]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_optimiser_and_names_the_samples(what: str) -> None:
    model = tiny_model(0).train()
    optimizer = _optimizer(model)
    if what == "loss":
        with torch.no_grad():
            model.projection.weight[0, 0] = math.nan
    else:
        model.projection.weight.register_hook(lambda gradient: gradient * math.inf)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        train_step(model, optimizer, [_batch([0, 1]), _batch([2])], objectives=LANGUAGE, rate=1e-3, clip_norm=1.0)
    for word in ("not both finite", "color/0, yes_no/1, shape/2", "learning_rate", "nan"):
        assert word in str(error.value)
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())  # no step, no moment
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


# --- many steps ------------------------------------------------------------------------------------------------------


def _run(start: int = 0, stop_after: int | None = None, dropout: float = 0.0) -> tuple[int, list[tuple]]:
    model = tiny_model(0, dropout=dropout)
    rows = [0, 1, 2, 3]
    batches = ((step, [_batch(rows)]) for step in range(start, total_steps(PHASES)))
    seen: list[tuple] = []

    def after_step(step: int, place: StepPosition, rate: float, result: StepResult) -> bool:
        seen.append((step, place.phase.name, rate, result.loss))
        return step + 1 == stop_after

    done = run_steps(
        model,
        _optimizer(model),
        PHASES,
        batches,
        start_step=start,
        seed=3,
        clip_norm=1.0,
        after_step=after_step,
    )
    return done, seen


def test_steps_phases_and_rates_go_on_through_the_run() -> None:
    done, seen = _run()
    assert done == 5
    expected = [(step, locate(PHASES, step)) for step in range(5)]
    assert [row[:3] for row in seen] == [(step, at.phase.name, at.phase.rate(at.step)) for step, at in expected]


def test_after_step_ends_the_run() -> None:
    done, seen = _run(stop_after=2)
    assert (done, len(seen)) == (2, 2)


def test_without_batches_nothing_is_done() -> None:
    assert _run(start=5) == (5, [])


@pytest.mark.slow
def test_dropout_draws_from_seed_and_step_alone() -> None:
    """The first step after a start at step 2 has the loss it would have with any history of the random stream."""
    torch.manual_seed(99)
    first = _run(start=2, dropout=0.3)[1][0]
    torch.rand(17)
    assert _run(start=2, dropout=0.3)[1][0] == first
    assert _run(start=2, dropout=0.0)[1][0][3] != first[3]


@pytest.mark.parametrize(("first", "start"), [(0, 0), (7, 7), (8, 7), (6, 7), (None, 0)])
def test_the_steps_after_the_one_that_is_said_are_traced(first: int | None, start: int, tmp_path: Path) -> None:
    said: list[str] = []
    with traced_steps(first, tmp_path, said.append, done=start) as trace:
        for done in range(start + 1, start + TRACED_STEPS + 2):
            torch.ones(done) + 1
            trace(done)
    wanted = first is not None and first >= start
    assert (tmp_path / "trace.json.gz").exists() == wanted
    assert said == [f"wrote {tmp_path / 'trace.json.gz'}"] * wanted
    if wanted:
        events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
        assert sum(event["name"] == "aten::ones" for event in events) == TRACED_STEPS


def test_a_trace_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trace.json.gz cannot be written"):  # noqa: SIM117
        with traced_steps(0, tmp_path / "gone", print):
            pass


def test_log_entry_counts_finished_steps() -> None:
    result = StepResult(1.5, {"a": 1.5}, {"language_modeling": 1.5}, 0.7, 2, 6, ["a/1", "a/2"])
    entry = log_entry(3, locate(PHASES, 3), 2e-4, result, {"samples_per_second": 9.0})
    assert entry == {
        "step": 4,
        "phase": "second",
        "loss": 1.5,
        "loss_by_dataset": {"a": 1.5},
        "lr": 2e-4,
        "grad_norm": 0.7,
        "tokens": 6,
        "padding_fraction": 0.0,
        "sample_ids": ["a/1", "a/2"],
        "samples_per_second": 9.0,
    }
