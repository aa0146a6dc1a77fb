"""Accuracy by equality: of texts, of the number of a choice, of a yes/no label."""

import string
from collections import Counter
from collections.abc import Collection, Hashable, Sequence

from instructblip.data.records import Record
from instructblip.evaluation.metrics.metric import (
    ModelOutput,
    Outputs,
    Records,
    accepted_answers,
    all_answers,
    labels_of,
    only_answers,
    texts_of,
)
from instructblip.evaluation.metrics.score import Score, check_references, group_means, mean_score, same_length

_TRAILING_PUNCTUATION = ".,;:!?"
_LETTERS = "ABCDE"
_NEAR = 0.5  # ANLS below it is 0
NO_CHOICE = -1


def accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]], *, normalize: bool = False) -> Score:
    """Share of predictions equal to any of their accepted answers, on a scale of 0 to 100.

    Each sample scores 100 or 0; the value is their mean.

    Args:
        predictions: one string a sample.
        answers: the accepted answers of each sample.
        normalize: compare after `normalize_answer` on both sides. Right for open generation, where a model may write
            "Yes."; not for ranking, where the prediction is one of the candidates as they stand.

    Raises:
        ValueError: no samples, different lengths, a sample without any accepted answer, or one string where a list of
            answers belongs.
    """
    check_references("answers", predictions, answers)
    per_sample = [
        100.0 * _matches(prediction, accepted, normalize)
        for prediction, accepted in zip(predictions, answers, strict=True)
    ]
    return mean_score(per_sample, metric="accuracy")


def normalize_answer(text: str) -> str:
    """Lower-case, white space made single and stripped, and sentence punctuation at the end dropped ("Yes. " -> "yes").

    Articles, number words and contractions stay: this is not the VQA scorer's normalisation.
    """
    return " ".join(text.lower().split()).rstrip(_TRAILING_PUNCTUATION + " ")


def multiple_choice_accuracy(predictions: Sequence[int], labels: Sequence[int]) -> Score:
    """Share of right choices on a scale of 0 to 100; choices are numbered from 0, and `NO_CHOICE` (-1) is always wrong.

    This is ScienceQA's accuracy; over the test questions with an image it is ScienceQA-IMG ("acc_has_image").

    Raises:
        ValueError: different lengths, no samples, or a label below 0.
    """
    same_length("labels", predictions, labels)
    if any(label < 0 for label in labels):
        raise ValueError(f"labels are numbered from 0, got {min(labels)}")
    per_sample = [100.0 * (prediction == label) for prediction, label in zip(predictions, labels, strict=True)]
    return mean_score(per_sample, metric="multiple-choice accuracy")


def scienceqa_choice(text: str, choices: int) -> int:
    """The number of the choice that a written letter names: "A" to "E", exactly, and no further than there are choices.

    For anything else ("a", "(A)", "F") the official code draws a choice at random, which nobody can repeat; here it is
    `NO_CHOICE`, which is wrong, as in LLaVA's script.
    """
    valid = _LETTERS[:choices]
    return valid.index(text) if len(text) == 1 and text in valid else NO_CHOICE


def iconqa_accuracy(predictions: Sequence[int | str], answers: Sequence[int | str]) -> Score:
    """Share of predictions whose text equals the answer's, on a scale of 0 to 100.

    Answers are numbers of choices from 0 (choose_txt, choose_img) or texts (fill_in_blank, where "8,488" is not "8488").
    The rule of IconQA's evaluation script.

    Raises:
        ValueError: different lengths or no samples.
    """
    same_length("answers", predictions, answers)
    per_sample = [
        100.0 * (str(prediction) == str(answer)) for prediction, answer in zip(predictions, answers, strict=True)
    ]
    return mean_score(per_sample, metric="IconQA accuracy")


def aokvqa_multiple_choice(predictions: Sequence[str | None], correct_choices: Sequence[str]) -> Score:
    """Share of predictions equal to the text of the right choice, on a scale of 0 to 100; None is wrong.

    The rule of A-OKVQA's `eval_predictions.py`.

    Raises:
        ValueError: different lengths or no samples.
    """
    same_length("right choices", predictions, correct_choices)
    per_sample = [100.0 * (text == correct) for text, correct in zip(predictions, correct_choices, strict=True)]
    return mean_score(per_sample, metric="A-OKVQA multiple choice")


