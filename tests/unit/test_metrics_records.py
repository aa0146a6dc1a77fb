"""Metrics called from records by the names that cards use: oracle and chance, the rules of each, and errors in one line."""

import random
from collections.abc import Callable

import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from instructblip.data.cards import all_cards
from instructblip.data.records import Record
from instructblip.evaluation.metrics import (
    METRICS,
    ModelOutput,
    Score,
    accuracy,
    aokvqa_direct_answer,
    auroc,
    exact_match,
    gqa_accuracy,
    group_means,
    multiple_choice_accuracy,
    visdial,
    vqa_accuracy,
    vsr_accuracy,
)
from instructblip.evaluation.metrics.score import mean_score

CHOICES = ("red", "green", "blue", "grey")
QUESTION = Record("q1", "question", "what?", answers=("cat", "dog"), answer_weights=(8.0, 2.0))
CHOICE = Record("c1", "multiple_choice", "which?", answers=("green",), choices=CHOICES, label=1)
CAPTIONS = [
    Record("i1", "captions", captions=("a dog runs", "the dog"), tags={"domain": "in-domain"}),
    Record("i2", "captions", captions=("two cats sleep", "cats"), tags={"domain": "out-domain"}),
    Record("i3", "captions", captions=("one red car", "the car"), tags={"domain": "out-domain"}),
]
MEMES = [
    Record(f"m{number}", "meme", "text", answers=(("no", "yes")[number % 2],), label=number % 2) for number in range(4)
]


def text(*texts: str) -> list[ModelOutput]:
    return [ModelOutput(item) for item in texts]


def ranked(classes: tuple[str, ...], *rows: tuple[float, ...]) -> list[ModelOutput]:
    return [ModelOutput(classes[row.index(max(row))], classes, row) for row in rows]


@pytest.mark.slow
def test_every_metric_that_a_card_names_is_there() -> None:
    for card in all_cards():
        if card.evaluation is not None:
            presets = card.evaluation.presets.values()
            assert {card.evaluation.metric, *(p["metric"] for p in presets if "metric" in p)} <= set(METRICS)


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("vqa_accuracy", 100.0),
        ("vqa_accuracy_lavis", 100.0),
        ("textvqa_accuracy", 100.0),
        ("vizwiz_accuracy", 100.0),
        ("aokvqa_direct_answer", 100.0),
        ("ocr_vqa_accuracy", 1.0),
        ("ivqa_accuracy", 1.0),
        ("accuracy", 100.0),
    ],
)
def test_answers_count_as_often_as_they_were_given(name: str, best: float) -> None:
    right = METRICS[name](text("cat"), [QUESTION])
    wrong = METRICS[name](text("horse"), [QUESTION])
    assert (right.value, right.table_value, right.count) == (best, 100.0, 1)
    assert wrong.value == 0


def test_the_rarer_answer_gets_its_share() -> None:
    assert METRICS["vqa_accuracy"](text("dog"), [QUESTION]).value == pytest.approx(60)
    assert METRICS["aokvqa_direct_answer"](text("dog"), [QUESTION]).value == pytest.approx(200 / 3)
    ivqa = Record("q", "video_question", answers=("cat", "dog"), answer_weights=(4.0, 1.0))
    assert METRICS["ivqa_accuracy"](text("dog"), [ivqa]).value == 0.5


def test_texts_that_a_card_ranks_are_held_against_choices_by_what_they_say() -> None:
    records = [
        Record(str(number), "multiple_choice", "?", choices=choices, label=0)
        for number, choices in enumerate([("yes", "no"), ("no", "yes"), ("never", "always")])
    ]
    outputs = ranked(("yes", "no"), (-1.0, -2.0), (-1.0, -2.0), (-1.0, -2.0))  # "yes", each time
    for name in ("multiple_choice_accuracy", "aokvqa_multiple_choice"):
        assert METRICS[name](outputs, records).per_sample == (100.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="rank its choices"):
        METRICS["visdial"](outputs, records)


def test_a_blank_answer_counts_as_an_annotator() -> None:
    record = Record("q", "question", answers=("cat",), answer_weights=(3.0,), annotators=10)
    for name in ("vqa_accuracy", "vqa_accuracy_lavis", "vizwiz_accuracy", "textvqa_accuracy"):
        assert METRICS[name](text("cat"), [record]).value == pytest.approx(90), name


