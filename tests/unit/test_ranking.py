"""Ranking and generation: equal to the plain way, whatever the batch, the order and the grouping."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    MistralForCausalLM,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3ForCausalLM,
)

from instructblip.models.facts import RANKING_PRESETS
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import DecoderLLM
from instructblip.models.ranking import CandidateTree
from tests.kit.losses import term_of
from tests.kit.tiny import EOS, tiny_encoder_decoder_llm, tiny_images, tiny_llm, tiny_llm_tokenizer, tiny_model

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


@pytest.fixture(scope="module", params=["decoder", "encoder_decoder"])
def model(request: pytest.FixtureRequest) -> InstructBLIP:
    torch.manual_seed(1)
    return tiny_model(llm=tiny_llm() if request.param == "decoder" else tiny_encoder_decoder_llm())


@pytest.fixture(scope="module")
def decoder_model() -> InstructBLIP:
    return tiny_model()


def build_tree(candidates: Sequence[Sequence[int]]) -> CandidateTree:
    tree = CandidateTree()
    assert all(tree.add(candidate) for candidate in candidates)
    return tree


@torch.no_grad()
def plain_scores(
    model: InstructBLIP, image: Tensor, prompt: str, candidates: Sequence[str], *, eos: bool, mean: bool = False
) -> Tensor:
    """One full forward a candidate through transformers' own model, with its cross-entropy."""
    visual = model.visual_prompt(model.image_tokens(image[None]), [prompt])
    text = model.llm.prompt_format.tokenizer(prompt)["input_ids"]
    encodes, embed = model.llm.model.config.is_encoder_decoder, model.llm.model.get_input_embeddings()
    scores = []
    for candidate in candidates:
        ids = model.llm.prompt_format.tokenizer(" " + candidate)["input_ids"] + [model.llm.prompt_format.eos_id] * eos
        if encodes:
            prefix = torch.cat([visual, embed(torch.tensor([[*text, model.llm.prompt_format.eos_id]]))], dim=1)
            logits = model.llm.model(inputs_embeds=prefix, labels=torch.tensor([ids])).logits[0]
        else:
            prefix = torch.cat([visual, embed(torch.tensor([text + ids]))], dim=1)
            logits = model.llm.model(inputs_embeds=prefix).logits[0, -len(ids) - 1 : -1]
        losses = F.cross_entropy(logits, torch.tensor(ids), reduction="none")
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


@pytest.mark.slow
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
    candidate = model.llm.prompt_format.tokenizer.decode(
        model.llm.prompt_format.tokenizer(" shape")["input_ids"][:1]
    ).strip()
    assert len(model.llm.prompt_format.target_ids(candidate, include_eos=False)) == 1
    found = model.rank(tiny_images(1), ["color"], [[candidate]], include_eos=False)
    check(found, [plain_scores(model, tiny_images(1)[0], "color", [candidate], eos=False)])


def test_scores_do_not_depend_on_how_many_vocabulary_rows_are_in_memory(
    model: InstructBLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.rank(tiny_images(2), PROMPTS[:2], [CANDIDATES] * 2)
    monkeypatch.setattr("instructblip.models.ranking._LOGIT_ROWS", 3)
    check(model.rank(tiny_images(2), PROMPTS[:2], [CANDIDATES] * 2), expected)


def test_the_image_and_the_frames_matter(model: InstructBLIP) -> None:
    (first,), (second,) = (model.rank(tiny_images(1, seed=seed), ["color"], [CANDIDATES]) for seed in (0, 1))
    assert not torch.allclose(first, second, atol=1e-3)
    clip = tiny_images(1, frames=2)
    check(model.rank(clip, ["color"], [CANDIDATES]), [plain_scores(model, clip[0], "color", CANDIDATES, eos=True)])


WINDOW = 6  # shorter than a prompt with its visual tokens


@pytest.mark.parametrize("family", [MistralForCausalLM, Gemma3ForCausalLM, Qwen3ForCausalLM, OPTForCausalLM])
def test_windows_and_positions_of_other_decoders_are_their_own(family: type[PreTrainedModel]) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_llm_tokenizer()
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "init_std": 0.2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "initializer_range": 0.2}
    sizes |= {"word_embed_proj_dim": 32, "ffn_dim": 64, "max_window_layers": 1, "use_sliding_window": True}
    if hasattr(family.config_class(), "sliding_window"):
        sizes["sliding_window"] = WINDOW
    config = family.config_class(vocab_size=len(tokenizer), pad_token_id=0, **sizes)
    if hasattr(config, "layer_types"):
        config.layer_types = ["full_attention", "sliding_attention"]
    model = tiny_model(
        llm=DecoderLLM(family(config).eval(), tokenizer, eos_token=EOS, pad_token=EOS, answer_prefix=" ")
    )
    images, prompts = tiny_images(3), PROMPTS[:3]
    found = model.rank(images, prompts, [CANDIDATES] * 3)
    plain = [
        plain_scores(model, image, prompt, CANDIDATES, eos=True) for image, prompt in zip(images, prompts, strict=True)
    ]
    check(found, plain)
    loss = term_of(model, images, prompts, ["red circle"] * 3)
    check([-loss.per_sample], [torch.stack([scores[CANDIDATES.index("red circle")] for scores in plain])])


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


