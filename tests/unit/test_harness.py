"""What lmms-eval's requests become: texts and log-likelihoods of the model, for small stand-ins of its objects."""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from instructblip.errors import UserError
from instructblip.harness.requests import read_decoding, score_texts, write_answers
from instructblip.models.decoding import cut_at
from instructblip.models.instructblip import InstructBLIP
from tests.kit.blip import tiny_caption, tiny_vqa
from tests.kit.tiny import tiny_model

COLORS = ["red", "green", "blue", "white"]
GREEDY = {"until": ["\n\n"], "max_new_tokens": 6, "do_sample": False}


@dataclass
class Asked:
    """As much of an lmms-eval `Instance` as is read."""

    args: tuple[Any, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


def document(color: str, pictures: int = 1) -> dict[str, Any]:
    return {"images": [Image.new("RGB", (40, 30), color)] * pictures, "question": f"what is {color}?", "answer": color}


DOCUMENTS = {"colors": {"test": [document(color) for color in COLORS], "two": [document("red", 2), document("blue")]}}


def pictures_of(document: dict[str, Any]) -> list[Image.Image]:
    return document["images"]


def to_write(number: int, prompt: str, *, split: str = "test", **settings: Any) -> Asked:
    return Asked((prompt, {**GREEDY, **settings}, pictures_of, number, "colors", split))


def to_score(number: int, prompt: str, text: str | Callable[[Any], str]) -> Asked:
    return Asked((prompt, text, pictures_of, number, "colors", "test"))


@pytest.fixture(scope="module")
def model() -> InstructBLIP:
    return tiny_model()


def picture(number: int) -> list[Image.Image]:
    return DOCUMENTS["colors"]["test"][number]["images"]


def test_texts_are_those_of_the_model_alone_in_the_order_of_the_requests(model: InstructBLIP) -> None:
    prompts = ["what color is the shape?", "shape?", "is the shape red or green or blue?", "color?"]
    requests = [to_write(number, prompt) for number, prompt in enumerate(prompts)]
    alone = [
        model.generate([picture(number)], [prompt], max_new_tokens=6, min_new_tokens=0)[0]
        for number, prompt in enumerate(prompts)
    ]
    assert len(set(alone)) > 1
    for batch_size in (1, 3, 64):
        assert write_answers(model, requests, DOCUMENTS, batch_size=batch_size) == alone


def test_each_request_is_decoded_as_its_own_task_says(model: InstructBLIP) -> None:
    one, many = to_write(0, "color?", max_new_tokens=1), to_write(0, "color?", max_new_tokens=8, num_beams=3)
    expected = [
        model.generate([picture(0)], ["color?"], max_new_tokens=1, min_new_tokens=0)[0],
        model.generate([picture(0)], ["color?"], max_new_tokens=8, min_new_tokens=0, num_beams=3)[0],
    ]
    assert expected[0] != expected[1]
    assert write_answers(model, [one, many], DOCUMENTS, batch_size=8) == expected


def test_an_answer_ends_where_its_task_says(model: InstructBLIP) -> None:
    text = model.generate([picture(1)], ["shape?"], max_new_tokens=6, min_new_tokens=0)[0]
    stop = text[2:4]
    assert write_answers(model, [to_write(1, "shape?", until=stop)], DOCUMENTS, batch_size=1) == [text[:2].strip()]
    assert cut_at("a cat. ASSISTANT: a dog\n\nno", ["\n\n", "ASSISTANT:"]) == "a cat."
    assert cut_at(" a cat ", ["\n\n"]) == "a cat"


def test_several_pictures_go_to_a_model_that_reads_them(model: InstructBLIP) -> None:
    requests = [to_write(0, "color?", split="two"), to_write(1, "color?", split="two")]
    documents = DOCUMENTS["colors"]["two"]
    expected = [model.generate([one["images"]], ["color?"], max_new_tokens=6, min_new_tokens=0)[0] for one in documents]
    assert write_answers(model, requests, DOCUMENTS, batch_size=2) == expected
    with pytest.raises(UserError, match=r"colors/two/0: BLIP.* reads one picture a sample, not 2 frames"):
        write_answers(tiny_vqa(), requests, DOCUMENTS, batch_size=1)


def test_a_captioning_model_is_shown_the_picture_without_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    captioner = tiny_caption()
    expected = captioner.generate([picture(0)], max_new_tokens=6, min_new_tokens=0)
    assert write_answers(captioner, [to_write(0, "one sentence, please")], DOCUMENTS, batch_size=1) == expected
    assert "reads no prompts" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [{"do_sample": True, "temperature": 0.7}, {"temperature": 0.2}, {"do_sample": True}],
)
def test_sampling_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"wants its answers drawn .*give --gen_kwargs do_sample=False,temperature=0"):
        read_decoding({"until": ["\n\n"], **settings})


