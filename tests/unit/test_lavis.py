"""LAVIS's files: what is read, what is passed over by name, what is refused; BLIP-2's two stages laid over each other."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from instructblip.errors import UserError
from instructblip.models.instructblip import InstructBLIP
from instructblip.weights.lavis import (
    load_lavis,
    qformer_settings,
    read_lavis,
    read_pth,
    save_lavis,
)
from instructblip.weights.names import foreign_names
from tests.kit.tiny import tiny_encoder_decoder_llm, tiny_llama, tiny_llm, tiny_released_model


@pytest.fixture(scope="module")
def source() -> InstructBLIP:
    return tiny_released_model(0)


@pytest.fixture
def target(source: InstructBLIP) -> InstructBLIP:
    model = tiny_released_model(1, llm=source.llm)
    assert not torch.equal(model.projection.weight, source.projection.weight)
    return model


def lavis_state(model: InstructBLIP, tmp_path: Path) -> dict[str, Tensor]:
    save_lavis(model, tmp_path / "state.pth")
    return dict(torch.load(tmp_path / "state.pth", weights_only=True)["model"])


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


def test_what_a_file_holds(source: InstructBLIP, tmp_path: Path) -> None:
    save_lavis(source, tmp_path / "model.pth")
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    assert content.keys() == {"model"}
    names = set(content["model"])
    positions = "Qformer.bert.embeddings.position_ids"  # a buffer, which LAVIS's own files have
    assert names == {*foreign_names(source.held_state(), "lavis").values(), positions}
    assert torch.equal(content["model"][positions], torch.arange(64)[None])
    assert {"query_tokens", "ln_vision.weight", "llm_proj.bias"} < names
    assert not [name for name in names if name.startswith(("visual_encoder", "llm_model"))]
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_a_checkpoint_of_lavis_own_training(source: InstructBLIP, target: InstructBLIP, tmp_path: Path) -> None:
    extra = {
        "Qformer.bert.embeddings.position_ids": torch.arange(64)[None],
        "llm_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "Qformer.cls.predictions.bias": torch.ones(4),
    }
    content = {
        "model": lavis_state(source, tmp_path) | extra,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-5, "betas": (0.9, 0.999)}]},
        "config": {"model": {"arch": "blip2_vicuna_instruct"}, "run": {"max_epoch": 1}},
        "scaler": None,
        "epoch": 3,
    }
    torch.save(content, tmp_path / "checkpoint_3.pth")
    vision = {name: tensor.clone() for name, tensor in target.vision.state_dict().items()}
    checkpoint = read_lavis(tmp_path / "checkpoint_3.pth")
    assert (checkpoint.projection, checkpoint.llm_width, checkpoint.vision) == ("llm_proj", 32, {})
    assert load_lavis(checkpoint, target)
    assert_equal(target.held_state(), source.held_state())
    assert_equal(target.vision.state_dict(), vision)


def test_a_vit_in_the_file_is_loaded(source: InstructBLIP, target: InstructBLIP, tmp_path: Path) -> None:
    vision = {f"visual_encoder.{name}": tensor for name, tensor in source.vision.backbone.state_dict().items()}
    state = lavis_state(source, tmp_path) | vision
    torch.save({"model": state}, tmp_path / "with_vit.pth")
    load_lavis(read_lavis(tmp_path / "with_vit.pth"), target)
    assert_equal(target.vision.state_dict(), source.vision.state_dict())
    assert_equal(target.part_state("qformer"), source.part_state("qformer"))
    assert target.held_parts == {"qformer", "vision"}
    del state["visual_encoder.blocks.1.norm2.weight"]
    torch.save({"model": state}, tmp_path / "without_norm.pth")
    with pytest.raises(UserError, match=r"lacks the tensor visual_encoder.blocks.1.norm2.weight"):
        load_lavis(read_lavis(tmp_path / "without_norm.pth"), target)


def test_tensors_that_do_not_fit_are_named(source: InstructBLIP, target: InstructBLIP, tmp_path: Path) -> None:
    state, name = lavis_state(source, tmp_path), "Qformer.bert.encoder.layer.1.attention.self.key.weight"
    before = {name: tensor.clone() for name, tensor in target.held_state().items()}
    cases = {
        f"lacks the tensor {name}": {key: tensor for key, tensor in state.items() if key != name},
        f"{name} is (3, 32), the model needs (32, 32)": state | {name: torch.zeros(3, 32)},
        "has the unknown tensor Qformer.bert.pooler.dense.weight": state
        | {"Qformer.bert.pooler.dense.weight": torch.zeros(2, 2)},
        "has the unknown tensor t5_model.shared.weight": state | {"t5_model.shared.weight": torch.zeros(2, 2)},
    }
    for message, broken in cases.items():
        torch.save({"model": broken}, tmp_path / "broken.pth")
        with pytest.raises(UserError, match=re.escape(message)) as error:
            load_lavis(read_lavis(tmp_path / "broken.pth"), target)
        assert "broken.pth" in str(error.value)
        assert_equal(target.held_state(), before)


def test_the_projection_into_another_width_stays(source: InstructBLIP, tmp_path: Path) -> None:
    save_lavis(source, tmp_path / "model.pth")
    wide = tiny_llm()
    wide.model = tiny_llama(320, 1, width=48)
    target = tiny_released_model(1, llm=wide)
    before = target.projection.weight.clone()
    assert not load_lavis(read_lavis(tmp_path / "model.pth"), target)
    assert torch.equal(target.projection.weight, before)
    assert_equal(target.qformer.state_dict(), source.qformer.state_dict())


def test_the_projection_tells_the_family_of_language_models(source: InstructBLIP, tmp_path: Path) -> None:
    t5 = tiny_released_model(llm=tiny_encoder_decoder_llm())
    for model, given, name in ((t5, None, "t5_proj"), (source, None, "llm_proj"), (source, "opt_proj", "opt_proj")):
        save_lavis(model, tmp_path / "model.pth", projection=given)
        assert f"{name}.weight" in torch.load(tmp_path / "model.pth", weights_only=True)["model"]
        checkpoint = read_lavis(tmp_path / "model.pth")
        assert checkpoint.projection == name
        assert torch.equal(checkpoint.trained["llm_proj.weight"], model.projection.weight)


@pytest.mark.parametrize("aliases", [("t5_model.encoder", "t5_model.decoder"), ("opt_model.lm_head",)])
def test_other_names_of_the_language_models_tied_table_are_passed_over(
    aliases: tuple[str, ...],
    source: InstructBLIP,
    target: InstructBLIP,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "instructblip")
    names = [f"{name}.weight" if "lm_head" in name else f"{name}.embed_tokens.weight" for name in aliases]
    state = lavis_state(source, tmp_path) | dict.fromkeys(names, torch.ones(9, 32, dtype=torch.bfloat16))
    torch.save({"model": state}, tmp_path / "runner.pth")
    assert load_lavis(read_lavis(tmp_path / "runner.pth"), target)
    assert_equal(target.held_state(), source.held_state())
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"passed over {len(names)} tensors of the frozen language model: {', '.join(names)}" in line


def test_settings_that_only_the_tensors_tell(source: InstructBLIP, tmp_path: Path) -> None:
    save_lavis(source, tmp_path / "model.pth")
    expected = {"queries": 4, "cross_attention_every": 2, "instruction_aware": True}
    assert qformer_settings(read_lavis(tmp_path / "model.pth")) == expected


def test_files_that_are_no_checkpoint(source: InstructBLIP, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    with pytest.raises(UserError, match="does not exist"):
        read_lavis(path)
    for content, message in (
        (b"not a file of torch", "no file of tensors"),
        (b"", "cannot be read"),
        (b"PK\x03\x04 cut short", "cannot be read"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            read_lavis(path)
        assert "\n" not in str(error.value)
    for wrong in ({"a": torch.zeros(1)}, [torch.zeros(1)], {"model": {"a": 1}}):
        torch.save(wrong, path)
        with pytest.raises(UserError, match="no state dict under 'model'"):
            read_lavis(path)
    state = {name: tensor for name, tensor in lavis_state(source, tmp_path).items() if "llm_proj" not in name}
    torch.save({"model": state}, path)
    with pytest.raises(UserError, match=r"has no projection \(llm_proj or t5_proj or opt_proj\) and no matching head"):
        read_lavis(path)


class Harmful:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_nothing_is_unpickled(zipped: bool, source: InstructBLIP, target: InstructBLIP, tmp_path: Path) -> None:
    state, path = lavis_state(source, tmp_path), tmp_path / "model.pth"
    torch.save({"model": state}, path, _use_new_zipfile_serialization=zipped)
    load_lavis(read_lavis(path), target)
    assert_equal(target.held_state(), source.held_state())
    torch.save({"model": state, "config": Harmful(tmp_path / "harm")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="could run foreign code; save its state dict alone"):
        read_pth(path)
    assert not (tmp_path / "harm").exists()
