"""Generation: logits that are not finite are refused, and what changes the lengths of beams leaves no trace."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from instructblip.errors import UserError
from instructblip.models.arguments import Decoding
from instructblip.models.decoding import drawing
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import LLM
from instructblip.models.prefill import Prefill
from tests.kit.tiny import by_transformers, tiny_encoder_decoder_llm, tiny_images, tiny_llm, tiny_model

MAKERS: dict[str, Callable[[], LLM]] = {
    "decoder": tiny_llm,
    "encoder-decoder": tiny_encoder_decoder_llm,
    "decoder, transformers": lambda: by_transformers(tiny_llm()),
    "encoder-decoder, transformers": lambda: by_transformers(tiny_encoder_decoder_llm()),
}


@pytest.mark.parametrize("name", MAKERS)
def test_weights_that_are_nan_do_not_write(name: str) -> None:
    model = tiny_model(llm=MAKERS[name]())
    images = tiny_images(2)
    assert len(model.generate(images, ["a?", "b?"], max_new_tokens=3)) == 2
    with torch.no_grad():
        model.projection.weight[0, 0] = float("nan")
    drawn: dict[str, Any] = {"do_sample": True}
    for options in ({"num_beams": 1}, {"num_beams": 3}, drawn, {**drawn, "noise": torch.rand(2, 3)}):
        with pytest.raises(UserError, match="the language model's logits are not finite"):
            model.generate(images, ["a?", "b?"], max_new_tokens=3, **options)
    assert not model.llm.model._forward_hooks


@pytest.mark.parametrize("name", MAKERS)
def test_the_end_of_a_text_is_no_part_of_it(name: str) -> None:
    """Tokenizers leave out what they hold as special, which a language model's end need not be."""
    torch.manual_seed(0)
    model, images = tiny_model(llm=MAKERS[name]()), tiny_images(1)
    form, written = model.llm.prompt_format, list[list[int]]()
    read = form.tokenizer.batch_decode

    def watched(ids: Any, **options: Any) -> Any:
        written.extend(torch.as_tensor(ids).tolist())
        return read(ids, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(form.tokenizer, "batch_decode", watched)
        # Of no token twice.
        model.generate(images, ["a?"], max_new_tokens=6, min_new_tokens=6, repetition_penalty=3.0)
    (*before, last), expected = written[0], read([written[0][:-1]])[0].strip()
    assert last not in before
    generation: Any = model.llm.model.generation_config
    form.eos_id = generation.eos_token_id = last  # a word
    found = model.generate(images, ["a?"], max_new_tokens=9, min_new_tokens=0, repetition_penalty=3.0)
    assert found == [expected]
    assert model.llm.texts(torch.tensor([[*before, last, form.pad_id], [*before, before[0], before[1]]])) == [
        expected,
        read([[*before, *before[:2]]])[0].strip(),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_sampling_draws_from_all_tokens(name: str) -> None:
    """transformers' generation keeps the 50 likeliest tokens where nobody says how many."""
    model = tiny_model(llm=MAKERS[name]())
    images = tiny_images(1).expand(256, -1, -1, -1, -1)
    torch.manual_seed(0)
    options: dict[str, Any] = {"do_sample": True, "temperature": 1e4, "max_new_tokens": 1, "min_new_tokens": 1}
    assert len(set(model.generate(images, ["a?"] * 256, **options))) > 60
    (likeliest,) = model.generate(images[:1], ["a?"], max_new_tokens=1)
    torch.manual_seed(0)
    nucleus = model.generate(images, ["a?"] * 256, **options | {"top_p": 1e-6})
    assert set(nucleus) == {likeliest}


@pytest.mark.parametrize("make", [tiny_llm, tiny_encoder_decoder_llm])
def test_a_drawn_token_is_as_likely_as_the_model_says(make: Callable[[], LLM]) -> None:
    model, drawn = tiny_model(llm=make()), 512
    images, options = tiny_images(1), {"do_sample": True, "max_new_tokens": 1, "min_new_tokens": 0}
    prefix = model.llm.prefixes(model.visual_prompt(model.image_tokens(images), ["a?"]), ["a?"])[0]
    with torch.no_grad():
        probabilities = model.llm.logits(model.llm.prefill([prefix]).last_BL)[0].softmax(0)
    torch.manual_seed(0)
    found = model.llm.new_tokens(model.llm.continue_rows([prefix] * drawn, top_k=0, **options))[:, 0]
    counts = found.bincount(minlength=len(probabilities))
    expected = probabilities * drawn
    often = expected > 8
    assert ((counts[often] - expected[often]).abs() < 5 * expected[often].sqrt()).all()
    assert abs(float(counts[~often].sum() - expected[~often].sum())) < 5 * float(expected[~often].sum().sqrt() + 1)


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_llm, tiny_encoder_decoder_llm])
def test_a_text_drawn_with_noise_is_a_function_of_its_own_numbers(make: Callable[[], LLM]) -> None:
    model = tiny_model(llm=make())
    images, prompts = tiny_images(6), ["a?", "what is there in it?", "b?", "c?", "dd?", "e?"]
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 7, "top_p": 0.9, "repetition_penalty": 1.1}
    noise = torch.rand(6, 7, generator=torch.Generator().manual_seed(0))
    together = model.generate(images, prompts, noise=noise, **options)
    assert len(set(together)) == 6
    torch.manual_seed(5)  # of no consequence
    alone = [
        model.generate(images[row : row + 1], prompts[row : row + 1], noise=noise[row : row + 1], **options)
        for row in range(6)
    ]
    assert [text for texts in alone for text in texts] == together
    by_transformers(model.llm)
    for more in ({}, {"at_once": 4}):
        assert model.generate(images, prompts, noise=noise, **more, **options) == together
    model.llm.abilities = replace(model.llm.abilities, padded_prompts=False)
    assert model.generate(images, prompts, noise=noise, **options) == together


