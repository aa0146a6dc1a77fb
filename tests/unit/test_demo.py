"""What is behind the page to try: bounds, buttons over models of every kind, heat maps, examples; no browser, no gradio."""

import base64
import importlib.util
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from instructblip.config.entry import compose_config
from instructblip.config.schema import DemoConfig, DemoLimitsConfig, ModelConfig, TrainConfig
from instructblip.config.validate import to_yaml
from instructblip.data.cards import load_card
from instructblip.demo import command
from instructblip.demo.asking import Subject
from instructblip.demo.buttons import Buttons
from instructblip.demo.command import demo
from instructblip.demo.examples import examples_of_pictures, examples_of_run, find_pictures
from instructblip.demo.heat import overlay, panels
from instructblip.demo.inputs import read_candidates, read_picture
from instructblip.errors import UserError
from instructblip.models.attention import ImageAttention
from instructblip.models.base import Model
from instructblip.weights.load import LoadedModel
from tests.kit.blip import tiny_caption, tiny_retrieval, tiny_vqa
from tests.kit.blip2 import tiny_stage1, tiny_stage2
from tests.kit.connectors import tiny_connector_model
from tests.kit.runs import World
from tests.kit.tiny import tiny_model

LIMITS = DemoLimitsConfig(bytes=50_000, pixels=10_000, characters=40, candidates=3, new_tokens=8, beams=3)
PROMPT = "what color is the shape?"
MODELS: dict[str, tuple[Callable[[], Model], set[str], str]] = {
    "instructblip": (tiny_model, {"generate", "rank", "attention"}, "must"),
    "blip2": (tiny_stage2, {"generate", "rank", "attention"}, "may"),
    "blip2_stage1": (tiny_stage1, {"generate", "attention", "match"}, "none"),
    "mlp": (lambda: tiny_connector_model("mlp"), {"generate", "rank"}, "may"),
    "blip_caption": (tiny_caption, {"generate"}, "may"),
    "blip_vqa": (tiny_vqa, {"generate", "rank"}, "must"),
    "blip_retrieval": (tiny_retrieval, {"match"}, "none"),
}


