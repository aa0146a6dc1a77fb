"""Parts built from their configuration: weights into every timm backbone, the Q-Former's three starts, restored runs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from instructblip.config.schema import (
    CONFIGS,
    ModelConfig,
    QFormerConfig,
    SourcesConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from instructblip.config.validate import read_config, to_yaml
from instructblip.errors import UserError
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.qformer import QFormer
from instructblip.weights.bert import qformer_state_from_bert
from instructblip.weights.checkpoint import save_checkpoint
from instructblip.weights.load import frozen_fingerprints, load_run
from instructblip.weights.modules import parts_without_weights
from instructblip.weights.parts import build_instructblip, load_qformer, load_text_model, load_vision
from instructblip.weights.position import resize_position_embedding
from tests.kit.runs import compose
from tests.kit.tiny import tiny_bert_tokenizer, tiny_parts, tiny_qformer


def vision_config(name: str, **changes: Any) -> VisionConfig:
    return replace(read_config(CONFIGS / "vision" / f"{name}.yaml", VisionConfig), **changes)


def pictures(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)


def random_backbone(name: str, **options: Any) -> Any:
    """A timm model whose every tensor matters, as large files hold it: with its classification head."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=7, **options).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and not tensor.any():
            nn.init.normal_(tensor, std=0.1)
    return model


# --- vision: any backbone by name ------------------------------------------------------------------------------------

SMALL_SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]}
SMALL_EVA02 = {"depth": 2, "embed_dim": 48, "num_heads": 2}


@pytest.mark.parametrize(
    ("backbone", "size", "options", "tokens", "width"),
    [
        ("test_vit", 160, {}, 101, 64),
        ("eva02_tiny_patch14_224", 56, SMALL_EVA02, 17, 48),
        ("test_convnext", 64, {}, 4, 64),
        ("resnet10t", 64, {}, 4, 512),
        ("swin_tiny_patch4_window7_224", 224, SMALL_SWIN, 49, 128),
        ("test_efficientnet", 64, {}, 4, 256),
        ("test_mambaout", 64, {}, 4, 64),
    ],
)
def test_any_backbone_gives_its_features(
    backbone: str, size: int, options: dict[str, Any], tokens: int, width: int, tmp_path: Path
) -> None:
    sized = {"img_size": size} if "patch" in backbone else {}
    original = random_backbone(backbone, **options, **sized)
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    sources = SourcesConfig(path=str(tmp_path))
    config = vision_config("timm", backbone=backbone, image_size=size, options=options, sources=sources)
    encoder = load_vision(config)
    assert (encoder.tokens, encoder.width) == (tokens, width)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.mean, config.std))
    with torch.no_grad():
        features = original.forward_features((pictures(size) - mean) / std)
    last = "swin" in backbone or "mamba" in backbone  # these keep channels last
    if features.ndim == 4:
        features = features if last else features.permute(0, 2, 3, 1)
        features = features.flatten(1, 2)
    torch.testing.assert_close(encoder(pictures(size)), features, atol=1e-5, rtol=1e-5)


# --- vision: EVA-CLIP-g and CLIP ViT-L as LAVIS cuts them ------------------------------------------------------------

CUT = {
    "eva_vit_g": {"embed_dim": 32, "num_heads": 4},
    "clip_vit_l": {"embed_dim": 32, "num_heads": 4},
}


def small(name: str, size: int, path: Path, **changes: Any) -> VisionConfig:
    """The YAML with two narrow blocks."""
    options = vision_config(name).options | CUT[name] | {"depth": 2}
    sources = SourcesConfig(path=str(path))
    return vision_config(name, **{"image_size": size, "options": options, "sources": sources} | changes)


@pytest.fixture(scope="module", params=sorted(CUT))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """(YAML, the model with all of its three blocks, norm and head, a folder with its file in three forms)."""
    name: str = request.param
    model = random_backbone(vision_config(name).backbone, depth=3, **CUT[name])
    folder = tmp_path_factory.mktemp(name)
    save_file(model.state_dict(), folder / "model.safetensors")
    torch.save(model.state_dict(), folder / "weights.pth")
    return name, model, folder


