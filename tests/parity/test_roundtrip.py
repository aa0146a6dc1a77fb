"""Weights out and in again: bit-equal for every tensor, and transformers opens what was written."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor, InstructBlipVideoProcessor

from instructblip.errors import UserError
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import LLM, DecoderLLM
from instructblip.models.quantized import quantize_linears
from instructblip.weights.lavis import load_lavis, read_lavis, save_lavis
from instructblip.weights.parity import stage_differences, trace_native, traces_native
from instructblip.weights.parity_transformers import trace_huggingface, traces_huggingface
from instructblip.weights.transformers_read import load_huggingface, read_weights
from instructblip.weights.transformers_settings import read_settings
from instructblip.weights.transformers_write import save_huggingface
from tests.kit.tiny import (
    BOS,
    EOS,
    HUGGINGFACE_LLMS,
    tiny_encoder_decoder_llm,
    tiny_huggingface,
    tiny_llama,
    tiny_llm,
    tiny_llm_tokenizer,
    tiny_model,
    tiny_released_model,
)

PROMPT = "what color is the shape?"


def tied_llm() -> LLM:
    """A head that is the token table, as SmolLM2's, in bfloat16."""
    tokenizer = tiny_llm_tokenizer()
    model = tiny_llama(len(tokenizer), tokenizer.eos_token_id)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    for parameter in model.parameters():  # `model.bfloat16()` would round the rotary frequencies as well
        parameter.data = parameter.data.bfloat16()
    return DecoderLLM(model, tokenizer, eos_token=EOS, pad_token=EOS, answer_prefix=" ", max_prompt_tokens=50)


def spare_rows_llm() -> LLM:
    """A token table with more rows than there are tokens, and a BOS that the tokenizer does not set by itself."""
    tokenizer = tiny_llm_tokenizer()
    model = tiny_llama(len(tokenizer) + 7, tokenizer.eos_token_id)
    return DecoderLLM(model, tokenizer, eos_token=EOS, pad_token=EOS, bos_token=BOS)


LLMS = {
    "llama": tiny_llm,
    "tied": tied_llm,
    "spare_rows": spare_rows_llm,
    "t5": tiny_encoder_decoder_llm,
    "prefixes": lambda: tiny_llm(image_prefix=f"{BOS}user\n", prompt_prefix="\n", prompt_suffix=" answer"),
}


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module", params=LLMS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[InstructBLIP, Path]:
    model = tiny_released_model(llm=LLMS[request.param]())
    folder = tmp_path_factory.mktemp(request.param) / "exported"
    model.save_huggingface(folder)
    return model, folder


@pytest.mark.slow
def test_ours_to_transformers_to_ours(exported: tuple[InstructBLIP, Path]) -> None:
    model, folder = exported
    again = load_huggingface(folder)
    assert_same_tensors(again.state_dict(), model.state_dict())
    assert torch.equal(again.vision.mean, model.vision.mean)
    assert torch.equal(again.vision.std, model.vision.std)
    assert again.vision_norm.eps == model.vision_norm.eps == 1e-5
    assert again.max_instruction_tokens == 32
    assert type(again.llm) is type(model.llm)
    for text in (PROMPT, "a literal <image> in a prompt"):
        assert again.llm.prompt_format.prompt_ids(text, training=True) == model.llm.prompt_format.prompt_ids(
            text, training=True
        )
        assert again.llm.prompt_format.target_ids(text) == model.llm.prompt_format.target_ids(text)
    assert again.llm.prompt_format.image_prefix_ids == model.llm.prompt_format.image_prefix_ids
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


def test_transformers_opens_the_folder_whole(exported: tuple[InstructBLIP, Path]) -> None:
    model, folder = exported
    theirs, info = InstructBlipForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    processor = InstructBlipProcessor.from_pretrained(folder)
    assert processor.num_query_tokens == theirs.config.num_query_tokens == 4
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == theirs.config.image_token_index
    rows = theirs.get_input_embeddings().weight.shape[0]
    assert (
        rows
        == theirs.config.text_config.vocab_size
        == max(model.llm.embeddings.weight.shape[0], len(processor.tokenizer))
    )


