"""BLIP in every format: read by one call, converted with a certificate, bit-equal out and in again."""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoImageProcessor, BlipImageProcessor, BlipProcessor

import instructblip
from instructblip.config.schema import ModelConfig
from instructblip.errors import UserError
from instructblip.models.blip import BLIP, BLIPVQA, BLIPRetrieval, Momentum
from instructblip.weights import load as loading
from instructblip.weights.__main__ import main
from instructblip.weights.blip import blip_checkpoint, save_blip
from instructblip.weights.heads import check_heads
from instructblip.weights.init_blip import start_blip_from
from instructblip.weights.init_sources import find_start, read_start
from instructblip.weights.lavis import model_state
from instructblip.weights.load import find_source, load_model
from instructblip.weights.names import foreign_names
from instructblip.weights.native import blip_parts_config, save_blip_parts, save_native
from instructblip.weights.parts import build_model
from instructblip.weights.transformers_blip import load_blip_folder
from instructblip.weights.transformers_settings import image_statistics
from tests.kit.blip import (
    CLASSES,
    SIDE,
    tiny_caption,
    tiny_pretrain,
    tiny_retrieval,
    tiny_text_model,
    tiny_vit,
    tiny_vqa,
    write_blip,
)
from tests.kit.blip_training import momentum_of
from tests.kit.parity import write_configs
from tests.kit.vectors import blip_tokenizer, tensors

TINY = {"caption": tiny_caption, "vqa": tiny_vqa, "retrieval": tiny_retrieval, "pretrain": tiny_pretrain}
COPIED = {
    "decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "decoder.bias": "text_decoder.cls.predictions.bias",
}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    "said",
    [
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 61.0, 62.0]},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"size": SIDE},  # as older folders have it
        {"do_rescale": None, "do_normalize": None},
    ],
)
def test_pixels_are_those_of_the_folders_own_image_processor(said: dict[str, Any], tmp_path: Path) -> None:
    BlipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    picture = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8)
    expected = BlipImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"][0]
    found = image_statistics(tmp_path, SimpleNamespace(vision_config=SimpleNamespace(image_size=SIDE)))
    mean, std = (torch.tensor(found[name]).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close((picture.float() - mean) / std, expected.float(), atol=1e-5, rtol=1e-5)


def test_an_image_processor_that_says_nothing_of_its_statistics_is_refused(tmp_path: Path) -> None:
    settings = {"image_mean": None, "image_std": [0.2, 0.3, 0.4], "size": None, "rescale_factor": None}
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=SIDE))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="does not say how images are normalised"):
        image_statistics(tmp_path, config)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.1, 0.2, 0.3]}))
    assert image_statistics(tmp_path, config)["mean"] == pytest.approx([25.5, 51.0, 76.5])


def test_of_two_image_processors_the_one_counts_that_transformers_takes(tmp_path: Path) -> None:
    """An older folder has its own file for it, and a processor that was saved there again another."""
    size = {"height": SIDE, "width": SIDE}
    BlipProcessor(BlipImageProcessor(size=size, image_mean=[0.1, 0.2, 0.3]), blip_tokenizer()).save_pretrained(tmp_path)
    BlipImageProcessor(size=size, image_mean=[0.7, 0.8, 0.9]).save_pretrained(tmp_path)
    assert {"preprocessor_config.json", "processor_config.json"} <= {file.name for file in tmp_path.iterdir()}
    found = image_statistics(tmp_path, SimpleNamespace(vision_config=SimpleNamespace(image_size=SIDE)))
    expected = AutoImageProcessor.from_pretrained(tmp_path).image_mean
    torch.testing.assert_close(torch.tensor(found["mean"]), 255 * torch.tensor(expected))


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ({"size": {"shortest_edge": 2 * SIDE}, "do_center_crop": False}, True),
        ({"size": {"shortest_edge": SIDE}, "do_center_crop": True, "crop_size": 2 * SIDE}, True),
        ({"size": {"shortest_edge": SIDE}, "do_center_crop": True, "crop_size": SIDE}, False),
    ],
)
def test_a_shorter_side_is_compared_with_the_towers_size(said: dict[str, Any], refused: bool, tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=SIDE))
    file.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.2] * 3, **said}))
    expected = (
        pytest.raises(UserError, match=r"gives images of .*, the vision part takes") if refused else nullcontext()
    )
    with expected:
        image_statistics(tmp_path, config)


