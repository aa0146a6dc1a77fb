"""Exact-match accuracy."""

import pytest

from instructblip.evaluation.metrics import Score, accuracy
from instructblip.evaluation.metrics.accuracy import normalize_answer


def test_any_accepted_answer_counts_and_the_scale_is_0_to_100() -> None:
    score = accuracy(["gray", "two", "no", "cat"], [["grey", "gray"], ["2"], ["no"], ["cat"]])
    assert score == Score(value=75.0, per_sample=(100.0, 0.0, 100.0, 100.0), count=4)


def test_without_normalisation_case_and_punctuation_matter() -> None:
    predictions, answers = ["Yes.", " yes", "yes"], [["yes"]] * 3
    assert accuracy(predictions, answers).per_sample == (0.0, 0.0, 100.0)
    assert accuracy(predictions, answers, normalize=True).per_sample == (100.0, 100.0, 100.0)


def test_answers_are_normalised_too() -> None:
    assert accuracy(["dark blue"], [["Dark  Blue!"]], normalize=True).value == 100.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [(" Yes. ", "yes"), ("a\tb\nC", "a b c"), ("no ?!", "no"), ("3.5", "3.5"), ("the cat", "the cat"), ("...", "")],
)
def test_normalisation_is_lower_case_single_spaces_no_final_punctuation(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("predictions", "answers"),
    [([], []), (["a"], []), (["a"], [["a"], ["b"]]), (["a"], [[]]), (["yes"], ["yes"])],
)
def test_wrong_input_is_refused(predictions: list[str], answers: list[list[str]]) -> None:
    with pytest.raises(ValueError):
        accuracy(predictions, answers)
