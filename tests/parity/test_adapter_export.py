"""Adapters out and in: merged into transformers' class or beside it for peft, in native runs, never in LAVIS's files."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from instructblip.config.schema import LLMConfig, SourcesConfig
from instructblip.errors import UserError
from instructblip.models.adapters import Adapter, is_adapter
from instructblip.models.quantized import QUANTIZATIONS, quantize_linears
from instructblip.weights.init_sources import find_start, read_start
from instructblip.weights.load import load_model
from instructblip.weights.parity import stage_differences, traces_native
from instructblip.weights.parity_transformers import traces_huggingface
from instructblip.weights.parts import train_parts
from instructblip.weights.peft_format import whole_folder
from instructblip.weights.transformers_write import save_huggingface
from tests.kit.connectors import write_llava
from tests.kit.parity import convert
from tests.kit.tiny import EOS, tiny_huggingface, tiny_llama, tiny_llm, tiny_llm_tokenizer, tiny_released_model

pytest.importorskip("peft", reason="adapters need requirements-lora.txt")

ADAPTERS = {
    "vision": Adapter(2, 4.0, 0.0),
    "qformer": Adapter(3, 3.0, 0.0, ("query", "value", "up")),
    "llm": Adapter(4, 8.0, 0.0, ("all-linear",)),
}


def adapted(model: Any) -> Any:
    train_parts(model, tuple(ADAPTERS), ADAPTERS)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data.normal_(std=0.1, generator=generator)
    return model.eval()


@pytest.fixture(scope="module", params=["llama", pytest.param("t5", marks=pytest.mark.slow)])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers, and `adapter` in it for peft, of three parts with ranks of their own."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_huggingface(folder / "base", request.param)
    model = adapted(load_model(folder / "base", device="cpu").model)
    whole_folder(model, "huggingface").write(folder / "adapter")
    return folder


@pytest.mark.slow
def test_each_way_out_computes_the_same(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = source / "base", ("--adapter", source / "adapter")
    for target, given, options in (
        ("merged", base, (*adapter, "--to", "huggingface")),
        ("separate", base, (*adapter, "--to", "huggingface", "--adapters", "separate")),
        ("native", base, (*adapter, "--to", "native")),
        ("from_native", tmp_path / "native", ("--to", "huggingface")),
        ("from_separate", tmp_path / "separate", ("--adapter", tmp_path / "separate/adapter", "--to", "huggingface")),
    ):
        status, rows, error = convert(capsys, given, tmp_path / target, *options, "--bound", "1e-5")
        assert (status, error) == (0, ""), (target, rows)
    models = {name: load_model(tmp_path / name, device="cpu").model for name in ("merged", "native", "from_separate")}
    assert not models["merged"].adapters and not models["from_separate"].adapters
    kept = {part: (adapter.rank, adapter.alpha) for part, adapter in models["native"].adapters.items()}
    assert kept == {part: (adapter.rank, adapter.alpha) for part, adapter in ADAPTERS.items()}
    plain = traces_native(load_model(base, device="cpu").model).float32  # type: ignore[arg-type]
    with_adapters = traces_native(models["native"]).float32  # type: ignore[arg-type]
    assert all(difference > 1e-3 for difference in stage_differences(plain, with_adapters).values())


def test_a_folder_is_loaded_with_the_adapters_that_it_was_written_with(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(source / "base", tmp_path / "separate"))
    shutil.copytree(source / "adapter", folder / "adapter")
    expected = load_model(source / "base", adapter=source / "adapter", device="cpu").model.state_dict()
    found = load_model(folder, device="cpu")
    assert found.model.adapters.keys() == ADAPTERS.keys() and found.adapter is None
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.model.state_dict().items())
    tokenizer = tiny_llm_tokenizer()
    tiny_llama(len(tokenizer), tokenizer.eos_token_id).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    other = LLMConfig(name="other", sources=SourcesConfig(path=str(folder / "llm")), eos_token=EOS, pad_token=EOS)
    assert not load_model(folder, llm=other, device="cpu").model.adapters
    assert f"{folder / 'adapter'} was trained with the model's own language model, and is left out" in caplog.text
    with pytest.raises(UserError, match=r"has adapters in .*adapter, which a start takes from runs alone"):
        read_start(find_start(str(folder)))


@pytest.mark.slow
def test_a_lavis_file_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (source / "base", tmp_path / "a.pth", "--adapter", source / "adapter", "--to", "lavis")
    status, _, error = convert(capsys, *arguments)
    assert status == 2 and "no place for them; write --to huggingface" in error


@pytest.mark.slow
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("base", ["int8", "nf4", "bfloat16"])
def test_what_adapters_were_trained_over_goes_with_them(base: str, merge: bool, tmp_path: Path) -> None:
    llm = tiny_llm()
    if base == "nf4":
        pytest.importorskip("bitsandbytes", reason="nf4 needs requirements-quantization.txt")
    if base in QUANTIZATIONS:
        quantize_linears(llm.model, base, keep=llm.model.get_output_embeddings())
    else:
        for parameter in llm.parameters():
            parameter.data = parameter.data.bfloat16()
    torch.manual_seed(1)
    model = adapted(tiny_released_model(llm=llm))
    save_huggingface(model, tmp_path / "out", merge=merge)
    found, expected = traces_huggingface(tmp_path / "out", pad_as_saved=True).float32, traces_native(model).float32
    assert max(stage_differences(expected, found).values()) < 1e-5


@pytest.mark.slow
def test_a_llava_is_adapted_by_peft_and_goes_out_merged(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    theirs = write_llava(tmp_path / "base")
    torch.manual_seed(2)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=r".*language_model.*(q_proj|up_proj)", init_lora_weights=False
    )
    get_peft_model(theirs, config).save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu").model
    assert model.adapters["llm"].targets == ("q_proj", "up_proj")
    train_parts(
        model, ("vision",), {"vision": ADAPTERS["vision"]}
    )  # the joint layer of the tower, which goes out in three
    for name, parameter in model.vision.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    save_huggingface(model.eval(), tmp_path / "out")
    found = traces_huggingface(tmp_path / "out", pad_as_saved=True).float32
    assert max(stage_differences(traces_native(model).float32, found).values()) < 1e-5  # type: ignore[arg-type]
    plain = load_model(tmp_path / "base", device="cpu").model
    assert stage_differences(traces_native(plain).float32, found)["logits"] > 1e-2  # type: ignore[arg-type]
    with pytest.raises(UserError, match="go out merged"):
        save_huggingface(model, tmp_path / "separate", merge=False)