def test_a_tree_grows_within_its_room_but_takes_a_first_candidate_of_any_length() -> None:
    tree = CandidateTree()
    assert tree.add([1, 2, 3, 4, 5, 6], room=2)
    assert tree.add([1, 2, 3, 9], room=2)  # nothing new but a last token, which is only predicted
    assert not tree.add([7, 8], room=5)
    assert (tree.tokens, len(tree.paths)) == ([1, 2, 3, 4, 5], 2)
    assert tree.add([7, 8], room=6)


@pytest.mark.parametrize("budget", [1, 20, 60, 100_000])
def test_scores_do_not_depend_on_the_token_budget(
    model: InstructBLIP, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = [CANDIDATES, CANDIDATES[:1], CANDIDATES[2:5], CANDIDATES[::-1]]
    expected = model.rank(tiny_images(4), PROMPTS[:4], lists)
    held: list[int] = []
    opened, continued = model.llm.prefill, model.llm.decode_tree

    def prefill(prefixes: Sequence[Tensor]) -> Any:
        held.append(max(map(len, prefixes)) * len(prefixes) if len(prefixes) > 1 else 0)
        return opened(prefixes)

    def decode_tree(prompts: Any, tokens: Tensor, *rest: Tensor) -> Tensor:
        held.append(tokens.numel())
        return continued(prompts, tokens, *rest)

    monkeypatch.setattr(model.llm, "prefill", prefill)
    monkeypatch.setattr(model.llm, "decode_tree", decode_tree)
    check(model.rank(tiny_images(4), PROMPTS[:4], lists, token_budget=budget), expected)
    longest = max(len(model.llm.prompt_format.target_ids(text)) for text in CANDIDATES)
    assert max(held) <= max(budget, longest)  # what cannot be cut is run alone
    assert len(held) == (2 if budget > 1000 else len(held))


def test_the_prompt_runs_once_and_the_tree_once(model: InstructBLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[str, int, int]] = []
    opened, continued = model.llm.prefill, model.llm.decode_tree

    def prefill(prefixes: Sequence[Tensor]) -> Any:
        passes.append(("prompts", len(prefixes), max(map(len, prefixes))))
        return opened(prefixes)

    def decode_tree(prompts: Any, tokens: Tensor, *rest: Tensor) -> Tensor:
        passes.append(("tree", *tokens.shape))
        return continued(prompts, tokens, *rest)

    monkeypatch.setattr(model.llm, "prefill", prefill)
    monkeypatch.setattr(model.llm, "decode_tree", decode_tree)
    model.rank(tiny_images(2), ["color", "what color"], [["red", "red circle", "red shape"]] * 2)
    tree = build_tree([model.llm.prompt_format.target_ids(text) for text in ("red", "red circle", "red shape")])
    assert passes == [
        ("prompts", 2, 4 + len(model.llm.prompt_format.prompt_ids("what color"))),
        ("tree", 2, len(tree.tokens)),
    ]


def test_presets_name_both_kinds_and_fit_rank(model: InstructBLIP) -> None:
    kind = "encoder_decoder" if model.llm.model.config.is_encoder_decoder else "decoder"
    paper, lavis = (
        model.rank(tiny_images(1), PROMPTS[:1], [["red", "red circle"]], **RANKING_PRESETS[name][kind])[0]
        for name in ("paper", "lavis")
    )
    assert torch.equal(paper, lavis) is (kind == "encoder_decoder")  # only the released decoders leave the end out


def test_ranking_errors() -> None:
    model = tiny_model(llm=tiny_llm(answer_prefix=""))
    with pytest.raises(ValueError, match="candidates holds a text without tokens; set include_eos=True"):
        model.rank(tiny_images(1), ["color"], [["red", ""]], include_eos=False)
    assert model.rank(tiny_images(1), ["color"], [["red", ""]])[0].shape == (2,)
    with pytest.raises(ValueError, match=r"candidates\[0\] is empty"):
        model.rank(tiny_images(1), ["color"], [[]])
    with pytest.raises(ValueError, match="normalize is 'max'; give 'sum' or 'mean'"):
        model.rank(tiny_images(1), ["color"], [["red"]], normalize="max")
    with pytest.raises(ValueError, match="candidates has 1 lists for 2 prompts"):
        model.rank(tiny_images(2), ["color", "shape"], [["red"]])


@pytest.mark.slow
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
    images = tiny_images(8)
    texts: dict[int, list[str]] = {}
    for batch in (1, 3, 8):
        starts = range(0, 8, batch)
        parts = [
            model.generate(images[i : i + batch], PROMPTS[i : i + batch], max_new_tokens=6, **options) for i in starts
        ]
        texts[batch] = [text for part in parts for text in part]
    assert texts[1] == texts[3] == texts[8]
    assert len(set(texts[1])) > 1


@torch.no_grad()
@pytest.mark.parametrize("penalty", [1.0, 5.0])
def test_greedy_generation_equals_a_plain_loop_and_holds_no_prompt(model: InstructBLIP, penalty: float) -> None:
    image, prompt = tiny_images(1), PROMPTS[0]
    encodes, embed = model.llm.model.config.is_encoder_decoder, model.llm.embed
    visual = model.visual_prompt(model.image_tokens(image), [prompt])
    ids: list[int] = []
    for _ in range(12):
        (text,) = embed([model.llm.prompt_format.prompt_ids(prompt) + ([] if encodes else ids)])
        said_ids = {"decoder_input_ids": torch.tensor([[model.llm.start_id, *ids]])} if encodes else {}
        logits = model.llm.model(inputs_embeds=torch.cat([visual, text[None]], dim=1), **said_ids).logits
        said = logits[0, -1, ids]  # the penalty is over what has been said (arXiv:1909.05858, section 4.1)
        logits[0, -1, ids] = torch.where(said > 0, said / penalty, said * penalty)
        ids.append(int(logits[0, -1].argmax()))
    assert model.llm.prompt_format.eos_id not in ids
    expected = model.llm.prompt_format.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert model.generate(image, [prompt], max_new_tokens=12, repetition_penalty=penalty) == [expected]


def generated_ids(model: InstructBLIP, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Tensor:
    """Token ids that `generate` makes for two prompts."""
    seen: list[Tensor] = []
    original = type(model.llm.prompt_format.tokenizer).batch_decode

    def decode(tokenizer: Any, ids: list[list[int]], **keywords: Any) -> list[str]:
        seen.append(torch.tensor(ids))
        return original(tokenizer, ids, **keywords)

    monkeypatch.setattr(type(model.llm.prompt_format.tokenizer), "batch_decode", decode)
    model.generate(tiny_images(2), PROMPTS[:2], **options)
    return seen[0]


@pytest.mark.parametrize("beams", [1, 2])
def test_lengths_count_new_tokens_only(model: InstructBLIP, monkeypatch: pytest.MonkeyPatch, beams: int) -> None:
    ids = generated_ids(model, monkeypatch, num_beams=beams, max_new_tokens=5, min_new_tokens=5)
    assert ids.shape == (2, 5)
    assert not bool((ids == model.llm.prompt_format.eos_id).any())


def test_a_penalty_forbids_repetition_but_not_words_of_the_prompt(
    model: InstructBLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "repetition_penalty": 1e6}
    first = generated_ids(model, monkeypatch, max_new_tokens=1, min_new_tokens=1)[:, 0]
    penalised = generated_ids(model, monkeypatch, **options)
    assert torch.equal(penalised[:, 0], first)  # nothing has been said yet
    assert all(len(set(row.tolist())) == 8 for row in penalised)
