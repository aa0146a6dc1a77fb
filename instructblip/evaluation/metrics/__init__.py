"""Scores of predictions against references: lists in, one entry a sample; a `Score` out."""

from instructblip.evaluation.metrics.accuracy import accuracy
from instructblip.evaluation.metrics.score import Score

__all__ = ["Score", "accuracy"]