@pytest.mark.parametrize("make", [tiny_llm, tiny_encoder_decoder_llm])
def test_even_noise_draws_first_tokens_in_the_proportions_of_the_nucleus(make: Callable[[], LLM]) -> None:
    model, rows = tiny_model(llm=make()), 256
    images = tiny_images(1)
    prefix = model.llm.prefixes(model.visual_prompt(model.image_tokens(images), ["a?"]), ["a?"])[0]
    with torch.no_grad():
        logits_1V = model.llm.logits(model.llm.prefill([prefix]).last_BL)
    shares = TopPLogitsWarper(0.8)(None, TemperatureLogitsWarper(1.5)(None, logits_1V))[0].softmax(0)
    noise = ((torch.arange(rows) + 0.5) / rows)[:, None]
    processors = drawing(Decoding(noise=noise, temperature=1.5, top_p=0.8), torch.device("cpu"))
    options = {"processors": processors, "max_new_tokens": 1, "min_new_tokens": 0, "do_sample": False}
    found = model.llm.new_tokens(model.llm.continue_rows([prefix] * rows, **options))[:, 0]
    counts = found.bincount(minlength=len(shares))
    assert ((counts - shares * rows).abs() <= 1).all()
    assert counts[shares == 0].sum() == 0


def test_wrong_noise_is_named() -> None:
    model, images = tiny_model(), tiny_images(2)
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 3}
    for noise, more, line in (
        (torch.rand(2, 3), {"do_sample": False}, "noise is what sampling draws with; set do_sample=True"),
        (torch.rand(2, 2), {}, r"noise is of \(2, 2\) for 2 images and 3 new tokens"),
        (torch.rand(1, 3), {}, r"noise is of \(1, 3\)"),
        (torch.ones(2, 3), {}, r"noise holds numbers outside of \[0, 1\)"),
        ([[0.5] * 3] * 2, {}, "noise is no tensor of numbers"),
        (torch.rand(2, 3), {"num_beams": 2}, "^noise draws one text for each image: num_beams=1"),
    ):
        with pytest.raises(ValueError, match=line):
            model.generate(images, ["a", "b"], noise=noise, **options | more)


# --- as some end, others enter -----------------------------------------------------------------------------------------

QUESTIONS = [
    "a?",
    "what is there in the image of it, and what color is the shape?",
    "is it red?",
    "shape",
    "b?",
    "c c c c c?",
]


def ending_model(make: Callable[[], LLM]) -> InstructBLIP:
    """Random weights, and an end that is so likely that some texts come to it soon and others late."""
    torch.manual_seed(3)
    model = tiny_model(llm=make())
    with torch.no_grad():
        model.llm.model.get_output_embeddings().weight.mul_(6)
    logits, end = model.llm.logits, model.llm.prompt_format.eos_id

    def with_likely_end(hidden_NL: Tensor) -> Tensor:
        logits_NV = logits(hidden_NL)
        spread_N1 = logits_NV.std(dim=1, keepdim=True)
        return logits_NV + 2.4 * spread_N1 * (torch.arange(logits_NV.shape[1]) == end)

    object.__setattr__(model.llm, "logits", with_likely_end)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_llm, tiny_encoder_decoder_llm])
@pytest.mark.parametrize(("beams", "lengths"), [(1, "new_tokens"), (3, "new_tokens"), (3, "transformers_4_33")])
def test_texts_do_not_depend_on_how_many_are_worked_on_together(
    make: Callable[[], LLM], beams: int, lengths: str
) -> None:
    model = ending_model(make)
    images, prompts = tiny_images(10), [f"{QUESTIONS[row % 6]}{'x' * (row % 4)}" for row in range(10)]
    options: dict[str, Any] = {
        "num_beams": beams,
        "max_new_tokens": 9,
        "repetition_penalty": 1.2,
        "beam_lengths": lengths,
    }
    alone = [model.generate(images[row : row + 1], prompts[row : row + 1], **options)[0] for row in range(10)]
    assert len({len(text) for text in alone}) > 2
    for at_once in (None, 2, 5):
        assert model.generate(images, prompts, at_once=at_once, **options) == alone


@pytest.mark.parametrize("make", [tiny_llm, tiny_encoder_decoder_llm])
def test_drawn_texts_do_not_depend_on_it_either(make: Callable[[], LLM]) -> None:
    model, images = ending_model(make), tiny_images(12)
    noise = torch.rand(12, 9, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 9, "noise": noise}
    together = model.generate(images, QUESTIONS * 2, **options)
    assert len({len(text) for text in together}) > 2
    assert model.generate(images, QUESTIONS * 2, at_once=3, **options) == together


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_places_that_are_free_are_taken(beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = ending_model(tiny_llm), list[int]()
    whole = type(model.llm).decode_tree

    def counted(self: LLM, prompts: Prefill, *rest: Any, **named: Any) -> Any:
        rows.append(len(prompts.lengths))
        return whole(self, prompts, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model.llm), "decode_tree", counted)
    images, prompts = tiny_images(24), QUESTIONS * 4
    options: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 12}
    expected = [
        text for first in range(0, 24, 6) for text in model.generate(images[first : first + 6], prompts[:6], **options)
    ]
    in_batches = len(rows)
    rows.clear()
    assert model.generate(images, prompts, at_once=6, **options) == expected
    assert max(rows) <= 6
    assert len(rows) < 0.9 * in_batches


def test_a_wrong_number_at_once_is_named() -> None:
    with pytest.raises(ValueError, match="at_once"):
        tiny_model().generate(tiny_images(1), ["a"], at_once=0)
