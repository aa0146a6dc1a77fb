"""BLIP from its configuration: BERT's weights, the ViT's file, what is drawn from the seed."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from instructblip.config.checks import ARCHITECTURE, check_model
from instructblip.config.schema import (
    ArchitectureConfig,
    ModelConfig,
    ModelKind,
    SourcesConfig,
    TextConfig,
    VisionConfig,
)
from instructblip.errors import UserError
from instructblip.models.blip import BLIP, BLIPVQA, BLIPCaption, BLIPPretrain, BLIPRetrieval, Momentum
from instructblip.models.vision import VisionEncoder
from instructblip.weights.modules import blip_without_weights
from instructblip.weights.parts import MODELS, build_model
from tests.kit.tiny import redraw
from tests.kit.vectors import FOLDER

KINDS: dict[ModelKind, type] = {
    "blip_caption": BLIPCaption,
    "blip_vqa": BLIPVQA,
    "blip_retrieval": BLIPRetrieval,
    "blip_pretrain": BLIPPretrain,
}
WIDTH = 32
SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of transformers with its head, and the weights of a ViT."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(1)
    tokenizer = BertTokenizerFast(vocab=str(FOLDER / "blip_med/vocab.txt"))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    bert = BertForMaskedLM(config)
    redraw(bert)
    bert.save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    vision = VisionEncoder(backbone="vit_base_patch16_224", image_size=48, mean=[0.0] * 3, std=[1.0] * 3, options=SIZES)
    redraw(vision)
    save_file(vision.backbone.state_dict(), folder / "vit.safetensors")
    return folder


def configured(folder: Path, kind: ModelKind, **architecture: object) -> ModelConfig:
    return ModelConfig(
        seed=3,
        model=ArchitectureConfig(kind=kind, **architecture),  # type: ignore[arg-type]
        vision=VisionConfig(
            name="vit",
            sources=SourcesConfig(path=str(folder / "vit.safetensors")),
            backbone="vit_base_patch16_224",
            options=SIZES,  # type: ignore[arg-type]
            image_size=32,
            mean=[0.0] * 3,
            std=[1.0] * 3,
            norm="none",
            norm_eps=1e-6,
        ),
        text=TextConfig(name="bert", sources=SourcesConfig(path=str(folder / "bert")), dropout=0.0),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_from_bert_and_a_vit(kind: ModelKind, folder: Path) -> None:
    paired = {"feature_width": 8, "queue_size": 4} if kind in ("blip_retrieval", "blip_pretrain") else {}
    config = configured(folder, kind, **paired)
    model, again = build_model(config), build_model(config)
    assert type(model) is KINDS[kind] is MODELS[kind]
    assert model.trained_parts == {"vision", "text"}
    state, other = model.state_dict(), build_model(dataclasses.replace(config, seed=4)).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    drawn = {name for name, tensor in other.items() if not torch.equal(tensor, state[name])}
    drawn = {name for name in drawn if not name.startswith("momentum.")}
    assert all(".cross_attention." in name or "_projection." in name or "matching_head" in name for name in drawn)
    assert any(".cross_attention." in name for name in drawn)
    assert state["vision.backbone.pos_embed"].shape == (1, 5, 24)  # of 48 pixels in the file
    bert = BertForMaskedLM.from_pretrained(folder / "bert").state_dict()
    for name in (
        name for name in state if "decoder_attention.query.weight" in name or "self_attention.query.weight" in name
    ):
        layer = int(name.partition(".layers.")[2][0])
        assert torch.equal(state[name], bert[f"bert.encoder.layer.{layer}.attention.self.query.weight"]), name
    heads = [name for name in state if name.endswith("lm_head.dense.weight")]
    assert bool(heads) == (kind != "blip_retrieval")
    assert all(torch.equal(state[name], bert["cls.predictions.transform.dense.weight"]) for name in heads)


def test_the_momentum_copies_are_what_they_follow(folder: Path) -> None:
    model = build_model(configured(folder, "blip_pretrain", feature_width=8, queue_size=4))
    assert isinstance(model, BLIPPretrain)
    assert isinstance(model.momentum, Momentum)
    for part in Momentum.COPIED:
        theirs = getattr(model, part).state_dict()
        assert all(
            torch.equal(tensor, theirs[name]) for name, tensor in getattr(model.momentum, part).state_dict().items()
        )
    assert model.queue_size == 4
    assert not any(parameter.requires_grad for parameter in model.momentum.parameters())
    without = build_model(configured(folder, "blip_retrieval", feature_width=8))
    assert isinstance(without, BLIPRetrieval)
    assert without.queue_size is None


def test_an_answerer_reads_the_questions_states(folder: Path) -> None:
    model = build_model(configured(folder, "blip_vqa"))
    assert isinstance(model, BLIPVQA)
    assert model.text_encoder.layers[0].cross_attention.key.in_features == 24
    assert model.text_decoder.layers[0].cross_attention.key.in_features == WIDTH


def test_what_cannot_be_built_is_said_in_one_line(folder: Path) -> None:
    config = configured(folder, "blip_caption", max_text_tokens=4)
    with pytest.raises(UserError, match=r"model.prompt: the prompt 'a picture of ' fills all 4 tokens"):
        build_model(config)
    config = configured(folder, "blip_retrieval", temperature=0.9)
    with pytest.raises(UserError, match=r"model.temperature=0.9 is not between 0.001 and 0.5"):
        build_model(config)
    config = configured(folder, "blip_caption")
    assert config.text is not None
    config.text = dataclasses.replace(config.text, layers=3)
    with pytest.raises(UserError, match=r"text.layers=3: .* has 2; give 1 to that many"):
        build_model(config)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_counts_and_refuses_what_a_start_builds_and_refuses(kind: ModelKind, folder: Path) -> None:
    config = configured(folder, kind)
    assert config.text is not None
    config.text.sizes = {"hidden_size": 7}  # what a YAML states is not what the folder holds
    parts, model = blip_without_weights(config, outlined=True), build_model(config)
    planned = {
        id(p): p.numel() for part in (parts.encoder, parts.decoder, parts.heads) if part for p in part.parameters()
    }
    built = [p.numel() for name, p in model.named_parameters() if model.part_of(name) == "text" and p.ndim]
    assert sum(planned.values()) == sum(built)
    for wrong in [{"max_text_tokens": 65}] + ([{"temperature": 0.9}] if "temperature" in ARCHITECTURE[kind] else []):
        config = configured(folder, kind, **wrong)
        refusals = []
        for refuse in (build_model, blip_without_weights):
            with pytest.raises(UserError, match=next(iter(wrong))) as error:
                refuse(config)
            refusals.append(str(error.value))
        assert refusals[0] == refusals[1]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_longer_than_the_positions_are_refused_before_one_comes(kind: ModelKind, folder: Path) -> None:
    with pytest.raises(UserError, match=r"max_text_tokens=65 is more than the text model's 64 places; lower it"):
        build_model(configured(folder, kind, max_text_tokens=65))
    with pytest.raises(UserError, match="max_text_tokens=2 leaves nothing of a text beside its 2 marks; set it to 3"):
        check_model(configured(folder, kind, max_text_tokens=2))
    check_model(configured(folder, kind, max_text_tokens=3))
    model = build_model(configured(folder, kind, max_text_tokens=64))
    assert isinstance(model, BLIP)
    (ids,) = model.token_ids(["a man " * 64])
    assert len(ids) == 64 and ids[-1] == model.tokenizer.sep_token_id


def test_an_older_bert_states_no_epsilon_and_another_model_no_sizes(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "bert", tmp_path / "bert")
    file = tmp_path / "bert/config.json"
    stated = json.loads(file.read_text())
    config = configured(folder, "blip_caption")
    assert config.text is not None
    config.text.sources.path = str(tmp_path / "bert")
    file.write_text(json.dumps({key: value for key, value in stated.items() if key != "layer_norm_eps"}))
    model = build_model(config)
    assert isinstance(model, BLIPCaption)
    assert model.text_decoder.norm.eps == BertConfig().layer_norm_eps
    file.write_text(
        json.dumps({key: value for key, value in stated.items() if key != "hidden_size"})
    )  # DistilBERT: dim
    for refuse in (build_model, blip_without_weights):
        with pytest.raises(UserError, match="has no hidden_size, as every BERT has; give a BERT's"):
            refuse(config)


def test_without_files_everything_is_drawn_from_the_seed(folder: Path) -> None:
    config = configured(folder, "blip_caption")
    config.vision = dataclasses.replace(config.vision, init="scratch", sources=SourcesConfig())
    first, second = build_model(config).state_dict(), build_model(config).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_model(dataclasses.replace(config, seed=5)).state_dict()
    assert not torch.equal(
        other["vision.backbone.blocks.0.attn.qkv.weight"], first["vision.backbone.blocks.0.attn.qkv.weight"]
    )


def test_a_prompt_does_not_run_into_the_caption(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model\.prompt='a picture of' does not end in a space"):
        check_model(configured(folder, "blip_caption", prompt="a picture of"))
    check_model(configured(folder, "blip_caption", prompt=""))