@pytest.mark.parametrize("file", [".", "model.safetensors", "weights.pth"])
def test_the_last_block_norm_and_head_are_left_out(file: str, whole: tuple[str, Any, Path]) -> None:
    name, model, folder = whole
    config = small(name, 224, folder / file)
    encoder = load_vision(config)
    assert (encoder.tokens, len(encoder.backbone.blocks), config.norm) == (257, 2, "layer")
    assert not any(key.startswith(("norm.", "head.", "blocks.2")) for key in encoder.backbone.state_dict())
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    seen: list[Tensor] = []
    hook = model.blocks[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        model.forward_features((pictures(224) / 255 - mean) / std)
    hook.remove()
    torch.testing.assert_close(encoder(pictures(224)), seen[0], atol=1e-4, rtol=1e-4)


def test_positions_are_resized_to_the_image(whole: tuple[str, Any, Path]) -> None:
    name, model, folder = whole
    encoder = load_vision(small(name, 112, folder))
    assert encoder.tokens == 65
    found, original = encoder.backbone.pos_embed, model.pos_embed.detach()
    assert torch.equal(found[:, 0], original[:, 0])
    grid = original[0, 1:].T.reshape(1, 32, 16, 16)
    expected = F.interpolate(grid, size=(8, 8), mode="bicubic", align_corners=False)
    torch.testing.assert_close(found[0, 1:].T.reshape(1, 32, 8, 8), expected)


def test_resizing_keeps_what_fits_and_what_is_linear() -> None:
    ramp = torch.arange(6.0).repeat(6)[None, :, None]  # grows by one a column, on every row
    assert resize_position_embedding(ramp, (6, 6), prefix_tokens=0) is ramp
    half = resize_position_embedding(ramp, (3, 3), prefix_tokens=0)[0, :, 0].view(3, 3)
    torch.testing.assert_close(half[:, 1], torch.full((3,), 2.5))  # midway between columns 2 and 3
    spike = torch.zeros(1, 37, 1)
    spike[0, 1 + 6 * 5 + 5] = 1.0  # the last corner of a grid behind one prefix token
    half = resize_position_embedding(spike, (3, 3))[0, :, 0]
    assert half[1:-1].abs().max() == 0  # without antialiasing it is seen next to it only
    assert half[-1] > 0.2
    with pytest.raises(UserError, match="no square grid"):
        resize_position_embedding(ramp, (4, 4), prefix_tokens=1)


def test_the_type_of_the_weights(whole: tuple[str, Any, Path]) -> None:
    name, _, folder = whole
    encoder = load_vision(small(name, 56, folder, dtype="bfloat16"))
    assert (encoder.dtype, encoder.mean.dtype, encoder(pictures(56)).dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", ["lacks the tensor blocks.1.mlp.fc1.weight"]),
        ("misshapen", ["blocks.1.mlp.fc1.weight is (5, 32)", "the model needs"]),
        ("surplus", ["unknown tensor blocks.1.mlp.fc3.weight"]),
        ("no such file", ["does not exist"]),
        ("no tensors", ["no state dict"]),
        ("objects", ["unpickling"]),
        ("cut short", ["cannot be read"]),
    ],
)
def test_a_file_that_does_not_fit_is_named(change: str, words: list[str], tmp_path: Path) -> None:
    weights: dict[str, Any] = random_backbone("eva_giant_patch14_clip_224", depth=3, **CUT["eva_vit_g"]).state_dict()
    name, file = "blocks.1.mlp.fc1.weight", tmp_path / "eva_vit_g.pth"
    if change == "missing":
        del weights[name]
    elif change == "misshapen":
        weights[name] = torch.zeros(5, 32)
    elif change == "surplus":
        weights["blocks.1.mlp.fc3.weight"] = torch.zeros(2, 2)
    elif change == "no tensors":
        weights = {"epoch": 3}
    elif change == "objects":
        weights = {"path": Path()}
    if change != "no such file":
        torch.save(weights, file)
    if change == "cut short":
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError) as error:
        load_vision(small("eva_vit_g", 56, file))
    assert [word for word in [*words, "eva_vit_g.pth"] if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": {"dept": 3}}, ["vision=eva_vit_g", "dept"]),
        ({"backbone": "eva_gigantic"}, ["vision=eva_vit_g", "eva_gigantic"]),
    ],
)
def test_wrong_vision_settings(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_vision(small("eva_vit_g", 56, tmp_path, **changes))
    assert [word for word in words if word not in str(error.value)] == []


# --- Q-Former --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny_parts(tmp_path_factory.mktemp("parts"))


def model_config(parts: dict[str, str], *overrides: str) -> TrainConfig:
    return compose("train", TrainConfig, [*(f"{key}={value}" for key, value in parts.items()), *overrides])


def build(config: ModelConfig) -> InstructBLIP:
    return build_instructblip(config)


def qformer_config(parts: dict[str, str], *overrides: str) -> QFormerConfig:
    return model_config(parts, *overrides).qformer


def test_the_random_stream_of_the_demo(parts: dict[str, str]) -> None:
    """What is new in the demo's Q-Former and projection is drawn as it always was; golden runs depend on it."""
    config = model_config(parts, "qformer.query_init=normal", "qformer.cross_attention_every=2")
    built = build(config)
    bert = load_file(Path(parts["qformer.sources.path"]) / "model.safetensors")
    torch.manual_seed(config.seed)
    qformer = tiny_qformer(vision_width=built.vision.width)
    qformer.load_state_dict(qformer_state_from_bert(bert, qformer), strict=False)
    projection = nn.Linear(qformer.width, built.llm.width).weight.detach().normal_()
    assert built.qformer.state_dict().keys() == qformer.state_dict().keys()
    for name, tensor in qformer.state_dict().items():
        assert torch.equal(built.qformer.state_dict()[name], tensor), name
    ratio = built.projection.weight / projection
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))


