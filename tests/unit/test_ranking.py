"""Ranking and generation: equal to the plain way, whatever the batch, the order and the grouping."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from instructblip.model.instructblip import InstructBLIP
from instructblip.model.ranking import build_tree
from tests.tiny import tiny_images, tiny_llm, tiny_model

PROMPTS = [
    "what color is the shape?",
    "Q: is there a red circle in the image? A:",
    "shape",
    "Based on the image, is this statement true or false? There is a teal triangle. Answer:",
    "Question: what is it? Short answer:",
    "color",
    "is a gray shape present?",
    "what is the shape in the image",
]
CANDIDATES = ["yes", "no", "red", "red circle", "red circle in the image", "blue", "triangle", "teal"]


@pytest.fixture(scope="module")
def model() -> InstructBLIP:
    return tiny_model()


@torch.no_grad()
def plain_scores(
    model: InstructBLIP, image: Tensor, prompt: str, candidates: Sequence[str], *, eos: bool, mean: bool = False
) -> Tensor:
    """One full forward a candidate through transformers' own model, with its cross-entropy."""
    visual = model.visual_prompt(model.image_tokens(image[None]), [prompt])
    text = model.llm.tokenizer(prompt)["input_ids"]
    scores = []
    for candidate in candidates:
        ids = model.llm.tokenizer(" " + candidate)["input_ids"] + [model.llm.eos_id] * eos
        embeddings = model.llm.model.get_input_embeddings()(torch.tensor([text + ids]))
        logits = model.llm.model(inputs_embeds=torch.cat([visual, embeddings], dim=1)).logits[0]
        losses = F.cross_entropy(logits[-len(ids) - 1 : -1], torch.tensor(ids), reduction="none")
        scores.append(-(losses.mean() if mean else losses.sum()))
    return torch.stack(scores)


def check(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("eos", "normalize"), list(itertools.product([True, False], ["sum", "mean"])))
def test_scores_equal_one_full_forward_a_candidate(model: InstructBLIP, eos: bool, normalize: str) -> None:
    images = tiny_images(3)
    found = model.rank(images, PROMPTS[:3], [CANDIDATES] * 3, normalize=normalize, include_eos=eos)
    assert [scores.dtype for scores in found] == [torch.float32] * 3
    check(
        found,
        [
            plain_scores(model, image, prompt, CANDIDATES, eos=eos, mean=normalize == "mean")
            for image, prompt in zip(images, PROMPTS[:3], strict=True)
        ],
    )


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_scores_do_not_depend_on_the_batch(model: InstructBLIP, batch: int) -> None:
    images = tiny_images(8)
    lists = [CANDIDATES[: 1 + row] for row in range(8)]  # lists of any length beside each other
    found = []
    for start in range(0, 8, batch):
        rows = slice(start, start + batch)
        found += model.rank(images[rows], PROMPTS[rows], lists[rows])
    expected = zip(images, PROMPTS, lists, strict=True)
    check(found, [plain_scores(model, *row, eos=True) for row in expected])


def test_scores_follow_the_candidates_in_any_order_and_grouping(model: InstructBLIP) -> None:
    image, prompt = tiny_images(1), PROMPTS[:1]
    (whole,) = model.rank(image, prompt, [CANDIDATES])
    order = torch.tensor([3, 7, 0, 4, 1, 6, 2, 5])
    (shuffled,) = model.rank(image, prompt, [[CANDIDATES[place] for place in order]])
    groups = [model.rank(image, prompt, [CANDIDATES[a:b]])[0] for a, b in ((0, 1), (1, 4), (4, 8))]
    (twice,) = model.rank(image, prompt, [["red", "red circle", "red"]])
    check([shuffled, torch.cat(groups)], [whole[order], whole])
    assert twice[0] == twice[2]


def test_a_candidate_that_begins_another_wins_only_without_its_end(model: InstructBLIP) -> None:
    image, candidates = tiny_images(1), ["red", "red circle", "red circle in the image"]
    (without,) = model.rank(image, PROMPTS[:1], [candidates], include_eos=False)
    assert without[0] > without[1] > without[2]
    (with_eos,) = model.rank(image, PROMPTS[:1], [candidates])
    assert bool((with_eos < without).all())


def test_one_candidate_of_one_token_needs_no_tree(model: InstructBLIP) -> None:
    candidate = model.llm.tokenizer.decode(model.llm.tokenizer(" shape")["input_ids"][:1]).strip()
    assert len(model.llm.target_ids(candidate, include_eos=False)) == 1
    found = model.rank(tiny_images(1), ["color"], [[candidate]], include_eos=False)
    check(found, [plain_scores(model, tiny_images(1)[0], "color", [candidate], eos=False)])


