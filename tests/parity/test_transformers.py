"""This code and transformers' own InstructBLIP, given the same weights: the same numbers, loss and text.

For language models of three families and a folder in the older form (no word of an `<image>` token) and in the newer one.
"""

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from instructblip.weights.parity import stage_differences, trace_native
from instructblip.weights.parity_transformers import trace_huggingface
from tests.kit.losses import term_of
from tests.kit.parity import FORMS, Pair, written_pair
from tests.kit.tiny import noise_pictures, tiny_huggingface

PROMPTS = ["what color is the shape?", "Question: is there a circle in the image? Short answer:"]
ANSWERS = ["a red one", "no there is a rectangle"]


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return written_pair(tiny_huggingface, tmp_path_factory.mktemp("_".join(request.param)), *request.param)


def their_inputs(pair: Pair, number: int, images: list[Image.Image], answer: list[int]) -> dict[str, Tensor]:
    """What transformers is given for one sample: `[<image> ...][prompt]`, and the answer behind it."""
    text = AutoTokenizer.from_pretrained(pair.folder / "qformer_tokenizer")(PROMPTS[number], return_tensors="pt")
    prompt = AutoTokenizer.from_pretrained(pair.folder)(PROMPTS[number])["input_ids"]
    marks = [pair.theirs.config.image_token_index] * pair.theirs.config.num_query_tokens
    assert marks[0] not in prompt
    return {
        "pixel_values": AutoImageProcessor.from_pretrained(pair.folder)(images[number], return_tensors="pt")[
            "pixel_values"
        ],
        "qformer_input_ids": text["input_ids"],
        "qformer_attention_mask": text["attention_mask"],
        "input_ids": torch.tensor([[*marks, *prompt, *answer]]),
    }


@torch.inference_mode()
def test_every_stage_and_the_logits(pair: Pair) -> None:
    found = stage_differences(trace_huggingface(pair.folder), trace_native(pair.ours))
    assert list(found) == ["vision", "qformer", "projection", "logits", "padded"]
    assert max(found.values()) < 1e-5, found


@torch.inference_mode()
def test_the_vocabularies_are_the_same(pair: Pair) -> None:
    assert trace_native(pair.ours)["logits"].shape[-1] == pair.theirs.config.text_config.vocab_size


@torch.inference_mode()
def test_loss(pair: Pair) -> None:
    images = noise_pictures(2)
    loss = term_of(pair.ours, images, PROMPTS, ANSWERS)
    for number in range(len(PROMPTS)):
        answer = pair.ours.llm.prompt_format.target_ids(ANSWERS[number])
        decoder_only = pair.theirs.config.use_decoder_only_language_model
        inputs = their_inputs(pair, number, images, answer if decoder_only else [])
        before = inputs["input_ids"].shape[1] - len(answer) if decoder_only else 0
        theirs = pair.theirs(**inputs, labels=torch.tensor([[-100] * before + answer])).loss
        torch.testing.assert_close(loss.per_sample[number] / len(answer), theirs, rtol=0, atol=1e-5)
    assert abs(loss.per_sample[0] - loss.per_sample[1]) > 0.1  # the samples differ


@torch.inference_mode()
def test_greedy_token_ids(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise_pictures(2)
    monkeypatch.setattr(pair.ours.llm, "texts", Tensor.tolist)
    ours = pair.ours.generate(images, PROMPTS, max_new_tokens=8)
    for number in range(len(PROMPTS)):
        inputs = their_inputs(pair, number, images, [])
        ids = pair.theirs.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=8)[0]
        # With token ids beside the embeddings, transformers returns the prompt too; a decoder returns its start token.
        skipped = inputs["input_ids"].shape[1] if pair.theirs.config.use_decoder_only_language_model else 1
        expected = ids[skipped:].tolist()
        assert ours[number][: len(expected)] == expected
        assert set(ours[number][len(expected) :]) <= {pair.ours.llm.prompt_format.pad_id}
    assert ours[0] != ours[1]


@torch.inference_mode()
def test_the_input_matters(pair: Pair) -> None:
    images = noise_pictures(2)
    loss = term_of(pair.ours, images, PROMPTS, ANSWERS).per_sample
    assert (term_of(pair.ours, images[::-1], PROMPTS, ANSWERS).per_sample - loss).abs().min() > 1e-3
    tokens = pair.ours.image_tokens(images)
    prompt, other = pair.ours.visual_prompt(tokens, PROMPTS), pair.ours.visual_prompt(tokens, PROMPTS[::-1])
    assert (prompt - other).abs().max() > 0.1