@pytest.mark.parametrize("name", ["accuracy", "ocr_vqa_accuracy"])
def test_what_somebody_left_blank_is_no_answer_that_is_accepted(name: str) -> None:
    record = Record("q", "question", answers=("cat", "dog"), answer_weights=(2.0, 1.0), annotators=10)
    best = METRICS[name].best if name == "accuracy" else 1.0
    assert METRICS[name](text("cat", "dog", "", "."), [record] * 4).per_sample == (best, best, 0.0, 0.0)


def test_records_of_too_few_annotators_are_refused_and_of_few_are_marked() -> None:
    few = {
        people: Record("q", "question", answers=("cat",), answer_weights=(people,)) for people in (1.0, 3.0, 4.0, 9.0)
    }
    for name in ("vqa_accuracy", "vqa_accuracy_lavis", "vizwiz_accuracy", "vizwiz_accuracy_lmms_eval"):
        for people in (1.0, 3.0):
            with pytest.raises(
                ValueError, match=rf"'q' has the answers of too few people for {name} \({people:.0f} of"
            ):
                METRICS[name](text("cat"), [few[people]])
        score = METRICS[name](text("cat", "cat", "cat"), [few[4.0], few[9.0], QUESTION])
        assert score.value == 100
        assert score.details["fewer_annotators"] == 2
        assert "fewer_annotators" not in METRICS[name](text("cat"), [QUESTION]).details
    with pytest.raises(
        ValueError, match=r"too few people for textvqa_accuracy \(9 of at least 10\); give the card another"
    ):
        METRICS["textvqa_accuracy"](text("cat"), [few[9.0]])
    with pytest.raises(ValueError, match="too few people for ivqa_accuracy"):
        METRICS["ivqa_accuracy"](text("cat"), [few[1.0]])


def test_vizwiz_of_lmms_eval_normalises_both_sides() -> None:
    answers = [["Yes!"] * 4 + ["no"] * 6]
    assert vqa_accuracy(["yes"], answers, variant="vizwiz").value == 0  # the API compares answers as they stand
    assert vqa_accuracy(["yes"], answers, variant="lmms_eval").value == 100
    assert vqa_accuracy(["yes"], [["Yes!"] * 9], variant="lmms_eval").value == 100  # however many people


def test_ranked_choices_are_compared_by_number_and_written_ones_by_text_or_letter() -> None:
    score = METRICS["multiple_choice_accuracy"]
    assert score(ranked(CHOICES, (-3.0, -1.0, -2.0, -1.0)), [CHOICE]).value == 100
    assert score(ranked(CHOICES, (-1.0, -1.0, -2.0, -1.0)), [CHOICE]).value == 0  # the first of equals is chosen
    assert [score(text(written), [CHOICE]).value for written in ("Green.", "B", "(b)", "A", "E")] == [100, 100, 0, 0, 0]


def test_aokvqa_compares_the_text_of_the_choice() -> None:
    twins = Record("q", "question", choices=("cat", "dog", "dog"), label=2)
    outputs = ranked(twins.choices, (-2.0, -1.0, -1.0))
    assert METRICS["aokvqa_multiple_choice"](outputs, [twins]).value == 100
    assert METRICS["multiple_choice_accuracy"](outputs, [twins]).value == 0
    assert METRICS["aokvqa_multiple_choice"](text("horse"), [twins]).value == 0


def test_aokvqa_leaves_out_difficult_direct_answers() -> None:
    difficult = Record(
        "q2", "question", answers=("x",), answer_weights=(10.0,), tags={"difficult_direct_answer": "true"}
    )
    score = METRICS["aokvqa_direct_answer"](text("no", "cat"), [difficult, QUESTION])
    assert (score.value, score.count, score.scored) == (100, 1, (1,))


def test_gqa_leaves_out_unbalanced_questions_and_normalises_only_for_lavis() -> None:
    records = [
        Record("q1", "question", answers=("dog",), tags={"balanced": "true"}),
        Record("q2", "question", answers=("cat",), tags={"balanced": "false"}),
    ]
    official = METRICS["gqa_accuracy"](text("The dog.", "cat"), records)
    lavis = METRICS["gqa_accuracy_lavis"](text("The dog.", "cat"), records)
    assert (official.value, official.count, lavis.value, lavis.count) == (0, 1, 100, 2)


