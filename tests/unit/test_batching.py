"""How a step's samples are cut into micro-batches: which go together, in which order, and how little of it is padding."""

import itertools
import pickle
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch

from instructblip.data.batching import (
    _PASS_TOKENS,
    Batch,
    Batching,
    Item,
    collate,
    in_order_of_draws,
    split_further,
)
from instructblip.data.records import Record, Sample
from instructblip.errors import UserError
from instructblip.models.packing import pack_rows
from tests.kit.losses import term_and_workload
from tests.kit.tiny import tiny_encoder_decoder_llm, tiny_llm, tiny_model


def words(instruction: str, target: str, frames: int) -> int:
    """A length that a test can read off: words of both texts, ten a frame."""
    return len(instruction.split()) + len(target.split()) + 10 * frames


def item(number: int, length: int, frames: int = 1) -> Item:
    """A drawn sample of `length` words in all; its pixels hold its number."""
    text = " ".join(["word"] * (length - 10 * frames - 1))
    record = Record(str(number), "question", answers=("yes",))
    sample = Sample(
        id=f"set/{number}",
        dataset="set" if frames == 1 else "clips",
        record=record,
        frames=(),
        image_location=(0, number),
        image_id=str(number),
        position=number,
        instruction=text,
        target="yes",
        template=text,
    )
    return sample, torch.full((frames, 3, 2, 2), number, dtype=torch.uint8)


def items(lengths: Sequence[int]) -> list[Item]:
    return [item(number, length) for number, length in enumerate(lengths)]


def places(batches: Sequence[Batch]) -> list[list[int]]:
    return [batch.places for batch in batches]


LENGTHS = [12, 31, 15, 30, 14, 13, 29, 28]
BUCKETED, PACKED = partial(Batching, "bucketed", length=words), partial(Batching, "packed", length=words)


def test_fixed_batches_are_cut_in_the_order_of_the_draws() -> None:
    assert places(Batching(micro_batch_size=3).split(items(LENGTHS))) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert places(Batching().split(items(LENGTHS))) == [list(range(8))]


def test_buckets_hold_samples_of_like_length_the_longest_first() -> None:
    assert places(BUCKETED(micro_batch_size=4).split(items(LENGTHS))) == [[1, 3, 6, 7], [2, 4, 5, 0]]
    assert places(BUCKETED().split(items([20, 20, 20]))) == [[0, 1, 2]]


def test_packed_batches_fill_their_budget_the_longest_first() -> None:
    assert places(PACKED(micro_batch_tokens=90).split(items(LENGTHS))) == [[1, 3, 6], [7, 2, 4, 5, 0]]
    assert places(PACKED(micro_batch_size=5).split(items(LENGTHS))) == [[1, 3, 6, 7, 2], [4, 5, 0]]
    assert places(PACKED(micro_batch_size=5, micro_batch_tokens=90).split(items(LENGTHS))) == [
        [1, 3, 6],
        [7, 2, 4, 5, 0],
    ]
    assert places(PACKED().split(items(LENGTHS))) == [[1, 3, 6, 7, 2, 4, 5, 0]]


@pytest.mark.parametrize("batching", [BUCKETED, PACKED])
def test_a_sample_beyond_the_budget_comes_alone(batching: partial[Batching]) -> None:
    assert places(batching(micro_batch_tokens=32).split(items([16, 40, 16]))) == [[1], [0, 2]]


@pytest.mark.parametrize("seed", range(6))
def test_no_other_cut_into_buckets_costs_less(seed: int) -> None:
    lengths = [int(length) for length in np.random.default_rng(seed).integers(12, 200, 8)]
    batching = BUCKETED(micro_batch_size=4, micro_batch_tokens=500)
    found = batching.split(items(lengths))
    longest_first = sorted(lengths, reverse=True)

    def cost(cut: Sequence[Sequence[int]]) -> int:
        return sum(len(part) * max(part) + _PASS_TOKENS for part in cut)

    def allowed(part: Sequence[int]) -> bool:
        return len(part) == 1 or (len(part) <= 4 and len(part) * max(part) <= 500)

    cuts = [
        [longest_first[a:b] for a, b in itertools.pairwise((0, *ends, 8))]
        for count in range(8)
        for ends in itertools.combinations(range(1, 8), count)
    ]
    assert len(cuts) == 128
    mine = [[lengths[place] for place in batch.places] for batch in found]
    assert all(allowed(part) for part in mine)
    assert cost(mine) == min(cost(cut) for cut in cuts if all(allowed(part) for part in cut))


@pytest.mark.parametrize(
    "batching",
    [
        Batching(micro_batch_size=3),
        BUCKETED(micro_batch_size=3),
        BUCKETED(micro_batch_tokens=60),
        PACKED(micro_batch_tokens=60),
    ],
)
def test_every_sample_comes_once_with_all_that_belongs_to_it(batching: Batching) -> None:
    drawn = items(LENGTHS)
    batches = batching.split(drawn)
    assert sorted(itertools.chain(*places(batches))) == list(range(8))
    assert in_order_of_draws(batches) == [sample.id for sample, _ in drawn]
    for batch in batches:
        assert batch.ids == [f"set/{place}" for place in batch.places]
        assert batch.images[:, 0, 0, 0, 0].tolist() == batch.places
        assert batch.instructions == [drawn[place][0].instruction for place in batch.places]
        assert batch.targets == ["yes"] * len(batch.places)


def test_nothing_drawn_is_no_batch() -> None:
    assert [batching.split([]) for batching in (Batching(), BUCKETED(), PACKED())] == [[], [], []]


