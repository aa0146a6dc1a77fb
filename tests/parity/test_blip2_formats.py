"""BLIP-2 in every format is one call away, can do what it has a head for, and is converted with a certificate."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

import instructblip
from instructblip.config.validate import read_model_config
from instructblip.errors import UserError
from instructblip.models.blip2 import BLIP2
from instructblip.models.instructblip import InstructBLIP
from instructblip.weights import load as loading
from instructblip.weights.__main__ import main
from instructblip.weights.lavis import read_lavis, save_lavis
from instructblip.weights.load import find_source, load_model
from tests.kit.blip2 import tiny_eva, tiny_stage1, tiny_stage2, write_captioner, write_retrieval
from tests.kit.parity import convert, write_configs
from tests.kit.runs import DATASETS, World, evaluate_here, predictions
from tests.kit.tiny import tiny_images

FORMATS = ("huggingface", "native", "lavis")
STAGES = {
    "stage1": ["vision", "qformer", "text", "contrast", "matching", "captions"],
    "stage2": ["vision", "qformer", "projection", "logits", "padded"],
}
TEXTS = ["a man riding a horse", "two dogs"]


@dataclass(frozen=True)
class Formats:
    """One stage's weights as a transformers folder, a run of ours and a file of LAVIS; `llm` where the last needs one."""

    stage: str
    huggingface: Path
    native: Path
    lavis: Path
    configs: Path

    def source(self, form: str) -> tuple[Path, dict[str, Any]]:
        needs_llm = form == "lavis" and self.stage == "stage2"
        return getattr(self, form), {"llm": "own"} if needs_llm else {}