def test_another_way_of_resizing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    BlipImageProcessor(size={"height": SIDE, "width": SIDE}, resample=2).save_pretrained(tmp_path)
    image_statistics(tmp_path, SimpleNamespace(vision_config=SimpleNamespace(image_size=SIDE)))
    assert "its image processor resizes by Pillow's filter 2, this code by the bicubic one" in caplog.text


@pytest.mark.parametrize(
    ("kind", "said", "shows"),
    [
        ("BlipImageProcessor", {"size_divisor": 32}, False),  # as released models for questions have it
        ("CLIPImageProcessor", {"do_center_crop": True, "crop_size": SIDE}, False),
        ("LlavaImageProcessor", {}, True),
        ("BlipImageProcessor", {"pad_size": {"height": 2 * SIDE, "width": 2 * SIDE}}, True),
    ],
)
def test_padding_is_said_where_it_shows(
    kind: str, said: dict[str, Any], shows: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size = {"height": SIDE, "width": SIDE}
    settings = {
        "image_processor_type": kind,
        "size": size,
        "do_pad": True,
        "image_mean": [0.1] * 3,
        "image_std": [0.2] * 3,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | said))
    image_statistics(tmp_path, SimpleNamespace(vision_config=SimpleNamespace(image_size=SIDE)))
    assert ("its image processor pads a picture" in caplog.text) == shows
    picture = torch.full((3, SIDE, 2 * SIDE), 255, dtype=torch.uint8)
    padded, plain = (
        AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt", do_pad=pads)["pixel_values"]
        for pads in (True, False)
    )
    assert (padded.shape != plain.shape or not torch.equal(padded, plain)) == shows


def square_vqa() -> BLIPVQA:
    """One width throughout, as transformers' class for questions wants it."""
    torch.manual_seed(0)
    tokenizer, width = blip_tokenizer(), tiny_vit().width
    model = BLIPVQA(
        vision=tiny_vit(),
        text_encoder=tiny_text_model(tokenizer, width=width),
        text_decoder=tiny_text_model(tokenizer, width=width, language_model_head=True),
        tokenizer=tokenizer,
    )
    return model.eval()


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of `load` that build the released files' parts in small: a configs/ of tiny ones, and a BERT folder."""
    config = _config_of(tiny_caption(), tmp_path / "parts")
    assert config.text is not None
    sections = {
        "vision/vit_b16": dataclasses.replace(config.vision, name="vit_b16", init="file", image_size=224),
        "text/blip": dataclasses.replace(config.text, name="blip", init="bert", dropout=0.1),
    }
    write_configs(tmp_path / "configs", sections)
    monkeypatch.setattr(loading, "CONFIGS", tmp_path / "configs")
    return {"qformer_path": str(tmp_path / "parts/text"), "device": "cpu"}


def _config_of(model: BLIP, folder: Path) -> ModelConfig:
    save_blip_parts(model, folder)
    return blip_parts_config(model, folder, "tiny")


# --- LAVIS -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TINY)
def test_a_file_of_lavis_is_loaded_and_goes_out_as_it_came(
    task: str, published: dict[str, Any], tmp_path: Path
) -> None:
    model = TINY[task]()
    save_blip(model, tmp_path / "model.pth")
    found = load_model(tmp_path / "model.pth", **published)
    assert found.config is not None
    assert find_source(tmp_path / "model.pth").kind == f"blip_{task}"
    assert_same(found.model.state_dict(), model.state_dict())
    assert found.model.conventions() == model.conventions()
    save_blip(found.model, tmp_path / "again.pth")
    first, again = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("model.pth", "again.pth"))
    assert_same(again, first)


