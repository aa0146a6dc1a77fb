"""One call loads every format; a language model that the weights were not aligned to is warned about."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import AutoTokenizer

import instructblip
from instructblip.config.schema import LLMConfig
from instructblip.config.validate import read_config
from instructblip.errors import UserError
from instructblip.weights.checkpoint import checkpoint_folders
from instructblip.weights.load import LoadedModel, Source, find_source, load_model
from instructblip.weights.names import QFORMER_TOKENIZER
from instructblip.weights.parity import ANSWER, UNEQUAL, pixels, stage_differences, trace_native
from instructblip.weights.parity_transformers import trace_huggingface
from tests.parity.conftest import Formats

pytestmark = pytest.mark.usefixtures("named_parts")


def load(source: Path | str, **parts: Any) -> LoadedModel:
    return load_model(source, device="cpu", **parts)


def test_every_format_is_the_same_model(formats: Formats) -> None:
    expected = load(formats.huggingface)
    trace = trace_native(expected.model)
    (checkpoint,) = checkpoint_folders(formats.native / "checkpoints")
    loaded = {
        "native": load(formats.native),
        "checkpoint": load(checkpoint),
        "lavis": load(formats.lavis, llm="own"),
    }
    for name, found in loaded.items():
        state = found.model.state_dict()
        assert not [key for key, tensor in expected.model.state_dict().items() if not torch.equal(state[key], tensor)]
        assert not found.model.training
        bound = 1e-4 if name == "lavis" else 0  # which has another eps in ln_vision
        assert max(stage_differences(trace_native(found.model), trace).values()) <= bound
    assert loaded["lavis"].model.vision_norm.eps == 1e-5
    assert loaded["native"].model.vision_norm.eps == 1e-6
    assert loaded["lavis"].model.qformer.query_tokens.shape[1] == 4  # the file's, not the configuration's
    names = ("huggingface", "native", "native", "model")
    assert (expected.name, *(found.name for found in loaded.values())) == names
    assert {found.step for found in loaded.values()} == {0}
    assert expected.config is None
    assert [part.name for part in expected.parts.values()] == ["ViT of huggingface", "llama of huggingface"]
    assert loaded["native"].parts["llm"] == ("huggingface_llm", str(formats.native / "llm"))
    assert [part.name for part in loaded["lavis"].parts.values()] == ["eva_vit_g", "own"]
    assert loaded["lavis"].config is not None
    assert loaded["lavis"].config.llm.name == "own"


def test_a_source_is_found_without_its_weights(formats: Formats, tmp_path: Path) -> None:
    (checkpoint,) = checkpoint_folders(formats.native / "checkpoints")
    assert find_source(formats.native) == ("run", checkpoint, "native", "instructblip", "decoder")
    assert find_source(checkpoint, llm="huggingface_llm") == ("run", checkpoint, "native", "instructblip", "decoder")
    assert find_source(formats.lavis, llm="own") == ("lavis", formats.lavis, "model", "instructblip", "decoder")
    folder = Path(
        shutil.copytree(formats.huggingface, tmp_path / "mine", ignore=shutil.ignore_patterns("*.safetensors"))
    )
    assert find_source(folder) == Source("huggingface", folder, "mine", "instructblip", "decoder")
    said = folder / "config.json"
    said.write_text(json.dumps(json.loads(said.read_text()) | {"text_config": {"model_type": "t5"}}))
    assert find_source(folder).llm_kind == "encoder_decoder"
    assert find_source(folder, llm="own").llm_kind == "decoder"
    file = formats.configs / "llm/own.yaml"
    t5 = dataclasses.replace(read_config(file, LLMConfig), kind="encoder_decoder")
    for source in (formats.native, formats.huggingface, formats.lavis):
        assert find_source(source, llm=t5).llm_kind == "encoder_decoder"


def test_instructions_are_padded_behind_whatever_the_folder_says(formats: Formats, tmp_path: Path) -> None:
    """A processor that pads prompts on the left may have marked the Q-Former's tokenizer so."""
    folder = Path(shutil.copytree(formats.huggingface, tmp_path / "left"))
    file = folder / QFORMER_TOKENIZER / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
    assert AutoTokenizer.from_pretrained(file.parent).padding_side == "left"
    model = load(folder).model
    trace = trace_native(model)
    expected = trace_native(load(formats.huggingface).model)
    assert max(stage_differences(trace, expected).values()) == 0
    assert stage_differences(trace_huggingface(folder), trace)["padded"] <= 1e-5  # what a conversion compares
    images = pixels(model.vision.image_size)[:, None]
    together = model.rank(images, UNEQUAL, [[ANSWER]] * 2)
    alone = [model.rank(images[row : row + 1], [UNEQUAL[row]], [[ANSWER]])[0] for row in range(2)]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    model.save_huggingface(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again" / QFORMER_TOKENIZER).padding_side == "right"


def test_load_returns_the_model_alone(formats: Formats) -> None:
    model = instructblip.load(str(formats.lavis), llm="own", device="cpu")
    assert isinstance(model, instructblip.models.instructblip.InstructBLIP)
    assert next(model.parameters()).device.type == "cpu"


def test_a_language_model_of_ones_own_is_given_by_the_path_of_its_yaml(formats: Formats, tmp_path: Path) -> None:
    file = Path(shutil.copy(formats.configs / "llm/own.yaml", tmp_path / "mine.yaml"))
    file.write_text(file.read_text().replace("name: own", "name: mine"))
    assert load(formats.lavis, llm=str(file)).parts["llm"].name == "mine"


@pytest.mark.slow
def test_the_language_model_it_was_aligned_to_is_no_reason_to_warn(
    formats: Formats, caplog: pytest.LogCaptureFixture
) -> None:
    load(formats.native)
    load(formats.huggingface)
    load(formats.native, llm="huggingface_llm")
    load(formats.lavis, llm="own")
    assert not caplog.records


@pytest.mark.slow
@pytest.mark.parametrize("source", ["huggingface", "native", "lavis"])
@pytest.mark.parametrize("llm", ["other", "wide"])
def test_another_language_model(source: str, llm: str, formats: Formats, caplog: pytest.LogCaptureFixture) -> None:
    own, loaded = load(formats.huggingface).model, load(getattr(formats, source), llm=llm)
    model = loaded.model
    trained_with = {
        "huggingface": "the LLM of huggingface",
        "native": "huggingface_llm",
        "lavis": "an LLM of width 32 (LAVIS's llm_proj)",
    }[source]
    remark = ", and the projection, into another width, starts anew" if llm == "wide" else ""
    assert [record.message for record in caplog.records] == [
        f"Q-Former and projection were aligned to {trained_with}; llm={llm} needs them trained{remark}"
    ]
    assert loaded.parts["llm"].name == llm
    assert loaded.standing.aligned_to == trained_with
    assert loaded.standing.untrained == (("projection",) if llm == "wide" else ())
    assert model.llm.width == model.projection.out_features == {"other": 32, "wide": 48}[llm]
    assert torch.equal(model.projection.weight, own.projection.weight) is (llm == "other")
    for name, tensor in own.held_state().items():
        if not name.startswith("projection."):
            assert torch.equal(model.state_dict()[name], tensor), name
    scores = model.rank(torch.zeros(1, 1, 3, 28, 28, dtype=torch.uint8), ["what is it?"], [["red", "blue"]])
    assert bool(scores[0].isfinite().all())


def test_of_two_language_models_of_one_width_the_projections_name_tells(
    formats: Formats, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = torch.load(formats.lavis, weights_only=True)["model"]
    torch.save({"model": {name.replace("llm_proj", "opt_proj"): state[name] for name in state}}, tmp_path / "opt.pth")
    own = read_config(formats.configs / "llm/own.yaml", LLMConfig)
    load(tmp_path / "opt.pth", llm=dataclasses.replace(own, lavis_projection="opt_proj"))
    assert not caplog.records
    load(tmp_path / "opt.pth", llm="own")
    assert [record.message for record in caplog.records] == [
        "Q-Former and projection were aligned to an LLM of width 32 (LAVIS's opt_proj); llm=own needs them trained"
    ]


def test_files_of_parts_from_elsewhere(formats: Formats, tmp_path: Path) -> None:
    for part in ("llm", "vision", "qformer"):
        shutil.copytree(formats.native / part, tmp_path / part)
    moved = tmp_path / "moved"
    shutil.copytree(formats.native, moved)
    for part in ("llm", "vision", "qformer"):
        shutil.rmtree(moved / part)
    text = (moved / "config.yaml").read_text().replace(str(formats.native), "/nowhere")
    (moved / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="/nowhere"):
        load(moved)
    parts = {f"{part}_path": str(tmp_path / part) for part in ("llm", "vision", "qformer")}
    found, expected = load(moved, **parts).model.state_dict(), load(formats.native).model.state_dict()
    assert not [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


def test_what_cannot_be_loaded(formats: Formats, tmp_path: Path) -> None:
    cases: list[tuple[Path | str, dict[str, str], str]] = [
        (
            formats.lavis,
            {},
            "has no language model in it; say which one it was trained with: llm= one of other, own, wide",
        ),
        (formats.lavis, {"llm": "owm"}, "there is no llm=owm; did you mean own? configs/llm has: other, own, wide"),
        (formats.lavis, {"llm": "./owm.yaml"}, "llm=./owm.yaml is not there; give the path of a YAML"),
        (formats.huggingface, {"vision_path": "x"}, "has its own ViT, Q-Former and LLM"),
        (formats.huggingface, {"llm_path": "x"}, "only llm= (with llm_path=)"),
        (tmp_path / "nothing", {}, "is no run, transformers folder, hub id or .pth file"),
        ("some where/else", {}, "is no run, transformers folder, hub id or .pth file"),
        (tmp_path, {}, "there is no checkpoint at"),
        ("model.pth", {"llm": "own"}, "is no run, transformers folder"),
        ("outputs/mistyped", {}, "there is no folder outputs/mistyped here, and it could not be had from the hub: "),
    ]
    for source, parts, message in cases:
        with pytest.raises(UserError, match=re.escape(message)):
            load(source, **parts)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_hub_id(form: str, formats: Formats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(formats.huggingface, repository)
    whole = load(repository).model
    if form == "bin":
        theirs = instructblip.weights.transformers_read.read_weights(repository)
        torch.save(instructblip.weights.names.pack_qkv_bias(theirs), repository / "pytorch_model.bin")
        (repository / "model.safetensors").unlink()
    else:
        (repository / "pytorch_model.bin").write_bytes(b"never to be fetched")
    asked = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str], **_: bool) -> str:
        asked.append(name)
        copy = tmp_path / f"snapshot{len(asked)}"
        for file in (path for path in repository.rglob("*") if path.is_file()):
            if any(file.match(pattern) for pattern in allow_patterns):
                place = copy / file.relative_to(repository)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, place)
        return str(copy)

    monkeypatch.setenv("INSTRUCTBLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = load("Someone/instructblip-tiny")
    assert loaded.name == "instructblip-tiny"
    assert asked == ["Someone/instructblip-tiny"] * {"safetensors": 1, "bin": 2}[form]
    assert not (tmp_path / "snapshot1/pytorch_model.bin").exists()
    found = loaded.model.state_dict()
    assert not [name for name, tensor in whole.state_dict().items() if not torch.equal(found[name], tensor)]
