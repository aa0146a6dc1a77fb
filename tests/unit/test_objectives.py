"""Objectives of different units mix; those over the whole batch have the same gradient however it is cut."""

from collections.abc import Collection, Sequence

import pytest
import torch
from torch import Tensor, nn

from instructblip.data.batching import Batch
from instructblip.models.base import Inputs, Outputs
from instructblip.models.instructblip import InstructBLIP
from instructblip.objectives import Objective, make_objectives
from instructblip.objectives.base import BatchObjective, Term, WholeBatch
from instructblip.objectives.language_modeling import LanguageModeling
from instructblip.training.loop import StepResult, train_step
from instructblip.training.optim import make_adamw
from tests.kit.losses import inputs_of
from tests.kit.objectives import PromptContrast, PromptNorm
from tests.kit.tiny import tiny_images, tiny_model

PROMPTS = ["what color?", "is there a red shape in the image?", "shape?", "what shape is in the image?"]
TARGETS = ["red", "yes", "rectangle", "a very long triangle"]
SPLITS = [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2], [3]], [[0, 1, 2, 3]]]
MIXED = (LanguageModeling(1.0), PromptNorm(0.3), PromptContrast(0.7))


class TemperedContrast(PromptContrast):
    """With a temperature that the model learns."""

    outputs = frozenset({"visual_prompt", "temperature"})
    shared = ("temperature",)


class Tempered(InstructBLIP):
    """InstructBLIP with a temperature among its outputs."""

    PARTS = {**InstructBLIP.PARTS, "qformer": (*InstructBLIP.PARTS["qformer"], "temperature")}  # noqa: RUF012

    def __init__(self, like: InstructBLIP) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(like.__dict__)
        self.temperature = nn.Parameter(torch.tensor(0.2))

    def forward(self, inputs: Inputs, wanted: Collection[str], *, packed: bool = False) -> Outputs:
        outputs = super().forward(inputs, set(wanted) - {"temperature"}, packed=packed)
        return outputs._replace(tensors=outputs.tensors | {"temperature": self.temperature})


def batch(rows: Sequence[int]) -> Batch:
    return Batch(
        ids=[str(row) for row in rows],
        datasets=["even" if row % 2 else "odd" for row in rows],
        instructions=[PROMPTS[row] for row in rows],
        targets=[TARGETS[row] for row in rows],
        images=tiny_images(4, seed=1)[list(rows)],
        places=list(rows),
        image_ids=[str(row) for row in rows],
        positions=list(rows),
    )


def step(
    split: Sequence[Sequence[int]], objectives: Sequence[Objective], *, dropout: float = 0.0, tempered: bool = False
) -> tuple[StepResult, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = tiny_model(0, dropout=dropout, queries=4)
    model = (Tempered(model) if tempered else model).train()
    optimizer = make_adamw(model.named_parameters(), weight_decay=0.05, betas=(0.9, 0.999))
    torch.manual_seed(1)
    batches = [batch(rows) for rows in split]
    result = train_step(model, optimizer, batches, objectives=objectives, rate=1e-3, clip_norm=None)
    return result, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=bound, atol=bound * scale, msg=name)


@pytest.mark.parametrize("objectives", [MIXED, (PromptNorm(),), (PromptContrast(),)])
@pytest.mark.parametrize("split", SPLITS[:3])
def test_any_split_gives_the_same_gradient(split: list[list[int]], objectives: Sequence[Objective]) -> None:
    whole, expected = step([[0, 1, 2, 3]], objectives)
    parts, found = step(split, objectives)
    assert_same(found, expected)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.loss_by_objective == pytest.approx(whole.loss_by_objective, rel=1e-6)
    assert parts.loss_by_dataset == pytest.approx(whole.loss_by_dataset, rel=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_gradient_is_that_of_the_loss_written_down(dropout: float) -> None:
    result, found = step([[0, 1, 2, 3]], MIXED, dropout=dropout)
    torch.manual_seed(0)
    model = tiny_model(0, dropout=dropout, queries=4).train()
    torch.manual_seed(1)
    inputs = inputs_of(model, tiny_images(4, seed=1), PROMPTS, TARGETS)
    outputs = model(inputs, {"answer_logits", "visual_prompt"}).tensors
    tokens = sum(map(len, inputs.answers))
    language, norm = (MIXED[k].term(outputs, inputs).total for k in (0, 1))  # type: ignore[attr-defined]
    numbers = torch.arange(4)
    contrast = MIXED[2].batch_term(WholeBatch(outputs, outputs, {}, numbers, numbers, numbers)).total
    loss = language / tokens + 0.3 * norm / 4 + 0.7 * contrast / 4
    loss.backward()
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert_same(found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_a_shared_output_gets_its_gradient_once(split: list[list[int]]) -> None:
    _, found = step(split, (TemperedContrast(),), tempered=True)
    _, expected = step([[0, 1, 2, 3]], (TemperedContrast(),), tempered=True)
    assert_same(found, expected)
    assert float(found["temperature"]) != 0


def test_dropout_draws_the_same_in_both_passes() -> None:
    """Were it not so, the features' gradient would go to other weights than those that made the features."""
    model = tiny_model(0, dropout=0.5, queries=4).train()
    seen: list[Tensor] = []

    class Watched(PromptContrast):
        def batch_term(self, batch: WholeBatch) -> Term:
            seen.append(batch.own["visual_prompt"].detach())
            return super().batch_term(batch)

    forward, passed = model.forward, []
    model.forward = lambda *a, **k: passed.append(forward(*a, **k)) or passed[-1]  # type: ignore[method-assign, func-returns-value]
    optimizer = make_adamw(model.named_parameters(), weight_decay=0.0, betas=(0.9, 0.999))
    train_step(model, optimizer, [batch([0, 1]), batch([2, 3])], objectives=(Watched(),), rate=0.0, clip_norm=None)
    second = torch.cat([outputs.tensors["visual_prompt"].detach() for outputs in passed[2:]])
    assert len(passed) == 4
    assert torch.equal(second, seen[0])


def test_a_phase_without_objectives_models_language_and_a_weight_of_0_leaves_one_out() -> None:
    assert [objective.name for objective in make_objectives({})] == ["language_modeling"]
    assert [objective.name for objective in make_objectives({"language_modeling": 0, "alignment": 2.0})] == [
        "alignment"
    ]
    assert make_objectives({"alignment": 2.0})[0].weight == 2.0


def test_only_whole_batch_objectives_take_two_passes() -> None:
    assert [isinstance(objective, BatchObjective) for objective in MIXED] == [False, False, True]
