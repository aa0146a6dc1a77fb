"""Each scorer as a `torchmetrics.Metric` equals its function on the metric vectors, in batches and on two ranks."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from instructblip.distributed import Ranks
from instructblip.evaluation import metrics
from instructblip.evaluation.metrics.modules import ScorerMetric, VQAAccuracy
from tests.kit.ranks import on_ranks
from tests.unit.test_metric_vectors import columns, dense, vectors

Case = tuple[str, list[list[Any]], dict[str, list[Any]], dict[str, Any]]  # class, columns, by name, options


def cases() -> Iterator[Case]:
    """Every class with the vectors of its scorer."""
    texts, several, *_ = columns("vqa_accuracy", 74)
    for variant in ("official", "lavis", "textvqa"):
        yield "VQAAccuracy", [texts, several], {}, {"variant": variant}
    yield "Accuracy", [texts, several], {}, {"normalize": True}
    texts, several, _ = columns("ocrvqa", 84)
    yield "OCRVQAAccuracy", [texts, several], {}, {}
    yield "GQAAccuracy", [texts, [given[0] for given in several]], {}, {"variant": "lavis"}
    choices, labels, several, difficult, chosen, written, *_ = columns("aokvqa", 40)
    right = [texts[label] for texts, label in zip(choices, labels, strict=True)]
    yield "AOKVQAMultipleChoice", [chosen, right], {}, {}
    yield "AOKVQADirectAnswer", [written, several], {"difficult": difficult}, {}
    written, letters, _ = (list(column) for column in zip(*vectors("lmms_eval")["letters"], strict=True))
    yield "LetterAccuracy", [written, letters], {}, {}
    written, accepted, _ = (list(column) for column in zip(*vectors("lmms_eval")["anls"], strict=True))
    yield "ANLS", [written, accepted], {}, {}
    _, answered, answers, _ = columns("iconqa", 60)
    yield "IconQAAccuracy", [answered, answers], {}, {}
    relations, labels, judged, _ = columns("vsr", 60)
    yield "VSRAccuracy", [judged, labels], {"relations": relations}, {}
    yield "MultipleChoiceAccuracy", [judged, labels], {}, {}
    _, _, labels, probabilities = columns("hateful_memes_auroc", 120)
    yield "AUROC", [probabilities, labels], {}, {}
    texts, answers, _ = columns("msvd_msrvtt", 30)
    yield "ExactMatch", [texts, answers], {}, {"vocabulary": vectors("msvd_msrvtt").get("vocabulary")}
    texts, several, _ = columns("ivqa", 30)
    yield "IVQAAccuracy", [texts, several], {}, {}
    texts, several, *_ = columns("captions_coco", 150)
    yield "CIDEr", [texts, several], {}, {"tokenizer": "python"}
    yield "ROUGE", [texts, several], {}, {"tokenizer": "python"}
    scores, relevance, _ = columns("visdial_ndcg", 15)
    yield "VisDial", [scores, [0] * 15, [dense(each) for each in relevance]], {}, {}
    yield "RetrievalRecall", [[0, 3, None, 12], [[0, 1], [7], [None, 2], [4, 0]]], {}, {}


CASES = list(cases())


def score_of(case: Case) -> metrics.Score:
    name, given, named, options = case
    found: metrics.Score = getattr(metrics, name).scorer(*given, **named, **options)
    return found


def filled(case: Case, batches: list[slice]) -> ScorerMetric:
    name, given, named, options = case
    metric: ScorerMetric = getattr(metrics, name)(**options)
    for batch in batches:
        metric.update(*(column[batch] for column in given), **{key: column[batch] for key, column in named.items()})
    return metric


def test_every_scorer_has_a_class_and_every_class_is_tried() -> None:
    classes = {
        name
        for name in metrics.__all__
        if inspect.isclass(found := getattr(metrics, name)) and issubclass(found, ScorerMetric)
    }
    assert {name for name, *_ in CASES} == classes
    helpers = {"group_means", "probability_of_class", "scienceqa_choice"}
    functions = {name for name in metrics.__all__ if inspect.isfunction(getattr(metrics, name))}
    assert {getattr(metrics, name).scorer.__name__ for name in classes} == functions - helpers


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[3].get('variant', '')}")
def test_in_batches_it_equals_its_function(case: Case) -> None:
    expected = score_of(case)
    metric = filled(case, [slice(0, 1), slice(1, 1), slice(1, 3), slice(3, None)])
    assert metric.compute().item() == pytest.approx(expected.value, rel=1e-6)
    assert metric.score == expected
    metric.reset()
    with pytest.warns(UserWarning, match="before the"), pytest.raises(ValueError):
        metric.compute()


def _halves(ranks: Ranks) -> list[tuple[float, int]]:
    """What this rank computes of each case, with three samples on the first rank, then with none."""
    found = []
    for shares in ((slice(0, 3), slice(3, None)), (slice(0, 0), slice(0, None))):
        for case in CASES:
            metric = filled(case, [shares[ranks.rank]] if shares[ranks.rank].stop != 0 else [])
            value = metric.compute().item()
            assert metric.score is not None
            found.append((value, metric.score.count))
    return found


@pytest.mark.slow
def test_two_ranks_compute_what_one_does() -> None:
    one, other = on_ranks(2, _halves)
    expected = [score_of(case) for case in CASES] * 2
    assert one == other
    assert [count for _, count in one] == [score.count for score in expected]
    assert [value for value, _ in one] == pytest.approx([score.value for score in expected], rel=1e-6)


def test_a_batch_has_its_own_value_in_a_loop_and_labels_may_be_tensors() -> None:
    metric = metrics.MultipleChoiceAccuracy()
    assert metric(torch.tensor([1, 0]), torch.tensor([1, 1])).item() == 50
    assert metric([1, 1], torch.tensor([1, 1])).item() == 100
    assert metric.compute().item() == 75


def test_what_is_no_list_or_of_other_length_is_refused() -> None:
    with pytest.raises(ValueError, match="not the text 'yes'"):
        VQAAccuracy().update("yes", [["yes"] * 10])
    with pytest.raises(ValueError, match="1 predictions for 2 entries of argument 1"):
        VQAAccuracy().update(["yes"], [["yes"] * 10] * 2)
