"""Every metric by the name a dataset card gives it, in one calling convention.

    score = METRICS[card.evaluation.metric](outputs, records)

`outputs[i]` is what the model made of `records[i]`: a text, and, where it ranked candidates, their log-likelihoods. Each
function takes from the records what its metric needs and hands over to the metric itself, whose docstring states the
scale; `Score.table_value` is on the scale of papers' tables for all of them. A record that lacks what the metric needs
(its answers are not public, say) raises ValueError with its id.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from instructblip.data.records import Record
from instructblip.evaluation.metrics.accuracy import (
    NO_CHOICE,
    accuracy,
    aokvqa_direct_answer,
    aokvqa_multiple_choice,
    exact_match,
    ivqa_accuracy,
    multiple_choice_accuracy,
    normalize_answer,
    scienceqa_choice,
)
from instructblip.evaluation.metrics.auroc import auroc, probability_of_class
from instructblip.evaluation.metrics.captions import cider
from instructblip.evaluation.metrics.score import Score, same_length
from instructblip.evaluation.metrics.visdial import visdial
from instructblip.evaluation.metrics.vqa import gqa_accuracy, ocr_vqa_accuracy, vqa_accuracy

_VQA_ANNOTATORS = 10


@dataclass(frozen=True)
class ModelOutput:
    """What a model made of one record.

    Attributes:
        text: what it wrote, or the class with the highest score.
        classes: what it chose from: the record's choices in their order, or the names of the classes; empty when it wrote
            freely.
        scores: log-likelihood of each of `classes`, in nats (of a class with several texts: of any of them).
    """

    text: str
    classes: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()


Outputs = Sequence[ModelOutput]
Records = Sequence[Record]
RecordMetric = Callable[[Outputs, Records], Score]
Reference = tuple[str, ...] | tuple[int, ...]


def _accuracy(outputs: Outputs, records: Records) -> Score:
    """PromptFormat as they stand where the model chose, after `normalize_answer` where it wrote."""
    return accuracy(_texts(outputs), _answers(records), normalize=not any(output.scores for output in outputs))


def _multiple_choice_accuracy(outputs: Outputs, records: Records) -> Score:
    _check(outputs, records)
    chosen = [_choice(output, record) for output, record in zip(outputs, records, strict=True)]
    return multiple_choice_accuracy(chosen, _labels(records))


def _aokvqa_multiple_choice(outputs: Outputs, records: Records) -> Score:
    _check(outputs, records)
    chosen = [_choice(output, record) for output, record in zip(outputs, records, strict=True)]
    texts = [
        None if number == NO_CHOICE else record.choices[number] for number, record in zip(chosen, records, strict=True)
    ]
    correct = [record.choices[label] for record, label in zip(records, _labels(records), strict=True)]
    return aokvqa_multiple_choice(texts, correct)


def _exact_match(outputs: Outputs, records: Records) -> Score:
    return exact_match(_texts(outputs), _only_answers(records))


def _ocr_vqa_accuracy(outputs: Outputs, records: Records) -> Score:
    return ocr_vqa_accuracy(_texts(outputs), _answers(records))


def _gqa_accuracy(outputs: Outputs, records: Records, *, variant: str) -> Score:
    """With `lavis` also the official score, in `details`: both go by the name of GQA accuracy."""
    texts, answers = _texts(outputs), _only_answers(records)
    balanced = [record.tags.get("balanced", "true") == "true" for record in records]
    score = gqa_accuracy(texts, answers, variant=variant, balanced=balanced)
    if variant == "official":
        return score
    exact = gqa_accuracy(texts, answers, variant="official", balanced=balanced).value if any(balanced) else None
    return replace(score, details={**score.details, "official": exact})


def _vqa_accuracy(outputs: Outputs, records: Records, *, variant: str) -> Score:
    answers = _answers(records)
    if variant == "textvqa":  # the scorer insists on ten; the reader leaves out blank ones, which it counts as answers
        answers = [given + [""] * (_VQA_ANNOTATORS - len(given)) for given in answers]
    return vqa_accuracy(_texts(outputs), answers, variant=variant)


def _ivqa_accuracy(outputs: Outputs, records: Records) -> Score:
    return ivqa_accuracy(_texts(outputs), _answers(records))


def _aokvqa_direct_answer(outputs: Outputs, records: Records) -> Score:
    difficult = [record.tags.get("difficult_direct_answer") == "true" for record in records]
    return aokvqa_direct_answer(_texts(outputs), _answers(records), difficult=difficult)


def _cider(outputs: Outputs, records: Records) -> Score:
    """CIDEr, also by domain where every record has one (NoCaps)."""
    for record in records:
        if not record.captions:
            raise ValueError(f"record {record.id!r} has no reference captions; they may not be public")
    domains = [record.tags.get("domain") for record in records]
    groups = None if None in domains else domains
    return cider(_texts(outputs), [record.captions for record in records], groups=groups)


def _auroc(outputs: Outputs, records: Records) -> Score:
    """p(class of label 1) by softmax over the class log-likelihoods; that class is what records of label 1 answer."""
    _check(outputs, records)
    labels = _labels(records)
    positive = {
        answer for record, label in zip(records, labels, strict=True) if label == 1 for answer in record.answers
    }
    if len(positive) != 1:
        raise ValueError(f"AUROC needs one answer that stands for label 1, got {sorted(positive)}")
    (name,) = positive
    probabilities = []
    for output, record in zip(outputs, records, strict=True):
        if output.classes.count(name) != 1 or len(output.scores) != len(output.classes):
            raise ValueError(f"record {record.id!r}: AUROC needs a score of class {name!r}; rank, do not generate")
        probabilities += probability_of_class([output.scores], output.classes.index(name))
    return auroc(probabilities, labels)


def _visdial(outputs: Outputs, records: Records) -> Score:
    _check(outputs, records)
    for output, record in zip(outputs, records, strict=True):
        if len(output.scores) != len(record.choices):
            raise ValueError(
                f"record {record.id!r} has {len(record.choices)} options but {len(output.scores)} scores; rank its choices"
            )
    scores = [output.scores for output in outputs]
    return visdial(scores, _labels(records), [record.relevance or None for record in records])


METRICS: dict[str, RecordMetric] = {
    "accuracy": _accuracy,
    "multiple_choice_accuracy": _multiple_choice_accuracy,
    "aokvqa_multiple_choice": _aokvqa_multiple_choice,
    "aokvqa_direct_answer": _aokvqa_direct_answer,
    "exact_match": _exact_match,
    "vqa_accuracy": partial(_vqa_accuracy, variant="official"),
    "vqa_accuracy_lavis": partial(_vqa_accuracy, variant="lavis"),
    "textvqa_accuracy": partial(_vqa_accuracy, variant="textvqa"),
    "vizwiz_accuracy": partial(_vqa_accuracy, variant="vizwiz"),
    "gqa_accuracy": partial(_gqa_accuracy, variant="official"),
    "gqa_accuracy_lavis": partial(_gqa_accuracy, variant="lavis"),
    "ocr_vqa_accuracy": _ocr_vqa_accuracy,
    "ivqa_accuracy": _ivqa_accuracy,
    "cider": _cider,
    "auroc": _auroc,
    "visdial": _visdial,
}

NEED_SCORES = ("auroc", "visdial")  # of candidates: a text that the model wrote is not enough


def _reference_answers(record: Record) -> Reference:
    return record.answers


def _reference_captions(record: Record) -> Reference:
    return record.captions


def _reference_label(record: Record) -> Reference:
    return () if record.label is None else (record.label,)


# What each metric compares with; empty where a record's answer is not public.
REFERENCES: Mapping[str, Callable[[Record], Reference]] = {
    **dict.fromkeys(METRICS, _reference_answers),
    "cider": _reference_captions,
    "multiple_choice_accuracy": _reference_label,
    "aokvqa_multiple_choice": _reference_label,
    "auroc": _reference_label,
    "visdial": _reference_label,
}


def _check(outputs: Outputs, records: Records) -> None:
    same_length("records", outputs, records)


def _texts(outputs: Outputs) -> list[str]:
    return [output.text for output in outputs]


def _answers(records: Records) -> list[list[str]]:
    """All annotators' answers of each record, repeated as often as given; a blank one is the empty text."""
    found = []
    for record in records:
        if not record.answers:
            raise ValueError(f"record {record.id!r} has no answers; they may not be public")
        weights = record.answer_weights or (1.0,) * len(record.answers)
        if len(weights) != len(record.answers) or any(weight < 1 or weight != int(weight) for weight in weights):
            raise ValueError(f"record {record.id!r}: answer weights must count annotators, got {weights}")
        given = [answer for answer, n in zip(record.answers, weights, strict=True) for _ in range(int(n))]
        found.append(given + [""] * ((record.annotators or len(given)) - len(given)))
    return found


def _only_answers(records: Records) -> list[str]:
    """The answer of each record, of which there must be one."""
    for record in records:
        if len(record.answers) != 1:
            raise ValueError(
                f"record {record.id!r} needs exactly one answer for this metric, has {len(record.answers)}"
            )
    return [record.answers[0] for record in records]


def _labels(records: Records) -> list[int]:
    labels = []
    for record in records:
        if record.label is None:
            raise ValueError(f"record {record.id!r} has no label; it may not be public")
        labels.append(record.label)
    return labels


def _choice(output: ModelOutput, record: Record) -> int:
    """Number of the chosen option: the likeliest (the first of equals); of a written text, the option that it repeats or
    whose letter it is."""
    if output.scores:
        if len(output.scores) != len(record.choices):
            raise ValueError(f"record {record.id!r} has {len(record.choices)} choices but {len(output.scores)} scores")
        return output.scores.index(max(output.scores))
    written = normalize_answer(output.text)
    for number, choice in enumerate(record.choices):
        if normalize_answer(choice) == written:
            return number
    return scienceqa_choice(output.text, len(record.choices))
