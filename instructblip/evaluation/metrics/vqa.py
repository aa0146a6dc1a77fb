"""VQA accuracy and its relatives: official scorers' rules for short answers, with all their oddities.

The rules were read off, and checked against the output of, GT-Vision-Lab/VQA (VQAv2, OKVQA), LAVIS, mmf (TextVQA,
OCR-VQA), the GQA evaluation script and the VizWiz API. Each scorer normalises differently, and not always both sides;
the differences reach tens of points on odd answers, so the variant is part of every score.
"""

import re
import string
from collections.abc import Callable, Sequence

from instructblip.evaluation.metrics.metric import (
    Outputs,
    Records,
    accepted_answers,
    all_answers,
    only_answers,
    texts_of,
)
from instructblip.evaluation.metrics.score import Score, check_references, mean_score, same_length

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PERIOD = re.compile(r"\.(?!\d)")
_DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
VQA_ANNOTATORS = 10
FEWEST_ANNOTATORS = 4  # with fewer, three of the others cannot agree with an answer, so no answer gets full marks
_MAX_PERIODS = 32  # the scorers pass the flag re.UNICODE where re.sub takes its count
_DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
# A word that lacks one of its apostrophes gets it back. Words missing here on purpose: the scorers' own list lacks them.
_CONTRACTED = [
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hasn't",
    "haven't",
    "he'd",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "isn't",
    "it'd",
    "it'll",
    "ma'am",
    "mightn't",
    "might've",
    "mustn't",
    "must've",
    "needn't",
    "not've",
    "o'clock",
    "oughtn't",
    "shan't",
    "should've",
    "shouldn't",
    "somebody'll",
    "somebody's",
    "someone'd",
    "someone'll",
    "someone's",
    "something'd",
    "something'll",
    "that's",
    "there'd",
    "there're",
    "there's",
    "they'd",
    "they'll",
    "they're",
    "they've",
    "'twas",
    "wasn't",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "y'all",
    "you'd",
    "you'll",
    "you're",
    "you've",
    "couldn't've",
    "hadn't've",
    "he'd've",
    "it'd've",
    "mightn't've",
    "she'd've",
    "shouldn't've",
    "somebody'd've",
    "someone'd've",
    "something'd've",
    "there'd've",
    "they'd've",
    "we'd've",
    "who'd've",
    "wouldn't've",
    "y'all'll",
    "you'd've",
    "y'all'd've",
    "'ow's'at",
]
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in _CONTRACTED for place, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # a slip of the scorers, kept


def normalize_vqa(text: str) -> str:
    """An answer as the VQA scorer compares it: no punctuation, lower case, digits for number words, no articles.

    Newlines and tabs become spaces and the ends are stripped first. A mark of punctuation is deleted where the text has it
    next to a space, or has a comma between digits anywhere; elsewhere it becomes a space. Periods go unless a digit
    follows; the first 32 of them only. "none" is 0. Missing apostrophes are put back ("dont" -> "don't").
    """
    return _digits_and_articles(_punctuation(_one_line(text)))


def normalize_textvqa(text: str) -> str:
    """As `normalize_vqa`, but first lower-cased, commas and question marks deleted, and "'s" made a word of its own."""
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalize_vqa(words)


def vqa_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]], *, variant: str = "official") -> Score:
    """VQA accuracy on a scale of 0 to 100: agreement with annotators, each left out in turn.

    An annotator left out, a prediction scores min(1, matches among the others / 3); the mean over annotators is the
    sample's score, so with ten annotators 0, 1, 2, 3, 4 or more matches give 0, 30, 60, 90, 100.
    Antol et al., "VQA: Visual Question Answering", ICCV 2015; rules as in the scorers named.

    Args:
        predictions: one answer a sample.
        answers: all annotators' answers of each sample, repeated as often as given (ten; `textvqa` insists).
        variant: how both sides are made comparable.
            * `official` (VQAv2, OKVQA; GT-Vision-Lab/VQA): both by `normalize_vqa`, but as they stand, case and all, where
              the annotators agree to the letter.
            * `lavis` (salesforce/LAVIS): predictions always by `normalize_vqa`; answers only lose punctuation, and not
              even that where the annotators agree to the letter.
            * `textvqa` (facebookresearch/mmf): both always by `normalize_textvqa`. mmf prints a fraction; here times 100,
              as the leaderboard does.
            * `vizwiz` (VizWiz API): predictions by `normalize_vqa`, answers as they stand.
            * `lmms_eval` (EvolvingLMMs-Lab/lmms-eval, VizWiz): as `textvqa`, for any number of annotators. Its numbers are
              not the API's.

    Raises:
        ValueError: unknown variant, different lengths, no samples, a sample without answers, or for `textvqa` not ten.
    """
    if variant not in VQA_VARIANTS:
        raise ValueError(f"VQA accuracy knows the variants {', '.join(VQA_VARIANTS)}, not {variant!r}")
    check_references("answers", predictions, answers)
    comparable = VQA_VARIANTS[variant]
    per_sample = []
    for prediction, given in zip(predictions, answers, strict=True):
        if variant == "textvqa" and len(given) != VQA_ANNOTATORS:
            raise ValueError(f"TextVQA accuracy needs ten answers a sample, got {len(given)}")
        text, references = comparable(prediction, given)
        per_sample.append(100 * _leave_one_out(text, references))
    return mean_score(per_sample, metric="VQA accuracy", details={"variant": variant})