def subject(model: Model, label: str = "run") -> Subject:
    return Subject(LoadedModel(model.eval(), label, "nowhere", 0, None, {}), label)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    generator = np.random.default_rng(0)
    path = tmp_path / "picture.png"
    Image.fromarray(generator.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_offered_what_it_can_do_and_answers_as_it_does_elsewhere(name: str, picture: str) -> None:
    make, abilities, prompting = MODELS[name]
    model: Any = make()
    asked = subject(model)
    assert (asked.abilities, asked.prompting) == (abilities, prompting)
    buttons, image = Buttons([asked], LIMITS), Image.open(picture)
    prompts = [] if prompting == "none" else [[PROMPT]]
    if "generate" in abilities:
        for beams in (1, 3):
            *_, (wrong, text) = buttons.answer(picture, PROMPT, beams, 8)
            assert wrong == ""
            assert [text] == model.generate([image], *prompts, num_beams=beams, max_new_tokens=8, min_new_tokens=1)
    if "rank" in abilities:
        wrong, bars = buttons.rank(picture, PROMPT, "red\n blue \n\nred\n<b>", "sum")
        assert wrong == ""
        (scores,) = model.rank([image], [PROMPT], [["red", "blue", "<b>"]])
        rows = re.findall(r"<td>(\S+)</td>.*?([\d.]+)%.*?<td>(-[\d.]+)</td>", bars, flags=re.DOTALL)
        expected = sorted(zip(scores.tolist(), scores.softmax(0).tolist(), ("red", "blue", "&lt;b&gt;"), strict=True))
        assert rows == [(text, f"{100 * share:.1f}", f"{score:.2f}") for score, share, text in reversed(expected)]
    if "match" in abilities:
        wrong, found = buttons.match(picture, "a dog")
        itm, itc = (float(model.match([image], ["a dog"], head=head)) for head in ("itm", "itc"))
        assert wrong == ""
        assert f"{100 * itm:.1f}%" in found
        assert f"{itc:.3f}" in found
    if "attention" in abilities:
        wrong, found = buttons.look(picture, PROMPT, 0)
        assert wrong == ""
        assert re.findall(r'alt="([^"]+)"', found) == ["mean of 2 layers", "layer 0", "layer 2"]
    for ability in {"generate", "rank", "attention", "match"} - abilities:
        assert re.search(r"has no (head|language model|Q-Former)", buttons.lack(asked, ability))  # type: ignore[arg-type]
        assert buttons.able(ability) == []  # type: ignore[arg-type]
    assert "never trained" not in buttons.header()


def test_an_answer_grows_and_who_leaves_ends_it(picture: str) -> None:
    asked = subject(tiny_model())
    texts = [text for _, text in Buttons([asked], LIMITS).answer(picture, PROMPT, 1, 8)]
    assert len(set(texts)) > 2
    writing = asked.written(read_picture(picture, LIMITS), PROMPT, num_beams=1, max_new_tokens=8)
    next(writing)
    writing.close()  # type: ignore[attr-defined]
    assert asked._lock.acquire(timeout=30)


@pytest.mark.parametrize(("beams", "followed"), [(1, True), (3, False)])
def test_an_answer_is_written_as_the_visitor_says(
    beams: int, followed: bool, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = tiny_stage1(), list[dict[str, Any]]()  # which by itself writes nine tokens at least
    monkeypatch.setattr(model, "generate", lambda images, **options: asked.append(options) or ["a"])
    list(subject(model).written(read_picture(picture, LIMITS), PROMPT, num_beams=beams, max_new_tokens=5))
    assert ("on_text" in asked[0]) == followed
    asked[0].pop("on_text", None)
    assert asked == [{"num_beams": beams, "max_new_tokens": 5, "min_new_tokens": 1}]


def test_a_picture_is_encoded_once(picture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_model(), []
    encode = model.vision.forward
    monkeypatch.setattr(model.vision, "forward", lambda images: calls.append(1) or encode(images))
    buttons = Buttons([subject(model)], LIMITS)
    for _ in range(2):
        list(buttons.answer(picture, PROMPT, 1, 3))
        buttons.rank(picture, PROMPT, "red\nblue", "mean")
        buttons.look(picture, PROMPT, 2)
    assert len(calls) == 1


@pytest.mark.slow
def test_two_checkpoints_answer_side_by_side_and_one_says_what_it_lacks(picture: str) -> None:
    models = tiny_model(1), tiny_stage2(), tiny_retrieval()
    buttons = Buttons([subject(model, name) for model, name in zip(models, "abc", strict=True)], LIMITS)
    image = Image.open(picture)
    *_, (wrong, *texts) = buttons.answer(picture, PROMPT, 1, 8)
    expected = [model.generate([image], [PROMPT], max_new_tokens=8)[0] for model in models[:2]]
    assert (wrong, texts) == ("", expected)
    # Without a prompt one of them captions.
    *_, (wrong, first, second) = buttons.answer(picture, "", 1, 8)
    assert "a: it reads a prompt, and there is none; write one" in wrong
    assert (first, [second]) == ("", models[1].generate([image], max_new_tokens=8))
    assert buttons.lack(buttons.subjects[2], "generate").count("has no head to generate text with") == 1


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"path": None}, "there is no picture yet"),
        ({"prompt": " "}, "there is no prompt yet; write one"),
        ({"prompt": "a" * 41}, "the prompt has 41 characters, and the page takes 40; shorten it"),
        ({"num_beams": 4}, "the number of beams is 4; give a whole number from 1 to 3"),
        ({"max_new_tokens": 2.5}, "the number of tokens is 2.5; give a whole number from 1 to 8"),
        ({"max_new_tokens": float("nan")}, "the number of tokens is nan; give a whole number from 1 to 8"),
        ({"num_beams": float("-inf")}, "the number of beams is -inf; give a whole number from 1 to 3"),
        ({"prompt": "\ud800"}, "run: prompts[0] is no text"),
    ],
)
def test_a_wrong_request_is_one_line(given: dict[str, Any], line: str, picture: str) -> None:
    request = {"path": picture, "prompt": PROMPT, "num_beams": 1, "max_new_tokens": 3} | given
    *_, (wrong, text) = Buttons([subject(tiny_model())], LIMITS).answer(**request)
    assert line in wrong
    assert wrong.count("<p") == 1
    assert text == ""


