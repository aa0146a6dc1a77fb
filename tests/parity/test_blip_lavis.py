"""BLIP equals LAVIS's: captions, questions, matching, features, re-ranking, and what pre-training's losses are made of."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from instructblip.models.base import Inputs, Partners
from instructblip.models.blip import BLIPVQA, BLIPCaption, BLIPPretrain, BLIPRetrieval
from instructblip.models.pairs import similarities
from tests.kit.vectors import (
    TOLERANCE,
    blip_caption,
    blip_images,
    blip_pretrain,
    blip_retrieval,
    blip_vqa,
    case,
)


@pytest.fixture(scope="module")
def captioner() -> BLIPCaption:
    return blip_caption()


@pytest.fixture(scope="module")
def answerer() -> BLIPVQA:
    return blip_vqa()


@pytest.fixture(scope="module")
def retriever() -> BLIPRetrieval:
    return blip_retrieval()


@pytest.fixture(scope="module")
def pretrained() -> BLIPPretrain:
    return blip_pretrain()


def vectors_of(name: str) -> dict[str, Any]:
    return case("blip_med", name)


def close(found: Tensor, expected: Tensor | float) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected), **TOLERANCE)


def rows(ids_BT: Tensor, mask_BT: Tensor) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(ids_BT, mask_BT, strict=True)]


def tokens(model: Any, ids_BT: Tensor) -> list[str]:
    return [text.strip() for text in model.tokenizer.batch_decode(ids_BT, skip_special_tokens=True)]


# --- captions --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_loss_of_captions(captioner: BLIPCaption) -> None:
    vectors = vectors_of("caption_loss")
    texts = [text.removeprefix(captioner.prompt) for text in vectors["texts"]]
    images = blip_images(captioner, vectors)
    close(images[:, 0], vectors["expected"]["image_embeds"])

    @dataclasses.dataclass
    class Batch:
        images: Tensor
        instructions: list[str]
        targets: list[str]
        image_ids: tuple[str, ...] = ()
        positions: tuple[int, ...] = ()
        pixel_ids: tuple[int, ...] = ()

    inputs = captioner.prepare(Batch(images, [""] * 6, texts))
    expected = rows(vectors["inputs"]["input_ids"], vectors["inputs"]["attention_mask"])
    assert inputs.answers == [ids[4:] for ids in expected]
    logits_SV = captioner(inputs, {"answer_logits"}).tensors["answer_logits"]
    labels_S = torch.tensor([token for ids in inputs.answers for token in ids])
    close(F.cross_entropy(logits_SV, labels_S, label_smoothing=0.1), vectors["expected"]["loss"])


GENERATED = [
    ("caption_generate_greedy", {}),
    ("caption_generate_beam3", {}),
    ("caption_generate_beam3_min8_max12", {}),
    ("caption_generate_beam3_repetition1.5", {"repetition_penalty": 1.5}),
    ("caption_generate_beam3_defaults", {}),
]


@pytest.mark.parametrize(("name", "options"), GENERATED, ids=[name for name, _ in GENERATED])
def test_captions(name: str, options: dict[str, Any], captioner: BLIPCaption) -> None:
    vectors = vectors_of(name)
    settings, prompt = vectors["settings"], 4
    wanted = {
        "num_beams": settings["num_beams"],
        "max_new_tokens": settings["max_length"] - prompt,
        "min_new_tokens": settings["min_length"] - prompt,
        **options,
    }
    images = blip_images(captioner, vectors)
    expected = tokens(captioner, vectors["expected"]["ids"][:, prompt:])
    assert captioner.generate(images, **wanted) == expected
    assert [captioner.generate(image[None], **wanted)[0] for image in images] == expected


def test_the_defaults_of_captions_are_the_released_ones(captioner: BLIPCaption) -> None:
    vectors = vectors_of("caption_generate_beam3")
    expected = tokens(captioner, vectors["expected"]["ids"][:, 4:])
    assert captioner.generate(blip_images(captioner, vectors)) == expected


# --- questions -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_loss_of_answers(answerer: BLIPVQA) -> None:
    vectors = vectors_of("vqa_loss")
    counts, weights = vectors["inputs"]["n_answers"], vectors["inputs"]["weight"]
    answers = answerer.answer_ids(vectors["answers"])
    assert [[101, *ids] for ids in answers] == rows(vectors["inputs"]["answer_ids"], vectors["inputs"]["answer_mask"])
    images = blip_images(answerer, vectors)
    inputs = Inputs(
        images,
        vectors["questions"],
        answers,
        answer_counts=torch.as_tensor(counts).tolist(),
        answer_weights=weights.tolist(),
    )
    logits_SV = answerer(inputs, {"answer_logits"}).tensors["answer_logits"]
    labels_S = torch.tensor([token for ids in answers for token in ids])
    losses_S = F.cross_entropy(logits_SV, labels_S, reduction="none", label_smoothing=0.1)
    losses_A = torch.stack([part.sum() for part in losses_S.split([len(ids) for ids in answers])])
    close(losses_A, vectors["expected"]["loss_of_each_answer"])
    close((losses_A * weights).sum() / len(images), vectors["expected"]["loss"])


@pytest.mark.parametrize("name", ["vqa_rank_k5", "vqa_rank_k9"])
def test_ranks_of_answers(name: str, answerer: BLIPVQA) -> None:
    vectors, images = vectors_of(name), blip_images(answerer, vectors_of(name))
    expected, kept = vectors["expected"], vectors["expected"]["topk_index"]
    questions, candidates = case("blip_med", "vqa_loss")["questions"], [vectors["answer_list"]] * len(images)
    options = {"label_smoothing": 0.1, "preselect": kept.shape[1]}
    for chosen in (
        answerer.rank(images, questions, candidates, **options),
        [answerer.rank(images[i : i + 1], questions[i : i + 1], candidates[:1], **options)[0] for i in range(3)],
        answerer.rank(images, questions, candidates, token_budget=1, **options),
    ):
        for found, places, scores in zip(chosen, kept, expected["score_of_topk"], strict=True):
            close(found[places], scores)
            assert set(found.isfinite().nonzero()[:, 0].tolist()) == set(places.tolist())
        best = [vectors["answer_list"][int(found.argmax())] for found in chosen]
        assert best == expected["answers"]


def test_plain_ranks_are_log_likelihoods(answerer: BLIPVQA) -> None:
    vectors = vectors_of("vqa_rank_k9")
    images, questions = blip_images(answerer, vectors), case("blip_med", "vqa_loss")["questions"]
    answers = answerer.answer_ids(vectors["answer_list"])
    with torch.no_grad():
        inputs = Inputs(images, questions, answers * 3, answer_counts=[9, 9, 9])
        logits_SV = answerer(inputs, {"answer_logits"}).tensors["answer_logits"]
    labels_S = torch.tensor([token for ids in answers * 3 for token in ids])
    likelihood_S = logits_SV.log_softmax(1).gather(1, labels_S[:, None])[:, 0]
    parts = likelihood_S.split([len(ids) for ids in answers] * 3)
    expected = torch.stack([part.sum() for part in parts]).view(3, 9)
    found = answerer.rank(images, questions, [vectors["answer_list"]] * 3)
    close(torch.stack(found), expected)
    without_end = torch.stack([part[:-1].mean() for part in parts]).view(3, 9)
    close(
        torch.stack(
            answerer.rank(images, questions, [vectors["answer_list"]] * 3, normalize="mean", include_eos=False)
        ),
        without_end,
    )


ANSWERED = ["vqa_generate_greedy", "vqa_generate_beam3", "vqa_generate_beam3_min4"]


@pytest.mark.parametrize("name", ANSWERED)
def test_answers_with_the_released_reading_of_padding(name: str, answerer: BLIPVQA) -> None:
    vectors = vectors_of(name)
    settings, questions = vectors["settings"], case("blip_med", "vqa_loss")["questions"]
    found = answerer.generate(
        blip_images(answerer, vectors),
        questions,
        num_beams=settings["num_beams"],
        max_new_tokens=settings["max_len"] - 1,
        min_new_tokens=settings["min_len"] - 1,
        attend_padding=True,
    )
    assert found == tokens(answerer, vectors["expected"]["ids"][:, 1:])


def test_answers_do_not_depend_on_the_batch(answerer: BLIPVQA) -> None:
    vectors = vectors_of("vqa_generate_beam3_one_at_a_time")
    questions = case("blip_med", "vqa_loss")["questions"]
    expected = tokens(answerer, [row["ids"][1:] for row in vectors["expected"]["rows"]])
    images = blip_images(answerer, vectors)
    assert answerer.generate(images, questions) == expected
    assert [answerer.generate(images[i : i + 1], questions[i : i + 1])[0] for i in range(3)] == expected


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["retriever", "pretrained"])
def test_matching(which: str, request: pytest.FixtureRequest) -> None:
    model, vectors = request.getfixturevalue(which), vectors_of("match")
    images, expected = blip_images(model, vectors), vectors["expected"]
    close(model.match(images, vectors["texts"]), expected["itm_probability"][:, 1])
    close(model.match(images, vectors["texts"], head="itc"), expected["itc_score"].diagonal())
    single = [model.match(images[i : i + 1], vectors["texts"][i : i + 1])[0] for i in range(6)]
    close(torch.stack(single), expected["itm_probability"][:, 1])


def test_features(retriever: BLIPRetrieval) -> None:
    vectors = vectors_of("features")
    texts, expected = case("blip_med", "match")["texts"], vectors["expected"]
    features = retriever.features(blip_images(retriever, vectors), texts)
    real = features.text_mask.bool()
    close(features.image, expected["image_embeds"])
    close(features.image_projected[:, 0], expected["image_embeds_proj"][:, 0])
    close(features.text[real], expected["text_embeds"][real])
    close(features.text_projected, expected["text_embeds_proj"][:, 0])
    close(features.multimodal[real], expected["multimodal_embeds"][real])


@torch.no_grad()
def test_scores_of_retrieval(retriever: BLIPRetrieval) -> None:
    vectors = vectors_of("rerank_k3")
    texts, kept = case("blip_med", "match")["texts"], vectors["k_test"]
    ids_CT, mask_CT = retriever.tokenize(texts, max_tokens=35)
    image, words = retriever.encode_images(blip_images(retriever, vectors)), retriever.encode_texts(ids_CT, mask_CT)
    cosine_BC = similarities(image.projected_BQE, words.projected_BE)
    first, second = (places.flatten() for places in torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"))
    logits_BC = (
        retriever.encode_pairs(image.tokens_BPU[first], ids_CT[second], mask_CT[second]).logits_B2[:, 1].view(6, 6)
    )
    for name, scores_RC, nearest_RC in (
        ("score_i2t", logits_BC + cosine_BC, cosine_BC),
        ("score_t2i", (logits_BC + cosine_BC).T, cosine_BC.T),
    ):
        places_RK = nearest_RC.topk(kept, dim=1).indices
        expected_RC = torch.full_like(scores_RC, -100).scatter(1, places_RK, scores_RC.gather(1, places_RK))
        close(expected_RC, vectors["expected"][name])


# --- what losses are made of -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "name"), [("pretrained", "pretrain_losses"), ("retriever", "retrieval_losses")])
@torch.no_grad()
def test_outputs_that_the_losses_are_made_of(which: str, name: str, request: pytest.FixtureRequest) -> None:
    model, vectors = request.getfixturevalue(which), vectors_of(name)
    expected, images = vectors["expected"], blip_images(model, vectors)
    answers = [ids[1:] for ids in rows(vectors["inputs"]["input_ids"], vectors["inputs"]["attention_mask"])]
    image_rows, text_rows = (vectors["draw"][f"negative_{what}"] for what in ("image_of_text", "text_of_image"))
    inputs = Inputs(
        images, [""] * 6, answers, partners=Partners(images[image_rows], [answers[row] for row in text_rows])
    )
    wanted = {"image_projected", "text_projected", "temperature", "match_logits"} | (model.OUTPUTS & {"answer_logits"})
    outputs = model(inputs, wanted).tensors
    own, text, wrong = outputs["match_logits"]
    labels = torch.tensor([1] * 6 + [0] * 12)
    close(F.cross_entropy(torch.cat([own, text, wrong]), labels), expected["loss_itm"])
    if "itm_logits" in expected:
        close(torch.cat([own, text, wrong]), expected["itm_logits"])
    if "loss_lm" in expected:
        labels_S = torch.tensor([token for ids in answers for token in ids])
        close(F.cross_entropy(outputs["answer_logits"], labels_S, label_smoothing=0.1), expected["loss_lm"])