@pytest.mark.parametrize("batching", [BUCKETED(), PACKED()])
def test_pictures_and_videos_come_apart(batching: Batching) -> None:
    drawn = [item(0, 20), item(1, 45, frames=4), item(2, 21), item(3, 47, frames=4)]
    assert places(batching.split(drawn)) == [[3, 1], [2, 0]]
    with pytest.raises(UserError, match=r"clips 4, set 1; set recipe\.phases\.NAME\.batching=bucketed or packed"):
        Batching().split(drawn)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "padded"}, "fixed, bucketed, packed, not 'padded'"),
        ({"micro_batch_tokens": 100}, "token budget needs batching bucketed or packed"),
        ({"kind": "packed"}, "packed batching needs to know how long"),
    ],
)
def test_settings_that_do_not_go_together(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Batching(**arguments)  # type: ignore[arg-type]


# --- ranks that compute in step --------------------------------------------------------------------------------------


def test_the_largest_micro_batches_are_halved_until_there_are_enough() -> None:
    batches = Batching(micro_batch_size=5).split(items(LENGTHS))
    assert places(split_further(batches, 2)) == [[0, 1, 2, 3, 4], [5, 6, 7]]
    assert places(split_further(batches, 4)) == [[0, 1], [2], [3, 4], [5, 6, 7]]
    assert places(split_further(batches, 8)) == [[place] for place in range(8)]
    assert in_order_of_draws(split_further(batches, 5)) == in_order_of_draws(batches)
    with pytest.raises(ValueError, match="8 samples do not make 9"):
        split_further(batches, 9)


def test_halves_keep_all_that_belongs_to_a_sample() -> None:
    first, second = split_further([collate(items([14, 15, 16]))], 2)
    assert (first.ids, second.ids) == (["set/0"], ["set/1", "set/2"])
    assert second.images[:, 0, 0, 0, 0].tolist() == [1, 2]
    assert (second.datasets, second.targets, second.places) == (["set", "set"], ["yes", "yes"], [1, 2])
    assert len(second.instructions[1].split()) == 5


# --- lengths ---------------------------------------------------------------------------------------------------------

PROMPTS = ["what color is the shape? Short answer:", "red", "is there a circle? " * 20]
TARGETS = ["red", "a long answer with many words", "no " * 40]


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_a_length_is_what_the_model_fills(kind: str, frames: int) -> None:
    make = tiny_llm if kind == "decoder" else tiny_encoder_decoder_llm
    model = tiny_model(llm=make(max_prompt_tokens=40, max_target_tokens=20))
    length = pickle.loads(pickle.dumps(Batching("bucketed", length=model.sample_length()))).length
    images = torch.zeros(1, frames, 3, 32, 32, dtype=torch.uint8)
    for prompt, target in zip(PROMPTS, TARGETS, strict=True):
        _, work = term_and_workload(model, images, [prompt], [target])
        assert (work.positions, work.padding) == (length(prompt, target, frames), 0)
    _, together = term_and_workload(model, images.expand(3, -1, -1, -1, -1), PROMPTS, TARGETS)
    alone = [length(prompt, target, frames) for prompt, target in zip(PROMPTS, TARGETS, strict=True)]
    assert together.positions - together.padding == sum(alone)
    assert together.padding > 0.2 * together.positions


def test_what_goes_to_a_worker_holds_no_weights() -> None:
    assert len(pickle.dumps(Batching("packed", length=tiny_model().sample_length()))) < 100_000


# --- padding on a mixture --------------------------------------------------------------------------------------------


def mixture(samples: int, seed: int) -> list[int]:
    """32 query tokens, prompts of 10 to 60, answers of 2 to 30; one in twenty is LLaVA's, with an answer of about 200."""
    random = np.random.default_rng(seed)
    answers = random.integers(2, 31, samples)
    long = random.random(samples) < 0.05
    answers[long] = random.integers(120, 257, long.sum())
    return [int(length) for length in 32 + random.integers(10, 61, samples) + answers - 1]


def padding(cuts: Sequence[Sequence[int]]) -> float:
    """Share of the places that hold nothing, in rows of these lengths, each group as long as its longest."""
    places = sum(len(rows) * max(rows) for rows in cuts)
    return 1 - sum(sum(rows) for rows in cuts) / places


def groups(batching: Batching, lengths: Sequence[int]) -> list[list[int]]:
    return [[lengths[place] for place in batch.places] for batch in batching.split(items(lengths))]


@pytest.mark.parametrize("width", [576, 2048, 4096])  # SmolLM2-135M, Flan-T5 XL, Vicuna-7B
@pytest.mark.parametrize(
    "batching", [PACKED(micro_batch_size=8), PACKED(micro_batch_size=16), PACKED(micro_batch_tokens=4096)]
)
def test_packed_rows_of_a_mixture_are_full(batching: Batching, width: int) -> None:
    steps = [groups(batching, mixture(64, seed)) for seed in range(10)]
    rows = [[sum(group[k] for k in row) for row in pack_rows(group, width=width)] for group in itertools.chain(*steps)]
    assert padding(rows) < 0.05


@pytest.mark.parametrize("batching", [BUCKETED(micro_batch_size=16), BUCKETED(micro_batch_tokens=4096)])
def test_buckets_of_a_mixture_are_full(batching: Batching) -> None:
    steps = [mixture(64, seed) for seed in range(10)]
    cuts = [group for lengths in steps for group in groups(batching, lengths)]
    assert padding(cuts) < 0.05
    fixed = [group for lengths in steps for group in groups(Batching(micro_batch_size=16), lengths)]
    assert padding(fixed) > 0.3
