"""An equal budget: a connector gets the trained parameters, visual tokens or FLOPs of the Q-Former, counted anew here."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from instructblip.config.checks import check
from instructblip.config.schema import (
    ArchitectureConfig,
    Budget,
    ConnectorConfig,
    ConnectorKind,
    TrainConfig,
    TrainedPartsConfig,
)
from instructblip.config.validate import read_model_config, to_yaml
from instructblip.errors import UserError
from instructblip.models.llava import LLaVA
from instructblip.training.budget import _qformer_budget, matched
from instructblip.training.plan.connector import connector_shape, frame_flops, kept_bytes
from instructblip.training.plan.flops import image_flops
from instructblip.training.plan.memory import Plan
from instructblip.training.plan.parts import make_plan
from instructblip.weights.modules import parts_without_weights
from instructblip.weights.parts import build_model
from tests.kit.connectors import tiny_connector_model, tiny_llava
from tests.kit.runs import compose
from tests.kit.tiny import tiny_parts

SMALL = {"width": 32, "depth": 1}
QUERIES = 16


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of a Q-Former over tiny parts, whose sizes their folders say, with 8 x 8 patches."""
    found = tiny_parts(tmp_path_factory.mktemp("parts")) | {"vision.grid": "8", "qformer.queries": str(QUERIES)}
    phases = ("~recipe.phases", "recipe.phases={one: {steps: 1, batch_size: 4, learning_rate: 1e-3}}")
    paths = [f"{key}={value}" for key, value in found.items()]
    overrides = ["~qformer.sizes", "~llm.sizes", "data.cache_features=false", *phases, *paths]
    return compose("train", TrainConfig, overrides)


def with_connector(config: TrainConfig, kind: ConnectorKind, **settings: Any) -> TrainConfig:
    return replace(config, connector=ConnectorConfig(kind=kind, **settings))


def trained_parameters(config: TrainConfig) -> int:
    """Of the model that is built, counted after it was told what trains."""
    model = build_model(config, trained=config.train.parts(config))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def step_flops(plan: Plan) -> float:
    """Of a usual sample, by the plan."""
    return sum(part.forward + part.backward for part in plan.sample_flops())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "match", "sizes"),
    [
        ("mlp", ["tokens", "parameters"], {}),
        ("mlp", ["flops"], {}),
        ("linear", ["tokens"], {}),
        ("linear", ["flops"], {}),
        ("resampler", ["parameters", "tokens"], SMALL),
        ("resampler", ["flops", "parameters"], SMALL),
    ],
)
def test_what_is_to_be_equal_is_equal(
    kind: ConnectorKind, match: list[Budget], sizes: dict[str, int], reference: TrainConfig
) -> None:
    config, said = matched(with_connector(reference, kind, match=match, **sizes))
    plan, wanted = make_plan(config), make_plan(reference)
    if "tokens" in match:
        assert plan.shape.visual_tokens == wanted.shape.visual_tokens == QUERIES
    if "parameters" in match:
        assert trained_parameters(config) == pytest.approx(trained_parameters(reference), rel=0.01)
    if "flops" in match:
        assert step_flops(plan) == pytest.approx(step_flops(wanted), rel=0.05)
        assert f"{step_flops(plan) / 1e9:,.4g} GFLOP a sample (Q-Former {step_flops(wanted) / 1e9:,.4g})" in said[0]
    assert len(said) == 1
    assert f"{trained_parameters(config):,} trained parameters (Q-Former {trained_parameters(reference):,})" in said[0]
    assert f"{plan.shape.visual_tokens:,} visual tokens a frame (Q-Former {QUERIES})" in said[0]


@pytest.mark.slow
def test_what_was_chosen_is_stored_and_builds_the_same_model(reference: TrainConfig, tmp_path: Path) -> None:
    chosen, _ = matched(with_connector(reference, "mlp", match=["tokens", "parameters"]))
    assert chosen.connector.match == ["tokens", "parameters"]
    (tmp_path / "config.yaml").write_text(to_yaml(chosen))
    stored = read_model_config(tmp_path / "config.yaml")
    assert (stored.connector, stored.qformer) == (chosen.connector, chosen.qformer)
    model = build_model(stored)
    assert isinstance(model, LLaVA)
    assert model.frame_tokens == QUERIES == chosen.connector.tokens
    assert model.connector.output.in_features == chosen.connector.hidden_width