@pytest.fixture(scope="module", params=["stage1", "stage2"])
def formats(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Formats:
    folder = tmp_path_factory.mktemp(request.param)
    made = Formats(request.param, folder / "huggingface", folder / "native", folder / "model.pth", folder / "configs")
    # The eps of transformers, which a LAVIS file has not: the same numbers in all three but for that.
    model: BLIP2 | InstructBLIP = tiny_stage1(norm_eps=1e-6) if made.stage == "stage1" else tiny_stage2(norm_eps=1e-6)
    model.save_huggingface(made.huggingface)
    assert main([str(made.huggingface), str(made.native), "--to", "native"]) == 0
    save_lavis(model, made.lavis)
    config = read_model_config(made.native / "config.yaml")
    sections: dict[str, Any] = {
        "vision/eva_vit_g": dataclasses.replace(config.vision, name="eva_vit_g", norm_eps=1e-5),
        "qformer/blip2": dataclasses.replace(config.qformer, name="blip2", queries=9, instruction_aware=True),
    }
    if config.llm is not None:
        sections["llm/own"] = dataclasses.replace(config.llm, name="own", lavis_projection="opt_proj")
    write_configs(made.configs, sections)
    return made


@pytest.fixture(scope="module")
def weights(formats: Formats) -> dict[str, Tensor]:
    """All tensors of the model, as they are in its transformers folder."""
    state: dict[str, Tensor] = load_model(formats.huggingface, device="cpu").model.state_dict()
    return state


@pytest.fixture(autouse=True)
def _named_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of parts mean those of `Formats.configs`."""
    if "formats" in request.fixturenames:
        monkeypatch.setattr(loading, "CONFIGS", request.getfixturevalue("formats").configs)


@pytest.mark.slow
def test_every_format_is_the_same_model(
    formats: Formats, weights: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    for form in FORMATS:
        source, options = formats.source(form)
        found = load_model(source, device="cpu", **options)
        state = found.model.state_dict()
        assert state.keys() == weights.keys()
        assert not [name for name, tensor in weights.items() if not torch.equal(state[name], tensor)], form
        assert ("llm" in found.parts) is (formats.stage == "stage2")
        kind = find_source(source, **options).kind
        assert kind == {"stage1": "blip2_stage1", "stage2": "blip2"}[formats.stage]
    assert not caplog.records  # the projection is the one of the language model that is asked for


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_one_call_loads_what_can_be_asked(form: str, formats: Formats) -> None:
    source, options = formats.source(form)
    model, images = instructblip.load(str(source), device="cpu", **options), tiny_images(2)[..., :28, :28]
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: model.generate(images, max_new_tokens=12),
        "rank": lambda: model.rank(images, ["what is it?"] * 2, [["red", "blue"]] * 2),
        "match": lambda: model.match(images, TEXTS),
        "features": lambda: model.features(images, TEXTS),
    }
    can = ["generate", "match", "features"] if formats.stage == "stage1" else ["generate", "rank"]
    assert model.calls() == can
    for name, call in calls.items():
        if name in can:
            assert len(call()) in (2, 6)  # one a sample, or the six kinds of features
            continue
        with pytest.raises(UserError, match=f"^BLIP-2's (first|second) stage has no .*; it can {', '.join(can)}$"):
            call()


def test_a_retrieval_model_of_transformers_does_not_caption(tmp_path: Path) -> None:
    write_retrieval(tmp_path / "theirs")
    model = instructblip.load(tmp_path / "theirs", device="cpu")
    message = "BLIP-2's first stage has no language-model head to caption with; it can match, features"
    with pytest.raises(UserError, match=f"^{message}$"):
        model.generate(tiny_images(1)[..., :28, :28])
    assert model.match(tiny_images(2)[..., :28, :28], TEXTS).shape == (2,)


# The ids that BLIP-2 is published under, by what they hold.
PUBLISHED = {
    "Salesforce/blip2-itm-vit-g": ("blip2_stage1", ""),
    "Salesforce/blip2-itm-vit-g-coco": ("blip2_stage1", ""),
    **{
        f"Salesforce/blip2-{name}{tuned}": ("blip2", llm)
        for name, llm in (("opt-2.7b", "opt"), ("opt-6.7b", "opt"), ("flan-t5-xl", "t5"), ("flan-t5-xxl", "t5"))
        for tuned in ("", "-coco")
        if (name, tuned) != ("flan-t5-xxl", "-coco")
    },
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the ids hold, by language model; not to be changed by a test."""
    folders = {llm: tmp_path_factory.mktemp(llm or "retrieval") for _, llm in PUBLISHED.values()}
    for llm, folder in folders.items():
        if llm:
            write_captioner(folder, llm)
        else:
            write_retrieval(folder)
    return folders


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_ids(name: str, published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layout of the hub's cache, which is what there is of a hub without a network."""
    kind, llm = PUBLISHED[name]
    repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(published[llm], repository / "snapshots/0123abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("INSTRUCTBLIP_CACHE", str(tmp_path / "cache"))
    assert find_source(name).kind == kind
    loaded = load_model(name, device="cpu")
    assert loaded.name == name.partition("/")[2]
    assert (
        len(loaded.model.generate(tiny_images(1)[..., :28, :28], max_new_tokens=3) if kind == "blip2" else TEXTS[:1])
        == 1
    )


# --- certificates ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("source", "to"), list(itertools.product(FORMATS, FORMATS)))
def test_every_format_to_every_other(
    source: str,
    to: str,
    formats: Formats,
    weights: dict[str, Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given, options = formats.source(source)
    target = tmp_path / "target"
    status, rows, _ = convert(capsys, given, target, "--to", to, *(f"--{k}={v}" for k, v in options.items()))
    assert status == 0, rows
    assert [stage for stage, _, _ in rows] == STAGES[formats.stage]
    assert all(difference < 1e-4 and verdict == "within" for _, difference, verdict in rows), rows
    options = {"llm": "own"} if to == "lavis" and formats.stage == "stage2" else {}
    after = load_model(target, device="cpu", **options).model.state_dict()  # type: ignore[arg-type]
    assert weights.keys() == after.keys()
    assert not [name for name, tensor in weights.items() if not torch.equal(after[name], tensor)]


@pytest.mark.slow
def test_a_retrieval_model_of_transformers_as_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_retrieval(tmp_path / "theirs")
    status, rows, _ = convert(capsys, tmp_path / "theirs", tmp_path / "run", "--to", "native", "--bound", "1e-5")
    assert (status, [stage for stage, _, _ in rows]) == (0, STAGES["stage1"][:-1])
    assert read_model_config(tmp_path / "run/config.yaml").model.language_model_head is False
    status, rows, _ = convert(capsys, tmp_path / "run", tmp_path / "again", "--to", "huggingface", "--bound", "1e-5")
    assert (status, [stage for stage, _, _ in rows]) == (0, STAGES["stage1"][:-1])


@pytest.mark.slow
@pytest.mark.parametrize("llm", ["opt", "t5"])
def test_a_captioner_of_transformers_as_a_run(llm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_captioner(tmp_path / "theirs", llm)
    status, rows, _ = convert(capsys, tmp_path / "theirs", tmp_path / "run", "--to", "native", "--bound", "1e-5")
    assert (status, [stage for stage, _, _ in rows]) == (0, STAGES["stage2"])
    config = read_model_config(tmp_path / "run/config.yaml")
    assert (config.model.kind, config.qformer.instruction_aware) == ("blip2", False)
    assert not (tmp_path / "run/qformer/tokenizer.json").exists()
    status, rows, _ = convert(capsys, tmp_path / "run", tmp_path / "again", "--to", "huggingface", "--bound", "1e-5")
    assert status == 0, rows


@pytest.mark.slow
def test_a_vit_of_the_file_is_kept_on_the_way(
    formats: Formats, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in the COCO-tuned files of LAVIS, whose ViT was trained on larger images."""
    stage1 = formats.stage == "stage1"
    model = tiny_stage1(3) if stage1 else tiny_stage2(3)
    model.vision = tiny_eva(42)
    model.choose_trained(("vision", "qformer"))
    save_lavis(model, tmp_path / "tuned.pth")
    options = [] if stage1 else ["--llm", "own"]
    for source, target, to in (("tuned.pth", "again.pth", "lavis"), ("tuned.pth", "run", "native")):
        status, rows, _ = convert(capsys, tmp_path / source, tmp_path / target, "--to", to, *options)
        assert status == 0, rows
    first, again = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("tuned.pth", "again.pth"))
    assert first.keys() == again.keys()
    assert not [name for name, tensor in first.items() if not torch.equal(again[name], tensor)]
    found = load_model(tmp_path / "run", device="cpu").model
    assert found.vision.image_size == 42
    assert torch.equal(found.vision.backbone.pos_embed, model.vision.backbone.pos_embed)


# --- half precision --------------------------------------------------------------------------------------------------

HALF = (torch.float16, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF, ids=["float16", "bfloat16"])
def test_a_retrieval_folder_in_half_precision(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_stage1(norm_eps=1e-6).save_huggingface(tmp_path / "whole")
    folder = tmp_path / "half"
    shutil.copytree(tmp_path / "whole", folder)
    Blip2ForImageTextRetrieval.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    model, exact = (instructblip.load(folder, device="cpu") for _ in range(2))
    exact = exact.float()
    assert model.vision.dtype == dtype
    assert {tensor.dtype for tensor in model.held_state().values()} == {torch.float32}
    images = tiny_images(8)[..., :28, :28]
    texts = TEXTS * 4
    bound = 16 * torch.finfo(dtype).eps
    for head in ("itm", "itc"):
        found, alone = (
            model.match(images, texts, head=head),
            [model.match(images[k : k + 1], texts[k : k + 1], head=head) for k in range(8)],
        )
        torch.testing.assert_close(found, exact.match(images, texts, head=head), rtol=0, atol=bound)
        torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=bound)
    features, wanted = model.features(images, texts), exact.features(images, texts)
    torch.testing.assert_close(features.image_projected, wanted.image_projected, rtol=0, atol=bound)
    torch.testing.assert_close(features.text_projected, wanted.text_projected, rtol=0, atol=1e-5)
    assert len(model.generate(images, max_new_tokens=12)) == 8
    for to, target in (("huggingface", "again"), ("native", "run")):
        status, rows, _ = convert(capsys, folder, tmp_path / target, "--to", to)
        assert status == 0, rows
        assert len(rows) == 2 * len(STAGES["stage1"])
    assert_same_files(tmp_path / "again", folder)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("llm", ["opt", "t5"])
def test_a_captioners_folder_in_half_precision(
    dtype: torch.dtype, llm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "half"
    write_captioner(folder, llm)
    Blip2ForConditionalGeneration.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    model, exact = (instructblip.load(folder, device="cpu") for _ in range(2))
    exact = exact.float()
    images, candidates = tiny_images(4)[..., :28, :28], [["red", "a blue circle", "two dogs"]] * 4
    for prompts in ([""] * 4, ["what color is it?", "a photo of"] * 2):
        found, wanted = (m.rank(images, prompts, candidates) for m in (model, exact))
        scale = max(float(scores.abs().max()) for scores in wanted)
        torch.testing.assert_close(found, wanted, rtol=0, atol=8 * torch.finfo(dtype).eps * scale)
        assert len(model.generate(images, prompts, max_new_tokens=5, num_beams=2)) == 4
    for to, target in (("huggingface", "again"), ("native", "run")):
        status, rows, _ = convert(capsys, folder, tmp_path / target, "--to", to)
        assert status == 0, rows
        assert len(rows) == 2 * len(STAGES["stage2"])
    assert_same_files(tmp_path / "again", folder)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["rank", "generate"])
def test_a_captioners_folder_is_evaluated(mode: str, world: World, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    write_captioner(folder)
    Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    evaluated = evaluate_here(world, folder, tmp_path / "out", "samples=4", "batch_size=4", f"mode={mode}")
    assert json.loads((evaluated / "results.json").read_text())["model"]["llm"]["dtype"] == "bfloat16"
    assert {len(predictions(evaluated)[name]) for name in DATASETS} == {4}


def assert_same_files(found: Path, wanted: Path) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (found, wanted))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def test_the_width_of_image_tokens_tells_the_released_vit(tmp_path: Path) -> None:
    names = {}
    for width in (1408, 1024):
        tensors = {"ln_vision.weight": torch.ones(width), "itm_head.weight": torch.zeros(2, 8)}
        tensors |= {"vision_proj.bias": torch.zeros(4), "query_tokens": torch.zeros(1, 4, 8)}
        torch.save({"model": tensors}, tmp_path / "stage1.pth")
        config = loading._lavis_config(read_lavis(tmp_path / "stage1.pth"), None)
        names[width] = config.vision.name
        assert (config.model.kind, config.model.feature_width, config.model.language_model_head) == (
            "blip2_stage1",
            4,
            False,
        )
    assert names == {1408: "eva_vit_g", 1024: "clip_vit_l"}
