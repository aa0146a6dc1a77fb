"""Converters: names and shapes of EfficientNet-Lite0, and a whole GGUF file written on the spot."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from instructblip._torchvision import declare_missing_operators
from instructblip.errors import UserError
from instructblip.fetch.converters import (
    convert_efficientnet_lite0,
    convert_gguf,
    efficientnet_lite0_names,
    rename_checked,
)


@pytest.fixture(scope="module")
def timm_weights() -> dict[str, torch.Tensor]:
    declare_missing_operators()
    import timm

    torch.manual_seed(0)
    return timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()


def theirs(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under the names of the .pth file."""
    original = {ours: name for name, ours in efficientnet_lite0_names().items()}
    return {original[name]: tensor for name, tensor in weights.items()}


def test_names_cover_all_of_timms_and_keep_their_order(timm_weights: dict[str, torch.Tensor]) -> None:
    names = efficientnet_lite0_names()
    assert len(names) == len(set(names.values())) == 296
    assert set(names.values()) == set(timm_weights)
    assert names["_blocks.0._project_conv.weight"] == "blocks.0.0.conv_pw.weight"
    assert names["_blocks.15._bn2.running_var"] == "blocks.6.0.bn3.running_var"
    assert names["_blocks.4._depthwise_conv.weight"] == "blocks.2.1.conv_dw.weight"
    assert names["_fc.bias"] == "classifier.bias"


def test_efficientnet_file_comes_back_tensor_by_tensor(tmp_path: Path, timm_weights: dict[str, torch.Tensor]) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    torch.save(theirs(timm_weights), source / "lite0.pth")
    convert_efficientnet_lite0(source, target)
    converted = load_file(target / "model.safetensors")
    assert converted.keys() == timm_weights.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in timm_weights.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("_bn0.bias"), "has no tensor for bn1.bias"),
        (lambda weights: weights.update(_se=torch.zeros(1)), "unknown tensor _se"),
        (lambda weights: weights.update({"_fc.bias": torch.zeros(3)}), r"classifier.bias has shape \(3,\), expected"),
    ],
)
def test_a_wrong_tensor_is_named(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, timm_weights: dict[str, torch.Tensor]
) -> None:
    weights = theirs(timm_weights)
    change(weights)
    with pytest.raises(UserError, match=message):
        rename_checked(weights, efficientnet_lite0_names(), timm_weights, "lite0.pth")


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"_fc.bias": Path("/")}, tmp_path / "lite0.pth")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        convert_efficientnet_lite0(tmp_path, tmp_path / "target")


@pytest.mark.parametrize("names", [(), ("a.gguf", "b.gguf")])
def test_exactly_one_file_is_needed(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"one .gguf file is needed, found {len(names)}"):
        convert_gguf(tmp_path, tmp_path / "target")


WIDTH, HEADS, HIDDEN, LAYERS = 32, 4, 64, 2
TOKENS = ["<unk>", "<s>", "</s>", "r", "e", "d", "Ġ", "re", "red"]


def write_gguf(path: Path, tokens: list[str] = TOKENS, leave_out: str = "") -> dict[str, np.ndarray]:
    """A random LLaMA with tied embeddings and a byte-pair tokenizer of nine tokens; returns its matrices.

    Args:
        path: to write.
        tokens: nine, of which the last six are letters and what they merge to.
        leave_out: name of a tensor that the file lacks.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["r e", "re d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        block: dict[str, tuple[int, ...]] = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH))
        block |= {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
        block |= {"ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    random = np.random.default_rng(0)
    tensors = {f"{name}.weight": random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if name != leave_out:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_gguf_becomes_a_transformers_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    tensors = write_gguf(source / "model.gguf")
    convert_gguf(source, target)
    assert capfd.readouterr().err == ""
    assert {path.suffix for path in target.iterdir()} <= {".json", ".safetensors", ".jinja"}

    with safe_open(target / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rope_parameters["rope_theta"] == 500.0
    np.testing.assert_array_equal(model.model.embed_tokens.weight.detach().numpy(), tensors["token_embd.weight"])
    down = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    np.testing.assert_array_equal(down, tensors["blk.1.ffn_down.weight"])
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer("red", add_special_tokens=False).input_ids == [TOKENS.index("red")]
    assert tokenizer.eos_token == "</s>"