def test_scores_do_not_depend_on_how_many_vocabulary_rows_are_in_memory(
    model: InstructBLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.rank(tiny_images(2), PROMPTS[:2], [CANDIDATES] * 2)
    monkeypatch.setattr("instructblip.model.ranking._LOGIT_ROWS", 3)
    check(model.rank(tiny_images(2), PROMPTS[:2], [CANDIDATES] * 2), expected)


def test_the_image_and_the_frames_matter(model: InstructBLIP) -> None:
    (first,), (second,) = (model.rank(tiny_images(1, seed=seed), ["color"], [CANDIDATES]) for seed in (0, 1))
    assert not torch.allclose(first, second, atol=1e-3)
    clip = tiny_images(1, frames=2)
    check(model.rank(clip, ["color"], [CANDIDATES]), [plain_scores(model, clip[0], "color", CANDIDATES, eos=True)])


def test_a_tree_shares_beginnings() -> None:
    tree = build_tree([[5, 6, 7], [5, 6, 8], [5, 9], [5], [4]])
    assert tree.tokens == [5, 6]  # last tokens are only predicted
    assert (tree.parents, tree.depths) == ([-1, 0], [0, 1])
    assert tree.paths == [
        [(-1, 5), (0, 6), (1, 7)],
        [(-1, 5), (0, 6), (1, 8)],
        [(-1, 5), (0, 9)],
        [(-1, 5)],
        [(-1, 4)],
    ]


def test_equal_tokens_under_different_parents_are_different_nodes() -> None:
    tree = build_tree([[1, 3, 0], [2, 3, 0]])
    assert (tree.tokens, tree.parents, tree.depths) == ([1, 3, 2, 3], [-1, 0, -1, 2], [0, 1, 0, 1])


def test_the_prompt_runs_once_and_the_tree_once(model: InstructBLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[int, ...]] = []
    original = model.llm.hidden_states

    def counted(embeddings: Tensor, **options: Any) -> Tensor:
        passes.append(tuple(embeddings.shape[:2]))
        return original(embeddings, **options)

    monkeypatch.setattr(model.llm, "hidden_states", counted)
    model.rank(tiny_images(2), ["color", "what color"], [["red", "red circle", "red shape"]] * 2)
    tree = build_tree([model.llm.target_ids(text) for text in ("red", "red circle", "red shape")])
    assert passes == [(2, 4 + len(model.llm.prompt_ids("what color"))), (2, len(tree.tokens))]


def test_ranking_errors() -> None:
    model = tiny_model(llm=tiny_llm(answer_prefix=""))
    with pytest.raises(ValueError, match="candidate 1 has no tokens; rank it with include_eos=True"):
        model.rank(tiny_images(1), ["color"], [["red", ""]], include_eos=False)
    assert model.rank(tiny_images(1), ["color"], [["red", ""]])[0].shape == (2,)
    with pytest.raises(ValueError, match="no candidates"):
        model.rank(tiny_images(1), ["color"], [[]])
    with pytest.raises(ValueError, match="'sum' or 'mean', not 'max'"):
        model.rank(tiny_images(1), ["color"], [["red"]], normalize="max")
    with pytest.raises(ValueError, match="zip"):
        model.rank(tiny_images(2), ["color", "shape"], [["red"]])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 5.0},
        {"num_beams": 3},
        {"num_beams": 3, "length_penalty": -1.0},
        {"num_beams": 3, "repetition_penalty": 5.0},
    ],
)
def test_generation_does_not_depend_on_the_batch(model: InstructBLIP, options: dict[str, Any]) -> None:
    images = tiny_images(4)
    together = model.generate(images, PROMPTS[:4], max_new_tokens=6, **options)
    alone = [model.generate(images[i : i + 1], [PROMPTS[i]], max_new_tokens=6, **options)[0] for i in range(4)]
    assert together == alone
    assert len(set(together)) > 1


@torch.no_grad()
@pytest.mark.parametrize("penalty", [1.0, 5.0])
def test_greedy_generation_equals_a_plain_loop_and_holds_no_prompt(model: InstructBLIP, penalty: float) -> None:
    image, prompt = tiny_images(1), PROMPTS[0]
    visual = model.visual_prompt(model.image_tokens(image), [prompt])
    ids: list[int] = []
    for _ in range(12):
        text = torch.tensor([model.llm.prompt_ids(prompt) + ids])
        logits = model.llm.model(inputs_embeds=torch.cat([visual, model.llm.embeddings(text)], dim=1)).logits
        said = logits[0, -1, ids]  # the penalty is over what has been said (arXiv:1909.05858, section 4.1)
        logits[0, -1, ids] = torch.where(said > 0, said / penalty, said * penalty)
        ids.append(int(logits[0, -1].argmax()))
    assert model.llm.eos_id not in ids
    expected = model.llm.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert model.generate(image, [prompt], max_new_tokens=12, repetition_penalty=penalty) == [expected]


def generated_ids(model: InstructBLIP, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Tensor:
    """Token ids that `generate` makes for two prompts."""
    seen: list[Tensor] = []
    original = type(model.llm.tokenizer).batch_decode

    def decode(tokenizer: Any, ids: Tensor, **keywords: Any) -> list[str]:
        seen.append(ids)
        return original(tokenizer, ids, **keywords)

    monkeypatch.setattr(type(model.llm.tokenizer), "batch_decode", decode)
    model.generate(tiny_images(2), PROMPTS[:2], **options)
    return seen[0]


@pytest.mark.parametrize("beams", [1, 2])
def test_lengths_count_new_tokens_only(model: InstructBLIP, monkeypatch: pytest.MonkeyPatch, beams: int) -> None:
    ids = generated_ids(model, monkeypatch, num_beams=beams, max_new_tokens=5, min_new_tokens=5)
    assert ids.shape == (2, 5)
    assert not bool((ids == model.llm.eos_id).any())


def test_a_penalty_forbids_repetition_but_not_words_of_the_prompt(
    model: InstructBLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "repetition_penalty": 1e6}
    first = generated_ids(model, monkeypatch, max_new_tokens=1, min_new_tokens=1)[:, 0]
    penalised = generated_ids(model, monkeypatch, **options)
    assert torch.equal(penalised[:, 0], first)  # nothing has been said yet
    assert all(len(set(row.tolist())) == 8 for row in penalised)