@pytest.mark.parametrize(("task", "file"), [("caption", "caption"), ("vqa", "vqa"), ("pretrain", "pretrain")])
def test_lavis_own_tensors_go_through(task: str, file: str, published: dict[str, Any], tmp_path: Path) -> None:
    weights = dict(tensors(f"blip_med/{file}_weights"))
    torch.save({"model": weights, "epoch": 3, "optimizer": {}}, tmp_path / "theirs.pth")
    found = load_model(tmp_path / "theirs.pth", **published)
    assert found.model.vision.image_size == 32
    save_blip(found.model, tmp_path / "ours.pth")
    content = torch.load(tmp_path / "ours.pth", weights_only=True)["model"]
    assert_same({name: content[name] for name in weights}, weights)
    added = content.keys() - weights.keys()
    if task != "pretrain":
        assert added and all(
            "position_ids" in name or name.startswith("text_decoder.cls.predictions.decoder") for name in added
        )
        return
    copies = {name for name in added if name.startswith("text_decoder.bert.") and "position_ids" not in name}
    assert copies and not any(".attention." in name for name in copies)
    for name in copies:
        assert torch.equal(content[name], weights[name.replace("text_decoder.bert.", "text_encoder.")]), name
    for ending, name in COPIED.items():
        assert torch.equal(content[f"text_decoder.cls.predictions.{ending}"], content[name])