def test_settings_of_sampling_that_is_off_are_let_pass() -> None:
    found = read_decoding({"do_sample": False, "temperature": 0.7, "top_p": None, "num_beams": 1, "until": ["", "\n"]})
    assert dict(found.options) == {"max_new_tokens": 1024, "min_new_tokens": 0, "num_beams": 1}
    assert found.until == ("\n",)


def test_all_settings_of_a_task_arrive_but_those_that_say_nothing() -> None:
    said = {"num_beams": 4, "max_new_tokens": 7, "min_new_tokens": 2, "length_penalty": -1.0, "repetition_penalty": 1.5}
    assert dict(read_decoding({"do_sample": False, **said}).options) == said
    nothing = dict.fromkeys(["until", *said])
    assert read_decoding(nothing) == read_decoding({})


def test_a_mark_of_the_picture_is_no_part_of_the_prompt(model: InstructBLIP) -> None:
    marked, plain = (to_write(0, prompt) for prompt in ("<image>what color is it?", "what color is it?"))
    assert write_answers(model, [marked], DOCUMENTS, batch_size=1) == write_answers(
        model, [plain], DOCUMENTS, batch_size=1
    )


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(UserError, match=r"generation_kwargs has stop_sequences, .* it takes until, max_new_tokens"):
        read_decoding({"stop_sequences": ["."]})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_beams": 0}, "num_beams is 0; give a whole number of at least 1"),
        ({"num_beams": [1]}, r"num_beams is \[1\]; give a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9, more than"),
    ],
)
def test_a_wrong_number_of_a_task_is_not_blamed_on_its_documents(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"^generation_kwargs: {says}.*; --gen_kwargs sets another$"):
        read_decoding(settings)


def test_log_likelihoods_are_sums_over_the_tokens_of_transformers_own_forward(model: InstructBLIP) -> None:
    """And a text is greedy where each of its tokens is the likeliest there."""
    prompt = "shape?"
    texts = ["red", "bl", "a blue circle", lambda document: document["answer"]]
    requests = [to_score(0, prompt, text if callable(text) else f" {text}") for text in texts]
    found = score_texts(model, requests, DOCUMENTS, batch_size=4)
    llm, flags = model.llm, []
    for text, (score, is_greedy) in zip(["red", "bl", "a blue circle", "red"], found, strict=True):
        tokens = llm.prompt_format.target_ids(text, False)
        with torch.inference_mode():
            (prefix,) = llm.prefixes(model.visual_prompt(model.image_tokens([picture(0)]), [prompt]), [prompt])
            rows = torch.cat([prefix, *llm.embed([tokens])])[None]
            logits = llm.model(inputs_embeds=rows, use_cache=False).logits[0, len(prefix) - 1 : -1].float()
        each = logits.log_softmax(-1)[range(len(tokens)), tokens]
        assert score == pytest.approx(float(each.sum()), abs=1e-4)
        assert is_greedy == (logits.argmax(-1).tolist() == tokens)
        flags.append(is_greedy)
    assert flags == [False, True, False, False]
    assert model.generate([picture(0)], [prompt], max_new_tokens=1) == ["bl"]


def test_scores_do_not_depend_on_the_batch(model: InstructBLIP) -> None:
    requests = [
        to_score(number, f"{color} shape?", f" {text}") for number, color in enumerate(COLORS) for text in COLORS
    ]
    one, many = (score_texts(model, requests, DOCUMENTS, batch_size=size) for size in (1, 8))
    assert [flag for _, flag in one] == [flag for _, flag in many]
    assert [score for score, _ in one] == pytest.approx([score for score, _ in many], abs=1e-4)


def test_what_is_no_picture_is_named(model: InstructBLIP) -> None:
    films = {"films": {"test": [{"film": "one.mp4"}, {"film": []}]}}
    for number, message in enumerate(("films/test/0 is about a str, not a picture", "films/test/1 has no picture")):
        asked = Asked(("what?", GREEDY, lambda document: document["film"], number, "films", "test"))
        with pytest.raises(UserError, match=message):
            write_answers(model, [asked], films, batch_size=1)
    with pytest.raises(UserError, match="request 0 is not about a picture"):
        score_texts(model, [Asked(("", "red"))], films, batch_size=1)


def test_a_model_without_a_language_model_gives_no_log_likelihoods() -> None:
    with pytest.raises(UserError, match="has no language model to give log-likelihoods with"):
        score_texts(tiny_vqa(), [to_score(0, "color?", "red")], DOCUMENTS, batch_size=1)


def test_the_package_names_its_registration_to_lmms_eval() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (place,) = project["entry-points"]["lmms_eval.models"].values()
    module, name = place.split(":")
    assert callable(getattr(import_module(module), name))