def gqa_accuracy(
    predictions: Sequence[str],
    answers: Sequence[str],
    *,
    variant: str = "official",
    balanced: Sequence[bool] | None = None,
) -> Score:
    """GQA accuracy on a scale of 0 to 100.

    Hudson and Manning, "GQA", CVPR 2019; rules as in its evaluation script.

    Args:
        predictions, answers: one text a sample.
        variant: `official` compares the strings as they stand; `lavis` after `normalize_vqa` on both sides; `lmms_eval`
            (EvolvingLMMs-Lab/lmms-eval, `exact_match`) without case and punctuation.
        balanced: whether each question is of the balanced set; the others are left out of `official` scores. None: all
            are, as in the released balanced files.

    Raises:
        ValueError: unknown variant, different lengths, or nothing left to score.
    """
    if variant not in GQA_VARIANTS:
        raise ValueError(f"GQA accuracy knows the variants {', '.join(GQA_VARIANTS)}, not {variant!r}")
    same_length("answers", predictions, answers)
    scored = tuple(range(len(predictions)))
    if balanced is not None:
        same_length("marks of balanced questions", predictions, balanced)
        scored = tuple(number for number in scored if balanced[number] or variant != "official")
    normalize = GQA_VARIANTS[variant]
    per_sample = [100.0 * (normalize(predictions[number]) == normalize(answers[number])) for number in scored]
    return mean_score(per_sample, metric="GQA accuracy", scored=scored, details={"variant": variant})


def ocr_vqa_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> Score:
    """Share of predictions among their answers after `normalize_textvqa` on both sides, between 0 and 1.

    The dataset has no official scorer; this is mmf's `ocrvqa_accuracy`.

    Raises:
        ValueError: different lengths, no samples, or a sample without answers.
    """
    check_references("answers", predictions, answers)
    per_sample = [
        float(normalize_textvqa(prediction) in {normalize_textvqa(answer) for answer in given})
        for prediction, given in zip(predictions, answers, strict=True)
    ]
    return mean_score(per_sample, metric="OCR-VQA accuracy", table_factor=100)


# --- of outputs and records -------------------------------------------------------------------------------------------


def vqa_accuracy_of_records(outputs: Outputs, records: Records, *, variant: str) -> Score:
    """Against all annotators' answers, blank ones too."""
    return vqa_accuracy(texts_of(outputs), all_answers(records), variant=variant)


def gqa_accuracy_of_records(outputs: Outputs, records: Records, *, variant: str) -> Score:
    """With another variant also the official score, in `details`: all go by the name of GQA accuracy."""
    texts, answers = texts_of(outputs), only_answers(records)
    balanced = [record.tags.get("balanced", "true") == "true" for record in records]
    score = gqa_accuracy(texts, answers, variant=variant, balanced=balanced)
    if variant == "official":
        return score
    exact = gqa_accuracy(texts, answers, variant="official", balanced=balanced).value if any(balanced) else None
    return score.with_details(official=exact)


def ocr_vqa_accuracy_of_records(outputs: Outputs, records: Records) -> Score:
    """Against all accepted answers."""
    return ocr_vqa_accuracy(texts_of(outputs), accepted_answers(records))


# --- how sides are made comparable ------------------------------------------------------------------------------------

Comparable = Callable[[str, Sequence[str]], tuple[str, list[str]]]


def _official(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    given = [_one_line(answer) for answer in answers]
    if len(set(given)) == 1:
        return _one_line(prediction), given
    return normalize_vqa(prediction), [normalize_vqa(answer) for answer in given]


def _lavis(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    agreed = len(set(answers)) == 1
    return normalize_vqa(prediction), [answer if agreed else _punctuation(answer) for answer in answers]


def _textvqa(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    return normalize_textvqa(prediction), [normalize_textvqa(answer) for answer in answers]


def _vizwiz(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    return normalize_vqa(prediction), list(answers)


VQA_VARIANTS: dict[str, Comparable] = {
    "official": _official,
    "lavis": _lavis,
    "textvqa": _textvqa,
    "vizwiz": _vizwiz,
    "lmms_eval": _textvqa,
}


def _plain(text: str) -> str:
    return text.lower().translate(_NO_PUNCTUATION)


GQA_VARIANTS: dict[str, Callable[[str], str]] = {"official": str, "lavis": normalize_vqa, "lmms_eval": _plain}


def _leave_one_out(text: str, references: Sequence[str]) -> float:
    matches = [reference == text for reference in references]
    return sum(min(1.0, (sum(matches) - own) / 3) for own in matches) / len(matches)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(text: str) -> str:
    digits_around_comma = _DIGITS_AROUND_COMMA.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        cleaned = cleaned.replace(mark, "" if beside_space or digits_around_comma else " ")
    return _PERIOD.sub("", cleaned, count=_MAX_PERIODS)


def _digits_and_articles(text: str) -> str:
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
