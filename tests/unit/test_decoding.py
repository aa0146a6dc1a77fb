"""Decoding over a table of next-token probabilities, where every right answer can be worked out."""

from collections import Counter
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from instructblip.models.arguments import Decoding
from instructblip.models.decoding import Step, decode, drawn_with
from instructblip.models.transformer import KeysValues, KeyValueCache

END, PAD, WORDS = 3, 0, 6


def table(seed: int = 0) -> Tensor:
    """Log-probabilities (W, W) of a token given the one before."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(WORDS, WORDS, generator=generator).log_softmax(dim=1)


def chain(log_probabilities: Tensor) -> Step:
    """A model that looks one token back, in its cache alone: wrong rows of the cache give wrong texts."""

    def step(new_RT: Tensor, cache: KeyValueCache) -> Tensor:
        seen = new_RT[:, None, :, None].float()
        keys_values = KeysValues(seen, seen)
        if cache.layers:
            keys_values = cache.layers[0].followed_by(keys_values)
        cache.layers, cache.text = [keys_values], cache.text + new_RT.shape[1]
        last_R = keys_values.keys_BHKE[:, 0, -1, 0].long()
        weight_R1 = 1 + 0.1 * keys_values.values_BHKE[:, 0, 0]  # and the first token of all
        return log_probabilities[last_R] * weight_R1

    return step


def starts(batch: int = 4) -> Tensor:
    return (torch.arange(batch) % 3 + 1)[:, None].masked_fill(torch.arange(batch)[:, None] % 3 == 2, 5)


def decoded(step: Step, start_BT: Tensor, cache: KeyValueCache | None = None, **options: Any) -> Tensor:
    return decode(step, start_BT, cache or KeyValueCache(), Decoding(**options), eos_id=END, pad_id=PAD)


def score(log_probabilities: Tensor, text: tuple[int, ...]) -> float:
    """Log-likelihood of what follows a text's first token, its end left aside in the length."""
    scaled = (log_probabilities * (1 + 0.1 * text[0])).log_softmax(dim=1)
    total = sum(float(scaled[one, other]) for one, other in pairwise(text))
    return total / (len(text) - (text[-1] == END))


def test_greedy_takes_the_likeliest_token_until_the_end() -> None:
    found = decoded(chain(table()), starts(), max_new_tokens=7)
    for row, start in zip(found.tolist(), starts()[:, 0].tolist(), strict=True):
        text = [start]
        while text[-1] != END and len(text) < 8:
            likeliest = table()[text[-1]].clone()
            if len(text) == 1:
                likeliest[END] = -torch.inf  # at least one token stands before the end
            text.append(int(likeliest.argmax()))
        assert row == (text + [PAD] * 8)[: len(row)]


def test_many_beams_find_the_best_text_of_all() -> None:
    log_probabilities = table(3)
    found = decoded(chain(log_probabilities), starts(), num_beams=200, max_new_tokens=3, min_new_tokens=0)
    for row, start in zip(found.tolist(), starts()[:, 0].tolist(), strict=True):
        texts = {
            (start, *tokens[: tokens.index(END) + 1 if END in tokens else None])
            for tokens in product(range(WORDS), repeat=3)
        }
        best = max(texts, key=lambda text: score(log_probabilities, text))
        assert row == [*best, *[PAD] * (len(row) - len(best))]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_row_does_not_depend_on_its_neighbours(beams: int) -> None:
    options = {"num_beams": beams, "max_new_tokens": 6}
    together = decoded(chain(table(1)), starts(8), **options)
    for row, start in zip(together, starts(8), strict=True):
        alone = decoded(chain(table(1)), start[None], **options)[0]
        assert row.tolist() == alone.tolist() + [PAD] * (len(row) - len(alone))


@pytest.mark.parametrize("beams", [1, 3])
def test_limits_of_length(beams: int) -> None:
    sure_end = torch.full((WORDS, WORDS), -9.0)
    sure_end[:, END], sure_end[:, 4] = 0.0, -1.0
    start = torch.tensor([[1, 2]])
    for least in range(4):
        limits = {"max_new_tokens": 6, "min_new_tokens": least}
        found = decoded(chain(sure_end), start, num_beams=beams, length_penalty=0.0, **limits)
        assert found.tolist() == [[1, 2, *[4] * least, END]]
    found = decoded(chain(sure_end), start, num_beams=beams, max_new_tokens=3, min_new_tokens=3)
    assert found.tolist() == [[1, 2, 4, 4, 4]]


