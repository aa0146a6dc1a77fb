"""LLaVA equals transformers' LlavaForConditionalGeneration on the same weights, in and out: logits, loss, written tokens."""

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor, OPTConfig, OPTForCausalLM

from instructblip.errors import UserError
from instructblip.models.base import Inputs
from instructblip.models.llava import LLaVA
from instructblip.models.llm import DecoderLLM
from instructblip.weights.__main__ import main
from instructblip.weights.load import load_model
from instructblip.weights.transformers_llava import load_llava_folder, read_llava_settings
from tests.kit.connectors import LLAVA_LLMS, tiny_connector_model, tiny_llava, write_llava
from tests.kit.tiny import (
    EOS,
    tiny_encoder_decoder_llm,
    tiny_images,
    tiny_llm,
    tiny_llm_tokenizer,
    tiny_released_model,
)

QUESTIONS = ("what color is the shape?", "is there a circle?")
ANSWERS = ("red", "no rectangle")


def pictures() -> Tensor:
    return torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def opened(folder: Path) -> tuple[Any, Any]:
    """transformers' model, of which nothing is missing, and its processor."""
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval(), LlavaProcessor.from_pretrained(folder)


def written(processor: Any, around: tuple[str, str, str]) -> dict[str, Tensor]:
    """Inputs as a user of transformers makes them: text with `<image>`, pictures of the right size."""
    texts = [f"{around[0]}<image>{around[1]}{question}{around[2]}" for question in QUESTIONS]
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures()]
    return dict(processor(images=images, text=texts, padding=True, return_tensors="pt"))


def with_answers(inputs: dict[str, Tensor], answers: list[list[int]], pad: int) -> dict[str, Tensor]:
    """The same with answers behind the prompts, filled up on the right, and their labels."""
    longest = max(map(len, answers))
    rest = [longest - len(answer) for answer in answers]
    ids = torch.tensor([answer + [pad] * more for answer, more in zip(answers, rest, strict=True)])
    real = torch.tensor([[1] * (longest - more) + [0] * more for more in rest])
    before = inputs["input_ids"]
    return {
        "input_ids": torch.cat([before, ids], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], real], dim=1),
        "labels": torch.cat([torch.full_like(before, -100), ids.masked_fill(real == 0, -100)], dim=1),
        "pixel_values": inputs["pixel_values"],
    }


@torch.no_grad()
def assert_equal(model: LLaVA, theirs: Any, processor: Any, around: tuple[str, str, str]) -> None:
    """Logits and loss of the answers, and what both write."""
    inputs, form = written(processor, around), model.llm.prompt_format
    answers = [form.answer_ids(*pair) for pair in zip(QUESTIONS, ANSWERS, strict=True)]
    logits = model(Inputs(pictures()[:, None], QUESTIONS, answers), {"answer_logits"}).tensors["answer_logits"]
    asked = with_answers(inputs, answers, form.pad_id)
    found = theirs(**asked, position_ids=(asked["attention_mask"].cumsum(1) - 1).clamp_min(0))
    before = inputs["input_ids"].shape[1] - 1
    expected = torch.cat([found.logits[row, before : before + len(answer)] for row, answer in enumerate(answers)])
    words = min(logits.shape[1], expected.shape[1])  # <image> may have got a row
    torch.testing.assert_close(logits[:, :words], expected[:, :words], atol=1e-5, rtol=1e-5)
    if logits.shape[1] == expected.shape[1]:
        loss = F.cross_entropy(logits, torch.tensor([token for answer in answers for token in answer]))
        torch.testing.assert_close(loss, found.loss, atol=1e-5, rtol=1e-5)
    for beams in (1, 3):
        options = {"num_beams": beams, "max_new_tokens": 6, "min_new_tokens": 1}
        ids = theirs.generate(**inputs, **options, do_sample=False, eos_token_id=form.eos_id, pad_token_id=form.pad_id)
        texts = processor.tokenizer.batch_decode(ids[:, before + 1 :], skip_special_tokens=True)
        assert model.generate(pictures()[:, None], QUESTIONS, **options) == [text.strip() for text in texts]


LLAVA_1_5 = ("USER: ", "\n", " ASSISTANT:")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("llm", "layer", "strategy"),
    [
        ("llama", -2, "default"),
        ("llama", 1, "full"),
        ("qwen2", -1, "default"),
        ("qwen2", -2, "full"),
        ("spaced", -2, "default"),
    ],
)
def test_a_published_folder_computes_what_transformers_does(
    llm: str, layer: int, strategy: str, tmp_path: Path
) -> None:
    write_llava(tmp_path, llm, layer=layer, strategy=strategy)
    model = load_llava_folder(tmp_path)
    assert len(model.vision.backbone.blocks) == {-2: 2, -1: 3, 1: 1}[layer]
    assert model.frame_tokens == 4 + (strategy == "full")
    theirs, processor = opened(tmp_path)
    assert_equal(model, theirs, processor, LLAVA_1_5)
    prefix = model.llm.prompt_format.image_prefix_ids
    assert prefix == processor.tokenizer("USER: ")["input_ids"]  # with its first token, where it has one