def test_transformers_answers_with_the_same_text(exported: tuple[InstructBLIP, Path]) -> None:
    model, folder = exported
    theirs = InstructBlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = InstructBlipProcessor.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    image = Image.fromarray(torch.randint(0, 256, (28, 28, 3), dtype=torch.uint8, generator=generator).numpy())
    llm = model.llm.float()
    inputs = processor(images=image, text=PROMPT, return_tensors="pt")
    # What the processor cannot say, its user has to: text around the visual tokens and the prompt.
    plain = processor.tokenizer(PROMPT)["input_ids"]
    assert inputs["input_ids"][0].tolist() == [theirs.config.image_token_index] * 4 + plain
    before, marks, prompt = (
        llm.prompt_format.image_prefix_ids,
        inputs["input_ids"][0, :4].tolist(),
        llm.prompt_format.prompt_ids(PROMPT),
    )
    assert prompt == plain or (llm.prompt_format.prompt_prefix and llm.prompt_format.prompt_suffix)
    inputs["input_ids"] = torch.tensor([[*before, *marks, *prompt]])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    ids = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)
    new = ids[:, inputs["input_ids"].shape[1] :] if theirs.config.use_decoder_only_language_model else ids
    text = processor.batch_decode(new, skip_special_tokens=True)[0].strip()
    assert text
    assert model.generate([image], [PROMPT], max_new_tokens=8) == [text]


def test_two_prompts_together_get_the_answers_they_get_alone(exported: tuple[InstructBLIP, Path]) -> None:
    _, folder = exported
    theirs = InstructBlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = InstructBlipProcessor.from_pretrained(folder)
    processor.tokenizer.init_kwargs.pop("padding_side", None)  # as the export's warning says
    decoder_only = theirs.config.use_decoder_only_language_model
    assert processor.tokenizer.padding_side == ("left" if decoder_only else "right")
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (2, 28, 28, 3), dtype=torch.uint8, generator=generator)
    images, prompts = [Image.fromarray(picture.numpy()) for picture in pixels], [PROMPT, "is it red?"]

    def answers(images: list[Image.Image], prompts: list[str]) -> list[list[int]]:
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        ids = theirs.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        return [row[-6:].tolist() for row in ids]

    alone = [answers([image], [prompt])[0] for image, prompt in zip(images, prompts, strict=True)]
    assert answers(images, prompts) == alone


def test_the_processor_of_videos_opens(exported: tuple[InstructBLIP, Path]) -> None:
    model, folder = exported
    processor = InstructBlipVideoProcessor.from_pretrained(folder)
    frames = torch.randint(0, 256, (1, 4, 3, 28, 28), dtype=torch.uint8)
    seen = processor(images=frames, text=[PROMPT], return_tensors="pt", padding=True)["pixel_values"]
    expected = (frames - model.vision.mean) / model.vision.std
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)


def test_transformers_computes_the_same(exported: tuple[InstructBLIP, Path]) -> None:
    model, folder = exported
    model.vision_norm.eps = 1e-6  # transformers has one eps for all norms of the vision part
    try:
        found = stage_differences(traces_huggingface(folder).float32, traces_native(model).float32)
    finally:
        model.vision_norm.eps = 1e-5
    assert max(found.values()) < 2e-5, found


def test_a_row_for_image_is_the_mean_of_the_others(tmp_path: Path) -> None:
    model = tiny_released_model(llm=tiny_llm())
    model.save_huggingface(tmp_path / "exported")
    weights = load_file(tmp_path / "exported/model.safetensors")
    for name, own in (
        ("model.embed_tokens", model.llm.embeddings),
        ("lm_head", model.llm.model.get_output_embeddings()),
    ):
        table = weights[f"language_model.{name}.weight"]
        assert torch.equal(table[:-1], own.weight)
        assert torch.equal(table[-1], own.weight.mean(dim=0))


def test_no_row_is_added_where_one_is_spare(tmp_path: Path) -> None:
    model = tiny_released_model(llm=spare_rows_llm())
    model.save_huggingface(tmp_path / "exported")
    theirs = load_file(tmp_path / "exported/model.safetensors")["language_model.model.embed_tokens.weight"]
    assert torch.equal(theirs, model.llm.embeddings.weight)
    assert json.loads((tmp_path / "exported/config.json").read_text())["image_token_index"] == len(
        model.llm.prompt_format.tokenizer
    )


