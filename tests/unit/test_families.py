"""Each family in configs/llm, as a tiny random model with the real YAML: forward, backward, generate and rank."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from instructblip.config.schema import CONFIGS
from instructblip.errors import UserError
from instructblip.models.arguments import Decoding
from instructblip.models.fingerprint import fingerprint
from instructblip.models.generation import write
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import LLM
from instructblip.models.quantized import QuantizedLinear
from instructblip.weights.parts import load_llm
from tests.kit.families import FAMILIES, SLIDING_WINDOW, llm_config, write_llm
from tests.kit.losses import term_of
from tests.kit.tiny import tiny_images, tiny_model

NAMES = sorted(FAMILIES)
PROMPTS = ["what color is the shape? Short answer:", "is there a circle?", "red"]
TARGETS = ["red", "yes no", "teal gray"]
CANDIDATES = [["red", "red no", "blue"], ["yes"], ["gray teal", "gray", "no", "yes"]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each family; those that share a writer share it."""
    made = {writer: tmp_path_factory.mktemp(writer.__name__) for writer in FAMILIES.values()}
    for name, writer in FAMILIES.items():
        if not any(made[writer].iterdir()):
            write_llm(name, made[writer])
    return {name: made[write] for name, write in FAMILIES.items()}


def load(name: str, folders: dict[str, Path], **changes: Any) -> LLM:
    return load_llm(llm_config(name, folders[name], **changes))


def one_step(model: InstructBLIP, images: Tensor) -> dict[str, Tensor]:
    """Gradients after one forward and backward pass, by name."""
    model.zero_grad()
    term_of(model, images, PROMPTS, TARGETS).total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_every_yaml_has_its_tiny_model() -> None:
    assert sorted(path.stem for path in (CONFIGS / "llm").glob("*.yaml")) == NAMES
    assert len(NAMES) >= 11


@pytest.mark.parametrize("name", NAMES)
def test_forward_backward_generate_rank(name: str, folders: dict[str, Path]) -> None:
    llm = load(name, folders)  # in the dtype of the YAML
    model, images = tiny_model(llm=llm), tiny_images(3)
    assert model.projection.out_features == llm.width
    gradients = one_step(model, images)
    assert gradients.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["projection.weight"].abs().max() > 0
    assert gradients["qformer.query_tokens"].abs().max() > 0
    texts = model.generate(images, PROMPTS, num_beams=2, max_new_tokens=4)
    assert [type(text) for text in texts] == [str] * 3
    scores = model.rank(images, PROMPTS, CANDIDATES)
    assert [len(row) for row in scores] == [3, 1, 4]
    assert all((row < 0).all() and row.isfinite().all() for row in scores)


@pytest.mark.parametrize("name", sorted({FAMILIES[name]: name for name in NAMES}.values()))
@torch.inference_mode()
def test_rank_is_the_plain_way_in_any_batch(name: str, folders: dict[str, Path]) -> None:
    model, images = tiny_model(llm=load(name, folders, dtype="float32")), tiny_images(3)
    ranked = model.rank(images, PROMPTS, CANDIDATES)
    alone = [model.rank(images[row : row + 1], [PROMPTS[row]], [CANDIDATES[row]])[0] for row in range(3)]
    for row, candidates in enumerate(CANDIDATES):
        count = len(candidates)
        repeated = images[row : row + 1].expand(count, -1, -1, -1, -1)
        plain = -term_of(model, repeated, [PROMPTS[row]] * count, candidates).per_sample
        torch.testing.assert_close(ranked[row], plain, atol=1e-4, rtol=0)
        torch.testing.assert_close(ranked[row], alone[row], atol=1e-4, rtol=0)
    together = model.generate(images, PROMPTS, max_new_tokens=6)
    assert together == [model.generate(images[row : row + 1], [PROMPTS[row]], max_new_tokens=6)[0] for row in range(3)]


