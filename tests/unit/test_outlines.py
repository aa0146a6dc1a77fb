"""Outlines of encoders and language models: what a plan reads of them is what the libraries build."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from instructblip.config.schema import CONFIGS, Dtype, LLMConfig, TrainConfig, VisionConfig
from instructblip.config.validate import read_config
from instructblip.models.empty import empty_modules
from instructblip.training.plan.parts import make_plan
from instructblip.training.plan.record import all_records
from instructblip.training.plan.tables import plan_summary
from instructblip.weights import modules
from instructblip.weights.modules import language_model_of_sizes
from instructblip.weights.outlines import (
    RECORD,
    build,
    describe,
    encoder_settings,
    language_model_settings,
    outlined_encoder,
    outlined_language_model,
)
from tests.kit.runs import compose

ENCODERS = sorted(
    path for path in (CONFIGS / "vision").glob("*.yaml") if path.stem != "timm"
)  # a user names its backbone
MODELS = sorted((CONFIGS / "llm").glob("*.yaml"))


def shapes(module: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Of every module its name, what plans tell its class by, its parameters, and which of them is tied to which."""
    numbers: dict[int, int] = {}
    for name, inner in module.named_modules():
        sizes = [getattr(inner, size, None) for size in ("in_features", "out_features", "normalized_shape")]
        kinds = [isinstance(inner, kind) for kind in (nn.Linear, nn.Embedding, nn.LayerNorm, nn.ModuleList)]
        own = {key: (p.shape, p.dtype) for key, p in inner.named_parameters(recurse=False)}
        tied = [numbers.setdefault(id(p), len(numbers)) for p in inner.parameters(recurse=False)]
        yield name, type(inner).__name__, sizes, kinds, own, tied


@pytest.mark.parametrize("name", ["smollm2_135m", "flan_t5_base"])
def test_an_outline_has_the_modules_that_transformers_builds(name: str) -> None:
    config = read_config(CONFIGS / "llm" / f"{name}.yaml", LLMConfig)
    outline = outlined_language_model(config)
    with empty_modules():
        built = language_model_of_sizes(config)
    assert list(shapes(outline)) == list(shapes(built))
    for part in ("base_model", "get_input_embeddings", "get_output_embeddings"):
        one, other = (getattr(model, part) for model in (outline, built))
        names = [
            {id(module): name for name, module in model.named_modules()}[id(found() if "get" in part else found)]
            for model, found in ((outline, one), (built, other))
        ]
        assert names[0] == names[1]
    assert (outline.dtype, outline.config.is_encoder_decoder) == (built.dtype, built.config.is_encoder_decoder)


@pytest.mark.slow
def test_an_outline_has_the_modules_that_timm_builds() -> None:
    config = read_config(CONFIGS / "vision" / "efficientnet_lite0.yaml", VisionConfig)
    outline = outlined_encoder(config)
    with empty_modules():
        built = modules.vision_encoder(config)
    assert outline is not None
    assert list(shapes(outline.backbone)) == list(shapes(built.backbone))
    for name in ("tokens", "width", "dtype", "patch_grid", "prefix_tokens", "class_token", "image_size"):
        assert getattr(outline, name) == getattr(built, name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_outline_is_in_the_type_that_is_asked_for(dtype: Dtype) -> None:
    encoder = outlined_encoder(replace(read_config(CONFIGS / "vision" / "vit_b16.yaml", VisionConfig), dtype=dtype))
    llm = outlined_language_model(replace(read_config(CONFIGS / "llm" / "smollm2_135m.yaml", LLMConfig), dtype=dtype))
    assert encoder is not None
    assert {p.dtype for module in (encoder, llm) for p in module.parameters()} == {getattr(torch, dtype)}
    assert encoder.dtype == llm.dtype == getattr(torch, dtype)


def test_tied_and_repeated_modules_are_built_as_they_were_described() -> None:
    block = lambda: nn.ModuleDict({"q_proj": nn.Linear(2, 3, bias=False), "norm": nn.LayerNorm(2)})  # noqa: E731
    module = nn.ModuleDict({"table": nn.Embedding(5, 2), "blocks": nn.ModuleList([block(), block()])})
    module["blocks"].append(nn.ModuleDict({"q_proj": nn.Linear(2, 3)}))
    module["head"] = nn.Linear(2, 5, bias=False)
    module["head"].weight = module["table"].weight
    described = describe(module)
    assert [count for count, _ in described["children"][1][1]["children"]] == [2, 1]
    found = build(described, torch.float32)
    assert list(shapes(found)) == list(shapes(module))


def test_every_encoder_and_language_model_of_the_repository_has_an_outline() -> None:
    recorded = {
        part: [record["settings"] for record in records] for part, records in json.loads(RECORD.read_text()).items()
    }
    for path in ENCODERS:
        assert encoder_settings(read_config(path, VisionConfig)) in recorded["vision"], path
    for path in MODELS:
        assert language_model_settings(read_config(path, LLMConfig)) in recorded["llm"], path


@pytest.mark.slow
def test_other_sizes_have_none_and_are_built() -> None:
    config = compose("train", TrainConfig, ["llm.sizes.num_hidden_layers=2", "vision.image_size=96", "plan=true"])
    assert outlined_encoder(config.vision) is None
    assert outlined_language_model(config.language_model()) is None
    assert make_plan(config).llm.config.num_hidden_layers == 2


@pytest.mark.slow
def test_the_plan_of_an_outline_is_that_of_what_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose("train", TrainConfig, ["plan=true"])
    outlined = make_plan(config)
    for name in ("outlined_encoder", "outlined_language_model"):
        monkeypatch.setattr(modules, name, lambda config: None)
    built = make_plan(config)
    assert type(built.vision) is not type(outlined.vision)
    assert outlined.memory() == built.memory()
    assert outlined.sample_flops() == built.sample_flops()
    assert plan_summary(outlined) == plan_summary(built)


@pytest.mark.slow
def test_the_record_is_what_the_libraries_build_for_every_shipped_configuration() -> None:
    assert json.loads(json.dumps(all_records())) == json.loads(RECORD.read_text(encoding="utf-8"))