def test_the_sidecar_says_what_transformers_cannot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_released_model(llm=LLMS["prefixes"]()).save_huggingface(tmp_path / "exported")
    assert [record.message for record in caplog.records] == [
        "transformers' processor puts no text around the visual tokens and the prompt: there, write '<|im_start|>user\\n' "
        "before and '\\n' after the image tokens and ' answer' after the prompt yourself",
        "transformers' processor pads the Q-Former's text on the left as it does the prompts, which moves its positions: "
        "there, before prompts of unequal lengths, call processor.tokenizer.init_kwargs.pop('padding_side')",
        "transformers computes ln_vision with an eps of 1e-06, this model with 1e-05: its outputs differ by that",
    ]
    assert json.loads((tmp_path / "exported/instructblip.json").read_text()) == {
        "format": 1,
        "vision": {"mean": [120.0, 125.0, 130.0], "std": [60.0, 61.0, 62.0], "norm_eps": 1e-5},
        "max_text_tokens": 32,
        "llm_rows": 320,
        "llm": {
            "eos_token": EOS,
            "pad_token": EOS,
            "bos_token": None,
            "image_prefix": f"{BOS}user\n",
            "prompt_prefix": "\n",
            "prompt_suffix": " answer",
            "answer_prefix": " ",
            "image_in_text": False,
            "supervise_bos": False,
            "max_prompt_tokens": 128,
            "max_target_tokens": 256,
        },
    }


@pytest.mark.slow
@pytest.mark.parametrize("llm", HUGGINGFACE_LLMS)
@pytest.mark.parametrize("image_token", [False, True], ids=["older", "newer"])
def test_transformers_to_ours_to_transformers(llm: str, image_token: bool, tmp_path: Path) -> None:
    theirs = tiny_huggingface(tmp_path / "theirs", llm, image_token=image_token)
    model = load_huggingface(tmp_path / "theirs")
    assert model.vision_norm.eps == 1e-6  # as its folder's weights were checked with
    model.save_huggingface(tmp_path / "again")
    again = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "again").state_dict()
    rows = theirs.config.text_config.vocab_size
    expected = theirs.state_dict()
    assert again.keys() == expected.keys()
    for name, tensor in expected.items():
        grown = tensor.shape[0] == rows and again[name].shape[0] == rows + 1 and not image_token
        assert torch.equal(again[name][:rows] if grown else again[name], tensor), name
    assert_same_tensors(load_huggingface(tmp_path / "again").state_dict(), model.state_dict())


