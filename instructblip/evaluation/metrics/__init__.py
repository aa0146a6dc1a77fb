"""Scores of predictions against references: lists in, one entry a sample; a `Score` out.

Equal to the official scorers; each docstring names them, states the scale, and says what to know. `METRICS` has them by
the names that dataset cards use, each with what evaluation and reports need to know about it, to be called with a model's
outputs and the records. Each scorer is a `torchmetrics.Metric`, too, under its name in capitals: `VQAAccuracy`, `CIDEr`.
"""

from typing import TYPE_CHECKING, Any

from instructblip.evaluation.metrics.accuracy import (
    accuracy,
    anls,
    aokvqa_direct_answer,
    aokvqa_multiple_choice,
    exact_match,
    iconqa_accuracy,
    ivqa_accuracy,
    letter_accuracy,
    multiple_choice_accuracy,
    scienceqa_choice,
    vsr_accuracy,
)
from instructblip.evaluation.metrics.auroc import auroc, probability_of_class
from instructblip.evaluation.metrics.captions import cider, rouge
from instructblip.evaluation.metrics.metric import Interval, Metric, ModelOutput, Outcome
from instructblip.evaluation.metrics.registry import METRICS
from instructblip.evaluation.metrics.retrieval import retrieval_recall
from instructblip.evaluation.metrics.score import Score, group_means
from instructblip.evaluation.metrics.visdial import visdial
from instructblip.evaluation.metrics.vqa import gqa_accuracy, ocr_vqa_accuracy, vqa_accuracy

if TYPE_CHECKING:
    from instructblip.evaluation.metrics.modules import (
        ANLS,
        AUROC,
        ROUGE,
        Accuracy,
        AOKVQADirectAnswer,
        AOKVQAMultipleChoice,
        CIDEr,
        ExactMatch,
        GQAAccuracy,
        IconQAAccuracy,
        IVQAAccuracy,
        LetterAccuracy,
        MultipleChoiceAccuracy,
        OCRVQAAccuracy,
        RetrievalRecall,
        VisDial,
        VQAAccuracy,
        VSRAccuracy,
    )

__all__ = [
    "ANLS",
    "AUROC",
    "METRICS",
    "ROUGE",
    "AOKVQADirectAnswer",
    "AOKVQAMultipleChoice",
    "Accuracy",
    "CIDEr",
    "ExactMatch",
    "GQAAccuracy",
    "IVQAAccuracy",
    "IconQAAccuracy",
    "Interval",
    "LetterAccuracy",
    "Metric",
    "ModelOutput",
    "MultipleChoiceAccuracy",
    "OCRVQAAccuracy",
    "Outcome",
    "RetrievalRecall",
    "Score",
    "VQAAccuracy",
    "VSRAccuracy",
    "VisDial",
    "accuracy",
    "anls",
    "aokvqa_direct_answer",
    "aokvqa_multiple_choice",
    "auroc",
    "cider",
    "exact_match",
    "gqa_accuracy",
    "group_means",
    "iconqa_accuracy",
    "ivqa_accuracy",
    "letter_accuracy",
    "multiple_choice_accuracy",
    "ocr_vqa_accuracy",
    "probability_of_class",
    "retrieval_recall",
    "rouge",
    "scienceqa_choice",
    "visdial",
    "vqa_accuracy",
    "vsr_accuracy",
]


def __getattr__(name: str) -> Any:
    """The classes of `modules`, which begins with torchmetrics: slow to import, and for who asks for them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from instructblip.evaluation.metrics import modules

    return getattr(modules, name)