@pytest.mark.parametrize("name", sorted({FAMILIES[name]: name for name in NAMES}.values()))
@pytest.mark.parametrize("length_penalty", [1.0, -1.0])
@torch.inference_mode()
def test_beams_that_share_their_prompt_are_transformers_own(
    name: str, length_penalty: float, folders: dict[str, Path]
) -> None:
    llm = load(name, folders, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    prefixes = [torch.randn(length, llm.width, generator=generator) for length in (9, 1, 4)]
    options = {"num_beams": 4, "max_new_tokens": 6, "length_penalty": length_penalty}
    plain = [llm.model.generate(inputs_embeds=prefix[None], **options)[0] for prefix in prefixes]
    expected = [llm.prompt_format.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in plain]
    decoding = Decoding(num_beams=4, max_new_tokens=6, length_penalty=length_penalty)
    assert write(llm, prefixes, decoding) == expected
    assert [write(llm, [prefix], decoding)[0] for prefix in prefixes] == expected
    assert len(set(expected)) > 1


# --- what each YAML says about text ----------------------------------------------------------------------------------

# YAML -> tokens in front of the image, of the prompt "red", of the answer "red".
CONVENTIONS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "vicuna_7b": ([], ["</s>", "▁red"], ["▁red", "</s>"]),
    "vicuna_13b": ([], ["</s>", "▁red"], ["▁red", "</s>"]),
    "flan_t5_base": ([], ["▁red", "</s>"], ["▁red", "</s>"]),
    "flan_t5_xl": ([], ["▁red", "</s>"], ["▁red", "</s>"]),
    "flan_t5_xxl": ([], ["▁red", "</s>"], ["▁red", "</s>"]),
    "llama_3_1_8b": (["<|begin_of_text|>"], ["red"], ["Ġred", "<|eot_id|>"]),
    "qwen3_8b": (["<|im_start|>", "user", "Ċ"], ["red"], ["Ġred", "<|im_end|>"]),
    "smollm2_135m": (["<|im_start|>", "user", "Ċ"], ["Ċ", "redĠAnswer:"], ["Ġred", "<|im_end|>"]),
    "mistral_7b": (["<s>"], ["▁red"], ["▁red", "</s>"]),
    "gemma_3_4b": (["<bos>"], ["red"], ["▁red", "<end_of_turn>"]),
    "opt_2_7b": ([], ["</s>", "red"], ["Ġred", "Ċ"]),
    "opt_6_7b": ([], ["</s>", "red"], ["Ġred", "Ċ"]),
}


@pytest.mark.parametrize("name", NAMES)
def test_text_conventions(name: str, folders: dict[str, Path]) -> None:
    llm = load(name, folders)

    def tokens(ids: list[int]) -> list[str]:
        """Special tokens one by one, what stands between them in one piece."""
        special, pieces = (
            set(llm.prompt_format.tokenizer.all_special_ids) | {*llm.prompt_format.image_prefix_ids[:1]},
            [""],
        )
        for number, token in zip(ids, llm.prompt_format.tokenizer.convert_ids_to_tokens(ids), strict=True):
            pieces += [token, ""] if number in special or token == "Ċ" else []
            pieces[-1] += "" if number in special or token == "Ċ" else token
        return [piece for piece in pieces if piece]

    image, prompt, answer = CONVENTIONS[name]
    assert tokens(llm.prompt_format.image_prefix_ids) == image
    assert tokens(llm.prompt_format.prompt_ids("red")) == prompt
    assert tokens(llm.prompt_format.target_ids("red")) == answer
    assert llm.prompt_format.target_ids("red", include_eos=False) == llm.prompt_format.target_ids("red")[:-1]
    assert len(llm.prompt_format.prompt_ids("red " * 400, training=True)) == 128
    longest = {"decoder": 256 - len(llm.prompt_format.bos_ids), "encoder_decoder": 256}[
        llm_config(name, folders[name]).kind
    ]
    assert len(llm.prompt_format.target_ids("red " * 400)) == longest
    assert llm.prompt_format.tokenizer.convert_ids_to_tokens([llm.prompt_format.pad_id, llm.prompt_format.eos_id]) == [
        llm.prompt_format.tokenizer.pad_token,
        llm.prompt_format.tokenizer.eos_token,
    ]


def test_what_a_hub_samples_with_is_left_behind(folders: dict[str, Path]) -> None:
    settings = load("qwen3_8b", folders).model.generation_config
    assert (settings.do_sample, settings.temperature, settings.repetition_penalty) == (None, None, None)


