"""Foreign folders that are broken, of another kind or hostile: one line with the way out, and no code runs.

The same faults are put into a language model's folder and into a whole model's.
"""

import ast
import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import instructblip
from instructblip.config.schema import CONFIGS, LLMConfig
from instructblip.config.validate import read_config
from instructblip.errors import UserError
from instructblip.weights.gatekeeper import open_config
from instructblip.weights.parts import load_llm
from tests.kit.families import llm_config, write_llm
from tests.kit.tiny import tiny_huggingface
from tests.unit.test_convert import write_gguf

ROOT = Path(instructblip.__file__).parents[1]
Change = Callable[[Path], Any]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 99\n"
WEIGHTS = "model.safetensors"
Q_PROJ = "q_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole folder of each kind, not to be changed."""
    root = tmp_path_factory.mktemp("whole")
    write_llm("smollm2_135m", root / "llm")
    tiny_huggingface(root / "model")
    return {kind: root / kind for kind in ("llm", "model")}


@pytest.fixture(params=["llm", "model"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(kind: str, folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(folders[kind], tmp_path / "copy"))


def open_folder(folder: Path, kind: str) -> Any:
    if kind == "llm":
        return load_llm(llm_config("smollm2_135m", folder))
    return instructblip.load(folder, device="cpu")


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


def test_a_configuration_that_was_changed_or_written_anew_is_read_as_it_stands(folder: Path) -> None:
    first = open_config(folder)
    expected = first.to_dict()
    first.vocab_size, first.architectures = 7, []
    assert open_config(folder).to_dict() == expected
    settings(architectures=["Other"])(folder)
    assert open_config(folder).to_dict() == expected | {"architectures": ["Other"]}


# --- changes ---------------------------------------------------------------------------------------------------------


def write(name: str, content: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(name: str, by: int) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-by])


def remove(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def settings(name: str = "config.json", **values: Any) -> Change:
    def change(folder: Path) -> None:
        old = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(old | values))

    return change


def tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Change:
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def renamed(rule: Callable[[str], str]) -> Change:
    return tensors(lambda found: {rule(name): tensor for name, tensor in found.items()})


def cast(dtype: torch.dtype, ending: str = Q_PROJ) -> Change:
    return tensors(lambda found: {n: t.to(dtype) if n.endswith(ending) else t for n, t in found.items()})


def pickled(change: Callable[[dict[str, Tensor]], Any] = dict) -> Change:
    def replace(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        torch.save(change(found), folder / "pytorch_model.bin")

    return replace


def indexed(index: Any, name: str = "model.safetensors.index.json") -> Change:
    def replace(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_text(json.dumps(index))

    return replace


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


BROKEN: dict[str, tuple[Change, list[str]]] = {
    # What stands in place of a file.
    "weights that are a pointer": (write(WEIGHTS, POINTER), [WEIGHTS, "pointer of Git LFS", "git lfs pull"]),
    "weights that are a page": (write(WEIGHTS, "\n<!DOCTYPE html><html>"), [WEIGHTS, "web page", "logged in"]),
    "weights that are an error of S3": (write(WEIGHTS, '<?xml version="1.0"?><Error>'), [WEIGHTS, "web page"]),
    "weights that are JSON": (write(WEIGHTS, '{"error": "Entry not found"}'), [WEIGHTS, "no file of safetensors"]),
    "weights that are empty": (write(WEIGHTS, ""), [WEIGHTS, "is empty", "fetch it again"]),
    "weights that are cut": (cut(WEIGHTS, 100), [WEIGHTS, "cut short", "bytes"]),
    "weights that are cut in their header": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:300]),
        [WEIGHTS, "cut short"],
    ),
    "weights that are too long": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"more"),
        [WEIGHTS, "longer than its header says"],
    ),
    "weights that are not there": (remove(WEIGHTS), ["no weights", WEIGHTS, "pytorch_model.bin"]),
    "a configuration that is a pointer": (write("config.json", POINTER), ["config.json", "git lfs pull"]),
    "a configuration that is a page": (write("config.json", "<html>"), ["config.json", "web page"]),
    "a tokenizer that is a pointer": (write("tokenizer.json", POINTER), ["tokenizer.json", "git lfs pull"]),
    "a tokenizer's settings that are a page": (
        write("tokenizer_config.json", "<html>"),
        ["tokenizer_config.json", "web page"],
    ),
    # Weights of another form.
    "an index without a map": (indexed({"metadata": {}}), ["index.json", "names no files"]),
    "an index that is a list": (indexed([1]), ["index.json", "no object"]),
    "an index of numbers": (indexed({"weight_map": {"a": 5}}), ["index.json", "names no files"]),
    "an index that leaves the folder": (
        indexed({"weight_map": {"a": "../../other.safetensors"}}),
        ["../../other.safetensors", "no file beside it"],
    ),
    "an index with a shard that is missing": (
        indexed({"weight_map": {"a": "model-00001-of-00002.safetensors"}}),
        ["model-00001-of-00002.safetensors is missing", "fetch the whole model"],
    ),
    "a pickle's index with a shard that is missing": (
        indexed({"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}, "pytorch_model.bin.index.json"),
        ["pytorch_model-00001-of-00002.bin is missing"],
    ),
    "a pickle that is cut": (both(pickled(), cut("pytorch_model.bin", 1000)), ["pytorch_model.bin is cut short"]),
    "a pickle that is text": (
        both(remove(WEIGHTS), write("pytorch_model.bin", "hello world")),
        ["pytorch_model.bin", "fetch it again"],
    ),
    "a pickle that is a pointer": (
        both(remove(WEIGHTS), write("pytorch_model.bin", POINTER)),
        ["pytorch_model.bin", "git lfs pull"],
    ),
    "a pickle with an object": (
        pickled(lambda found: {**found, "x": Path("x")}),
        ["pytorch_model.bin", "foreign code"],
    ),
    "a pickle of a list": (pickled(lambda found: [*found.values()]), ["no state dict", "torch.save"]),
    "a training checkpoint": (
        pickled(lambda found: {"state_dict": found, "epoch": 3}),
        ["more than weights (state_dict, of type dict)", "torch.save(model.state_dict()"],
    ),
    # Names that others put there.
    "DistributedDataParallel": (renamed("module.{}".format), ["module.*", "save the model inside (model.module)"]),
    "torch.compile": (renamed("_orig_mod.{}".format), ["_orig_mod", "torch.compile", "model._orig_mod"]),
    "torch.compile, a part of it": (
        renamed(lambda name: name.replace("layers.0.", "layers.0._orig_mod.")),
        ["_orig_mod", "torch.compile"],
    ),
    "FSDP": (
        renamed(lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module.")),
        ["_fsdp_wrapped_module", "full state dict"],
    ),
    "peft": (renamed("base_model.model.{}".format), ["base_model.model.*", "merge_and_unload"]),
    "LoRA among the weights": (
        tensors(lambda found: {**found, "model.layers.0.q_proj.lora_A.weight": torch.ones(2, 32)}),
        ["LoRA adapter", "merge"],
    ),
    # Adapters.
    "an adapter beside the weights": (
        write("adapter_config.json", "{}"),
        ["an adapter beside a model's weights (adapter_config.json)", "merge_and_unload"],
    ),
    "an adapter alone": (
        lambda folder: [
            *[path.unlink() for path in folder.iterdir() if path.is_file()],
            (folder / "adapter_config.json").write_text("{}"),
        ],
        ["an adapter alone (adapter_config.json)", "merge_and_unload"],
    ),
    # Rounded weights.
    "GPTQ by its settings": (
        settings(quantization_config={"quant_method": "gptq", "bits": 4}),
        ["quantised weights (gptq)", "unquantised model", "llm.quantization=int8"],
    ),
    "GPTQ by its file": (write("quantize_config.json", '{"bits": 4}'), ["quantised weights", "unquantised"]),
    "compressed tensors": (settings(compression_config={"format": "x"}), ["quantised weights", "unquantised"]),
    "GPTQ by its tensors": (
        both(cast(torch.int32), renamed(lambda name: name.replace(Q_PROJ, "q_proj.qweight"))),
        ["quantised weights", "q_proj.qweight", "unquantised"],
    ),
    "8 bits by their type": (cast(torch.int8), ["quantised weights", Q_PROJ, "unquantised"]),
    "floats of 8 bits by their type": (cast(torch.float8_e4m3fn), ["quantised weights", Q_PROJ, "unquantised"]),
    "8 bits in a pickle": (both(cast(torch.int8), pickled()), ["quantised weights", Q_PROJ, "unquantised"]),
    # Settings.
    "a configuration cut short": (cut("config.json", 30), ["config.json", "not whole JSON", "fetch it again"]),
    "a configuration that is a list": (write("config.json", "[1]"), ["config.json", "no object of settings"]),
    "a setting of another type": (settings(initializer_range="wide"), ["config.json", "initializer_range"]),
    "a dtype that is none": (settings(dtype="float17"), ["config.json", "float17"]),
    "code of the hub for attention": (
        settings(_attn_implementation="somebody/attention"),
        ["config.json", "somebody/attention", "never run"],
    ),
    # Tokenizers.
    "no tokenizer": (remove("tokenizer.json"), ["no tokenizer", "tokenizer.json", "fetch it too"]),
    "a tokenizer that is cut": (cut("tokenizer.json", 500), ["no tokenizer that opens", "fetch it again"]),
    "a tokenizer's settings that are cut": (cut("tokenizer_config.json", 20), ["no tokenizer that opens"]),
    "vocabulary without merges": (
        both(remove("tokenizer.json"), write("vocab.json", "{}")),
        ["no tokenizer that opens", "fetch it again"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_line_with_the_way_out(name: str, kind: str, folder: Path) -> None:
    change, words = BROKEN[name]
    change(folder)
    said = refusal(lambda: open_folder(folder, kind))
    assert [word for word in words if word not in said] == [], said
    assert str(folder) in said or "llm=smollm2_135m" in said


GOOD: dict[str, Change] = {
    "a pickle": pickled(),
    "float16": tensors(lambda found: {name: tensor.half() for name, tensor in found.items()}),
    "bfloat16": tensors(lambda found: {name: tensor.bfloat16() for name, tensor in found.items()}),
    "float64": tensors(lambda found: {name: tensor.double() for name, tensor in found.items()}),
    "a broken index beside whole weights": write("model.safetensors.index.json", "{}"),
    "another file of weights that is named and not there": settings(transformers_weights="other.safetensors"),
    "settings of generation that are broken": write("generation_config.json", "{"),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_folder_that_is_only_unusual_opens(name: str, kind: str, folder: Path) -> None:
    GOOD[name](folder)
    assert open_folder(folder, kind) is not None


def test_shards_are_read_by_their_index(kind: str, folder: Path) -> None:
    whole = load_file(folder / WEIGHTS)
    parts = {"one.safetensors": sorted(whole)[::2], "two.safetensors": sorted(whole)[1::2]}
    for file, names in parts.items():
        save_file({name: whole[name] for name in names}, folder / file, metadata={"format": "pt"})
    places = {name: file for file, names in parts.items() for name in names}
    indexed({"metadata": {}, "weight_map": places})(folder)
    assert open_folder(folder, kind) is not None
    (folder / "two.safetensors").write_text(POINTER)
    assert "two.safetensors is a pointer of Git LFS" in refusal(lambda: open_folder(folder, kind))


# --- another model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("vit", ["a model of type vit (ViTConfig) is no decoder language model", "give a language model's folder"]),
        ("t5", ["is no decoder language model", "set llm.kind=encoder_decoder"]),
        ("instructblip", ["is no decoder language model"]),
        ("mystery", ["model_type 'mystery' is none that transformers", "newer transformers"]),
        (None, ["model_type None"]),
        (["llama"], ["model_type ['llama']"]),
        ("gpt2", ["of another model"]),
    ],
)
def test_a_language_model_of_another_type(
    model_type: Any, words: list[str], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["llm"], tmp_path / "copy"))
    settings(model_type=model_type)(folder)
    said = refusal(lambda: open_folder(folder, "llm"))
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize("act", ["swish_of_somebody"])
def test_settings_that_a_class_stumbles_over(act: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["llm"], tmp_path / "copy"))
    settings(hidden_act=act)(folder)
    assert "cannot be loaded (KeyError: 'swish_of_somebody')" in refusal(lambda: open_folder(folder, "llm"))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("vision_config", "num_attention_heads", 3),
        ("vision_config", "patch_size", 0),
        ("vision_config", "num_hidden_layers", 0),
        ("qformer_config", "num_attention_heads", 0),
        ("qformer_config", "cross_attention_frequency", 0),
        ("text_config", "num_attention_heads", 3),
        ("text_config", "model_type", "vit"),
        ("text_config", "model_type", "mystery"),
    ],
)
def test_parts_of_a_model_that_do_not_fit_together(
    part: str, name: str, value: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["model"], tmp_path / "copy"))
    old = json.loads((folder / "config.json").read_text())
    settings(**{part: old[part] | {name: value}})(folder)
    assert str(folder) in refusal(lambda: open_folder(folder, "model"))