@pytest.mark.slow
def test_every_form_of_weight_file_reads_the_same(tmp_path: Path) -> None:
    theirs = tiny_huggingface(tmp_path / "whole", image_token=False)
    expected = load_huggingface(tmp_path / "whole").state_dict()
    for form in ("sharded", "bin", "sharded_bin"):
        shutil.copytree(tmp_path / "whole", tmp_path / form)
        (tmp_path / form / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 3
    # Files of the first release also hold what is computed from the configuration.
    state = theirs.state_dict() | {
        "qformer.embeddings.position_ids": torch.arange(64)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    torch.save(state, tmp_path / "bin/pytorch_model.bin")
    names, folder = list(state), tmp_path / "sharded_bin"
    halves = {"pytorch_model-1.bin": names[:40], "pytorch_model-2.bin": names[40:]}
    for file, part in halves.items():
        torch.save({name: state[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for form in ("sharded", "bin", "sharded_bin"):
        assert_same_tensors(load_huggingface(tmp_path / form).state_dict(), expected)


@pytest.mark.parametrize("llm", ["llama", "t5"])
def test_ours_to_lavis_to_ours(llm: str, tmp_path: Path) -> None:
    model = tiny_released_model(0, llm=LLMS[llm]())
    save_lavis(model, tmp_path / "model.pth")
    again = tiny_released_model(1, llm=model.llm)
    again.vision = model.vision
    checkpoint = read_lavis(tmp_path / "model.pth")
    assert checkpoint.projection == {"llama": "llm_proj", "t5": "t5_proj"}[llm]
    assert load_lavis(checkpoint, again)
    assert_same_tensors(again.state_dict(), model.state_dict())


def test_an_ablated_qformer_goes_through_lavis(tmp_path: Path) -> None:
    model, again = (tiny_model(seed, instruction_aware=False) for seed in (0, 1))
    save_lavis(model, tmp_path / "model.pth")
    load_lavis(read_lavis(tmp_path / "model.pth"), again)
    assert_same_tensors(again.held_state(), model.held_state())


def test_only_what_is_released_goes_into_transformers_format(tmp_path: Path) -> None:
    def quantised() -> InstructBLIP:
        model = tiny_released_model()
        quantize_linears(model.llm.model, "int8", keep=model.llm.model.get_output_embeddings())
        return model

    def channel_norm() -> InstructBLIP:
        model = tiny_released_model()
        model.vision_norm = tiny_model(vision_norm="channel").vision_norm
        return model

    def final_norm() -> InstructBLIP:
        model = tiny_released_model()
        model.vision.backbone.norm = nn.LayerNorm(32)
        return model

    reasons = {
        tiny_model: "EfficientNet",
        quantised: "quantised; load it with llm.quantization=null",
        channel_norm: "ChannelNorm",
        final_norm: "vision.backbone.norm.weight has no place in a transformers",
    }
    for make, reason in reasons.items():
        with pytest.raises(UserError, match=reason):
            save_huggingface(make(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_folder_in_the_way(tmp_path: Path) -> None:
    model, folder = tiny_released_model(), tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("")
    with pytest.raises(UserError, match="exists already"):
        model.save_huggingface(folder)
    with pytest.raises(UserError, match=r"has no instructblip.json, so it is not replaced"):
        save_huggingface(model, folder, overwrite=True)
    (folder / "mine.txt").unlink()
    model.save_huggingface(folder)
    other = tiny_released_model(5)
    save_huggingface(other, folder, overwrite=True)
    assert_same_tensors(load_huggingface(folder).held_state(), other.held_state())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_folder_that_is_not_whole_is_named(tmp_path: Path) -> None:
    theirs = tiny_huggingface(tmp_path / "theirs")
    whole = theirs.state_dict()

    def read(state: Mapping[str, Tensor]) -> None:
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        shutil.copytree(tmp_path / "theirs", tmp_path / "broken")
        (tmp_path / "broken/model.safetensors").unlink()
        torch.save(dict(state), tmp_path / "broken/pytorch_model.bin")
        load_huggingface(tmp_path / "broken")

    for lacking in (
        "vision_model.encoder.layers.1.mlp.fc1.bias",
        "qformer.encoder.layer.2.intermediate.dense.weight",
        "language_model.model.layers.1.mlp.up_proj.weight",
    ):
        with pytest.raises(UserError, match=f"broken lacks the tensor {lacking}"):
            read({name: tensor for name, tensor in whole.items() if name != lacking})
        with pytest.raises(UserError, match=lacking):
            read(whole | {lacking: torch.zeros(3, 3)})
    for surplus in ("vision_model.head.weight", "language_model.model.layers.9.mlp.up_proj.weight", "other"):
        with pytest.raises(UserError, match=f"broken has the unknown tensor {surplus}"):
            read(whole | {surplus: torch.zeros(1)})


@pytest.mark.slow
def test_a_key_bias_is_dropped_and_changes_nothing(tmp_path: Path) -> None:
    theirs = tiny_huggingface(tmp_path / "theirs")
    bias = theirs.vision_model.encoder.layers[0].self_attn.qkv.bias
    plain = trace_huggingface(tmp_path / "theirs")
    with torch.no_grad():
        bias.view(3, -1)[1] = 0.5
    theirs.save_pretrained(tmp_path / "theirs")
    assert "vision_model.encoder.layers.0.self_attn.qkv.bias[key]" not in read_weights(tmp_path / "theirs")
    assert max(stage_differences(trace_huggingface(tmp_path / "theirs"), plain).values()) < 1e-5
    assert max(stage_differences(trace_native(load_huggingface(tmp_path / "theirs")), plain).values()) < 1e-5


def test_settings_of_a_folder(tmp_path: Path) -> None:
    tiny_huggingface(tmp_path / "theirs")
    settings = read_settings(tmp_path / "theirs")
    assert settings.llm is not None
    assert settings.llm.conventions == {"eos_token": EOS, "pad_token": "[PAD]", "bos_token": EOS}
    assert (settings.kind, settings.llm.kind) == ("instructblip", "decoder")
    assert settings.vision["options"] == {
        "patch_size": 14,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "mlp_ratio": 1.5,
    }
    assert settings.vision["mean"] == pytest.approx([122.7709383, 116.7460125, 104.09373615])
    assert settings.max_text_tokens == 64  # no more than it has positions