def aokvqa_direct_answer(
    predictions: Sequence[str | None],
    answers: Sequence[Sequence[str]],
    *,
    difficult: Sequence[bool] | None = None,
) -> Score:
    """min(1, equal answers / 3) on a scale of 0 to 100: no annotator left out, no normalisation; None is wrong.

    The rule of A-OKVQA's `eval_predictions.py`.

    Args:
        predictions: one answer a sample.
        answers: the ten annotators' answers of each sample, repeated as often as given.
        difficult: marks the questions with `difficult_direct_answer`, which are left out. None: none is.

    Raises:
        ValueError: different lengths, a sample without answers, or nothing left to score.
    """
    check_references("answers", predictions, answers)
    marks = [False] * len(predictions) if difficult is None else difficult
    same_length("marks of difficult questions", predictions, marks)
    scored = tuple(number for number, mark in enumerate(marks) if not mark)
    matches = [sum(answer == predictions[number] for answer in answers[number]) for number in scored]
    per_sample = [100 * min(1.0, count / 3) for count in matches]
    return mean_score(per_sample, metric="A-OKVQA direct answer", scored=scored)


def letter_accuracy(predictions: Sequence[str], labels: Sequence[int]) -> Score:
    """Share of texts that name the right option by its letter, on a scale of 0 to 100: lmms-eval's rule for ScienceQA.

    A text is right that is the letter, of either case, or begins with the upper-case letter and a full stop ("B. Iowa").

    Raises:
        ValueError: different lengths, no samples, or a label that has no letter.
    """
    same_length("labels", predictions, labels)
    if any(not 0 <= label < len(string.ascii_uppercase) for label in labels):
        raise ValueError(f"labels are numbered from 0 to 25, got {min(labels)} to {max(labels)}")
    letters = [string.ascii_uppercase[label] for label in labels]
    per_sample = [
        100.0 * (text.strip().lower() == letter.lower() or text.strip().startswith(f"{letter}."))
        for text, letter in zip(predictions, letters, strict=True)
    ]
    return mean_score(per_sample, metric="letter accuracy")