def test_written_answers_are_normalised_by_accuracy_and_chosen_ones_are_not() -> None:
    record = Record("s", "statement", answers=("true",), label=1)
    assert METRICS["accuracy"](text("True."), [record]).value == 100
    assert METRICS["accuracy"](ranked(("True.", "false"), (-1.0, -2.0)), [record]).value == 0


def test_exact_match_takes_texts_as_they_stand() -> None:
    record = Record("v", "video_question", answers=("dog",))
    assert METRICS["exact_match"](text("dog"), [record]).value == 1
    assert METRICS["exact_match"](text("Dog"), [record]).value == 0


def test_cider_by_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no Java, which takes seconds
    score = METRICS["cider"](text("a dog runs", "two cats sleep", "one red car"), CAPTIONS)
    assert score.value > 4 and score.details["groups"]["in-domain"]["count"] == 1
    assert score.details["groups"]["out-domain"]["count"] == 2
    assert METRICS["cider"](text("x", "y", "z"), CAPTIONS).value == 0


def test_rouge_is_of_answers_or_of_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no Java, which takes seconds
    records = [Record("1", "dialog", answers=("a big red dog",)), Record("2", "captions", captions=("x", "two cats"))]
    score = METRICS["rouge_l"](text("a big red dog", "cats"), records)
    precision, recall = 1, 1 / 2
    assert score.per_sample == pytest.approx((1, (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)))
    with pytest.raises(ValueError, match="record '3' has no answers or captions; they may not be public"):
        METRICS["rouge_l"](text("a"), [Record("3", "dialog")])


def test_auroc_finds_the_class_of_label_1_by_the_answers() -> None:
    rows = [(-1.0, -3.0), (-3.0, -1.0), (-1.0, -2.0), (-2.0, -1.0)]  # of no, yes
    assert METRICS["auroc"](ranked(("no", "yes"), *rows), MEMES).value == 1
    turned = [(yes, no) for no, yes in rows]
    assert METRICS["auroc"](ranked(("yes", "no"), *turned), MEMES).value == 1
    assert METRICS["auroc"](ranked(("no", "yes"), *turned), MEMES).value == 0  # swapped labels show


def test_visdial_from_records() -> None:
    first = Record("d1", "dialog", answers=("green",), choices=CHOICES, label=1, relevance=(0.0, 1.0, 0.5, 0.0))
    second = Record("d2", "dialog", answers=("red",), choices=CHOICES, label=0)
    score = METRICS["visdial"](ranked(CHOICES, (-3.0, -1.0, -2.0, -4.0), (-2.0, -1.0, -2.0, -4.0)), [first, second])
    assert score.value == pytest.approx((1 + 1 / 2) / 2)  # of equal scores the earlier option comes first
    assert score.details == {
        "r@1": 0.5,
        "r@5": 1,
        "r@10": 1,
        "mean_rank": 1.5,
        "ndcg": pytest.approx(1),
        "ndcg_count": 1,
    }


def test_chance_scores_near_chance() -> None:
    draw = random.Random(0)
    records = [Record(str(n), "multiple_choice", choices=CHOICES, label=draw.randrange(4)) for n in range(4000)]
    outputs = ranked(CHOICES, *(tuple(draw.random() for _ in CHOICES) for _ in records))
    assert METRICS["multiple_choice_accuracy"](outputs, records).value == pytest.approx(25, abs=2.5)
    assert METRICS["visdial"](outputs, records).value == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4, abs=0.02)
    labels = [draw.randrange(2) for _ in range(4000)]
    assert auroc([draw.random() for _ in labels], labels).value == pytest.approx(0.5, abs=0.03)


def test_auroc_is_the_mean_of_its_samples_and_counts_ties_half() -> None:
    score = auroc([0.1, 0.4, 0.4, 0.8], [0, 0, 1, 1])
    assert score.value == 0.875
    assert score.per_sample == (1.0, 0.75, 0.75, 1.0)
    assert auroc([0.5] * 6, [0, 1, 0, 1, 1, 0]).value == 0.5


def test_auroc_is_that_of_torchmetrics() -> None:
    draw = random.Random(1)
    labels = [draw.randrange(2) for _ in range(500)]
    values = [round(draw.random(), 2) for _ in labels]  # many ties
    theirs = float(binary_auroc(torch.tensor(values, dtype=torch.float64), torch.tensor(labels)))
    assert auroc(values, labels).value == pytest.approx(theirs, abs=1e-6)  # it divides in float32


