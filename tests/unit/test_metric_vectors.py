"""Every metric against what the official scorers gave for the same input: per case and, where it is known, overall.

The numbers lie in tests/metric_vectors, each file with the scorer that made them under `source`.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from instructblip.evaluation.metrics import (
    anls,
    aokvqa_direct_answer,
    aokvqa_multiple_choice,
    auroc,
    cider,
    exact_match,
    gqa_accuracy,
    group_means,
    iconqa_accuracy,
    ivqa_accuracy,
    letter_accuracy,
    multiple_choice_accuracy,
    ocr_vqa_accuracy,
    probability_of_class,
    scienceqa_choice,
    visdial,
    vqa_accuracy,
    vsr_accuracy,
)
from instructblip.evaluation.metrics import caption_tokenizer as java
from instructblip.evaluation.metrics.captions import PUNCTUATION, bleu, cider_d, rouge_l
from instructblip.evaluation.metrics.vqa import normalize_textvqa, normalize_vqa

VECTORS = Path(__file__).parent.parent / "metric_vectors"
FLOAT32 = 1e-6  # the VisDial scorer computes in float32
ROUNDED = 6e-9  # caption scores of single cases are stored with 8 decimals
needs_java = pytest.mark.skipif(java.missing() is not None, reason=f"{java.missing()}")


def vectors(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def columns(name: str, count: int) -> list[list[Any]]:
    """The cases of a file by column; `count` guards against a file that lost some."""
    cases = vectors(name)["cases"]
    assert len(cases) == count
    return [list(column) for column in zip(*cases, strict=True)]


def test_answers_are_normalised_as_by_the_vqa_and_textvqa_scorers() -> None:
    texts, vqa, textvqa = columns("vqa_normalisation", 61)
    assert [normalize_vqa(text) for text in texts] == vqa
    assert [normalize_textvqa(text) for text in texts] == textvqa


def test_vqa_accuracy_in_three_variants() -> None:
    predictions, answers, *expected = columns("vqa_accuracy", 74)
    for variant, values in zip(("official", "lavis", "textvqa"), expected, strict=True):
        score = vqa_accuracy(predictions, answers, variant=variant)
        assert score.per_sample == pytest.approx(values, abs=ROUNDED)
        assert score.value == pytest.approx(sum(values) / 74, abs=ROUNDED)
        assert score.details == {"variant": variant} and score.count == 74


def test_vqa_accuracy_with_fewer_than_ten_answers() -> None:
    predictions, answers, official, lavis = columns("vqa_accuracy_few_answers", 19)
    assert vqa_accuracy(predictions, answers).per_sample == pytest.approx(official, abs=ROUNDED)
    assert vqa_accuracy(predictions, answers, variant="lavis").per_sample == pytest.approx(lavis, abs=ROUNDED)


def test_vizwiz_accuracy() -> None:
    predictions, answers, expected = columns("vizwiz_rules", 74)
    assert vqa_accuracy(predictions, answers, variant="vizwiz").per_sample == pytest.approx(expected, abs=ROUNDED)


def test_scorers_of_lmms_eval() -> None:
    found = vectors("lmms_eval")
    assert [len(found[name]) for name in ("gqa", "anls", "letters")] == [113, 185, 57]
    predictions, answers, expected = zip(*found["gqa"], strict=True)
    score = gqa_accuracy(predictions, answers, variant="lmms_eval")
    assert score.per_sample == pytest.approx([100 * value for value in expected])
    predictions, several, expected = zip(*found["anls"], strict=True)
    assert anls(predictions, several).per_sample == pytest.approx(expected)
    predictions, labels, expected = zip(*found["letters"], strict=True)
    score = letter_accuracy(predictions, labels)
    assert score.per_sample == pytest.approx([100 * value for value in expected])


def test_gqa_accuracy() -> None:
    predictions, answers, balanced, _, official, lavis = columns("gqa", 60)
    score = gqa_accuracy(predictions, answers, balanced=balanced)
    assert score.scored == tuple(number for number, mark in enumerate(balanced) if mark)
    assert score.per_sample == tuple(100 * value for value, mark in zip(official, balanced, strict=True) if mark)
    everything = gqa_accuracy(predictions, answers, variant="lavis", balanced=balanced)
    assert everything.per_sample == tuple(100 * value for value in lavis)


def test_ocr_vqa_accuracy() -> None:
    predictions, answers, expected = columns("ocrvqa", 84)
    assert ocr_vqa_accuracy(predictions, answers).per_sample == tuple(expected)


def test_aokvqa_multiple_choice_and_direct_answer() -> None:
    choices, labels, answers, difficult, chosen, written, expected_choice, expected_written = columns("aokvqa", 40)
    correct = [texts[label] for texts, label in zip(choices, labels, strict=True)]
    assert aokvqa_multiple_choice(chosen, correct).per_sample == tuple(expected_choice)
    score = aokvqa_direct_answer(written, answers, difficult=difficult)
    assert score.per_sample == pytest.approx(expected_written, abs=1e-12)
    assert any(text is None for text in written)  # a missing prediction is among the cases


def test_scienceqa_accuracy_and_breakdowns_of_its_whole_test_split() -> None:
    data = vectors("scienceqa")
    rows = [row for line in data["rows"] for row in line.split(" ")]
    assert len(rows) == 4241
    score = multiple_choice_accuracy([int(row[1]) for row in rows], [int(row[0]) for row in rows])
    image, hint = [row[2] == "1" for row in rows], [row[3] == "1" for row in rows]
    subject = group_means(score.per_sample, [row[4] for row in rows])
    young = group_means(score.per_sample, [int(row[5:]) <= 6 for row in rows])
    no_context = [not (a or b) for a, b in zip(image, hint, strict=True)]
    found = {
        "acc_natural": subject["n"],
        "acc_social": subject["s"],
        "acc_language": subject["l"],
        "acc_has_text": group_means(score.per_sample, hint)[True],
        "acc_has_image": group_means(score.per_sample, image)[True],
        "acc_no_context": group_means(score.per_sample, no_context)[True],
        "acc_grade_1_6": young[True],
        "acc_grade_7_12": young[False],
        "acc_average": (score.value, 4241),
    }
    assert {name: f"{value:.2f}" for name, (value, _) in found.items()} == data["overall"]


def test_scienceqa_letters() -> None:
    mapping = vectors("scienceqa")["choice_mapping"]
    assert len(mapping) == 44
    for text, choices, index in mapping:
        assert scienceqa_choice(text, choices) == (-1 if index is None else index)


def test_iconqa_accuracy() -> None:
    tasks, predictions, answers, expected = columns("iconqa", 60)
    assert iconqa_accuracy(predictions, answers).per_sample == tuple(100 * value for value in expected)
    assert set(tasks) == {"choose_txt", "choose_img", "fill_in_blank"}


def test_vsr_accuracy() -> None:
    relations, labels, predictions, expected = columns("vsr", 60)
    score = vsr_accuracy(predictions, labels, relations=relations)
    assert score.per_sample == tuple(expected)
    on = [value for relation, value in zip(relations, expected, strict=True) if relation == "on"]
    assert score.details["by_relation"]["on"] == {"accuracy": sum(on) / len(on), "count": len(on)}


def test_hateful_memes_auroc() -> None:
    no, yes, labels, stored = columns("hateful_memes_auroc", 120)
    expected = vectors("hateful_memes_auroc")["overall"]
    assert auroc(stored, labels).value == expected["auroc_softmax_proba"]
    assert probability_of_class(list(zip(no, yes, strict=True))) == stored  # to the last bit: ties are at stake
    hard = [float(probability > 0.5) for probability in stored]
    assert auroc(hard, labels).value == pytest.approx(expected["auroc_from_hard_labels"], abs=1e-12)
    low, high = min(yes), max(yes)
    yes_only = [(value - low) / (high - low) for value in yes]
    assert auroc(yes_only, labels).value == pytest.approx(expected["auroc_logit_yes_only"], abs=1e-12)


def test_visdial_retrieval_and_ndcg() -> None:
    data = vectors("visdial")
    scores = [row for dialog in data["dialogs"] for row in dialog[0]]
    labels = [label for dialog in data["dialogs"] for label in dialog[1]]
    ranks = [rank for dialog in data["dialogs"] for rank in dialog[2]]
    relevance = [dense(dialog[3]) if number == 0 else None for dialog in data["dialogs"] for number in range(10)]
    score = visdial(scores, labels, relevance)
    assert score.per_sample == tuple(1 / rank for rank in ranks) and len(ranks) == 60
    found = {**score.details, "mrr": score.value, "mean": score.details["mean_rank"]}
    assert {name: found[name] for name in data["overall"]} == pytest.approx(data["overall"], abs=FLOAT32)
    assert found["ndcg_count"] == 6
    for dialog in data["dialogs"]:
        alone = visdial([dialog[0][0]], [dialog[1][0]], [dense(dialog[3])])
        assert alone.details["ndcg"] == pytest.approx(dialog[4], abs=FLOAT32)


def test_visdial_ndcg_of_single_rounds() -> None:
    for scores, relevance, expected in zip(*columns("visdial_ndcg", 15), strict=True):
        assert visdial([scores], [0], [dense(relevance)]).details["ndcg"] == pytest.approx(expected, abs=FLOAT32)


def dense(relevance: dict[str, float]) -> list[float]:
    return [relevance.get(str(option), 0.0) for option in range(100)]


def test_video_qa_top_1_and_ivqa() -> None:
    predictions, answers, expected = columns("msvd_msrvtt", 30)
    vocabulary = {text for text in (*predictions, *answers) if text != "oov"}
    assert exact_match(predictions, answers, vocabulary=vocabulary).per_sample == tuple(expected)
    assert exact_match(["oov"], ["oov"], vocabulary=vocabulary).value == 0
    predictions, several, expected = columns("ivqa", 30)
    assert ivqa_accuracy(predictions, several).per_sample == tuple(expected)


def test_caption_scores_of_tokenised_captions() -> None:
    _, _, texts, given, *expected = columns("captions_coco", 150)
    overall = vectors("captions_coco")["overall"]
    hypotheses = [text.split() for text in texts]
    references = [[text.split() for text in each] for each in given]
    by_name = dict(zip(vectors("captions_coco")["columns"][4:], expected, strict=True))
    found = {f"Bleu_{n}": scores for n, scores in enumerate(bleu(hypotheses, references), start=1)}
    for name, scores in (("CIDEr", cider_d(hypotheses, references)), ("ROUGE_L", rouge_l(texts, given))):
        found[name] = (sum(scores) / 150, scores)
    for name, (value, scores) in found.items():
        assert value == pytest.approx(overall[name], abs=1e-12)
        assert scores == pytest.approx(by_name[name], abs=ROUNDED)


@needs_java
def test_captions_through_java_equal_the_official_scores() -> None:
    predictions, given, texts, given_words, *_ = columns("captions_coco", 150)
    data = vectors("captions_coco")
    captions = [*predictions, *(text for each in given for text in each)]
    words = [" ".join(word for word in line if word not in PUNCTUATION) for line in java.ptb_tokenize(captions)]
    assert words == [*texts, *(text for each in given_words for text in each)]
    score = cider(predictions, given, tokenizer="java", groups=[number % 3 for number in range(150)])
    assert score.value == pytest.approx(data["overall"]["CIDEr"], abs=1e-12)
    assert {name: score.details[name] for name in data["overall"] if name != "CIDEr"} == pytest.approx(
        {name: value for name, value in data["overall"].items() if name != "CIDEr"}, abs=1e-12
    )
    assert [score.details["groups"][str(n)]["CIDEr"] for n in range(3)] == pytest.approx(data["domains"], abs=1e-12)
    assert "Java" in score.details["tokenizer"]