@pytest.mark.slow
@pytest.mark.parametrize("llm", LLAVA_LLMS)
def test_a_published_folder_goes_out_and_comes_back(llm: str, tmp_path: Path) -> None:
    theirs = write_llava(tmp_path / "theirs", llm, strategy="full")
    model = load_llava_folder(tmp_path / "theirs")
    model.save_huggingface(tmp_path / "again")
    again, processor = opened(tmp_path / "again")
    assert again.config.vision_feature_layer == -1
    expected = theirs.state_dict()
    for name, tensor in again.state_dict().items():
        assert "post_layernorm" in name or torch.equal(tensor, expected[name]), name
    assert_equal(model, again, processor, LLAVA_1_5)
    back = load_llava_folder(tmp_path / "again").state_dict()
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("conventions", "around"),
    [
        ({}, ("", "", "")),
        (
            {"bos_token": EOS, "prompt_prefix": "Question: ", "prompt_suffix": " Answer:"},
            ("", f"{EOS}Question: ", " Answer:"),
        ),
        ({"bos_token": EOS, "image_prefix": "USER: ", "image_in_text": True}, (f"{EOS}USER: ", "", "")),
    ],
)
@pytest.mark.parametrize("quick", [True, False])
def test_an_own_model_goes_to_transformers_and_comes_back_whole(
    conventions: dict[str, str],
    around: tuple[str, str, str],
    quick: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_llava(llm=tiny_llm(**conventions), quick=quick, class_token=not quick)
    model.save_huggingface(tmp_path / "out")
    assert repr(around[0]) in caplog.text
    assert repr(around[1]) in caplog.text
    theirs, processor = opened(tmp_path / "out")
    assert_equal(model, theirs, processor, around)
    again = load_model(tmp_path / "out", device="cpu").model
    assert isinstance(again, LLaVA)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert again.conventions() == model.conventions()


def test_a_text_that_transformers_would_cut_otherwise_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_llava(tmp_path / "theirs", "spaced")
    model = load_llava_folder(tmp_path / "theirs")
    model.save_huggingface(tmp_path / "same")
    assert "token ids" not in caplog.text
    model.llm.prompt_format.image_in_text = False
    model.save_huggingface(tmp_path / "other")
    assert "or train with llm.image_in_text=true" in caplog.text


@pytest.mark.slow
def test_older_and_newer_names_of_tensors_are_read(tmp_path: Path) -> None:
    write_llava(tmp_path)
    expected = load_llava_folder(tmp_path).state_dict()
    weights = load_file(tmp_path / "model.safetensors")
    older = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in weights.items()}
    newer = {
        name.replace("language_model.lm_head", "lm_head").replace(
            "language_model.model.", "model.language_model."
        ): tensor
        for name, tensor in weights.items()
    }
    for names in (older, newer):
        save_file(names, tmp_path / "model.safetensors", metadata={"format": "pt"})
        found = load_llava_folder(tmp_path).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("llm", LLAVA_LLMS)
def test_the_command_certifies_both_ways(llm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_llava(tmp_path / "theirs", llm)
    for source, target, to in (("theirs", "run", "native"), ("run", "out", "huggingface")):
        assert main([str(tmp_path / source), str(tmp_path / target), "--to", to, "--bound", "1e-5"]) == 0, (
            capsys.readouterr()
        )
    assert main([str(tmp_path / "run"), str(tmp_path / "x.pth"), "--to", "lavis"]) == 2
    assert "take --to huggingface or native" in capsys.readouterr().err
    own, again = (load_model(tmp_path / name, device="cpu").model for name in ("run", "out"))
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in own.state_dict().items())


def test_another_language_model_takes_the_place_of_a_folders(tmp_path: Path) -> None:
    write_llava(tmp_path)
    model = load_llava_folder(tmp_path, llm=tiny_llm())
    own = load_llava_folder(tmp_path)
    assert torch.equal(model.connector.output.weight, own.connector.output.weight)


@pytest.mark.slow
def test_a_folder_without_a_known_chat_template_takes_prompts_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_llava(tmp_path, template=False)
    model = load_llava_folder(tmp_path)
    assert "no chat template of LLaVA-1.5" in caplog.text
    assert_equal(model, *opened(tmp_path), ("", "", ""))