@pytest.mark.slow
def test_without_a_budget_the_qformer_section_is_left_out(reference: TrainConfig) -> None:
    config, said = matched(with_connector(reference, "linear"))
    assert (config.qformer, said) == (None, [])
    assert matched(reference) == (reference, [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings", "queries", "words"),
    [
        (
            "mlp",
            {"match": ["tokens"]},
            11,
            "connector.tokens=11: no rectangle within 8 x 8 patches has so many; set it",
        ),
        ("resampler", {"match": ["parameters"], "width": 64, "depth": 9}, 4, "comes no nearer to the Q-Former's"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(
    kind: ConnectorKind, settings: dict[str, Any], queries: int, words: str, reference: TrainConfig
) -> None:
    config = replace(reference, qformer=replace(reference.q_former(), queries=queries))
    with pytest.raises(UserError, match=words) as error:
        matched(with_connector(config, kind, **settings))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("linear", {"match": ["parameters"]}, "chooses hidden_width, and connector=linear has none"),
        ("mlp", {"match": ["tokens", "flops"]}, "chooses tokens twice"),
        ("mlp", {"match": ["tokens"], "tokens": 4}, "leave one of the two out"),
        (
            "qformer",
            {"tokens": 4},
            "connector.tokens is none of connector=qformer; leave it out, or set connector=mlp or",
        ),
        ("mlp", {"depth": 2}, "connector.depth is none of connector=mlp"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    kind: ConnectorKind, settings: dict[str, Any], words: str, reference: TrainConfig
) -> None:
    with pytest.raises(UserError, match=words) as error:
        check(with_connector(reference, kind, **settings))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_model_and_what_trains_must_have_the_connector(reference: TrainConfig) -> None:
    mlp = with_connector(reference, "mlp")
    captioner = ("model=blip_caption", "vision=vit_b16", "text=bert_base", "~qformer", "~llm", "connector=mlp")
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: check(replace(mlp, model=ArchitectureConfig(kind="blip2"))), "model=blip2 is made of a Q-Former"),
        (lambda: compose("train", TrainConfig, captioner), "model=blip_caption has no connector, and connector=mlp is"),
        (lambda: check(replace(mlp, train=TrainedPartsConfig(connector="frozen"))), "set train.connector=full"),
        (
            lambda: check(replace(mlp, train=TrainedPartsConfig(learning_rates={"qformer": 1e-5}))),
            "connector=mlp has no qformer to train",
        ),
        (
            lambda: check(replace(reference, train=TrainedPartsConfig(learning_rates={"connector": 1e-5}))),
            "model=instructblip has no connector to train",
        ),
        (
            lambda: compose("train", TrainConfig, ["connector=mlp", "qformer.queries=8"]),
            "qformer.queries= is of a Q-Former, which connector=mlp is not; leave it out, or say what is to be equal",
        ),
    ]
    for refused, words in cases:
        with pytest.raises(UserError, match=words) as error:
            refused()
        assert "\n" not in str(error.value)


def test_gradients_pass_through_an_encoder_with_adapters(reference: TrainConfig) -> None:
    parts = parts_without_weights(reference)
    modes: dict[str, Any] = {mode: replace(reference.train, vision=mode) for mode in ("frozen", "lora", "full")}
    flops = {mode: _qformer_budget(replace(reference, train=train), parts).flops for mode, train in modes.items()}
    image = image_flops(parts.vision)
    assert flops["lora"] - flops["frozen"] == pytest.approx(image)
    assert flops["full"] - flops["frozen"] == pytest.approx(2 * image)


# --- the plan --------------------------------------------------------------------------------------------------------


def test_flops_of_a_frame_are_those_of_its_matrices_and_attention() -> None:
    linear, mlp, resampler = (tiny_connector_model(kind).connector for kind in ("linear", "mlp", "resampler"))
    width = linear.output.in_features  # 16 patches, an LLM of width 32
    assert frame_flops(linear, 16, width) == 2 * 16 * width * 32
    assert frame_flops(mlp, 16, width) == 2 * 16 * (width * 32 + 32 * 32)
    layer = 2 * (2 * 4 + 2 * (16 + 4)) * 32 * 32 + 4 * 4 * (16 + 4) * 32 + 2 * 4 * 2 * 32 * 128
    assert frame_flops(resampler, 16, width) == 2 * 16 * width * 32 + 2 * layer + 2 * 4 * 32 * 32


def test_a_pass_keeps_the_inputs_of_its_layers() -> None:
    model = tiny_llava()
    tokens = torch.randn(1, 5, 32)
    patches, hidden = 4 * 32, 4 * 32
    assert kept_bytes(model.connector, tokens) == 4 * (patches + 2 * hidden) + 4 * 32  # [CLS] lies in the same memory


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize(("norm", "encoder"), [("layer", ()), ("none", ()), ("none", ("vision",))])
def test_a_backward_pass_is_counted_as_torch_counts_it(
    kind: ConnectorKind, norm: str, encoder: tuple[str, ...]
) -> None:
    model = tiny_connector_model(kind)
    shape = connector_shape(
        model.vision,
        nn.LayerNorm(model.vision.width) if norm == "layer" else nn.Identity(),
        model.connector,
        model.llm.model,
        {"connector", *encoder},
    )
    (found,) = (part for part in shape.by_part(shape.sample_work(shape.usual), set()) if part.part == "connector")
    assert not found.recompute  # a run has nothing to recompute in it
    tokens = torch.randn(1, 16, model.vision.width, requires_grad=norm == "layer" or bool(encoder))
    output = model.connector.requires_grad_(True)(tokens).sum()
    with FlopCounterMode(display=False) as counter:
        output.backward()
    assert found.backward == counter.get_total_flops()


def test_a_plan_counts_what_the_model_has() -> None:
    model = tiny_llava()
    shape = connector_shape(model.vision, model.vision_norm, model.connector, model.llm.model)
    work: Any = shape.sample_work(shape.usual)
    assert (shape.visual_tokens, work.positions) == (4, 4 + 35 + 16 - 1)
    parts = {part.part: part for part in shape.by_part(work, {"answer_logits"})}
    assert parts["connector"].forward == 2 * 4 * (32 * 32 + 32 * 32)
    assert parts["connector"].backward == 3 * 2 * 4 * 32 * 32  # no gradient for image tokens, which nothing trains
    assert {"vision encoder", "language model", "logits of the answers"} < parts.keys()
    assert not parts["connector"].recompute
    none = {part.part: part for part in shape.by_part(work, {"visual_prompt"})}
    assert none["language model"].forward == 0