def test_blips_own_repository_calls_the_pointer_otherwise(published: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_retrieval(queue_size=6)
    assert isinstance(model.momentum, Momentum)
    model.momentum.pointer.fill_(4)
    model.momentum.image_id_queue.copy_(torch.arange(6)[None])
    save_blip(model, tmp_path / "model.pth")
    state = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    state["ptr_queue"] = state.pop("queue_ptr")
    state["temp"] = state["temp"].view(1)
    torch.save({"model": state}, tmp_path / "theirs.pth")
    assert_same(load_model(tmp_path / "theirs.pth", **published).model.state_dict(), model.state_dict())


def test_momentum_is_dropped_where_nothing_trains_with_it(
    published: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_caption()
    save_blip(model, tmp_path / "model.pth")
    state = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    extra = {"visual_encoder_m.cls_token": torch.zeros(1), "image_queue": torch.zeros(4, 4), "temp": torch.ones(())}
    torch.save({"model": state | extra}, tmp_path / "theirs.pth")
    with caplog.at_level(logging.INFO, logger="instructblip.weights.blip"):
        found = load_model(tmp_path / "theirs.pth", **published)
    assert "passed over 3 tensors of momentum and contrast: visual_encoder_m.cls_token" in caplog.text
    assert_same(found.model.state_dict(), model.state_dict())


@pytest.mark.parametrize("lacks", [r"_m\.", r"_queue$|^queue_ptr$"], ids=["copies", "queue"])
def test_a_file_with_half_of_momentum_is_loaded_without_it(
    lacks: str, published: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_retrieval(queue_size=8)
    save_blip(model, tmp_path / "model.pth")
    state = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    kept = {name: tensor for name, tensor in state.items() if not re.search(lacks, name)}
    torch.save({"model": kept}, tmp_path / "theirs.pth")
    found = load_model(tmp_path / "theirs.pth", **published).model
    assert isinstance(found, BLIPRetrieval) and found.queue_size is None
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("momentum.")}
    assert_same(found.state_dict(), own)


@pytest.mark.slow
def test_what_is_no_blip_is_refused_in_one_line(published: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_pretrain()
    save_blip(model, tmp_path / "model.pth")
    whole = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    shared = "text_decoder.bert.encoder.layer.0.intermediate.dense.bias"
    cases = {
        "it is BLIP for NLVR2": whole | {"text_encoder.encoder.layer.0.crossattention.self0.query.bias": torch.ones(1)},
        f"{shared} differs from text_encoder": whole | {shared: whole[shared] + 1},
        "lacks the tensor visual_encoder.cls_token": {
            n: t for n, t in whole.items() if n != "visual_encoder.cls_token"
        },
        "lacks the tensor itm_head.bias": {n: t for n, t in whole.items() if n != "itm_head.bias"},
        "has the unknown tensor text_encoder.pooler": whole | {"text_encoder.pooler": torch.ones(1)},
    }
    for message, state in cases.items():
        torch.save({"model": state}, tmp_path / "wrong.pth")
        with pytest.raises(UserError, match=message) as caught:
            load_model(tmp_path / "wrong.pth", **published)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="BLIP, which has no language model of its own; leave llm= out"):
        find_source(tmp_path / "model.pth", "opt_2_7b")


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("tokens", [False, True], ids=["as_published", "with_tokens"])
def test_a_published_folder_goes_out_as_it_came(task: str, tokens: bool, tmp_path: Path) -> None:
    theirs = write_blip(tmp_path / "theirs", task, tokens=tokens)
    model = instructblip.load(tmp_path / "theirs", device="cpu")
    model.save_huggingface(tmp_path / "again")
    again, info = CLASSES[task].from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(again.state_dict(), theirs.state_dict())
    assert again.config.text_config.num_attention_heads == 4
    assert again.config.vision_config.layer_norm_eps == 1e-5
    assert_same(load_blip_folder(tmp_path / "again").state_dict(), model.state_dict())
    assert find_source(tmp_path / "again").kind == f"blip_{task}"


@pytest.mark.parametrize("task", CLASSES)
def test_lavis_and_transformers_and_back(task: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    makers = {"caption": tiny_caption, "vqa": square_vqa, "retrieval": lambda: tiny_retrieval(queue_size=6)}
    model = makers[task]()
    save_blip(model, tmp_path / "model.pth")
    model.save_huggingface(tmp_path / "folder")
    again = load_blip_folder(tmp_path / "folder")
    assert_same(again.state_dict(), model.state_dict())
    assert again.conventions() == model.conventions()
    assert torch.equal(again.vision.mean, model.vision.mean)
    save_blip(again, tmp_path / "again.pth")
    first, second = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("model.pth", "again.pth"))
    assert_same(second, first)
    warned = " ".join(record.message for record in caplog.records)
    assert ("set the first of input_ids to 199" in warned) == (task != "caption")
    assert ("has no place for the temperature, momentum copies and queue" in warned) == (task == "retrieval")


def test_what_transformers_cannot_hold_is_said_in_one_line(tmp_path: Path) -> None:
    for model, message in (
        (
            tiny_vqa(),
            r"BlipForQuestionAnswering cannot hold this model: its decoder reads states as wide as the vision .*\(48\)",
        ),
        (tiny_pretrain(), "it has no class for pre-training; write --to lavis"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            model.save_huggingface(tmp_path / "folder")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "folder").exists()


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_blip(tmp_path, "caption")
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"bos_token_id": 198', '"bos_token_id": 190'))
    with pytest.raises(
        UserError, match=r"the tokenizer has \[DEC\], \[ENC\], \[SEP\] as 198, 199, 102, where .* \[DEC\] as 190"
    ):
        load_blip_folder(tmp_path)


# --- certificates ----------------------------------------------------------------------------------------------------

STAGES = {
    "caption": {"vision", "captions"},
    "vqa": {"vision", "questions", "answers"},
    "retrieval": {"vision", "text", "contrast", "matching"},
}


@pytest.mark.slow
@pytest.mark.parametrize("task", CLASSES)
def test_conversions_have_a_certificate(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_blip(tmp_path / "theirs", task, dtype=torch.float16 if task == "vqa" else torch.float32)
    for source, target, form in (
        ("theirs", "run", "native"),
        ("run", "folder", "huggingface"),
        ("run", "run.pth", "lavis"),
    ):
        assert main([str(tmp_path / source), str(tmp_path / target), "--to", form]) == 0
        shown = capsys.readouterr().out
        assert all(stage in shown for stage in STAGES[task]), shown
    expected = load_blip_folder(tmp_path / "theirs").state_dict()
    for found in (load_model(tmp_path / "run", device="cpu").model, load_blip_folder(tmp_path / "folder")):
        state = found.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name].to(tensor.dtype), tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_a_certificate_covers_momentum(
    published: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_blip(tiny_pretrain(), tmp_path / "model.pth")
    arguments = ["--qformer-path", published["qformer_path"]]
    for source, target, form in (("model.pth", "run", "native"), ("run", "again.pth", "lavis")):
        extra = arguments if source == "model.pth" else []
        assert main([str(tmp_path / source), str(tmp_path / target), "--to", form, *extra]) == 0
        shown = capsys.readouterr().out
        assert "momentum" in shown and "captions" in shown
    first, again = (model_state(tmp_path / name) for name in ("model.pth", "again.pth"))
    assert_same(again, first)


# --- runs and starts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TINY)
def test_a_run_is_loaded_without_files_of_its_parts(task: str, tmp_path: Path) -> None:
    model = TINY[task]()
    model.held_parts |= {"vision"}
    (tmp_path / "run").mkdir()
    config = _config_of(model, tmp_path / "parts")
    text = dataclasses.replace(config.text, init="bert")
    save_native(model, dataclasses.replace(config, text=text), tmp_path / "run")
    found = load_model(tmp_path / "run", device="cpu")
    assert_same(found.model.state_dict(), model.state_dict())
    assert found.model.conventions() == model.conventions()


def started(model: BLIP, path: Path) -> Any:
    return start_blip_from(model, [read_start(find_start(str(path)))])


def test_a_retriever_starts_from_pre_training_with_its_momentum(tmp_path: Path) -> None:
    pretrained, model = tiny_pretrain(seed=1), tiny_retrieval(seed=2, queue_size=24)
    save_blip(pretrained, tmp_path / "pretrained.pth")
    begun = started(model, tmp_path / "pretrained.pth")
    theirs = pretrained.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[name]) or name == "momentum.image_id_queue", name
    assert begun.start.new == ("image ids of the queue",)
    assert "vision" in model.held_parts
    smaller = tiny_retrieval(seed=2, queue_size=8)
    begun = started(smaller, tmp_path / "pretrained.pth")
    assert "queue" in begun.start.new and "momentum copies" not in begun.start.new


def test_a_retriever_with_momentum_starts_from_a_run_of_the_same_heads(tmp_path: Path) -> None:
    theirs, model = tiny_retrieval(seed=1, queue_size=8), tiny_retrieval(seed=2, queue_size=8)
    (tmp_path / "run").mkdir()
    config = _config_of(theirs, tmp_path / "parts")
    save_native(theirs, config, tmp_path / "run")
    weights = [read_start(find_start(str(tmp_path / "run")))]
    start_blip_from(model, weights)
    assert check_heads(model, weights, config) == []
    assert config.text is not None
    other = dataclasses.replace(config, text=dataclasses.replace(config.text, dropout=0.3))
    assert check_heads(model, weights, other) == []


def test_momentum_copies_start_as_what_they_follow(tmp_path: Path) -> None:
    theirs, model = tiny_retrieval(seed=1), tiny_retrieval(seed=2, queue_size=8)
    theirs.save_huggingface(tmp_path / "folder")
    begun = started(model, tmp_path / "folder")
    assert "momentum copies start as what they follow" in begun.lines
    assert isinstance(model.momentum, Momentum)
    for part in Momentum.COPIED:
        own, copied = getattr(theirs, part).state_dict(), getattr(model.momentum, part).state_dict()
        assert_same(copied, own)


def test_a_queue_is_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    """Else the images of a file's features would be said of features that are drawn at random."""
    theirs, model = tiny_retrieval(seed=1, queue_size=8), tiny_retrieval(seed=2, queue_size=8)
    momentum_of(theirs).enqueue(torch.randn(3, 16), torch.randn(3, 16), torch.tensor([5, 6, 7]))
    save_blip(theirs, tmp_path / "model.pth")
    state = model_state(tmp_path / "model.pth")
    torch.save({"model": state | {"text_queue": torch.zeros(8, 8)}}, tmp_path / "narrow.pth")
    before = momentum_of(model).image_queue.clone()
    begun = started(model, tmp_path / "narrow.pth")
    assert begun.start.new == ("queue", "image ids of the queue")
    assert torch.equal(momentum_of(model).image_queue, before)
    assert set(momentum_of(model).image_id_queue.flatten().tolist()) == {-100}
    assert int(momentum_of(model).pointer) == 0


def test_captioner_and_answerer_start_from_pre_training(tmp_path: Path) -> None:
    pretrained, captioner, answerer = tiny_pretrain(seed=1), tiny_caption(seed=2), tiny_vqa(seed=3)
    save_blip(pretrained, tmp_path / "pretrained.pth")
    begun = started(captioner, tmp_path / "pretrained.pth")
    assert begun.start.new == ()
    layer, theirs = captioner.text_decoder.layers[1], pretrained.text_encoder.layers[1]
    assert torch.equal(layer.self_attention.query.weight, theirs.decoder_attention.query.weight)
    assert torch.equal(layer.ffn.up.weight, theirs.ffn.up.weight)
    before = answerer.text_decoder.layers[0].cross_attention.key.weight.clone()
    begun = started(answerer, tmp_path / "pretrained.pth")
    assert begun.start.new == ("cross-attention",)  # into states of another width
    assert torch.equal(answerer.text_decoder.layers[0].cross_attention.key.weight, before)
    assert torch.equal(answerer.text_encoder.layers[1].cross_attention.key.weight, theirs.cross_attention.key.weight)


def test_a_start_at_another_image_size_resizes_positions(tmp_path: Path) -> None:
    pretrained, model = tiny_pretrain(seed=1), tiny_retrieval(seed=2, queue_size=24)
    save_blip(pretrained, tmp_path / "pretrained.pth")
    config = _config_of(model, tmp_path / "parts")
    config.vision.image_size = 64
    larger = build_model(config)
    assert isinstance(larger, BLIPRetrieval)
    started(larger, tmp_path / "pretrained.pth")
    for vision in (larger.vision, larger.momentum.vision):
        assert vision.backbone.pos_embed.shape == (1, 17, 48)
    assert torch.equal(larger.vision.backbone.pos_embed[:, 0], pretrained.vision.backbone.pos_embed[:, 0])
    assert larger.match(torch.zeros(1, 1, 3, 64, 64, dtype=torch.uint8), ["a dog"]).isfinite().all()


def test_weights_of_another_model_do_not_start_a_blip(tmp_path: Path) -> None:
    torch.save({"model": {"query_tokens": torch.zeros(1, 2, 3)}}, tmp_path / "qformer.pth")
    with pytest.raises(UserError, match="holds nothing that BLIP for captions has; give weights of BLIP"):
        started(tiny_caption(), tmp_path / "qformer.pth")
    save_blip(tiny_pretrain(), tmp_path / "pretrained.pth")
    state = model_state(tmp_path / "pretrained.pth")
    wide = {
        name: torch.cat([tensor, tensor]) if name.endswith("mlp.fc1.bias") else tensor for name, tensor in state.items()
    }
    torch.save({"model": wide}, tmp_path / "wide.pth")
    with pytest.raises(
        UserError, match=r"vision.backbone.blocks.0.mlp.fc1.bias is \(384,\), this model needs \(192,\)"
    ):
        started(tiny_caption(), tmp_path / "wide.pth")


def test_every_tensor_has_one_name() -> None:
    for make in TINY.values():
        state = make().state_dict()
        names = foreign_names(state, "lavis_blip")
        assert len(set(names.values())) == len(state)
    assert blip_checkpoint(Path("x"), dict(tensors("blip_med/vqa_weights"))).kind == "blip_vqa"
