"""One tiny trained model in every format, and the configurations that name its parts."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from instructblip.config.schema import LLMConfig
from instructblip.config.validate import read_model_config
from instructblip.weights import load as loading
from instructblip.weights.__main__ import main
from tests.kit.parity import write_configs
from tests.kit.tiny import EOS, tiny_huggingface, tiny_llama, tiny_llm_tokenizer


@dataclass(frozen=True)
class Formats:
    """The same weights as a transformers folder, a run of ours and a file of LAVIS, and a configs/ for the last.

    Its configs/llm has `own` (the model's), `other` (other weights) and `wide` (another width).
    """

    huggingface: Path
    native: Path
    lavis: Path
    configs: Path


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> Formats:
    folder = tmp_path_factory.mktemp("formats")
    made = Formats(folder / "huggingface", folder / "native", folder / "model.pth", folder / "configs")
    tiny_huggingface(made.huggingface)
    assert main([str(made.huggingface), str(made.native), "--to", "native"]) == 0
    assert main([str(made.native), str(made.lavis), "--to", "lavis"]) == 0
    config = read_model_config(made.native / "config.yaml")
    sections = {
        "vision/eva_vit_g": dataclasses.replace(config.vision, name="eva_vit_g", norm_eps=1e-5),
        "qformer/blip2": dataclasses.replace(config.qformer, name="blip2", queries=9),
        "llm/own": dataclasses.replace(config.llm, name="own", lavis_projection="llm_proj"),
        "llm/other": _language_model(folder / "other", config.llm, width=32),
        "llm/wide": _language_model(folder / "wide", config.llm, width=48),
    }
    write_configs(made.configs, sections)
    return made


@pytest.fixture
def named_parts(formats: Formats, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of parts mean those of `Formats.configs`."""
    monkeypatch.setattr(loading, "CONFIGS", formats.configs)


def _language_model(folder: Path, like: LLMConfig, *, width: int) -> LLMConfig:
    torch.manual_seed(width)
    tokenizer = tiny_llm_tokenizer()
    tiny_llama(len(tokenizer), tokenizer.eos_token_id, width=width).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sources = dataclasses.replace(like.sources, path=str(folder))
    return dataclasses.replace(like, name=folder.name, sources=sources, pad_token=EOS, bos_token=None)
