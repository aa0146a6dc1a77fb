"""Scores of predictions against references: lists in, one entry a sample; a `Score` out.

Equal to the official scorers; each docstring names them, states the scale, and says what to know. `METRICS` has them by
the names that dataset cards use, each with what evaluation and reports need to know about it, to be called with a model's
outputs and the records.
"""

from instructblip.evaluation.metrics.accuracy import (
    accuracy,
    aokvqa_direct_answer,
    aokvqa_multiple_choice,
    exact_match,
    iconqa_accuracy,
    ivqa_accuracy,
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

__all__ = [
    "METRICS",
    "Interval",
    "Metric",
    "ModelOutput",
    "Outcome",
    "Score",
    "accuracy",
    "aokvqa_direct_answer",
    "aokvqa_multiple_choice",
    "auroc",
    "cider",
    "exact_match",
    "gqa_accuracy",
    "group_means",
    "iconqa_accuracy",
    "ivqa_accuracy",
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
