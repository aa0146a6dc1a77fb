"""The schedule's exact values, and which parameters decay."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from instructblip.models.vision import VisionEncoder
from instructblip.training.optim import (
    NEW_PARTS,
    WeightAverage,
    layer_decay,
    learning_rate,
    make_adamw,
    set_learning_rate,
)
from tests.kit.tiny import tiny_model


def _rates(steps: int, warmup: int, peak: float = 1.0, start: float = 0.0, final: float = 0.0) -> list[float]:
    options = {"steps": steps, "peak": peak, "warmup_steps": warmup, "start": start, "final": final}
    return [learning_rate(step, **options) for step in range(steps)]


def test_warmup_is_linear_and_reaches_the_peak_at_its_last_step() -> None:
    assert _rates(10, 4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert _rates(10, 4, peak=1.0, start=0.2)[:4] == pytest.approx([0.4, 0.6, 0.8, 1.0])


def test_cosine_is_per_step_and_exact() -> None:
    rates = _rates(12, 2, peak=3.0, final=1.0)
    assert rates[2:] == [1 + 2 * 0.5 * (1 + math.cos(math.pi * k / 10)) for k in range(10)]
    assert rates[7] == pytest.approx(2.0)  # half-way
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[2:]))
    assert rates[-1] == pytest.approx(1 + (1 + math.cos(math.pi * 0.9)))
    assert learning_rate(12, steps=12, peak=3.0, warmup_steps=2, start=0.0, final=1.0) == 1.0


def test_the_papers_schedule() -> None:
    """Section 3: from 1e-8 to 1e-5 over 1,000 steps, cosine to 0 at step 60,000."""
    options = {"steps": 60_000, "peak": 1e-5, "warmup_steps": 1000, "start": 1e-8, "final": 0.0}
    assert learning_rate(0, **options) == pytest.approx(1e-8 + (1e-5 - 1e-8) / 1000)
    assert learning_rate(999, **options) == pytest.approx(1e-5, rel=1e-12)
    assert learning_rate(1000, **options) == 1e-5
    assert learning_rate(30_500, **options) == pytest.approx(5e-6)
    assert learning_rate(60_000, **options) == 0.0


def test_plateaus_of_blips_pre_training_fall_by_a_factor_down_to_the_last_rate() -> None:
    """BLIP's utils.py: the warm-up within the first epoch, then `max(min_lr, init_lr * decay_rate ** epoch)`."""
    options: dict[str, Any] = {"steps": 100, "peak": 3e-4, "warmup_steps": 4, "start": 1e-6, "final": 1e-6}
    found = [learning_rate(step, **options, plateau_steps=5, plateau_decay=0.85) for step in range(100)]
    warm = [1e-6 + (3e-4 - 1e-6) * step / 4 for step in range(5)]
    assert found[:5] == pytest.approx(warm)
    assert found[5:] == pytest.approx([max(1e-6, 3e-4 * 0.85 ** (step // 5)) for step in range(5, 100)])
    assert learning_rate(99, **(options | {"final": 1e-4}), plateau_steps=5, plateau_decay=0.85) == 1e-4


@pytest.mark.parametrize(("steps", "warmup", "first"), [(1, 0, 1.0), (1, 1, 1.0), (3, 3, 1 / 3), (2, 5, 0.2)])
def test_short_runs(steps: int, warmup: int, first: float) -> None:
    rates = _rates(steps, warmup)
    assert rates[0] == pytest.approx(first)
    assert all(0 <= rate <= 1 for rate in rates)


def test_norms_biases_and_query_tokens_do_not_decay() -> None:
    model = tiny_model()
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = make_adamw(model.named_parameters(), weight_decay=0.05, betas=(0.9, 0.98))
    decay = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay["qformer.query_tokens"] == 0.0
    assert decay["projection.weight"] == 0.05
    assert decay["projection.bias"] == 0.0
    for name, value in decay.items():
        spared = name.endswith((".bias", "norm.weight", "query_tokens")) or name.startswith("vision_norm")
        assert value == (0.0 if spared else 0.05), name
    assert decay.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith(("vision.", "llm.")) for name in decay)
    assert all(group["betas"] == (0.9, 0.98) for group in optimizer.param_groups)


def test_new_parts_have_their_own_multiple_of_the_rate() -> None:
    assert "cross_attention." in NEW_PARTS
    model = tiny_model()
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = make_adamw(model.named_parameters(), weight_decay=0.05, betas=(0.9, 0.98))
    set_learning_rate(optimizer, 0.5, new_parts_scale=4.0)
    rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, rate in rates.items():
        new = any(part in name for part in NEW_PARTS)
        assert rate == (2.0 if new else 0.5), name
    assert set(rates.values()) == {0.5, 2.0}


def test_decay_acts_on_weights_only() -> None:
    layer = nn.Linear(3, 3)
    optimizer = make_adamw(layer.named_parameters(), weight_decay=0.5, betas=(0.9, 0.999))
    set_learning_rate(optimizer, 0.1)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(layer.weight, before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(layer.bias, before["bias"])


def test_one_step_equals_the_formula() -> None:
    """AdamW's first step is the sign of the gradient times the rate (arXiv 1711.05101, algorithm 2)."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = make_adamw([("bias", parameter)], weight_decay=0.05, betas=(0.9, 0.999))
    set_learning_rate(optimizer, 0.01)
    parameter.grad = torch.tensor([0.3, -7.0])
    optimizer.step()
    assert torch.allclose(parameter, torch.tensor([0.99, -1.99]), atol=1e-6)


def test_layer_decay_acts_on_the_rates_of_a_vit() -> None:
    """Scales as LAVIS's `get_num_layer_for_vit` gives them and BEiT's optimiser applies them; LAVIS's own does not."""
    vision = VisionEncoder(
        backbone="vit_tiny_patch16_224", image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, final_norm=False
    )
    model = SimpleNamespace(vision=vision)
    scales = layer_decay(model, 0.5)  # type: ignore[arg-type]
    assert layer_decay(model, 1.0) == {}  # type: ignore[arg-type]
    names = dict(vision.named_parameters(prefix="vision"))
    assert scales.keys() == names.keys()
    optimizer = make_adamw(
        [*names.items(), ("head.weight", nn.Parameter(torch.ones(2, 2)))],
        weight_decay=0.0,
        betas=(0.9, 0.999),
        part_of=lambda name: name.partition(".")[0],
        layer_scales=scales,
    )
    set_learning_rate(optimizer, 8.0)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in names.items():
        block = name.split("blocks.")[1].split(".")[0] if "blocks." in name else None
        layer = 0 if block is None else int(block) + 1
        assert rates[id(parameter)] == 8.0 * 0.5 ** (12 + 1 - layer), name
    assert sorted(set(rates.values()))[-2:] == [4.0, 8.0]


def test_what_is_saved_of_an_average_is_what_was_validated_with_tied_tables_too() -> None:
    """transformers ties an output head to the table of tokens; who loads both names has what the last one holds."""
    trained, other = tiny_model(), tiny_model(seed=1)
    for model in (trained, other):
        model.llm.model.lm_head.weight = model.llm.model.get_input_embeddings().weight
        model.choose_trained({"qformer", "llm"})
    average = WeightAverage(trained, 0.5)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(parameter.requires_grad)
    average.update()
    other.load_state_dict(average.state(trained.held_state()), strict=False)
    with average.in_place():
        for name, tensor in trained.held_state().items():
            assert torch.equal(other.held_state()[name], tensor), name
