"""A text is told while it is written: the same tokens as `generate` without a listener, one at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from instructblip.models.base import Model
from instructblip.models.streaming import on_ids
from tests.kit.blip import tiny_caption, tiny_vqa
from tests.kit.blip2 import tiny_stage1
from tests.kit.connectors import tiny_connector_model
from tests.kit.tiny import by_transformers, tiny_encoder_decoder_llm, tiny_images, tiny_llm, tiny_model

MODELS: dict[str, tuple[Callable[[], Model], bool]] = {  # and whether it reads a prompt
    "decoder": (lambda: tiny_model(llm=tiny_llm()), True),
    "encoder-decoder": (lambda: tiny_model(llm=tiny_encoder_decoder_llm()), True),
    "decoder, transformers": (lambda: tiny_model(llm=by_transformers(tiny_llm())), True),
    "encoder-decoder, transformers": (lambda: tiny_model(llm=by_transformers(tiny_encoder_decoder_llm())), True),
    "llava": (lambda: tiny_connector_model("mlp"), True),
    "blip2_stage1": (tiny_stage1, False),
    "blip_caption": (tiny_caption, False),
    "blip_vqa": (tiny_vqa, True),
}
SIDES = {"blip2_stage1": 28}


@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_are_those_of_generate(name: str) -> None:
    make, prompted = MODELS[name]
    model = make()
    image = tiny_images(1)[..., : SIDES.get(name, 32), : SIDES.get(name, 32)]
    given: list[Any] = [image, ["what color is the shape?"]] if prompted else [image]
    options: dict[str, Any] = {"num_beams": 1, "max_new_tokens": 6, "min_new_tokens": 1}
    plain = model.generate(*given, **options)
    told: list[str] = []
    assert model.generate(*given, **options, on_text=told.append) == plain
    assert told[-1] == plain[0].rstrip("\ufffd").rstrip()
    assert 2 <= len(told) <= 6
    # What is told on the way is what a shorter answer would be.
    for count in (1, 2):
        (shorter,) = model.generate(*given, **options | {"max_new_tokens": count})
        assert told[count - 1] == shorter.rstrip("\ufffd").rstrip()


def test_drawn_tokens_are_told_too() -> None:
    model, image = tiny_model(), tiny_images(1)
    noise = torch.rand(1, 8, generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"do_sample": True, "noise": noise, "max_new_tokens": 8}
    told: list[str] = []
    (text,) = model.generate(image, ["a?"], **options, on_text=told.append)
    assert [text] == model.generate(image, ["a?"], **options)
    assert told[-1] == text.rstrip("\ufffd").rstrip()
    assert told[-1] != model.generate(image, ["a?"], max_new_tokens=8)[0]


def test_a_listener_that_raises_ends_the_writing() -> None:
    class EnoughError(Exception):
        pass

    def listen(text: str) -> None:
        heard.append(text)
        if len(heard) == 2:
            raise EnoughError

    for make, prompts in ((tiny_model, ["a?"]), (tiny_caption, None)):
        heard: list[str] = []
        model = make()
        with pytest.raises(EnoughError):
            model.generate(tiny_images(1), prompts, num_beams=1, max_new_tokens=12, on_text=listen)
        assert len(heard) == 2
        assert model.generate(tiny_images(1), prompts, num_beams=1, max_new_tokens=3)  # and goes on to work


@pytest.mark.parametrize("name", MODELS)
def test_several_texts_or_beams_are_refused(name: str) -> None:
    make, prompted = MODELS[name]
    model, side = make(), SIDES.get(name, 32)
    for count, beams, said in ((2, 1, "not 2; give one image"), (1, 3, "num_beams=1")):
        given: list[Any] = [tiny_images(count)[..., :side, :side], *([["a?"] * count] if prompted else [])]
        with pytest.raises(ValueError, match=said):
            model.generate(*given, num_beams=beams, max_new_tokens=12, on_text=print)


def test_a_character_waits_for_all_its_bytes() -> None:
    told: list[str] = []
    listener = on_ids(told.append, lambda ids: [bytes(ids[0].tolist()).decode(errors="replace")])
    assert listener is not None
    written = list("a 東".encode())
    for count in range(1, len(written) + 1):
        listener(torch.tensor([written[:count]]))
    assert told == ["a", "a", "a", "a", "a 東"]
    assert on_ids(None, lambda ids: []) is None
