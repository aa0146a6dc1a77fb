"""`python -m instructblip.weights`: a certificate, an exit status, and a whole TARGET or none."""

import itertools
import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from instructblip.models.instructblip import InstructBLIP
from instructblip.weights import conversion as command
from instructblip.weights.__main__ import main
from instructblip.weights.lavis import save_lavis
from instructblip.weights.load import load_model
from instructblip.weights.parity import traces_native
from instructblip.weights.parity_transformers import traces_huggingface
from instructblip.weights.transformers_write import save_huggingface
from tests.kit.parity import convert
from tests.kit.tiny import tiny_huggingface
from tests.parity.conftest import Formats

pytestmark = pytest.mark.usefixtures("named_parts")

STAGES = ["vision", "qformer", "projection", "logits", "padded"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "to"), list(itertools.product(["huggingface", "native", "lavis"], ["huggingface", "native", "lavis"]))
)
def test_every_format_to_every_other(
    source: str, to: str, formats: Formats, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--llm", "own"] if source == "lavis" else []
    target = tmp_path / "target"
    status, rows, _ = convert(capsys, getattr(formats, source), target, "--to", to, *options)
    assert status == 0
    assert [stage for stage, _, _ in rows] == STAGES
    assert all(difference < 1e-4 and verdict == "within" for _, difference, verdict in rows), rows
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    parts = {"llm": "own"} if to == "lavis" else {}
    before = load_model(formats.huggingface, device="cpu").model.state_dict()
    after = load_model(target, device="cpu", **parts).model.state_dict()  # type: ignore[arg-type]
    assert before.keys() == after.keys()
    assert not [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]


@pytest.mark.slow
@pytest.mark.parametrize("llm", ["opt", "t5"])
def test_other_language_models(llm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_huggingface(tmp_path / "source", llm, image_token=False)
    for target, to, source in (("run", "native", "source"), ("again", "huggingface", "run")):
        status, rows, _ = convert(capsys, tmp_path / source, tmp_path / target, "--to", to, "--bound", "1e-5")
        assert status == 0, rows


@pytest.mark.slow
def test_each_side_is_run_by_its_own_code(
    formats: Formats, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def recorded(name: str, function: Any) -> Any:
        def call(source: Any, **options: Any) -> Any:
            calls.append(name)
            return function(source, **options)

        return call

    monkeypatch.setattr(command, "traces_huggingface", recorded("transformers", traces_huggingface))
    monkeypatch.setattr(command, "traces_native", recorded("ours", traces_native))
    convert(capsys, formats.huggingface, tmp_path / "a", "--to", "native")
    convert(capsys, formats.native, tmp_path / "b", "--to", "huggingface")
    convert(capsys, formats.huggingface, tmp_path / "c", "--to", "huggingface")
    assert calls == ["transformers", "ours", "ours", "transformers", "transformers", "transformers"]


@pytest.mark.slow
def test_a_native_target_brings_its_frozen_parts(formats: Formats, tmp_path: Path) -> None:
    shutil.copytree(formats.huggingface, tmp_path / "source")
    assert main([str(tmp_path / "source"), str(tmp_path / "run"), "--to", "native"]) == 0
    shutil.rmtree(tmp_path / "source")
    model = load_model(tmp_path / "run", device="cpu").model
    expected = load_model(formats.huggingface, device="cpu").model
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.yaml",
        "checkpoints",
        "vision",
        "qformer",
        "llm",
    }
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000000"]
    assert "partial" not in (tmp_path / "run/config.yaml").read_text()


@pytest.mark.slow
def test_with_a_named_language_model_its_weights_are_not_copied(formats: Formats, tmp_path: Path) -> None:
    assert main([str(formats.huggingface), str(tmp_path / "run"), "--to", "native", "--llm", "wide"]) == 0
    assert not (tmp_path / "run/llm").exists()
    loaded = load_model(tmp_path / "run", device="cpu")
    assert loaded.model.llm.width == 48
    assert loaded.config is not None
    assert loaded.config.llm.name == "wide"


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_result_that_computes_something_else_is_not_written(
    wrong: float, formats: Formats, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_wrongly(model: InstructBLIP, path: Path, *, projection: str | None) -> None:
        kept = model.qformer.layers[2].query_ffn.down.bias.detach().clone()  # type: ignore[union-attr, operator]
        with torch.no_grad():
            model.qformer.layers[2].query_ffn.down.bias.add_(wrong * torch.arange(32))  # type: ignore[union-attr, operator]
            save_lavis(model, path, projection=projection)
            model.qformer.layers[2].query_ffn.down.bias.copy_(kept)  # type: ignore[union-attr, operator]

    monkeypatch.setattr(command, "save_lavis", save_wrongly)
    status, rows, _ = convert(capsys, formats.native, tmp_path / "x.pth", "--to", "lavis")
    assert status == 1
    assert [(stage, verdict) for stage, _, verdict in rows] == list(
        zip(STAGES, ["within", "ABOVE", "ABOVE", "ABOVE", "ABOVE"], strict=True)
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_result_whose_prompts_are_padded_on_the_wrong_side_is_not_written(
    formats: Formats, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_without_the_side(model: InstructBLIP, folder: Path, *, merge: bool) -> None:
        save_huggingface(model, folder, merge=merge)
        said = json.loads((folder / "tokenizer_config.json").read_text())
        assert said.pop("padding_side") == "left"
        (folder / "tokenizer_config.json").write_text(json.dumps(said))

    monkeypatch.setattr(command, "save_huggingface", save_without_the_side)
    status, rows, _ = convert(capsys, formats.native, tmp_path / "x", "--to", "huggingface")
    assert (status, [verdict for _, _, verdict in rows]) == (1, ["within"] * 4 + ["ABOVE"])


@pytest.mark.slow
@pytest.mark.parametrize("to", ["huggingface", "native", "lavis"])
def test_the_bound_holds_for_every_format(
    to: str, formats: Formats, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, rows, _ = convert(capsys, formats.native, tmp_path / "target", "--to", to, "--bound", "-1")
    assert status == 1
    assert [verdict for _, _, verdict in rows] == ["ABOVE"] * 5
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_stands_in_the_way(formats: Formats, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    status, rows, said = convert(capsys, formats.native, target, "--to", "lavis")
    assert (status, rows) == (2, [])
    assert said == f"error: {target} exists already; choose another file, or give --overwrite\n"
    assert target.read_text() == "mine"
    assert convert(capsys, formats.native, target, "--to", "lavis", "--overwrite")[0] == 0
    assert load_model(target, llm="own", device="cpu").model.llm.width == 32
    folder = tmp_path / "folder"
    for to, other in (("native", "huggingface"), ("huggingface", "native")):
        assert convert(capsys, formats.native, folder, "--to", to)[0] == 0
        assert convert(capsys, formats.native, folder, "--to", to)[0] == 2
        assert convert(capsys, formats.native, folder, "--to", to, "--overwrite")[0] == 0
        status, _, said = convert(capsys, formats.native, folder, "--to", other, "--overwrite")
        assert status == 2
        assert "so it is not replaced" in said
        shutil.rmtree(folder)


def test_errors_are_one_line(formats: Formats, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ((formats.lavis, tmp_path / "x", "--to", "native"), "has no language model in it"),
        ((tmp_path / "none", tmp_path / "x", "--to", "native"), "is no run, transformers folder"),
        ((formats.native, tmp_path / "x", "--to", "native", "--llm", "nine"), "there is no llm=nine"),
    ):
        status, rows, said = convert(capsys, *arguments)
        assert (status, rows) == (2, [])
        assert said.startswith("error: ")
        assert message in said
        assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_command_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["weights", str(tmp_path / "none"), str(tmp_path / "x"), "--to", "lavis"])
    monkeypatch.delitem(sys.modules, "instructblip.weights.__main__")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("instructblip.weights", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
