"""What results.json says of the model that was evaluated."""

import pytest
import torch

from instructblip.evaluation.suite import describe_model, model_identity
from instructblip.models.adapters import Adapter
from instructblip.models.fingerprint import fingerprint_tensors
from instructblip.models.quantized import quantize_linears
from instructblip.weights.load import FrozenPart, frozen_fingerprints
from instructblip.weights.parts import adapt
from tests.kit.tiny import tiny_model

PARTS = {"vision": FrozenPart("a ViT", "vision.pth"), "llm": FrozenPart("an LLM", "its/folder")}


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_frozen_parts_are_named_as_they_are_held(quantization: str | None) -> None:
    model = tiny_model()
    if quantization:
        quantize_linears(model.llm.model, quantization)
    frozen = frozen_fingerprints(model)
    found = describe_model(model, PARTS, frozen, "trained")
    assert found["llm"] == {
        "name": "an LLM",
        "source": "its/folder",
        "kind": "decoder",
        "dtype": "float32",
        "quantization": quantization,
        "sha256": frozen["llm"],
    }
    assert found["vision"] == {
        "name": "a ViT",
        "source": "vision.pth",
        "dtype": "float32",
        "image_size": model.vision.image_size,
        "sha256": frozen["vision"],
    }
    assert found["sha256"] == model_identity(model, frozen, "trained")


def test_another_factor_of_the_same_adapters_is_another_model() -> None:
    found = set()
    for alpha in (4.0, 8.0):
        model = tiny_model()
        adapt(model, "llm", Adapter(2, alpha, 0.0), seed=0)
        found.add(model_identity(model, frozen_fingerprints(model), fingerprint_tensors(model.held_state())))
    assert len(found) == 2


def test_the_same_weights_with_other_settings_are_another_model() -> None:
    """Heads of the encoder, of the Q-Former, and what `llm.options` replaces: no answer of one is taken for another's."""
    models = [tiny_model() for _ in range(5)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    models[2].vision.backbone.bn1.eps = 0.1
    layers = [module for module in models[3].qformer.modules() if hasattr(module, "heads")]
    layers[0].heads //= 2
    models[4].llm.model.config.rms_norm_eps = 0.1
    found = [model_identity(model, frozen_fingerprints(model), "trained") for model in models]
    assert found[0] == found[1]
    assert len(set(found)) == 4


def test_another_weight_is_another_model() -> None:
    models = [tiny_model() for _ in range(3)]
    with torch.no_grad():
        next(models[1].llm.model.parameters()).add_(1)
        models[2].projection.bias.add_(1)
    first, frozen, trained = (
        describe_model(model, PARTS, frozen_fingerprints(model), fingerprint_tensors(model.held_state()))
        for model in models
    )
    assert len({first["sha256"], frozen["sha256"], trained["sha256"]}) == 3
    assert first["llm"]["sha256"] == trained["llm"]["sha256"] != frozen["llm"]["sha256"]
