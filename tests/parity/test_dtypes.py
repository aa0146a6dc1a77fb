"""Folders in float32, float16 and bfloat16 do the same: load, answer, rank, be evaluated, and go out as they came.

For language models of three families. Half precision is compared with float32's scores of the same (rounded) weights, which
transformers' own class opens as well.
"""

import copy
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import InstructBlipForConditionalGeneration

from instructblip.config.schema import VisionConfig
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.quantized import quantize_linears
from instructblip.weights import __main__ as command
from instructblip.weights.modules import vision_encoder
from instructblip.weights.parity import rounding_bounds, stage_differences, trace_native
from instructblip.weights.parity_transformers import trace_huggingface
from instructblip.weights.transformers_read import load_huggingface
from tests.kit.runs import DATASETS, World, evaluate_here, predictions
from tests.kit.tiny import HUGGINGFACE_LLMS, noise_pictures, tiny_huggingface, tiny_images, tiny_model

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PROMPTS = [
    "what color is the shape?",
    "Question: is there a circle in the image? Short answer:",
    "red",
    "Based on the image, is this statement true or false? the shape is blue",
] * 2
CANDIDATES = ["red", "blue", "a green rectangle", "yes", "no there is a circle"]


class Folder(NamedTuple):
    """A transformers folder in one dtype, and the same values in float32."""

    path: Path
    dtype: torch.dtype
    ours: InstructBLIP
    exact: InstructBLIP