def test_a_tokenizer_of_another_model(kind: str, folder: Path) -> None:
    found = json.loads((folder / "tokenizer.json").read_text())
    last = max(found["model"]["vocab"].values())
    found["model"]["vocab"] |= {f"another{number}": last + number for number in range(1, 100)}
    (folder / "tokenizer.json").write_text(json.dumps(found))
    said = refusal(lambda: open_folder(folder, kind))
    assert "tokens and the model's token table" in said and "of another model" in said


def test_a_language_model_is_not_taken_for_a_whole_model(folders: dict[str, Path]) -> None:
    said = refusal(lambda: instructblip.load(folders["llm"], device="cpu"))
    assert "holds a model of type llama" in said and "llm_path=" in said
    said = refusal(lambda: load_llm(llm_config("smollm2_135m", folders["model"])))
    assert "InstructBlipConfig" in said and "give a language model's folder" in said


@pytest.mark.parametrize(
    ("content", "words"),
    [(POINTER, "git lfs pull"), ("<html>", "web page"), ("", "is empty"), ("text", "fetch it again")],
)
def test_a_file_of_lavis_that_is_none(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_text(content)
    assert words in refusal(lambda: instructblip.load(tmp_path / "model.pth", llm="vicuna_7b", device="cpu"))


def test_a_file_without_content_and_without_a_language_models_name_is_refused_for_both(tmp_path: Path) -> None:
    (tmp_path / "model.pth").touch()
    told = refusal(lambda: instructblip.load(tmp_path / "model.pth", device="cpu"))
    assert "is empty" in told and "vicuna_7b" in told


# --- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file alone in its folder, with the tokens of the demo's language model."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.gguf", ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "r", "e", "d", "Ġ", "re", "red"])
    return folder / "tiny.gguf"


def smollm2(path: Path) -> Any:
    config = read_config(CONFIGS / "llm" / "smollm2_135m.yaml", LLMConfig)
    config.sources.path = str(path)
    return load_llm(config)


@pytest.mark.slow
def test_a_gguf_file_or_a_folder_of_one_is_a_language_model(gguf: Path, tmp_path: Path) -> None:
    expected = smollm2(gguf).model.state_dict()
    (tmp_path / "config.json").write_text("{}")  # as repositories of GGUF files have one, too
    shutil.copy(gguf, tmp_path / "COPY.GGUF")
    for place in (gguf.parent, tmp_path / "COPY.GGUF"):
        found = smollm2(place).model.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_gguf_files_that_cannot_be_taken(gguf: Path, tmp_path: Path) -> None:
    whole = gguf.read_bytes()
    for content, words in {
        whole[:-5000]: "cannot be converted",
        whole[:200]: "cannot be converted",
        POINTER.encode(): "is no GGUF file",
        b"": "is no GGUF file",
    }.items():
        (tmp_path / "a.gguf").write_bytes(content)
        said = refusal(lambda: smollm2(tmp_path / "a.gguf"))
        assert words in said and str(tmp_path / "a.gguf") in said
    (tmp_path / "b.gguf").write_bytes(whole)
    assert "holds 2 GGUF files; give the path of one" in refusal(lambda: smollm2(tmp_path))
    write_gguf(tmp_path / "c.gguf", leave_out="blk.1.ffn_up.weight")
    assert "lacks the tensor model.layers.1.mlp.up_proj.weight" in refusal(lambda: smollm2(tmp_path / "c.gguf"))
    assert "is not a folder" in refusal(lambda: smollm2(tmp_path / "nowhere.gguf"))


def test_a_gguf_file_is_no_whole_model(gguf: Path) -> None:
    for place in (gguf, gguf.parent):
        assert "llm_path=" in refusal(lambda place=place: instructblip.load(place, device="cpu"))  # type: ignore[misc]


# --- code ------------------------------------------------------------------------------------------------------------


def test_no_code_that_lies_in_a_folder_runs(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w').write('x')\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
    (folder / "mystery.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)

    def asked(*_: Any) -> str:
        raise AssertionError("asked whether to run foreign code")

    monkeypatch.setattr(builtins, "input", asked)
    named = {"AutoConfig": "mystery.LlamaConfig", "AutoModelForCausalLM": "mystery.LlamaForCausalLM"}
    settings(auto_map=named)(folder)
    assert open_folder(folder, kind) is not None  # transformers' own class of that type is taken
    words = {"AutoTokenizer": ["mystery.Words", None]}
    settings("tokenizer_config.json", auto_map=words, tokenizer_class="Words")(folder)
    if kind == "llm":
        assert "its tokenizer needs Python code of its own" in refusal(lambda: open_folder(folder, kind))
        settings(model_type="mystery")(folder)
        assert "needs Python code of its own for model_type 'mystery'" in refusal(lambda: open_folder(folder, kind))
    else:  # transformers has a tokenizer for that type
        assert open_folder(folder, kind) is not None
    assert not marker.exists()


@pytest.mark.slow
def test_every_call_refuses_foreign_code() -> None:
    """Calls of transformers that could run a folder's code, and of torch.load, say in plain words that they do not."""
    seen = []
    for file in sorted(
        [*ROOT.glob("*.py"), *(ROOT / "instructblip").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    ):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            where = f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node.func)}"
            if node.func.attr in ("from_pretrained", "from_config"):
                assert given.get("trust_remote_code") == "False", where
                seen.append(node.func.attr)
            elif ast.unparse(node.func) == "torch.load":
                assert given.get("weights_only") == "True", where
                seen.append("torch.load")
    assert seen.count("from_pretrained") >= 5 and seen.count("from_config") >= 3 and seen.count("torch.load") >= 2