@pytest.mark.parametrize(
    ("template", "known"),
    [
        ("{% for m in messages %}USER: <image>\n{{ m }} ASSISTANT:{% endfor %}", True),
        ('{{ message["role"].upper() + ": " }}{{ "ASSISTANT:" }}', True),
        ("{{ message.role | upper }}: {{ content }} ASSISTANT:", True),
        ("{{ '<|im_start|>' + message['role'] + '\n' }}{{ '<|im_start|>assistant' }}", False),
        ("{{ '###Human: ' }}{{ '###Assistant:' }}", False),
    ],
)
def test_a_chat_template_is_known_however_it_writes_the_role(template: str, known: bool, tmp_path: Path) -> None:
    write_llava(tmp_path)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]}]
    shown = LlavaProcessor.from_pretrained(tmp_path).apply_chat_template(messages, add_generation_prompt=True)
    assert shown == f"USER: <image>\n{QUESTIONS[0]} ASSISTANT:"  # as the released folders' does
    for name, text in (
        ("chat_template.json", json.dumps({"chat_template": template})),
        ("chat_template.jinja", template),
    ):
        for other in tmp_path.glob("chat_template.*"):
            other.unlink()
        (tmp_path / name).write_text(text)
        prefix = read_llava_settings(tmp_path).llm.conventions["image_prefix"]
        assert prefix == ("USER: " if known else "")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer=\[-2, -1\] is no single one of CLIP's 3 layers"),
        ({"vision_feature_layer": 7}, "vision_feature_layer=7 is no single one of CLIP's 3 layers"),
        ({"projector_hidden_act": "relu"}, "the projector has not LLaVA-1.5's gelu"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "the vision tower is siglip_vision_model"),
    ],
)
def test_folders_that_are_not_read_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_llava(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words) as error:
        load_llava_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_what_transformers_cannot_hold_is_refused(tmp_path: Path) -> None:
    cases = {
        "the connector is connector=linear; keep it as a run": tiny_connector_model("linear"),
        "the connector is connector=resampler": tiny_connector_model("resampler"),
        "vision tower is CLIP's ViT, this one is EfficientNet": tiny_connector_model("mlp"),
        "hidden width is the LLM's 32, not 48": tiny_llava(hidden_width=48),
        "averages them to 2 tokens": tiny_llava(tokens=2),
        "its language model is decoder-only": tiny_llava(llm=tiny_encoder_decoder_llm()),
    }
    normed = tiny_llava()
    normed.vision_norm = torch.nn.LayerNorm(normed.vision.width)
    cases["train with vision.norm=none"] = normed
    behind = tiny_llava()
    behind.vision.backbone.norm = torch.nn.LayerNorm(behind.vision.width)
    cases["train with vision.final_norm=false"] = behind
    for words, model in cases.items():
        with pytest.raises(
            UserError, match=f"LlavaForConditionalGeneration cannot hold this model: .*{words}"
        ) as error:
            model.save_huggingface(tmp_path / "out")
        assert "\n" not in str(error.value)
        assert list(itertools.islice(tmp_path.iterdir(), 1)) == []


@pytest.mark.parametrize("width", [32, 16])
def test_language_models_of_opts_form_are_refused_where_they_have_no_place(width: int, tmp_path: Path) -> None:
    """OPT's token table stands elsewhere; OPT-350M's is narrower than its layers."""
    tokenizer = tiny_llm_tokenizer()
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(vocab_size=len(tokenizer), word_embed_proj_dim=width, do_layer_norm_before=width == 32, **sizes)
    llm = DecoderLLM(OPTForCausalLM(config).eval(), tokenizer, eos_token=EOS, pad_token=EOS)
    with pytest.raises(UserError, match=r"embed_tokens, and OPTForCausalLM has none there; keep it as a run"):
        tiny_llava(llm=llm).save_huggingface(tmp_path / "llava")
    refusal = pytest.raises(UserError, match=r"as wide as the language model's layers \(32\), .* not \(16\)")
    with refusal if width == 16 else contextlib.nullcontext():
        tiny_released_model(llm=llm).save_huggingface(tmp_path / "instructblip")


def test_a_llava_says_what_it_can() -> None:
    model = tiny_llava()
    images = tiny_images(1)
    with pytest.raises(UserError, match=r"a model of connector=mlp has no head to match.*; it can generate, rank"):
        model.match(images, ["a"])
    with pytest.raises(UserError, match="a model of connector=mlp has no projections to make features with"):
        model.features(images)
