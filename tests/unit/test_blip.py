"""BLIP's models as a user calls them: arguments by name, texts cut and counted as released, batches that change nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from instructblip.errors import UserError
from instructblip.models import blip as module
from instructblip.models.arguments import Decoding
from instructblip.models.blip import BLIP
from instructblip.models.pairs import similarities
from tests.kit.blip import SIDE, tiny_caption, tiny_pretrain, tiny_retrieval, tiny_text_model, tiny_vit, tiny_vqa
from tests.kit.blip2 import tiny_stage1
from tests.kit.losses import Samples
from tests.kit.tiny import noise_pictures
from tests.kit.vectors import bert_tokenizer, blip_tokenizer

TEXTS = ["a dog on the grass", "two", "a red car"]


def pictures(count: int) -> list[Image.Image]:
    return noise_pictures(count, side=SIDE, seed=3)


def test_each_model_says_what_it_can() -> None:
    can = {
        tiny_caption: ["generate"],
        tiny_vqa: ["generate", "rank"],
        tiny_retrieval: ["match", "features"],
        tiny_pretrain: ["generate", "match", "features"],
    }
    for make, calls in can.items():
        model = make()
        assert model.calls() == calls
        missing = ({"generate", "rank", "match", "features"} - set(calls)).pop()
        with pytest.raises(UserError, match=f"^{model.title} has no .*; it can {', '.join(calls)}$"):
            getattr(model, missing)(pictures(1))


def test_wrong_arguments_are_named() -> None:
    caption, vqa, retrieval, images = tiny_caption(), tiny_vqa(), tiny_retrieval(), pictures(2)
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: caption.generate(images, ["a"]), "prompts has 1 entries for 2 images"),
        (lambda: caption.generate(images, num_beams=0), "num_beams is 0"),
        (lambda: caption.generate(images, repetition_penalty=0.0), "repetition_penalty is 0"),
        (
            lambda: caption.generate(images, ["a " * 63, "a"]),
            r"prompts\[0\] has 64 tokens; the text model has 64 places",
        ),
        (lambda: vqa.generate(images, "what?"), "prompts is of type str"),
        (lambda: vqa.rank(images, TEXTS[:2], [["a"], []]), r"candidates\[1\] is empty"),
        (lambda: vqa.rank(images, TEXTS[:2], [["a"]] * 2, label_smoothing=1.0), "label_smoothing is 1.0"),
        (lambda: vqa.rank(images, TEXTS[:2], [["a"]] * 2, preselect=0), "preselect is 0"),
        (lambda: vqa.rank(images, TEXTS[:2], [[""]] * 2, include_eos=False), "candidates holds a text without tokens"),
        (lambda: retrieval.match(images, TEXTS), "texts has 3 entries for 2 images"),
        (lambda: retrieval.match(images, TEXTS[:2], head="cosine"), "head is 'cosine'"),
        (lambda: retrieval.features(), "images and texts are both missing"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="reads one picture a sample, not 2 frames"):
        caption.generate([[images[0], images[1]]])


def test_parts_that_do_not_fit_are_refused() -> None:
    tokenizer = blip_tokenizer()
    with pytest.raises(ValueError, match="a text model that writes needs a language-model head"):
        module.BLIPCaption(vision=tiny_vit(), text_decoder=tiny_text_model(tokenizer), tokenizer=tokenizer)
    decoder = tiny_text_model(tokenizer, language_model_head=True)
    with pytest.raises(ValueError, match="the prompt 'a picture of ' fills all 4 tokens of a caption"):
        module.BLIPCaption(vision=tiny_vit(), text_decoder=decoder, tokenizer=tokenizer, max_text_tokens=4)
    plain = bert_tokenizer()
    with pytest.raises(ValueError, match=r"the tokenizer has no \[ENC\], which begins"):
        module.BLIPRetrieval(vision=tiny_vit(), text_encoder=tiny_text_model(plain), tokenizer=plain)


@pytest.mark.slow
def test_prompts_of_unequal_lengths_are_continued_as_alone() -> None:
    model, images, prompts = tiny_caption(), pictures(4), ["a picture of ", "", "two dogs", "a picture of "]
    for beams in (1, 3):
        together = model.generate(images, prompts, num_beams=beams)
        alone = [
            model.generate([image], [prompt], num_beams=beams)[0] for image, prompt in zip(images, prompts, strict=True)
        ]
        assert together == alone
        assert together[0] == model.generate(images, num_beams=beams)[0]  # its own prompt is the first


@pytest.mark.parametrize("make", [tiny_caption, tiny_vqa, tiny_stage1])
@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_do_not_write(make: Callable[[], Any], damage: float) -> None:
    model, side = make(), 28 if make is tiny_stage1 else SIDE
    images = torch.zeros(2, 1, 3, side, side, dtype=torch.uint8)
    asked = ["what?", "who?"] if make is tiny_vqa else None
    writer = model.qformer if make is tiny_stage1 else model.text_decoder
    writer.lm_head.bias.data[5] = damage
    drawn: dict[str, Any] = {"do_sample": True, "num_beams": 1}
    for options in ({"num_beams": 1}, {"num_beams": 3}, drawn, {**drawn, "noise": torch.rand(2, 3)}):
        with pytest.raises(UserError, match="logits are not finite numbers"):
            model.generate(images, asked, max_new_tokens=3, min_new_tokens=0, **options)


def test_sampling_has_the_released_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Decoding] = []
    own = module.decode

    def watched(step: Any, start: Any, cache: Any, decoding: Decoding, **ends: Any) -> Any:
        asked.append(decoding)
        return own(step, start, cache, decoding, **ends)

    monkeypatch.setattr(module, "decode", watched)
    model, images = tiny_caption(), pictures(2)
    torch.manual_seed(0)
    drawn = model.generate(images, do_sample=True)
    torch.manual_seed(0)
    assert drawn == model.generate(images, do_sample=True)
    model.generate(images, do_sample=True, repetition_penalty=1.0)
    model.generate(images)
    assert [decoding.repetition_penalty for decoding in asked] == [1.1, 1.1, 1.0, 1.0]
    assert [decoding.num_beams for decoding in asked] == [1, 1, 1, 3]
    assert all(decoding.top_p == 0.9 and decoding.max_new_tokens == 16 for decoding in asked)


@pytest.mark.parametrize("make", [tiny_caption, tiny_vqa, tiny_stage1])
def test_no_text_is_longer_than_the_places_of_its_model(make: Callable[[], Any]) -> None:
    model, lengths, side = make(), list[int](), 28 if make is tiny_stage1 else SIDE
    texts = model._texts
    model._texts = lambda ids_BT: lengths.append(ids_BT.shape[1]) or texts(ids_BT)
    images = torch.zeros(1, 1, 3, side, side, dtype=torch.uint8)
    model.generate(
        images, *([TEXTS[:1]] if make is tiny_vqa else []), num_beams=1, max_new_tokens=99, min_new_tokens=99
    )
    places = model._longest_text if make is tiny_stage1 else model.text_decoder.max_text_tokens
    begun = len(model.caption_start()) if make is tiny_caption else 1
    assert lengths == [places - begun]


@pytest.mark.parametrize("make", [tiny_caption, tiny_pretrain, tiny_retrieval])
def test_long_texts_lose_their_end_but_for_its_mark(make: Callable[[], Any]) -> None:
    model: BLIP = make()
    inputs = model.prepare(Samples(torch.zeros(2, 1, 3, SIDE, SIDE, dtype=torch.uint8), ["", ""], ["dog " * 80, "dog"]))
    start = len(model.caption_start()) if hasattr(model, "caption_start") else 1
    end = model.tokenizer.sep_token_id
    assert [len(answer) for answer in inputs.answers] == [model.max_text_tokens - start, 2]
    assert all(answer[-1] == end for answer in inputs.answers)
    length = model.sample_length()
    assert [length("", text, 1) for text in ("dog " * 80, "dog")] == [model.max_text_tokens, start + 2]


@pytest.mark.parametrize("make", [tiny_caption, tiny_vqa, tiny_retrieval, tiny_stage1])
def test_a_batch_of_unequal_numbers_is_refused(make: Callable[[], Any]) -> None:
    frames = torch.zeros(2, 1, 3, SIDE, SIDE, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^2 images.* 1 \w+ do not make (pairs|samples)$"):
        make().prepare(Samples(frames, ["", ""], ["dog"]))


def test_questions_are_cut_and_answers_are_not() -> None:
    model = tiny_vqa()
    states_BTD, mask_BT = model.encode_questions(model.image_tokens(pictures(2)), ["dog " * 80, "dog"])
    assert states_BTD.shape[1] == model.max_text_tokens == 35
    assert mask_BT.sum(dim=1).tolist() == [35, 3]
    assert len(model.answer_ids(["dog " * 50])[0]) == 51
    assert model.sample_length()("dog " * 80, "dog", 1) == 35 + 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_models_that_were_cast_answer(dtype: torch.dtype) -> None:
    images = pictures(2)
    assert len(tiny_caption().to(dtype).generate(images)) == 2
    assert len(tiny_vqa().to(dtype).generate(images, TEXTS[:2])) == 2
    assert tiny_retrieval().to(dtype).match(images, TEXTS[:2]).isfinite().all()
    model = tiny_pretrain()
    full = model.match(images, TEXTS[:2], head="itc")
    torch.testing.assert_close(model.to(dtype).match(images, TEXTS[:2], head="itc").float(), full, atol=3e-2, rtol=0)


@pytest.mark.parametrize("make", [tiny_retrieval, tiny_stage1])
def test_cosines_of_models_in_half_precision_are_not_rounded_to_it(make: Callable[[], Any]) -> None:
    model = make().to(torch.bfloat16)
    found = model.match(pictures(3), TEXTS, head="itc")
    features = model.features(pictures(3), TEXTS)
    cosines_BC = similarities(features.image_projected.float(), features.text_projected.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, cosines_BC.diagonal(), atol=1e-6, rtol=0)


def test_an_evaluation_reads_how_texts_enter() -> None:
    model = tiny_vqa()
    before = model.conventions()
    model.enc_token = False
    assert model.conventions() != before
    captioner = tiny_caption()
    before = captioner.conventions()
    captioner.prompt = "a photo of "
    assert captioner.conventions() != before
