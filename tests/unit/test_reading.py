"""Steps are launched without a wait for the device, and what they left is read later, the same to the bit."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from instructblip.data.batching import Batch
from instructblip.data.loader import LoadedStep
from instructblip.distributed import Ranks
from instructblip.errors import UserError
from instructblip.models import llm as llm_module
from instructblip.models.instructblip import InstructBLIP
from instructblip.objectives import make_objectives
from instructblip.training import run as run_module
from instructblip.training.ahead import Ahead
from instructblip.training.loop import launch_step, run_steps, train_step
from instructblip.training.optim import make_adamw
from instructblip.training.parallel import StepContext
from instructblip.training.reading import LaunchedStep, StepResult, read_steps
from instructblip.training.schedule import StepPosition
from instructblip.training.timer import StepTimer
from tests.kit.losses import ALIGNMENT, LANGUAGE
from tests.kit.runs import World, read_lines, train_here
from tests.kit.stage1 import tiny_stage1
from tests.kit.tiny import tiny_images, tiny_model
from tests.unit.test_loop import PHASES

CONTRAST = make_objectives({"contrastive": 1.0, "matching": 1.0})
SETTINGS: dict[str, Any] = {"objectives": LANGUAGE, "rate": 1e-3, "clip_norm": 1.0}


def batch(rows: Sequence[int]) -> Batch:
    return Batch(
        ids=[f"set/{row}" for row in rows],
        datasets=["even" if row % 2 else "odd" for row in rows],
        instructions=[f"what color is shape {row}?" for row in rows],
        targets=["red" * (1 + row) for row in rows],
        images=tiny_images(8)[list(rows)],
        places=list(rows),
        image_ids=[str(row) for row in rows],
        positions=list(rows),
    )


def adamw(model: InstructBLIP) -> torch.optim.Optimizer:
    return make_adamw(model.named_parameters(), weight_decay=0.05, betas=(0.9, 0.999))


# --- no wait ---------------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Copies to the device for which the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.copies, self.waits = 0, 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        options = kwargs or {}
        if "_to_copy" in str(call) and str(options.get("device")) == "meta" and args[0].device.type == "cpu":
            self.copies += 1
            self.waits += not options.get("non_blocking")
        return call(*args, **options)


class Unread(torch.optim.AdamW):
    """Takes no step, and keeps what decides of it."""

    def step(self, closure: Any = None) -> None:
        self.decided_by: Tensor = self.found_inf  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [LANGUAGE, ALIGNMENT, (*LANGUAGE, *ALIGNMENT)])
def test_a_step_is_launched_without_reading_anything_from_the_device(
    objectives: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is `meta`, which has no numbers: whatever asks for one fails. Rows without a mask are not in it: there
    transformers reads the positions once a pass."""
    model = tiny_model(0).train().to("meta")
    made, rows = torch.tensor, llm_module.pack_rows
    monkeypatch.setattr(llm_module, "pack_rows", lambda lengths, width: rows(lengths, width=4096))

    def on_the_host(*values: Any, device: Any = None, **options: Any) -> Tensor:
        assert device is None, "a tensor that is made on a device is copied there while the host waits"
        return made(*values, **options)

    monkeypatch.setattr(torch, "tensor", on_the_host)
    with pytest.raises(RuntimeError):
        model.projection.weight.sum().item()  # so it would be seen
    optimizer = Unread([{"params": [model.projection.weight], "scale": 1.0, "part": "qformer", "new": False}])
    with Watch() as watch:
        batches = [batch([0, 1, 2]), batch([3, 4])]
        step = launch_step(model, optimizer, batches, packed=True, **{**SETTINGS, "objectives": objectives})
    assert optimizer.decided_by.device.type == "meta"
    assert watch.copies > 10
    assert watch.waits == 0
    assert isinstance(step, LaunchedStep)


# --- the same numbers ------------------------------------------------------------------------------------------------


