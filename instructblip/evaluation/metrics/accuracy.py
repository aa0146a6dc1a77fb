"""Exact-match accuracy."""

from collections.abc import Sequence

from instructblip.evaluation.metrics.score import Score

_TRAILING_PUNCTUATION = ".,;:!?"


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
    if len(predictions) != len(answers):
        raise ValueError(f"{len(predictions)} predictions for {len(answers)} samples with answers")
    if not predictions:
        raise ValueError("accuracy of no samples is not defined")
    per_sample = tuple(
        100.0 * _matches(prediction, accepted, normalize)
        for prediction, accepted in zip(predictions, answers, strict=True)
    )
    return Score(value=sum(per_sample) / len(per_sample), per_sample=per_sample, count=len(per_sample))


def normalize_answer(text: str) -> str:
    """Lower-case, white space made single and stripped, and sentence punctuation at the end dropped ("Yes. " -> "yes").

    Articles, number words and contractions stay: this is not the VQA scorer's normalisation.
    """
    return " ".join(text.lower().split()).rstrip(_TRAILING_PUNCTUATION + " ")


def _matches(prediction: str, accepted: Sequence[str], normalize: bool) -> bool:
    if isinstance(accepted, str) or not accepted:
        raise ValueError(f"each sample needs a list of at least one accepted answer, got {accepted!r}")
    if normalize:
        return normalize_answer(prediction) in {normalize_answer(answer) for answer in accepted}
    return prediction in accepted
