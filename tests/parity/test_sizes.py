"""The four published models have the published numbers of parameters: built on the meta device, without memory."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from instructblip.config.entry import compose_config
from instructblip.config.schema import CONFIGS, LLMConfig, QFormerConfig, TrainConfig
from instructblip.config.validate import read_config
from instructblip.models.qformer import QFormer
from instructblip.weights.modules import language_model_of_sizes, parts_without_weights, qformer_of_sizes

# The last layer's text feed-forward can influence nothing: the published counts have it, training leaves it alone.
LAST_TEXT_FFN = 768 * 3072 + 3072 + 3072 * 768 + 768 + 2 * 768

TRAINED = {"vicuna_7b": 188_837_376, "vicuna_13b": 189_624_832, "flan_t5_xl": 187_262_464, "flan_t5_xxl": 188_837_376}
FROZEN = {
    "vicuna_7b": 6_738_423_808,
    "vicuna_13b": 13_015_874_560,
    "flan_t5_xl": 2_849_757_184,
    "flan_t5_xxl": 11_135_332_352,
    "flan_t5_base": 247_577_856,
    "smollm2_135m": 134_515_008,
    "llama_3_1_8b": 8_030_261_248,
    "mistral_7b": 7_248_023_552,
    "qwen3_8b": 8_190_735_360,
    "gemma_3_4b": 3_880_263_168,
    "opt_2_7b": 2_651_596_800,
    "opt_6_7b": 6_658_473_984,
}


def parameters(module: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def qformer(instruction_aware: bool = True) -> QFormer:
    config = read_config(CONFIGS / "qformer/bert_base.yaml", QFormerConfig)
    config = replace(config, instruction_aware=instruction_aware)
    return qformer_of_sizes(config, vision_width=1408)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_published_models(name: str) -> None:
    parts = parts_without_weights(compose_config("train", TrainConfig, [f"experiment=paper_{name}"]))
    assert parts.vision.tokens == 257
    assert parameters(parts.vision) == 985_894_528
    trainable = nn.ModuleList([parts.norm, parts.qformer, parts.heads])
    assert parameters(trainable) == TRAINED[name]
    assert parameters(trainable, trained=True) == TRAINED[name] - LAST_TEXT_FFN


@pytest.mark.slow
def test_the_second_stage_trains_as_many_parameters_as_others_counted() -> None:
    """A log of BLIP-2's second stage beside OPT 2.7B (BLIText) says 107,133,696."""
    parts = parts_without_weights(compose_config("train", TrainConfig, ["experiment=blip2_stage2"]))
    assert parameters(nn.ModuleList([parts.norm, parts.qformer, parts.heads]), trained=True) == 107_133_696


@pytest.mark.slow
def test_every_language_model_has_its_published_size() -> None:
    found = {}
    for file in sorted((CONFIGS / "llm").glob("*.yaml")):
        with torch.device("meta"):
            model = language_model_of_sizes(read_config(file, LLMConfig))
        assert model.dtype == (torch.float32 if file.stem == "smollm2_135m" else torch.bfloat16)
        found[file.stem] = parameters(model)
    assert found == FROZEN


def test_parts_of_the_qformer() -> None:
    with torch.device("meta"):
        aware, ablated = qformer(), qformer(instruction_aware=False)
    queries = 32 * 768
    assert queries == 24_576
    assert parameters(aware) - queries == 185_660_160
    assert parameters(aware) - parameters(aware, trained=True) == LAST_TEXT_FFN == 4_723_968
    assert parameters(ablated) - queries == 105_137_664