def steps_of(read_after: Any, changed: Any = None, *, skip: bool = False) -> tuple[list[StepResult], InstructBLIP]:
    model, seen = tiny_model(0, dropout=0.1), []
    if changed is not None:
        changed(model)

    def after_step(step: int, place: StepPosition, rate: float, result: StepResult) -> bool:
        seen.append(result)
        return False

    batches = ((step, [batch([step, step + 1]), batch([step + 2])]) for step in range(5))
    settings: dict[str, Any] = {"start_step": 0, "seed": 3, "clip_norm": 1.0, "after_step": after_step}
    context = StepContext(skip_non_finite=skip)
    run_steps(model, adamw(model), PHASES, batches, read_after=read_after, context=context, **settings)
    return seen, model


@pytest.mark.slow
def test_results_that_are_read_late_are_the_same_to_the_bit() -> None:
    expected, weights = steps_of(lambda done: True)
    found, own = steps_of(lambda done: done in (2, 5))
    assert found == expected and len(found) == 5
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in weights.state_dict().items())


def spoilt(model: InstructBLIP, *steps: int) -> None:
    """The gradient is infinite in these steps, of two micro-batches each."""
    calls = [0]

    def spoil(gradient: Tensor) -> Tensor:
        calls[0] += 1
        return gradient * math.inf if (calls[0] - 1) // 2 in steps else gradient

    model.projection.weight.register_hook(spoil)


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_before_anyone_knows() -> None:
    expected, weights = steps_of(lambda done: True, lambda model: spoilt(model, 1, 2), skip=True)
    found, own = steps_of(lambda done: done == 5, lambda model: spoilt(model, 1, 2), skip=True)
    assert [result.skipped for result in found] == [False, True, True, False, False]
    assert repr(found) == repr(expected)  # which holds NaN
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in weights.state_dict().items())
    assert all(bool(value.isfinite().all()) for value in own.state_dict().values() if value.is_floating_point())


def test_a_run_ends_at_the_step_that_is_not_finite_though_later_ones_were_taken() -> None:
    logged: list[int] = []
    model = tiny_model(0)
    spoilt(model, 1)

    def after_step(step: int, *_: Any) -> bool:
        logged.append(step)
        return False

    with pytest.raises(UserError, match=r"not both finite in the batch set/1, set/2, set/3; lower"):
        run_steps(
            model,
            adamw(model),
            PHASES,
            ((step, [batch([step, step + 1]), batch([step + 2])]) for step in range(5)),
            start_step=0,
            seed=3,
            clip_norm=None,
            after_step=after_step,
            read_after=lambda done: done == 4,
        )
    assert logged == [0]