def test_flan_t5_computes_with_the_exact_gelu(folders: dict[str, Path]) -> None:
    exact, own = load("flan_t5_xl", folders), load("flan_t5_xl", folders, options={})
    assert exact.model.config.dense_act_fn == "gelu"
    assert own.model.config.dense_act_fn == "gelu_new"
    activation = exact.model.encoder.block[0].layer[-1].DenseReluDense.act
    inputs = torch.linspace(-3, 3, 7)
    assert torch.equal(activation(inputs), torch.nn.functional.gelu(inputs))


def test_vicunas_padding_token_gets_the_mean_of_all_rows(folders: dict[str, Path]) -> None:
    first, second = load("vicuna_7b", folders, dtype="float32"), load("vicuna_7b", folders, dtype="float32")
    tokens = {role: getattr(first.prompt_format.tokenizer, f"{role}_token") for role in ("bos", "eos", "unk", "pad")}
    assert tokens == {"bos": "</s>", "eos": "</s>", "unk": "</s>", "pad": "[PAD]"}
    for table in (first.embeddings.weight, first.model.get_output_embeddings().weight):
        assert first.prompt_format.pad_id == len(table) - 1
        torch.testing.assert_close(table[-1], table[:-1].mean(dim=0))
    assert fingerprint(first) == fingerprint(second)


