"""The best of a vocabulary without scoring all of it: the same ones and the same scores as when all are scored."""

import math
import random
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from instructblip.evaluation import runner
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import LLM, LLMAbilities
from instructblip.models.pruning import best_candidates, vocabulary_of
from instructblip.models.ranking import rank_candidates
from tests.kit.tiny import tiny_encoder_decoder_llm, tiny_images, tiny_llm, tiny_model

WORDS = [
    "yes",
    "no",
    "red",
    "blue",
    "teal",
    "gray",
    "circle",
    "triangle",
    "square",
    "shape",
    "image",
    "in",
    "the",
    "color",
]


@pytest.fixture(scope="module", params=["decoder", "encoder_decoder"])
def llm(request: pytest.FixtureRequest) -> LLM:
    """Random weights, of which the output head is so large that some tokens are far likelier than others."""
    torch.manual_seed(1)
    llm = tiny_llm() if request.param == "decoder" else tiny_encoder_decoder_llm()
    with torch.no_grad():
        llm.model.get_output_embeddings().weight.mul_(8)
    return llm


def answers(llm: LLM, seed: int, count: int = 150, *, eos: bool = True) -> list[list[int]]:
    """Token sequences of one to four words; many begin alike, some are there twice, some begin others."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.choice((1, 1, 2, 2, 3, 4)))) for _ in range(count)]
    return [llm.prompt_format.target_ids(text, include_eos=eos) for text in texts]


def prompts(llm: LLM, count: int) -> list[Tensor]:
    texts = ["what color is the shape?", "is it red?", "shape", "the image in the image", "a circle is gray?"]
    return llm.embed([llm.prompt_format.prompt_ids(texts[row % 5]) for row in range(count)])


def check_best(found: Sequence[Tensor], expected: Sequence[Tensor], best: int) -> None:
    """The same `best` largest in the same places, and no other number than the right one."""
    for own, whole in zip(found, expected, strict=True):
        known = own > -math.inf
        torch.testing.assert_close(own[known], whole[known], rtol=0, atol=1e-4)
        count = min(best, len(whole))
        torch.testing.assert_close(own.topk(count).values, whole.topk(count).values, rtol=0, atol=1e-4)
        least = whole.topk(count).values[-1]
        assert bool(known[whole > least + 2e-4].all())


@pytest.mark.parametrize("normalize", ["sum", "mean"])
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("best", [1, 10, 1000])
def test_the_best_equal_those_of_the_whole_vocabulary(llm: LLM, normalize: str, eos: bool, best: int) -> None:
    lists, list_of = [answers(llm, 0, eos=eos), answers(llm, 1, 30, eos=eos)], [0, 1, 0, 0, 1, 0]
    prefixes = prompts(llm, 6)
    with torch.inference_mode():
        expected = rank_candidates(llm, prefixes, lists, list_of, normalize=normalize)
        found = best_candidates(llm, prefixes, lists, list_of, best=best, normalize=normalize)
    check_best(found, expected, best)
    if best >= 150:
        assert all(bool((scores > -math.inf).all()) for scores in found)


@pytest.mark.slow
@pytest.mark.parametrize("token_budget", [1, 40, 300])
def test_the_size_of_a_pass_changes_nothing(llm: LLM, token_budget: int) -> None:
    lists, prefixes = [answers(llm, 2)], prompts(llm, 5)
    with torch.inference_mode():
        expected = rank_candidates(llm, prefixes, lists, [0] * 5)
        found = best_candidates(llm, prefixes, lists, [0] * 5, best=5, token_budget=token_budget)
    check_best(found, expected, 5)


def test_most_of_a_vocabulary_is_left_out_where_the_model_is_sure(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run = []
    whole = type(llm).decode_tree

    def counted(self: LLM, prompts: object, tokens_BN: Tensor, *rest: Tensor) -> Tensor:
        run.append(tokens_BN.numel())
        return whole(self, prompts, tokens_BN, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(type(llm), "decode_tree", counted)
    lists, prefixes = [answers(llm, 3, 600)], prompts(llm, 1)
    with torch.inference_mode():
        rank_candidates(llm, prefixes, lists, [0])
        all_nodes = sum(run)
        run.clear()
        best_candidates(llm, prefixes, lists, [0], best=3)
    assert sum(run) < all_nodes / 3


def test_a_model_that_cannot_run_trees_scores_all(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lists, prefixes = [answers(llm, 4, 20)], prompts(llm, 2)
    with torch.inference_mode():
        expected = rank_candidates(llm, prefixes, lists, [0, 0])
        monkeypatch.setattr(llm, "abilities", LLMAbilities(tree=False))
        found = best_candidates(llm, prefixes, lists, [0, 0], best=2)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tree", [True, False])
def test_numbers_that_are_not_finite_show(llm: LLM, tree: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lists, (prefix,) = [answers(llm, 5, 20)], prompts(llm, 1)
    monkeypatch.setattr(llm, "abilities", LLMAbilities(tree=tree))
    with torch.inference_mode():
        (found,) = best_candidates(llm, [torch.full_like(prefix, torch.nan)], lists, [0], best=2)
    assert bool(found.isnan().all())


@pytest.mark.parametrize(
    ("texts", "classes", "aggregate", "best"),
    [
        ([221], (), "sum", 10),
        ([221, 221], (), "sum", 10),
        ([200], (), "sum", None),
        ([221, 50], (), "sum", None),  # what is kept of a question does not depend on its neighbour
        ([221], [str(number) for number in range(221)], "sum", 10),
        ([221], ["a", *"b" * 220], "sum", None),  # each text counts
        ([221], ["a", *"b" * 220], "max", 10),
    ],
)
def test_the_evaluation_asks_for_the_best_where_the_others_do_not_count(
    texts: list[int], classes: Sequence[str], aggregate: str, best: int | None
) -> None:
    asked: list[int | None] = []

    def rank(
        _images: Tensor, _prompts: Sequence[str], lists: Sequence[Sequence[str]], **options: object
    ) -> list[Tensor]:
        asked.append(options.get("best"))  # type: ignore[arg-type]
        return [torch.arange(len(candidates)) - 500.0 for candidates in lists]

    protocol = SimpleNamespace(
        mode="rank", preset="paper", normalize="sum", include_eos=True, classes=tuple(classes), aggregate=aggregate
    )
    task = SimpleNamespace(protocol=protocol, candidates=lambda count: [str(number) for number in range(count)])
    samples = [SimpleNamespace(prompt="x", id=str(count), record=count) for count in texts]
    batch = [(SimpleNamespace(sample=sample), torch.zeros(1, 1, 1)) for sample in samples]
    model = SimpleNamespace(PARTS={"llm"}, RELEASED_RANKING={}, rank=rank)
    found = runner._answers(model, task, batch, 8)  # type: ignore[arg-type]
    assert asked == [best]
    assert [len(scores) for _, scores, _ in found] == [count if count <= 200 else 10 for count in texts]


def test_a_vocabulary_is_a_tree_of_beginnings() -> None:
    tree = vocabulary_of([[5, 6, 7], [5], [5, 6], [8, 6], [5, 6, 7]])
    paths = []
    for end in tree.ends_C.tolist():
        path: list[int] = []
        while end >= 0:
            path.insert(0, int(tree.tokens_M[end]))
            end = int(tree.parents_M[end])
        paths.append(path)
    assert paths == [[5, 6, 7], [5], [5, 6], [8, 6], [5, 6, 7]]
    assert len(tree.tokens_M) == 5
    assert tree.longest_M.tolist() == [3, 2, 3, 0, 0]
    assert bool((tree.parents_M < torch.arange(5)).all())


def test_rank_leaves_out_what_is_not_among_the_best() -> None:
    torch.manual_seed(0)
    model: InstructBLIP = tiny_model()
    texts = sorted({f"{a} {b}" for a in WORDS for b in WORDS})
    whole = model.rank(tiny_images(2), ["shape", "color"], [texts, texts[:40]])
    found = model.rank(tiny_images(2), ["shape", "color"], [texts, texts[:40]], best=4)
    check_best(found, whole, 4)
    with pytest.raises(ValueError, match="best"):
        model.rank(tiny_images(2), ["shape", "color"], [texts, texts[:40]], best=0)