def test_bert_gives_all_but_query_tokens_and_cross_attention(parts: dict[str, str]) -> None:
    bert = load_file(Path(parts["qformer.sources.path"]) / "model.safetensors")
    config = qformer_config(parts, "qformer.extra_tokens=['[DEC]']")
    torch.manual_seed(1)
    qformer, tokenizer = load_qformer(config, vision_width=8)
    rows = len(tiny_bert_tokenizer())
    assert tokenizer.convert_tokens_to_ids("[DEC]") == rows
    words = qformer.word_embeddings.weight
    assert len(words) == rows + 1
    torch.testing.assert_close(words[-1], words[:-1].mean(dim=0))
    assert torch.equal(words[:-1], bert["embeddings.word_embeddings.weight"])
    assert torch.equal(qformer.layers[2].text_ffn.up.weight, bert["encoder.layer.2.intermediate.dense.weight"])
    # The tokenizer's own [SEP] is where it was, and a text is cut on the left.
    ids = tokenizer("what is there", truncation=True, max_length=4)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", *tokenizer.tokenize("is there")[-2:], "[SEP]"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "lack encoder.layer.1.output.dense.bias"),
        ("misshapen", "layers.0.self_attention.query.weight is (16, 32), the model needs (32, 32)"),
    ],
)
def test_bert_weights_that_do_not_fit(change: str, words: str, parts: dict[str, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(parts["qformer.sources.path"], tmp_path / "bert"))
    weights = load_file(folder / "model.safetensors")
    if change == "missing":
        del weights["encoder.layer.1.output.dense.bias"]
    else:
        weights["encoder.layer.0.attention.self.query.weight"] = torch.zeros(16, 32)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_qformer(qformer_config(parts, f"qformer.sources.path={folder}"), vision_width=8)
    assert words in str(error.value)


@pytest.mark.parametrize(("name", "other"), [("hidden_act", "relu"), ("position_embedding_type", "relative_key")])
def test_a_bert_that_computes_otherwise_is_no_start(
    name: str, other: str, parts: dict[str, str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(parts["qformer.sources.path"], tmp_path / "bert"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: other}))
    words = f"config.json has {name}={other}, where BERT's weights"
    place = f"qformer.sources.path={folder}"
    with pytest.raises(UserError, match=words):
        load_qformer(qformer_config(parts, place), vision_width=8)
    text = TextConfig(name="other", sources=SourcesConfig(path=str(folder)), init="bert")
    with pytest.raises(UserError, match=words):
        load_text_model(text, source_width=8)
    # Nothing of it but sizes and tokenizer is taken.
    load_qformer(qformer_config(parts, place, "qformer.init=scratch", "qformer.query_init=normal"), vision_width=8)


def test_from_scratch_everything_is_drawn_as_bert_was(parts: dict[str, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(parts["qformer.sources.path"], tmp_path / "bert"))
    (folder / "model.safetensors").unlink()  # sizes and tokenizer are enough
    config = qformer_config(
        parts, "qformer.init=scratch", "qformer.query_init=normal", f"qformer.sources.path={folder}"
    )

    def draw(seed: int) -> QFormer:
        torch.manual_seed(seed)
        return load_qformer(config, vision_width=8)[0]

    state, other = draw(0).state_dict(), draw(1).state_dict()
    for name, tensor in state.items():
        if "norm" in name or name.endswith("bias"):
            assert torch.equal(tensor, torch.full_like(tensor, float("norm.weight" in name))), name
        else:
            assert tensor.std().item() == pytest.approx(0.02, rel=0.25), name
            assert not torch.equal(tensor, other[name]), name


# --- restored runs ---------------------------------------------------------------------------------------------------


def test_instructions_that_the_qformer_has_no_places_for_are_refused_before_the_run(parts: dict[str, str]) -> None:
    limit = "qformer.max_instruction_tokens=65"
    config = model_config(parts, limit)
    makers: list[Callable[[ModelConfig], Any]] = [build_instructblip, parts_without_weights]
    for make in makers:
        with pytest.raises(UserError, match=f"{limit} is more than the Q-Former's 64 places; lower it"):
            make(config)
    build_instructblip(model_config(parts, limit, "model=blip2", "qformer.instruction_aware=false"))  # which reads none


@pytest.mark.slow
def test_a_run_needs_no_training_sections_and_not_what_it_started_from(parts: dict[str, str], tmp_path: Path) -> None:
    bert = Path(shutil.copytree(parts["qformer.sources.path"], tmp_path / "bert"))
    config = model_config(parts, f"qformer.sources.path={bert}", "seed=3")
    model = build(config)
    model.vision_norm.calibrate(torch.randn(2, 5, model.vision.width))  # type: ignore[operator]
    state = {"frozen": frozen_fingerprints(model), "seed": 3}
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    save_checkpoint(folder, step=9, model=model.held_state(), optimizer={}, state=state, keep=1)
    sections = ModelConfig(seed=config.seed, vision=config.vision, qformer=config.qformer, llm=config.llm)
    (tmp_path / "run/config.yaml").write_text(to_yaml(sections))
    (bert / "model.safetensors").unlink()
    run = load_run(tmp_path / "run", device="cpu")
    assert (run.step, run.config) == (9, sections)
    for name, tensor in model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], tensor), name
    (tmp_path / "run/config.yaml").write_text(to_yaml(replace(config, name="whole")))
    assert load_run(tmp_path / "run", device="cpu").config == sections
    other = replace(sections, llm=replace(config.llm, quantization="int8"))
    (tmp_path / "run/config.yaml").write_text(to_yaml(other))
    with pytest.raises(UserError, match="the frozen llm weights are not those"):
        load_run(tmp_path / "run", device="cpu")
