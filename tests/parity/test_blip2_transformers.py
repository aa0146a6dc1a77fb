"""BLIP-2 equals transformers' classes of it, from pixels on: matching, contrast, features; logits, loss and tokens."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    Blip2TextModelWithProjection,
    Blip2VisionModelWithProjection,
    PreTrainedModel,
)

from instructblip.models.blip2 import BLIP2
from instructblip.models.pairs import similarities
from instructblip.weights.parity import stage_differences, trace_native
from instructblip.weights.parity_transformers import trace_huggingface
from tests.kit.blip2 import tiny_stage1, write_captioner
from tests.kit.losses import term_of
from tests.kit.parity import FORMS, Pair, written_pair
from tests.kit.tiny import noise_pictures

EPS = 1e-6  # one eps serves all norms of transformers' vision part
TEXTS = ["a man riding a horse on the grass", "two dogs", "a cat."]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def model() -> BLIP2:
    return tiny_stage1(norm_eps=EPS)


@pytest.fixture(scope="module")
def retrieval(model: BLIP2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as transformers' folder."""
    folder = tmp_path_factory.mktemp("retrieval") / "out"
    model.save_huggingface(folder)
    return folder


def theirs(folder: Path, kind: type[PreTrainedModel]) -> PreTrainedModel:
    """A class of transformers with our weights; of the two halves each takes its own part of them."""
    found, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    return found.eval()


def inputs(model: BLIP2) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Pictures, their pixels as transformers takes them, token ids with their mask."""
    pictures = torch.randint(0, 256, (3, 1, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = (pictures[:, 0].float() - model.vision.mean) / model.vision.std
    ids_BT, mask_BT = model.tokenize(TEXTS)
    return pictures, pixels, {"input_ids": ids_BT, "attention_mask": mask_BT}


@torch.no_grad()
def test_retrieval_model(model: BLIP2, retrieval: Path) -> None:
    other = theirs(retrieval, Blip2ForImageTextRetrieval)
    pictures, pixels, text = inputs(model)
    matching = other(pixel_values=pixels, **text, use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(model.match(pictures, TEXTS), matching.softmax(dim=1)[:, 1], **CLOSE)
    cosines = other(pixel_values=pixels, **text, use_image_text_matching_head=False).logits_per_image
    torch.testing.assert_close(model.match(pictures, TEXTS, head="itc"), cosines.diagonal(), **CLOSE)
    features = model.features(pictures, TEXTS)
    torch.testing.assert_close(similarities(features.image_projected, features.text_projected), cosines, **CLOSE)
    assert matching.softmax(dim=1)[:, 1].std() > 1e-3  # they differ at all


@torch.no_grad()
def test_both_halves(model: BLIP2, retrieval: Path) -> None:
    pictures, pixels, text = inputs(model)
    features = model.features(pictures, TEXTS)
    images = theirs(retrieval, Blip2VisionModelWithProjection)(pixel_values=pixels).image_embeds
    torch.testing.assert_close(features.image_projected, images, **CLOSE)
    output = theirs(retrieval, Blip2TextModelWithProjection)(**text)
    torch.testing.assert_close(features.text_projected, output.text_embeds[:, 0], **CLOSE)
    real = features.text_mask.bool()
    torch.testing.assert_close(features.text[real], output.last_hidden_state[real], **CLOSE)


# --- the second stage ------------------------------------------------------------------------------------------------

PROMPTS = ["Question: what color is the shape? Answer:", "a photo of"]
ANSWERS = ["a red one", "two circles"]


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return written_pair(write_captioner, tmp_path_factory.mktemp("_".join(request.param)), *request.param)


def their_inputs(pair: Pair, number: int, prompt: str, answer: list[int]) -> dict[str, Tensor]:
    """What transformers is given for one sample: `[<image> ...][prompt]`, and the answer behind it."""
    processor, config = Blip2Processor.from_pretrained(pair.folder), pair.theirs.config
    marks = [config.image_token_index] * config.num_query_tokens
    ids = torch.tensor([[*marks, *processor.tokenizer(prompt)["input_ids"], *answer]])
    pixels = processor(images=noise_pictures(2)[number], return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "input_ids": ids}


def test_every_stage_and_the_logits(pair: Pair) -> None:
    found = stage_differences(trace_huggingface(pair.folder), trace_native(pair.ours))
    assert list(found) == ["vision", "qformer", "projection", "logits", "padded"]
    assert max(found.values()) < 1e-5, found


@torch.inference_mode()
@pytest.mark.parametrize("prompts", [PROMPTS, ["", ""]], ids=["prompt", "none"])
def test_loss(pair: Pair, prompts: list[str]) -> None:
    loss = term_of(pair.ours, noise_pictures(2), prompts, ANSWERS)  # type: ignore[arg-type]
    for number, prompt in enumerate(prompts):
        answer = pair.ours.llm.prompt_format.answer_ids(prompt, ANSWERS[number])
        decoder_only = pair.theirs.config.use_decoder_only_language_model
        inputs = their_inputs(pair, number, prompt, answer if decoder_only else [])
        before = inputs["input_ids"].shape[1] - len(answer) if decoder_only else 0
        theirs = pair.theirs(**inputs, labels=torch.tensor([[-100] * before + answer])).loss
        torch.testing.assert_close(loss.per_sample[number] / len(answer), theirs, rtol=0, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("prompts", [PROMPTS, None], ids=["prompt", "none"])
def test_token_ids(pair: Pair, prompts: list[str] | None, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair.ours.llm, "texts", Tensor.tolist)
    ours = pair.ours.generate(noise_pictures(2), prompts, max_new_tokens=8, num_beams=beams)
    decoder_only = pair.theirs.config.use_decoder_only_language_model
    for number in range(2):
        inputs = their_inputs(pair, number, (prompts or ["", ""])[number], [])
        if prompts is None and decoder_only:
            del inputs["input_ids"]  # whose default is the same: the visual tokens and BOS
        options = {"do_sample": False, "num_beams": beams, "max_new_tokens": 8}
        ids = pair.theirs.generate(**inputs, **options, eos_token_id=pair.ours.llm.prompt_format.eos_id)[0]
        # With token ids beside the embeddings, transformers returns the prompt too; a decoder returns its start token.
        skipped = (4 + 1 if prompts is None else inputs["input_ids"].shape[1]) if decoder_only else 1
        expected = ids[skipped:].tolist()
        assert list(ours[number])[: len(expected)] == expected
        assert set(list(ours[number])[len(expected) :]) <= {pair.ours.llm.prompt_format.pad_id}
    assert prompts is None or ours[0] != ours[1]  # without a prompt such random weights repeat one token