def test_vicuna_as_it_lies_on_the_hub(folders: dict[str, Path], tmp_path: Path) -> None:
    """A tokenizer.model of SentencePiece and a pytorch_model.bin, both in formats of 2023."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*PROMPTS, *TARGETS] * 9),
        model_writer=written,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    settings = AutoConfig.from_pretrained(folders["vicuna_7b"], vocab_size=processor.vocab_size())
    settings.save_pretrained(tmp_path)
    torch.save(AutoModelForCausalLM.from_config(settings).state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    llm = load_llm(llm_config("vicuna_7b", tmp_path))
    for text in ("red", "what color is it?", "two  spaces ", "a\nb", "日本"):
        assert llm.prompt_format.prompt_ids(text) == [2, *processor.encode(text)]
        assert llm.prompt_format.target_ids(text) == [*processor.encode(text), 2]
    assert (llm.prompt_format.pad_id, len(llm.embeddings.weight)) == (
        processor.vocab_size(),
        processor.vocab_size() + 1,
    )


@pytest.mark.parametrize("name", ["qwen3_8b", "flan_t5_xl", "opt_2_7b"])
def test_rows_that_no_token_uses_stay(name: str, folders: dict[str, Path]) -> None:
    llm = load(name, folders)
    assert len(llm.embeddings.weight) > len(llm.prompt_format.tokenizer)


def test_a_multimodal_checkpoint_becomes_its_text_model(folders: dict[str, Path]) -> None:
    llm = load("gemma_3_4b", folders, dtype="float32")
    whole: Any = AutoModelForCausalLM.from_pretrained(folders["gemma_3_4b"], dtype=torch.float32)
    assert (type(llm.model).__name__, type(whole).__name__) == ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
    assert sum("vision" in name for name in llm.state_dict()) == 0
    ids = torch.tensor([llm.prompt_format.prompt_ids("what color is the shape?")])
    assert ids.shape[1] > SLIDING_WINDOW
    with torch.no_grad():
        expected = whole(ids).logits
        found = llm.logits(llm.model.base_model(inputs_embeds=llm.embed([ids[0].tolist()])[0][None]).last_hidden_state)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# --- quantised -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["vicuna_7b", "flan_t5_xl", "opt_2_7b", "gemma_3_4b"])
def test_a_quantised_model_is_trained_through_and_generated_from(
    name: str, kind: str, folders: dict[str, Path]
) -> None:
    if kind == "nf4":
        pytest.importorskip("bitsandbytes", reason="nf4 needs requirements-quantization.txt")
    exact = load(name, folders, dtype="float32")
    llm = load(name, folders, dtype="float32", quantization=kind)
    before = fingerprint(llm)
    layers = {part: module for part, module in llm.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(layers) == sum(isinstance(module, torch.nn.Linear) for module in exact.modules()) - 1  # the output head
    for part, layer in layers.items():  # the same model as one of plain layers that hold the rounded weights
        plain = exact.get_submodule(part).weight
        largest = plain.abs().max()
        rounded = layer.expanded(torch.float32)
        assert (rounded - plain).abs().max() < {"int8": 1 / 250, "nf4": 1 / 6}[kind] * largest
        plain.data = rounded
    model, images = tiny_model(llm=llm), tiny_images(3)
    gradients, expected = one_step(model, images), one_step(tiny_model(llm=exact), images)
    assert gradients.keys() == expected.keys()
    for part, gradient in expected.items():
        torch.testing.assert_close(gradients[part], gradient, atol=1e-4 * float(gradient.abs().max()) + 1e-6, rtol=1e-4)
    assert len(model.generate(images, PROMPTS, max_new_tokens=4)) == 3
    together = model.rank(images, PROMPTS, CANDIDATES)
    alone = [model.rank(images[row : row + 1], [PROMPTS[row]], [CANDIDATES[row]])[0] for row in range(3)]
    for row, score in zip(together, alone, strict=True):
        torch.testing.assert_close(row, score, atol=1e-4, rtol=0)
    assert fingerprint(llm) == before == fingerprint(load(name, folders, dtype="float32", quantization=kind))
    assert before != fingerprint(exact)


def test_quantised_weights_are_small(folders: dict[str, Path]) -> None:
    llm = load("vicuna_7b", folders, quantization="int8")
    layer = next(part for part in llm.modules() if isinstance(part, QuantizedLinear))
    assert layer.weight.dtype == torch.int8
    assert layer.weight.numel() == layer.in_features * layer.out_features
    hidden = torch.randn(2, layer.in_features, requires_grad=True)
    layer(hidden).sum().backward()
    torch.testing.assert_close(hidden.grad, layer.expanded(torch.float32).sum(dim=0).expand(2, -1))
    saved = layer(hidden).grad_fn.saved_tensors  # type: ignore[union-attr]
    assert saved == ()  # the expanded weight is made anew in the backward pass


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "encoder_decoder"}, ["llm=vicuna_7b", "LlamaConfig"]),
        ({"options": {"hiden_act": "gelu"}}, ["llm.options.hiden_act", "LlamaConfig"]),
        ({"eos_token": "<end>"}, ["'<end>'"]),
        ({"unk_token": "<what>"}, ["'<what>'"]),
    ],
)
def test_mistakes_end_in_one_line(changes: dict[str, Any], words: list[str], folders: dict[str, Path]) -> None:
    with pytest.raises(UserError) as error:
        load("vicuna_7b", folders, **changes)
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_implementation", "someone/attention"),
        ("_attn_implementation", {"": "someone/attention@main:f"}),
        ("experts_implementation", "someone/experts"),
    ],
)
def test_code_on_the_hub_is_not_run(key: str, value: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["vicuna_7b"], tmp_path / "llm"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {key: value}))
    with pytest.raises(UserError, match=rf"llm=vicuna_7b: .*config\.json: {key} .* names code on the hub"):
        load_llm(llm_config("vicuna_7b", folder))


@pytest.mark.parametrize("change", ["missing", "surplus", "misshapen"])
def test_a_wrong_tensor_is_named(change: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["vicuna_7b"], tmp_path / "llm"))
    weights, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "misshapen":
        weights[name] = weights[name][:-1].contiguous()
    else:
        name = "model.layers.1.mlp.up_proj.bias"
        weights[name] = torch.zeros(64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        load_llm(llm_config("vicuna_7b", folder))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_weights_or_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["vicuna_7b"], tmp_path / "llm"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"llm=vicuna_7b: .*no file named model\.safetensors") as error:
        load_llm(llm_config("vicuna_7b", folder))
    assert "\n" not in str(error.value)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"llm=vicuna_7b: .*has no tokenizer") as error:
        load_llm(llm_config("vicuna_7b", folder))
    assert "\n" not in str(error.value)


def test_a_missing_library_is_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"requirements-quantization\.txt"):
        load("vicuna_7b", folders, quantization="nf4")
