"""BLIP-2's weights out and in again: bit-equal for every tensor, and transformers and LAVIS find all that they look for."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, Blip2Processor

from instructblip.errors import UserError
from instructblip.models.blip2 import BLIP2
from instructblip.models.instructblip import InstructBLIP
from instructblip.weights.lavis import load_lavis, qformer_settings, read_lavis, save_lavis
from instructblip.weights.transformers_read import load_huggingface
from instructblip.weights.transformers_settings import read_settings
from tests.kit.blip2 import NEWLINE, tiny_stage1, tiny_stage2, write_captioner, write_retrieval
from tests.kit.tiny import EOS, HUGGINGFACE_LLMS, tiny_encoder_decoder_llm, tiny_llm
from tests.kit.vectors import read, stage1_model, stage2_llm, stage2_model, tensors

LLMS = {"llama": tiny_llm, "t5": tiny_encoder_decoder_llm}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# --- transformers ----------------------------------------------------------------------------------------------------


def test_the_first_stage_goes_to_transformers_and_comes_back_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_stage1()
    model.save_huggingface(tmp_path / "out")
    assert [record.message for record in caplog.records] == [
        "transformers' Blip2ForImageTextRetrieval has no place for the language-model head and the temperature: "
        "instructblip.safetensors beside its own files holds them",
        "transformers computes ln_vision with an eps of 1e-06, this model with 1e-05: its outputs differ by that",
    ]
    side = load_file(tmp_path / "out/instructblip.safetensors")
    assert {name for name in side if "lm_head" not in name} == {"temperature"}
    again = load_huggingface(tmp_path / "out")
    assert isinstance(again, BLIP2)
    assert_same(again.state_dict(), model.state_dict())
    assert again.vision_norm.eps == 1e-5
    assert torch.equal(again.vision.mean, model.vision.mean)
    for text in ("two dogs", "a literal <image> in a text"):
        assert torch.equal(again.tokenize([text])[0], model.tokenize([text])[0])
    theirs, info = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.config.image_token_index is None
    assert theirs.config.image_text_hidden_size == 16
    ids = Blip2Processor.from_pretrained(tmp_path / "out")(text=["two dogs"])["input_ids"]
    assert ids == model.tokenize(["two dogs"])[0].tolist()


def test_the_first_stage_without_a_language_model_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_stage1(captions=False, norm_eps=1e-6)
    model.save_huggingface(tmp_path / "out")
    assert [record.message for record in caplog.records] == [
        "transformers' Blip2ForImageTextRetrieval has no place for the temperature: instructblip.safetensors beside its own "
        "files holds them"
    ]
    assert_same(load_huggingface(tmp_path / "out").state_dict(), model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("image_token", [False, True])
def test_a_published_retrieval_model_goes_out_as_it_came(image_token: bool, tmp_path: Path) -> None:
    theirs = write_retrieval(tmp_path / "theirs", image_token=image_token)
    model = load_huggingface(tmp_path / "theirs")
    assert isinstance(model, BLIP2)
    assert model.qformer.lm_head is None
    assert float(model.temperature.detach()) == pytest.approx(0.07)
    assert len(model.tokenizer) == theirs.config.qformer_config.vocab_size  # <image> has no row
    assert model.match(torch.zeros(1, 1, 3, 28, 28, dtype=torch.uint8), ["a literal <image>"]).isfinite().all()
    model.save_huggingface(tmp_path / "again")
    assert_same(Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "again").state_dict(), theirs.state_dict())
    assert_same(load_huggingface(tmp_path / "again").state_dict(), model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("llm", LLMS)
def test_the_second_stage_goes_to_transformers_and_comes_back_whole(llm: str, tmp_path: Path) -> None:
    model = tiny_stage2(llm=LLMS[llm]())
    model.save_huggingface(tmp_path / "out")
    again = load_huggingface(tmp_path / "out")
    assert isinstance(again, InstructBLIP)
    assert_same(again.state_dict(), model.state_dict())
    assert not again.qformer.instruction_aware
    assert again.qformer_tokenizer is None
    for text in ("what color is it?", "", "a literal <image>"):
        assert again.llm.prompt_format.prompt_ids(text) == model.llm.prompt_format.prompt_ids(text)
        assert again.llm.prompt_format.answer_ids(text, "red") == model.llm.prompt_format.answer_ids(text, "red")
    theirs, info = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    processor = Blip2Processor.from_pretrained(tmp_path / "out")
    assert processor.num_query_tokens == theirs.config.num_query_tokens == 4
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == theirs.config.image_token_index
    assert not (tmp_path / "out/instructblip.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("llm", HUGGINGFACE_LLMS)
@pytest.mark.parametrize("image_token", [False, True], ids=["older", "newer"])
def test_a_published_captioner_goes_out_as_it_came(llm: str, image_token: bool, tmp_path: Path) -> None:
    theirs = write_captioner(tmp_path / "theirs", llm, image_token=image_token)
    model = load_huggingface(tmp_path / "theirs")
    model.save_huggingface(tmp_path / "again")
    again = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "again").state_dict()
    expected, rows = theirs.state_dict(), theirs.config.text_config.vocab_size
    assert again.keys() == expected.keys()
    for name, tensor in expected.items():
        grown = tensor.shape[0] == rows and again[name].shape[0] == rows + 1 and not image_token
        assert torch.equal(again[name][:rows] if grown else again[name], tensor), name
    assert_same(load_huggingface(tmp_path / "again").state_dict(), model.state_dict())


@pytest.mark.slow
def test_a_captioners_conventions_are_its_configurations(tmp_path: Path) -> None:
    for llm, end in (("opt", NEWLINE), ("llama", EOS), ("t5", EOS)):
        write_captioner(tmp_path / llm, llm)
        settings = read_settings(tmp_path / llm)
        assert settings.kind == "blip2"
        assert settings.llm is not None
        begins = None if llm == "t5" else EOS
        assert settings.llm.conventions == {
            "eos_token": end,
            "pad_token": "[PAD]",
            "bos_token": begins,
            "answer_prefix": " ",  # all of these tokenizers are byte-level
        }


def test_other_classes_of_blip2_are_named(tmp_path: Path) -> None:
    write_retrieval(tmp_path / "theirs")
    said = json.loads((tmp_path / "theirs/config.json").read_text())
    (tmp_path / "theirs/config.json").write_text(json.dumps(said | {"architectures": ["Blip2TextModelWithProjection"]}))
    with pytest.raises(UserError, match="holds a Blip2TextModelWithProjection; wanted is one of InstructBlipFor"):
        load_huggingface(tmp_path / "theirs")
    del said["architectures"]
    (tmp_path / "theirs/config.json").write_text(json.dumps(said))
    assert isinstance(load_huggingface(tmp_path / "theirs"), BLIP2)  # by what its Q-Former reads


@pytest.mark.slow
def test_a_damaged_folder_of_the_first_stage_is_named(tmp_path: Path) -> None:
    tiny_stage1().save_huggingface(tmp_path / "whole")
    own, side = "model.safetensors", "instructblip.safetensors"
    for file, lacking in ((own, "itm_head.weight"), (own, "embeddings.word_embeddings.weight"), (side, "temperature")):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "broken")
        state = load_file(tmp_path / "broken" / file)
        del state[lacking]
        torch.save(state, tmp_path / "broken/pytorch_model.bin")
        if file == own:
            (tmp_path / "broken" / own).unlink()
        else:
            save_file(state, tmp_path / "broken" / side)
        with pytest.raises(UserError, match=f"lacks the tensor {lacking}"):
            load_huggingface(tmp_path / "broken")


# --- LAVIS -----------------------------------------------------------------------------------------------------------


def test_the_first_stage_of_lavis_goes_out_as_it_came(tmp_path: Path) -> None:
    weights, sizes = tensors("blip2_stage1/weights"), read("blip2_stage1/config")["sizes"]
    tied = {
        "Qformer.cls.predictions.decoder.weight": weights["Qformer.bert.embeddings.word_embeddings.weight"],
        "Qformer.cls.predictions.decoder.bias": weights["Qformer.cls.predictions.bias"],
        "Qformer.bert.embeddings.position_ids": torch.arange(sizes["max_position_embeddings"])[None],
    }
    torch.save({"model": weights | tied, "epoch": 3}, tmp_path / "stage1.pth")
    checkpoint = read_lavis(tmp_path / "stage1.pth")
    assert (checkpoint.kind, checkpoint.projection, checkpoint.llm_width) == ("blip2_stage1", None, None)
    settings = {"queries": 6, "cross_attention_every": 2, "instruction_aware": True}
    assert qformer_settings(checkpoint) == settings
    model = stage1_model()
    with torch.no_grad():
        for tensor in model.part_state("qformer").values():
            tensor.zero_()
    assert load_lavis(checkpoint, model)
    save_lavis(model, tmp_path / "again.pth")
    assert_same(torch.load(tmp_path / "again.pth", weights_only=True)["model"], weights | tied)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_the_second_stage_of_lavis_goes_out_as_it_came(kind: str, tmp_path: Path) -> None:
    weights = {name: t for name, t in tensors(f"blip2_stage2/{kind}_weights").items() if f"{kind}_model." not in name}
    torch.save({"model": weights}, tmp_path / "stage2.pth")
    checkpoint = read_lavis(tmp_path / "stage2.pth")
    assert (checkpoint.kind, checkpoint.projection, checkpoint.llm_width) == ("blip2", f"{kind}_proj", 64)
    model = stage2_model(stage2_llm(kind))
    with torch.no_grad():
        for tensor in model.part_state("qformer").values():
            tensor.zero_()
    assert load_lavis(checkpoint, model)
    save_lavis(model, tmp_path / "again.pth")
    positions = {"Qformer.bert.embeddings.position_ids": torch.arange(512)[None]}
    assert_same(torch.load(tmp_path / "again.pth", weights_only=True)["model"], weights | positions)


@pytest.mark.parametrize("make", [tiny_stage1, tiny_stage2])
def test_a_trained_vit_is_in_the_file(make: type[BLIP2] | type[InstructBLIP], tmp_path: Path) -> None:
    model, other = make(0), make(1)
    model.choose_trained(("vision", "qformer"))
    save_lavis(model, tmp_path / "model.pth")
    checkpoint = read_lavis(tmp_path / "model.pth")
    assert checkpoint.image_size == 28
    load_lavis(checkpoint, other)
    assert_same(other.held_state(), model.held_state())
    assert "vision.backbone.pos_embed" in other.held_state()  # a checkpoint of it holds the ViT from then on