def test_candidates_and_queries_have_bounds(picture: str) -> None:
    buttons = Buttons([subject(tiny_model())], LIMITS)
    assert "write at least two, one a line" in buttons.rank(picture, PROMPT, "red\nred\n", "sum")[0]
    assert "there are 4 candidates, and the page takes 3" in buttons.rank(picture, PROMPT, "a\nb\nc\nd", "sum")[0]
    assert "by the sum or the mean" in buttons.rank(picture, PROMPT, "a\nb", "max")[0]
    assert "the query is 5; give a whole number from 1 to 4" in buttons.look(picture, PROMPT, 5)[0]
    with pytest.raises(UserError, match="the candidate has 41 characters"):
        read_candidates("a\n" + "b" * 41, LIMITS)


def test_pictures_are_bounded_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (101, 100)).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "heavy.png").write_bytes(b"\0" * 50_001)
    monkeypatch.setattr("instructblip.demo.inputs.decode_image", lambda *_: pytest.fail("it was decoded"))
    for name, line in {
        "wide": "the picture has 101 x 100 pixels, and the page takes 0.01 million; give a smaller one",
        "text": r"the image you gave cannot be decoded \(not an image\); give a PNG, JPEG or WebP file",
        "heavy": "the picture's file has 0.1 MB, and the page takes 0.05 MB; give a smaller one",
    }.items():
        with pytest.raises(UserError, match=f"^{line}$"):
            read_picture(str(tmp_path / f"{name}.png"), LIMITS)