@pytest.fixture(
    scope="module",
    params=[(llm, dtype) for llm in HUGGINGFACE_LLMS for dtype in DTYPES],
    ids=lambda case: f"{case[0]}-{str(case[1]).removeprefix('torch.')}",
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    llm, dtype = request.param
    path = tmp_path_factory.mktemp(llm)
    tiny_huggingface(path, llm)
    if dtype != torch.float32:  # as whoever publishes in half precision does it; some tensors stay in float32 then
        InstructBlipForConditionalGeneration.from_pretrained(path, dtype=dtype).save_pretrained(path)
    model = load_huggingface(path)
    return Folder(path, dtype, model, copy.deepcopy(model).float())


def assert_near(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    """Scores of several tokens, each of which was rounded on its way through all layers."""
    for scores, exact in zip(found, wanted, strict=True):
        assert scores.dtype == torch.float32
        bound = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps * float(exact.abs().max())
        torch.testing.assert_close(scores, exact, rtol=0, atol=bound)


@pytest.mark.slow
def test_frozen_parts_are_held_in_the_folders_dtype(folder: Folder) -> None:
    vision, llm = folder.ours.vision, folder.ours.llm
    assert {tensor.dtype for tensor in (*vision.parameters(), *vision.backbone.buffers())} == {folder.dtype}
    assert vision.mean.dtype == vision.std.dtype == torch.float32
    kept = {name for name, tensor in llm.model.named_parameters() if tensor.dtype != folder.dtype}
    assert all(".wo." in name for name in kept)  # T5's, by transformers' own rule
    assert {tensor.dtype for tensor in llm.buffers()} == {torch.float32}
    assert {tensor.dtype for tensor in folder.ours.held_state().values()} == {torch.float32}


def test_scores_are_float32s_within_rounding_at_any_batch_size(folder: Folder) -> None:
    images, candidates = noise_pictures(len(PROMPTS)), [CANDIDATES] * len(PROMPTS)
    wanted = folder.exact.rank(images, PROMPTS, candidates)
    together = folder.ours.rank(images, PROMPTS, candidates)
    alone = [folder.ours.rank([i], [p], [CANDIDATES])[0] for i, p in zip(images, PROMPTS, strict=True)]
    assert_near(together, wanted, folder.dtype)
    assert_near(alone, wanted, folder.dtype)
    assert_near(together, alone, folder.dtype)
    assert max(float((a - b).abs().max()) for a, b in itertools.pairwise(wanted)) > 0.1  # the input matters


def test_answers_depend_on_the_batch_no_more_than_rounding_lets_them(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = noise_pictures(len(PROMPTS))
    monkeypatch.setattr(folder.ours.llm, "texts", Tensor.tolist)
    together: list[Any] = folder.ours.generate(images, PROMPTS, max_new_tokens=5)
    for number, answer in enumerate(together):
        alone: Any = folder.ours.generate(images[number : number + 1], PROMPTS[number : number + 1], max_new_tokens=5)[
            0
        ]
        place = next((place for place, pair in enumerate(zip(answer, alone, strict=False)) if pair[0] != pair[1]), None)
        if place is not None:
            # Half precision rounds a sum by the order in which it is taken, which may decide between equals.
            assert folder.dtype != torch.float32
            logits = next_logits(folder.exact, images[number], PROMPTS[number], answer[:place])
            margin = float((logits[answer[place]] - logits[alone[place]]).abs())
            assert margin < 8 * torch.finfo(folder.dtype).eps * float(logits.abs().max())
    assert len({tuple(answer) for answer in together}) > 1


@torch.inference_mode()
def next_logits(model: InstructBLIP, image: Image.Image, prompt: str, begun: list[int]) -> Tensor:
    """Logits (V,) of the token behind the beginning of an answer."""
    prefixes = model.llm.prefixes(model.visual_prompt(model.image_tokens([image]), [prompt]), [prompt])
    return model.llm.logits(model.llm.answer_states(prefixes, [[*begun, 0]]).hidden_SL)[-1]


@pytest.mark.parametrize("beams", [1, 3])
def test_each_picture_and_prompt_gets_an_answer(folder: Folder, beams: int) -> None:
    answers = folder.ours.generate(noise_pictures(len(PROMPTS)), PROMPTS, max_new_tokens=5, num_beams=beams)
    assert len(answers) == len(PROMPTS)
    assert len(set(answers)) > 1


def test_transformers_computes_the_same_in_that_dtype(folder: Folder) -> None:
    theirs, ours = trace_huggingface(folder.path), trace_native(folder.ours)
    bounds = dict.fromkeys(theirs, 1e-5)
    if folder.dtype != torch.float32:
        bounds = rounding_bounds(theirs, folder.dtype)
    assert all(found <= bounds[stage] for stage, found in stage_differences(theirs, ours).items())


@pytest.mark.slow
def test_an_export_has_the_same_tensors_in_the_same_types(folder: Folder, tmp_path: Path) -> None:
    folder.ours.save_huggingface(tmp_path / "again")
    assert_same(load_file(tmp_path / "again/model.safetensors"), load_file(folder.path / "model.safetensors"))
    theirs, info = InstructBlipForConditionalGeneration.from_pretrained(
        tmp_path / "again", dtype=folder.dtype, output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.language_model.dtype == theirs.vision_model.dtype == folder.dtype
    assert_same(load_huggingface(tmp_path / "again").state_dict(), folder.ours.state_dict())


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["rank", "generate"])
def test_it_is_evaluated(folder: Folder, mode: str, world: World, tmp_path: Path) -> None:
    evaluated = evaluate_here(world, folder.path, tmp_path, "samples=4", "batch_size=4", f"mode={mode}")
    held = json.loads((evaluated / "results.json").read_text())["model"]["llm"]["dtype"]
    assert held == str(folder.dtype).removeprefix("torch.")
    assert {len(predictions(evaluated)[name]) for name in DATASETS} == {4}


@pytest.mark.slow
def test_certificates_are_made_in_that_dtype(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = (("native", folder.path), ("lavis", tmp_path / "native"), ("huggingface", tmp_path / "native"))
    for to, source in steps:
        capsys.readouterr()
        assert command.main([str(source), str(tmp_path / to), "--to", to]) == 0
        said = capsys.readouterr().out
        name = str(folder.dtype).removeprefix("torch.")
        assert f"{name}, fixed random input" in said
        assert said.count("within") == (5 if folder.dtype == torch.float32 else 10)


@pytest.mark.slow
def test_what_was_trained_is_never_rounded(tmp_path: Path) -> None:
    tiny_huggingface(tmp_path / "half").bfloat16().save_pretrained(tmp_path / "half")
    model = load_huggingface(tmp_path / "half")
    with torch.no_grad():
        model.projection.weight.add_(1e-4)
    model.save_huggingface(tmp_path / "trained")
    written = load_file(tmp_path / "trained/model.safetensors")
    assert torch.equal(written["language_projection.weight"], model.projection.weight)
    assert written["query_tokens"].dtype == torch.float32
    assert written["language_model.lm_head.weight"].dtype == torch.bfloat16
    again = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "trained")
    assert torch.equal(again.language_projection.weight, model.projection.weight)


@pytest.mark.slow
def test_a_part_of_several_types_is_held_in_one_that_holds_them_all(tmp_path: Path) -> None:
    theirs = tiny_huggingface(tmp_path / "mixed").half()
    expected = {name: tensor.float() for name, tensor in theirs.state_dict().items()}
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    theirs.language_model.model.norm.bfloat16()
    theirs.save_pretrained(tmp_path / "mixed")
    model = load_huggingface(tmp_path / "mixed")
    assert model.vision.dtype == model.llm.model.dtype == torch.float32
    assert {tensor.dtype for tensor in model.vision.backbone.buffers()} == {torch.float32}
    found = model.vision.backbone.state_dict()["blocks.0.norm1.weight"]
    assert torch.equal(found, expected["vision_model.encoder.layers.0.layer_norm1.weight"])
    assert len(model.rank(noise_pictures(len(PROMPTS))[:1], PROMPTS[:1], [CANDIDATES])[0]) == len(CANDIDATES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["layer", "channel"])
def test_a_model_that_its_user_casts_goes_on_working(norm: str, dtype: torch.dtype) -> None:
    model, prompts, candidates = tiny_model(vision_norm=norm), PROMPTS[:2], [CANDIDATES] * 2
    quantize_linears(model.llm.model, "int8", keep=model.llm.model.get_output_embeddings())
    images, exact = tiny_images(2), {name: buffer.clone() for name, buffer in model.named_buffers()}
    wanted = model.rank(images, prompts, candidates)
    model.to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for name, buffer in model.named_buffers():
        if buffer.dtype == torch.float32:
            assert torch.equal(buffer, exact[name]), name
    rest = {name for name, buffer in model.named_buffers() if buffer.dtype == dtype}
    assert all(name.startswith("vision.backbone.") for name in rest)
    assert "llm.model.model.layers.0.mlp.up_proj.scale" in exact.keys() - rest
    for scores, exact_scores in zip(model.rank(images, prompts, candidates), wanted, strict=True):
        bound = 16 * torch.finfo(dtype).eps * float(exact_scores.abs().max())
        torch.testing.assert_close(scores, exact_scores, rtol=0, atol=bound)
    assert len(model.generate(images, prompts, max_new_tokens=3)) == 2


@pytest.mark.parametrize("backbone", ["eva02_tiny_patch14_224", "vit_small_patch16_rope_224", "beit_base_patch16_224"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_vision_parts_of_a_configured_dtype(backbone: str, dtype: str) -> None:
    size, options = 28 if "14" in backbone else 32, {"depth": 2}
    config = VisionConfig(
        name="own", backbone=backbone, image_size=size, mean=[127.0] * 3, std=[128.0] * 3, options=options
    )
    torch.manual_seed(0)
    vision = vision_encoder(config)
    torch.manual_seed(0)
    config.dtype = dtype
    half = vision_encoder(config)
    images = torch.randint(0, 256, (2, 3, config.image_size, config.image_size), dtype=torch.uint8)
    found, wanted = half(images).float(), vision(images)
    assert half.dtype == getattr(torch, dtype)
    assert float((found - wanted).abs().max()) < 16 * torch.finfo(half.dtype).eps * float(wanted.abs().max())
    angles = {name: buffer for name, buffer in half.named_buffers() if "rope" in name and buffer.is_floating_point()}
    assert bool(angles) is (backbone != "beit_base_patch16_224")
    assert all(torch.equal(buffer, dict(vision.named_buffers())[name]) for name, buffer in angles.items())