def test_a_skipped_step_moves_neither_weights_nor_moments() -> None:
    model = tiny_model(0).train()
    optimizer = adamw(model)
    train_step(model, optimizer, [batch([0, 1])], **SETTINGS)
    state = [value.clone() for of in optimizer.state.values() for value in of.values()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    spoilt(model, 0)
    assert train_step(model, optimizer, [batch([2, 3])], context=StepContext(skip_non_finite=True), **SETTINGS).skipped
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    after = [value for of in optimizer.state.values() for value in of.values()]
    assert all(torch.equal(before, now) for before, now in zip(state, after, strict=True))


@dataclass(frozen=True)
class Counted(Ranks):
    """A rank that counts what is exchanged."""

    exchanged: list[Any] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        self.exchanged.append(value)
        return [value]


def test_ids_are_exchanged_once_for_all_steps_that_are_read_together() -> None:
    model, context = tiny_model(0).train(), StepContext(ranks=Counted())
    optimizer = adamw(model)
    launched = [launch_step(model, optimizer, [batch([row, row + 1])], context=context, **SETTINGS) for row in (0, 2)]
    assert not [value for value in context.ranks.exchanged if "set/0" in repr(value)]
    results = read_steps(launched, replace(context, stop_signal=lambda: 15))
    assert [result.ids for result in results] == [["set/0", "set/1"], ["set/2", "set/3"]]
    assert [result.stop_signal for result in results] == [0, 15]
    assert len([value for value in context.ranks.exchanged if "set/0" in repr(value)]) == 1


# --- images of the next step -----------------------------------------------------------------------------------------


def loaded(steps: int) -> Iterator[LoadedStep]:
    return iter([LoadedStep(step, [batch([step, step + 1]), batch([step + 2])], []) for step in range(steps)])


@pytest.mark.slow
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("objectives", [LANGUAGE, CONTRAST])
def test_images_that_are_encoded_before_their_step_change_no_bit(
    objectives: Any, precision: torch.dtype | None
) -> None:
    context = StepContext(autocast=precision)
    results = []
    for encodes in (None, False, True):
        model = (tiny_model(0) if objectives is LANGUAGE else tiny_stage1(0)).train()
        optimizer = adamw(model)
        steps = loaded(3) if encodes is None else Ahead(model, context, encodes=encodes).steps(loaded(3))
        settings = {**SETTINGS, "objectives": objectives}
        results.append([train_step(model, optimizer, step.batches, context=context, **settings) for step in steps])
    assert results[0] == results[1] == results[2]
    assert {result.work.encoded for result in results[2]} == {3}  # they are counted where they are trained on


def test_a_step_is_handed_on_once_the_images_of_the_next_are_begun() -> None:
    model, events = tiny_model(0), list[str]()

    def source() -> Iterator[LoadedStep]:
        for step in loaded(3):
            events.append(f"read {step.step}")
            yield step

    for step in Ahead(model, StepContext(), encodes=True).steps(source()):
        events.append(f"train {step.step}")
        assert [len(part.encoded[0]) for part in step.batches] == [2, 1]
    assert events == ["read 0", "read 1", "train 0", "read 2", "train 1", "train 2"]


# --- runs ------------------------------------------------------------------------------------------------------------

SHORT = ("recipe.checkpoint_every=4", "recipe.validate_every=50", "recipe.final_samples=1", "data.workers=0")


def lines_of(run: Path) -> list[dict[str, Any]]:
    timed = {"samples_per_second", "tokens_per_second", "mfu", "data_wait_fraction", "memory"}
    return [
        {key: value for key, value in line.items() if key not in timed} for line in read_lines(run / "metrics.jsonl")
    ]


@pytest.mark.slow
def test_a_run_that_reads_seldom_writes_the_lines_of_one_that_reads_each_step(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it may be stopped in between: what goes on is the same run."""
    phase = "recipe.phases={only: {steps: 7, batch_size: 4, learning_rate: 1e-3}}"
    options = ("~recipe.phases", phase, *SHORT)
    expected = lines_of(train_here(world, tmp_path / "each", *options))
    found = train_here(world, tmp_path / "seldom", *options, "parallel.read_every=3")
    assert lines_of(found) == expected and len(expected) == 7
    lines = read_lines(found / "metrics.jsonl")
    assert lines[0]["samples_per_second"] == pytest.approx(lines[2]["samples_per_second"])  # read together
    save = run_module._save

    def dies(run: Any, step: int, **options: Any) -> None:
        save(run, step, **options)
        if step == 4:
            run.writer.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "_save", dies)
    with pytest.raises(KeyboardInterrupt):
        train_here(world, tmp_path / "killed", *options, "parallel.read_every=3")
    monkeypatch.setattr(run_module, "_save", save)
    resumed = train_here(world, tmp_path / "killed", *options, "parallel.read_every=3", "resume=auto")
    assert lines_of(resumed) == expected


def test_steps_that_are_read_together_share_their_time() -> None:
    now = [0.0]
    timer = StepTimer(clock=lambda: now[0])
    with timer.waiting():
        now[0] += 1
    now[0] += 5
    timer.together(3)
    rates = []
    for _ in range(3):
        timer.step(samples=4, tokens=8, flops=16.0)
        rates.append((timer.samples_per_second, timer.tokens_per_second, timer.data_wait_fraction))
    assert rates == [(2.0, 4.0, pytest.approx(1 / 6))] * 3
    now[0] += 1
    timer.step(samples=1)
    assert timer.samples_per_second == pytest.approx(13 / 7)