def test_a_full_memory_is_one_line(picture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    for call in ("generate", "rank"):
        monkeypatch.setattr(model, call, fail)
    buttons = Buttons([subject(model)], LIMITS)
    assert "memory is full" in buttons.rank(picture, PROMPT, "a\nb", "sum")[0]
    assert "memory is full" in list(buttons.answer(picture, PROMPT, 1, 3))[-1][0]


def test_a_defect_is_no_visitors_mistake(picture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(model, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(Buttons([subject(model)], LIMITS).answer(picture, PROMPT, 1, 3))


# --- heat maps -------------------------------------------------------------------------------------------------------


def test_the_brightest_place_lies_over_the_patch_that_is_looked_at() -> None:
    weights = torch.full((1, 1, 2, 3, 17), 0.16 / 15)
    weights[..., 0] = 0.2  # [CLS]
    weights[0, 0, :, 1, 1 + 2 * 4 + 3] = 0.64  # query 2 looks at row 2, column 3
    attention = ImageAttention({0: weights, 2: weights.flip(-1)}, prefix=1, grid=(4, 4))
    image = Image.new("RGB", (80, 40), (128, 128, 128))
    mean, first, second = panels(image, attention, 2)
    assert [panel.title for panel in (mean, first, second)] == ["mean of 2 layers", "layer 0", "layer 2"]
    assert first.note == "brightest patch 10.9 x even, 20% on no patch"
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(first.data.partition(",")[2]))), dtype=float).sum(axis=-1)
    assert drawn.shape == (40, 80)
    row, column = np.unravel_index(drawn.argmax(), drawn.shape)
    assert (int(row) // 10, int(column) // 20) == (2, 3)
    with pytest.raises(UserError, match="there is no query 4; the model has 3"):
        panels(image, attention, 4)


def test_an_even_gaze_is_dark_everywhere() -> None:
    image = Image.new("RGB", (40, 40), (128, 128, 128))
    even = np.asarray(overlay(image, np.ones((4, 4), dtype=np.float32)), dtype=float)
    goal = np.ones((4, 4), dtype=np.float32)
    goal[1, 1] = 10
    assert np.ptp(even) < 100
    assert np.asarray(overlay(image, goal), dtype=float).max() > even.max() + 50


# --- examples and the command ----------------------------------------------------------------------------------------


def loaded_run(folder: Path, stored: str) -> LoadedModel:
    (folder / "run/checkpoints/step_00000001").mkdir(parents=True)
    (folder / "run/config.yaml").write_text(stored, encoding="utf-8")
    config: Any = object()
    return LoadedModel(tiny_model(), "run", str(folder / "run/checkpoints/step_00000001"), 1, config, {})


@pytest.fixture(scope="module")
def trained(world: World) -> TrainConfig:
    """A run's configuration."""
    return compose_config("train", TrainConfig, list(world.train))


def test_examples_are_what_the_run_was_scored_on(trained: TrainConfig, tmp_path: Path) -> None:
    found = examples_of_run(loaded_run(tmp_path, to_yaml(trained)), tmp_path)
    assert len(found) == 6
    assert {example.picture.parent for example in found} == {tmp_path}
    statements = load_card("easy_vqa_statements").evaluation
    assert statements is not None
    texts = {text for texts in statements.verbalizers.values() for text in texts}
    assert [set(example.candidates) == texts for example in found] == [False, False, False, True, False, False]
    assert all(len(example.candidates) > 1 and example.prompt for example in found)


def test_a_run_whose_data_are_not_at_hand_has_no_examples(trained: TrainConfig, tmp_path: Path) -> None:
    gone = replace(trained, data=replace(trained.data, shards=str(tmp_path / "none")))
    assert examples_of_run(loaded_run(tmp_path, to_yaml(gone)), tmp_path) == []
    converted = ModelConfig(seed=1, vision=trained.vision, qformer=trained.qformer, llm=trained.llm)
    assert examples_of_run(loaded_run(tmp_path / "other", to_yaml(converted)), tmp_path) == []
    broken = loaded_run(tmp_path / "third", "suite: {name: x, held_in: [./gone.yaml]}\ndata: {shards: none}\n")
    assert examples_of_run(broken, tmp_path) == []


def test_pictures_of_a_folder_are_copied_small(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/notes.txt").write_text("no picture")
    with pytest.raises(UserError, match="has no pictures in it"):
        find_pictures(tmp_path / "photos")
    for number in range(8):
        Image.new("RGB", (900, 30 + number)).save(tmp_path / f"photos/{number}.JPG")
    found = examples_of_pictures(find_pictures(tmp_path / "photos"), tmp_path)
    assert [Image.open(example.picture).size[0] for example in found] == [768] * 6
    with pytest.raises(UserError, match="is no folder"):
        find_pictures(tmp_path / "none")


def test_without_gradio_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -r requirements-demo\.txt$"):
        demo(DemoConfig(checkpoint="x"), Console(quiet=True))


def test_settings_of_a_second_checkpoint_need_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(UserError, match="name it with beside="):
        demo(DemoConfig(checkpoint="x", beside_adapter="y"), Console(quiet=True))


def test_checkpoints_of_one_name_are_told_apart() -> None:
    model = tiny_model()

    def made(name: str, step: int, adapter: str | None = None) -> LoadedModel:
        return LoadedModel(model, name, "nowhere", step, None, {}, adapter=adapter)

    labels = command._labels
    assert labels([made("a", 1), made("b", 1)]) == ["a", "b"]
    assert labels([made("a", 1), made("a", 1, "out/tuned")]) == ["a", "a with tuned"]
    assert labels([made("a", 1000), made("a", 2000)]) == ["a, step 1,000", "a, step 2,000"]
    assert labels([made("a", 0), made("a", 0)]) == ["a (1)", "a (2)"]