def test_a_repetition_penalty_avoids_what_was_said() -> None:
    liked = torch.full((WORDS, WORDS), -5.0)
    liked[:, 4], liked[:, 5] = -1.0, -1.2
    assert decoded(chain(liked), starts(1), max_new_tokens=2).tolist() == [[1, 4, 4]]
    assert decoded(chain(liked), starts(1), max_new_tokens=2, repetition_penalty=2.0).tolist() == [[1, 4, 5]]


def test_sampling_draws_from_the_nucleus_in_its_proportions() -> None:
    torch.manual_seed(0)
    shares = torch.tensor([0.02, 0.02, 0.4, 0.01, 0.3, 0.25])

    def draw(**more: float) -> Counter[int]:
        # Token 0 begins every row, so that `chain` leaves the table as it is.
        start = torch.zeros(4000, 1, dtype=torch.long)
        step = chain(shares.log().expand(WORDS, -1))
        found = decoded(step, start, max_new_tokens=1, do_sample=True, **more)
        return Counter(found[:, 1].tolist())

    counts = draw(top_p=0.6)
    assert counts.keys() == {2, 4}
    assert counts[2] / 4000 == pytest.approx(0.4 / 0.7, abs=0.03)
    colder = draw(top_p=0.6, temperature=0.5)
    assert colder[2] / 4000 == pytest.approx(0.16 / 0.25, abs=0.03)
    assert len(draw()) == WORDS - 1  # all but the end, before which one token has to stand


@pytest.mark.parametrize("beams", [1, 3])
def test_the_cache_given_stays_as_it_is(beams: int) -> None:
    step, cache = chain(table()), KeyValueCache()
    step(starts(), cache)
    kept = cache.layers[0].keys_BHKE.clone()
    options = {"num_beams": beams, "max_new_tokens": 4}
    first = decoded(step, starts(), cache, **options)
    assert (cache.text, len(cache.layers)) == (1, 1)
    assert torch.equal(cache.layers[0].keys_BHKE, kept)
    assert torch.equal(decoded(step, starts(), cache, **options), first)


def even_noise(tokens: int, *, steps: int) -> Tensor:
    """Every combination of `steps` even numbers in [0, 1), of so many tokens in a row."""
    even = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    return torch.cartesian_prod(*[even] * tokens)


@pytest.mark.parametrize(("top_p", "temperature"), [(1.0, 1.0), (0.9, 1.0), (0.5, 1.3)])
def test_noise_falls_on_texts_in_the_proportions_of_transformers_nucleus(top_p: float, temperature: float) -> None:
    steps, log_probabilities = 60, table(4)
    noise = even_noise(2, steps=steps)
    start = torch.zeros(len(noise), 1, dtype=torch.long)  # leaves the table of `chain` as it is
    options = {"max_new_tokens": 2, "min_new_tokens": 0, "do_sample": True, "top_p": top_p, "temperature": temperature}
    found = decoded(chain(log_probabilities), start, noise=noise, **options)
    counts = Counter(map(tuple, found[:, 1:].tolist()))
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, log_probabilities))
    shares = warped.softmax(dim=1).tolist()
    expected = {(one, other): shares[0][one] * shares[one][other] for one, other in product(range(WORDS), repeat=2)}
    for text in expected:
        if text[0] == END:
            expected[text] = shares[0][END] if text[1] == PAD else 0.0
    for text, share in expected.items():
        assert counts[text] / len(noise) == pytest.approx(share, abs=2 / steps)
        assert share > 0 or not counts[text]


def test_a_row_with_noise_is_a_function_of_its_own_numbers() -> None:
    options = {"max_new_tokens": 6, "do_sample": True, "top_p": 0.9}
    noise = torch.rand(8, 9, generator=torch.Generator().manual_seed(0))  # more numbers than are needed
    torch.manual_seed(1)
    together = decoded(chain(table(1)), starts(8), noise=noise, **options)
    torch.manual_seed(2)  # of no consequence
    assert len({tuple(row) for row in together.tolist()}) > 4
    for row, start, own in zip(together, starts(8), noise, strict=True):
        alone = decoded(chain(table(1)), start[None], noise=own[None], **options)[0]
        assert row.tolist() == alone.tolist() + [PAD] * (len(row) - len(alone))


def test_the_ends_of_the_interval_fall_on_tokens_that_can_be() -> None:
    scores = torch.full((2, 5), -torch.inf)
    scores[:, 1:4] = torch.tensor([0.3, -0.2, 0.1])
    for almost_one in (1 - 2**-53, 1 - 2**-24):
        assert drawn_with(scores, torch.tensor([0.0, almost_one], dtype=torch.float64)).tolist() == [1, 3]