def anls(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> Score:
    """Average normalised Levenshtein similarity to the nearest answer, between 0 and 1; a text below 0.5 scores 0.

    Biten et al., "Scene Text Visual Question Answering", ICCV 2019; white space and case as lmms-eval has them.

    Raises:
        ValueError: different lengths, no samples, or a sample without answers.
    """
    check_references("answers", predictions, answers)
    per_sample = []
    for text, accepted in zip(predictions, answers, strict=True):
        near = max(1 - _edit_share(text, answer) for answer in accepted)
        per_sample.append(near if near >= _NEAR else 0.0)
    return mean_score(per_sample, metric="ANLS", table_factor=100)


def _edit_share(text: str, answer: str) -> float:
    """Edits that lead from one to the other, by the longer one's length."""
    one, other = (" ".join(side.lower().split()) for side in (text, answer))
    row = list(range(len(one) + 1))
    for place, letter in enumerate(other):
        last, row = row, [place + 1]
        for number, own in enumerate(one):
            row.append(last[number] if own == letter else 1 + min(last[number], last[number + 1], row[-1]))
    longest = max(len(text.upper()), len(answer.upper()))  # as lmms-eval takes it
    return row[-1] / longest if longest else 0.0


def vsr_accuracy(
    predictions: Sequence[int], labels: Sequence[int], *, relations: Sequence[Hashable] | None = None
) -> Score:
    """Share of statements judged right, between 0 and 1; 1 is true, 0 is false. `details` has it by relation.

    The rule of visual-spatial-reasoning's evaluation scripts.

    Raises:
        ValueError: different lengths, no samples, or labels other than 0 and 1.
    """
    same_length("labels", predictions, labels)
    if not set(labels) <= {0, 1}:
        raise ValueError(f"VSR labels are 0 and 1, got {sorted(set(labels))}")
    per_sample = [float(prediction == label) for prediction, label in zip(predictions, labels, strict=True)]
    by_relation = (
        {
            str(relation): {"accuracy": mean, "count": count}
            for relation, (mean, count) in group_means(per_sample, relations or ()).items()
        }
        if relations is not None
        else {}
    )
    return mean_score(per_sample, metric="VSR accuracy", table_factor=100, details={"by_relation": by_relation})


def exact_match(
    predictions: Sequence[str], answers: Sequence[str], *, vocabulary: Collection[str] | None = None
) -> Score:
    """Share of predictions equal to their answer, between 0 and 1: MSVD-QA's and MSRVTT-QA's top-1 accuracy.

    The rule of just-ask's `compute_aggreeings`: the model chooses from an answer vocabulary, and a sample whose answer is
    outside it is wrong but counts.

    Args:
        predictions, answers: one text a sample, compared as they stand.
        vocabulary: the answers there are to choose from; None, as in open generation: any.

    Raises:
        ValueError: different lengths or no samples.
    """
    same_length("answers", predictions, answers)
    known = None if vocabulary is None else frozenset(vocabulary)
    per_sample = [
        float(prediction == answer and (known is None or answer in known))
        for prediction, answer in zip(predictions, answers, strict=True)
    ]
    return mean_score(per_sample, metric="exact match", table_factor=100)


def ivqa_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> Score:
    """min(1, equal answers / 2) over the five annotators, between 0 and 1, texts compared as they stand.

    Yang et al., "Just Ask", ICCV 2021; the rule of its `compute_aggreeings`.

    Raises:
        ValueError: different lengths, no samples, or a sample without answers.
    """
    check_references("answers", predictions, answers)
    per_sample = [
        min(1.0, Counter(given)[prediction] / 2) for prediction, given in zip(predictions, answers, strict=True)
    ]
    return mean_score(per_sample, metric="iVQA accuracy", table_factor=100)


def _matches(prediction: str, accepted: Sequence[str], normalize: bool) -> bool:
    if normalize:
        return normalize_answer(prediction) in {normalize_answer(answer) for answer in accepted}
    return prediction in accepted


# --- of outputs and records -------------------------------------------------------------------------------------------


def accuracy_of_records(outputs: Outputs, records: Records) -> Score:
    """Texts as they stand where the model chose, after `normalize_answer` where it wrote."""
    wrote = not any(output.classes or output.scores for output in outputs)
    return accuracy(texts_of(outputs), accepted_answers(records), normalize=wrote)


def multiple_choice_accuracy_of_records(outputs: Outputs, records: Records) -> Score:
    """By the number of the chosen option (`chosen_option`)."""
    return multiple_choice_accuracy(_chosen_options(outputs, records), labels_of(records))


def aokvqa_multiple_choice_of_records(outputs: Outputs, records: Records) -> Score:
    """By the text of the chosen option (`chosen_option`)."""
    chosen = _chosen_options(outputs, records)
    texts = [
        None if number == NO_CHOICE else record.choices[number] for number, record in zip(chosen, records, strict=True)
    ]
    correct = [record.choices[label] for record, label in zip(records, labels_of(records), strict=True)]
    return aokvqa_multiple_choice(texts, correct)


def aokvqa_direct_answer_of_records(outputs: Outputs, records: Records) -> Score:
    """Without the records that the tag `difficult_direct_answer` marks."""
    difficult = [record.tags.get("difficult_direct_answer") == "true" for record in records]
    return aokvqa_direct_answer(texts_of(outputs), all_answers(records), difficult=difficult)


def exact_match_of_records(outputs: Outputs, records: Records) -> Score:
    """Against each record's only answer."""
    return exact_match(texts_of(outputs), only_answers(records))


def ivqa_accuracy_of_records(outputs: Outputs, records: Records) -> Score:
    """Against all annotators' answers."""
    return ivqa_accuracy(texts_of(outputs), all_answers(records))


def letter_accuracy_of_records(outputs: Outputs, records: Records) -> Score:
    """Against the letter of the right choice."""
    return letter_accuracy(texts_of(outputs), labels_of(records))


def anls_of_letters(outputs: Outputs, records: Records) -> Score:
    """ANLS against the letter of the right choice, which is what lmms-eval's prompt for IconQA asks for."""
    return anls(texts_of(outputs), [[string.ascii_uppercase[label]] for label in labels_of(records)])


def chosen_option(output: ModelOutput, record: Record) -> int:
    """Number of the chosen option: the likeliest (the first of equals); of a text, written or ranked among others than the
    record's own choices, the option that it repeats or whose letter it is.

    Raises:
        ValueError: the record has not as many choices as the output has scores.
    """
    if output.scores and output.classes in ((), record.choices):
        if len(output.scores) != len(record.choices):
            raise ValueError(f"record {record.id!r} has {len(record.choices)} choices but {len(output.scores)} scores")
        return output.scores.index(max(output.scores))
    written = normalize_answer(output.text)
    for number, choice in enumerate(record.choices):
        if normalize_answer(choice) == written:
            return number
    return scienceqa_choice(output.text, len(record.choices))


def _chosen_options(outputs: Outputs, records: Records) -> list[int]:
    return [chosen_option(output, record) for output, record in zip(outputs, records, strict=True)]