def test_group_means_weigh_back_to_the_whole() -> None:
    means = group_means([1.0, 0.0, 1.0, 1.0], ["a", "b", "a", "b"])
    assert means == {"a": (1.0, 2), "b": (0.5, 2)}


def test_a_mean_score_says_how_many_samples_it_has() -> None:
    score = mean_score([1.0, 0.0], metric="m", table_factor=100)
    assert (score.value, score.count, score.table_value, score.scored) == (0.5, 2, 50, None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vqa_accuracy(["a"], []), "1 predictions for 0 lists of answers"),
        (lambda: vqa_accuracy(["a"], [[]]), "sample 0 needs a list of at least one of its answers, got \\[\\]"),
        (lambda: vqa_accuracy(["a"], ["cat"]), "got 'cat'"),
        (lambda: vqa_accuracy([], []), "VQA accuracy of no samples"),
        (
            lambda: vqa_accuracy(["a"], [["a"]], variant="okvqa"),
            "official, lavis, textvqa, vizwiz, lmms_eval, not 'okvqa'",
        ),
        (lambda: vqa_accuracy(["a"], [["a"] * 9], variant="textvqa"), "ten answers a sample, got 9"),
        (lambda: gqa_accuracy(["a"], ["a"], variant="paper"), "official, lavis, lmms_eval, not 'paper'"),
        (lambda: gqa_accuracy(["a"], ["a"], balanced=[False]), "GQA accuracy of no samples"),
        (lambda: aokvqa_direct_answer(["a"], [["a"]], difficult=[]), "1 predictions for 0 marks"),
        (lambda: multiple_choice_accuracy([0], [-1]), "labels are numbered from 0, got -1"),
        (lambda: vsr_accuracy([1], [2]), "labels are 0 and 1"),
        (lambda: exact_match(["a", "b"], ["a"]), "2 predictions for 1 answers"),
        (lambda: accuracy([], []), "accuracy of no samples"),
        (lambda: auroc([0.1, 0.2], [1, 1]), "samples of both labels, got 2 of 1 among 2"),
        (lambda: auroc([0.1, float("nan")], [0, 1]), "between 0 and 1 without NaN"),
        (lambda: auroc([-3.0, 0.5], [0, 1]), "between 0 and 1 without NaN"),
        (lambda: auroc([0.1, 0.5], [0, 2]), "labels 0 and 1, got \\[0, 2\\]"),
        (lambda: visdial([[0.1, 0.2]], [2]), "round 0 has 2 options, none of them number 2"),
        (lambda: visdial([[0.1, float("nan")]], [0]), "round 0 has an option whose score is NaN"),
        (lambda: visdial([[0.1, 0.2]], [0], [[0.0, 0.0]]), "no relevant option"),
        (lambda: visdial([[0.1, 0.2]], [0], [[1.0]]), "2 options but 1 relevances"),
        (
            lambda: METRICS["vqa_accuracy"](text("a"), [Record("r7", "question")]),
            "'r7' has no answers; they may not be",
        ),
        (lambda: METRICS["visdial"](text("a"), [CHOICE]), "'c1' has 4 options but 0 scores; rank its choices"),
        (lambda: METRICS["auroc"](text(*"abcd"), MEMES), "'m0': AUROC needs a score of class 'yes'; rank"),
        (lambda: METRICS["auroc"](text("a"), [Record("r7", "meme")]), "'r7' has no label"),
        (lambda: METRICS["cider"](text("a"), [Record("r7", "captions")]), "'r7' has no reference captions"),
        (lambda: METRICS["exact_match"](text("a"), [QUESTION]), "'q1' needs exactly one answer for this metric, has 2"),
        (
            lambda: METRICS["vqa_accuracy"](text("a"), [Record("r7", "q", answers=("a",), answer_weights=(0.3,))]),
            "'r7': answer weights must count annotators, got \\(0.3,\\)",
        ),
        (lambda: METRICS["multiple_choice_accuracy"](text("a"), []), "1 predictions for 0 records"),
    ],
)
def test_bad_input_is_told_in_one_line(call: Callable[[], Score], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
