"""Each scorer as a `torchmetrics.Metric`: `update` a batch at a time, `compute` the value over all batches of all ranks.

    metric = VQAAccuracy(variant="lavis")
    metric.update(predictions, answers)   # what `vqa_accuracy` takes, one entry a sample
    metric.compute()                      # its value, on its scale; `metric.score` is the whole `Score`

What a scorer reads is kept until `compute`: most of them are no mean over batches. Samples that a distributed sampler
repeats, to give all ranks as many, count as often as they come.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

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
    vsr_accuracy,
)
from instructblip.evaluation.metrics.auroc import auroc
from instructblip.evaluation.metrics.captions import cider, rouge
from instructblip.evaluation.metrics.retrieval import retrieval_recall
from instructblip.evaluation.metrics.score import Score, same_length
from instructblip.evaluation.metrics.visdial import visdial
from instructblip.evaluation.metrics.vqa import gqa_accuracy, ocr_vqa_accuracy, vqa_accuracy


class ScorerMetric(Metric):
    """A scorer over all that it was given.

    Args:
        options: of the scorer, that are not one a sample, such as `variant`.

    Attributes:
        score: what the last `compute` found, with details and a value a sample; those of rank 0 come first.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    scorer: ClassVar[Callable[..., Score]]
    score: Score | None
    lines: list[Tensor]  # a tensor while ranks are synchronised

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._options, self.score = options, None
        # A line of JSON a sample, as bytes: ranks exchange tensors only.
        self.add_state("lines", default=[], dist_reduce_fx="cat")

    def update(self, predictions: Sequence[Any] | Tensor, *others: Any, **named: Any) -> None:
        """Take a batch.

        Args:
            predictions, others: the scorer's own, in its order, one entry a sample; lists, or tensors of numbers.
            named: further ones by their names there, such as `relations`.

        Raises:
            ValueError: they differ in length.
        """
        columns = [_plain(column) for column in (predictions, *others)]
        by_name = {name: _plain(column) for name, column in named.items()}
        for number, column in enumerate([*columns, *by_name.values()]):
            same_length(f"entries of argument {number}", columns[0], column)
        rows = [
            {
                "columns": [column[row] for column in columns],
                "named": {name: column[row] for name, column in by_name.items()},
            }
            for row in range(len(columns[0]))
        ]
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        self.lines.append(
            torch.frombuffer(bytearray(text, "ascii") or bytearray(b"\n"), dtype=torch.uint8).to(self.device)
        )

    def compute(self) -> Tensor:
        """The scorer's value.

        Raises:
            ValueError: as the scorer, such as of no samples.
        """
        given = dim_zero_cat(self.lines).cpu().numpy().tobytes() if len(self.lines) else b""
        rows = [json.loads(line) for line in given.splitlines() if line]
        width = max((len(row["columns"]) for row in rows), default=2)
        columns = [[row["columns"][place] for row in rows] for place in range(width)]
        named = {name: [row["named"][name] for row in rows] for row in rows[:1] for name in row["named"]}
        self.score = type(self).scorer(*columns, **named, **self._options)
        return torch.tensor(self.score.value, device=self.device)

    def sync(self, *arguments: Any, **named: Any) -> None:
        """As torchmetrics', also where a rank has no sample: what it sends has the type of the others'."""
        if not len(self.lines):
            self.lines.append(torch.zeros(0, dtype=torch.uint8, device=self.device))
        super().sync(*arguments, **named)


def _plain(column: Any) -> list[Any]:
    if isinstance(column, str):
        raise ValueError(f"a list with one entry a sample is needed, not the text {column!r}")
    if isinstance(column, Tensor):
        return list(column.tolist())
    return [entry.tolist() if isinstance(entry, Tensor) else entry for entry in column]


class Accuracy(ScorerMetric):
    """`accuracy`."""

    scorer = staticmethod(accuracy)


class MultipleChoiceAccuracy(ScorerMetric):
    """`multiple_choice_accuracy`."""

    scorer = staticmethod(multiple_choice_accuracy)


class LetterAccuracy(ScorerMetric):
    """`letter_accuracy`."""

    scorer = staticmethod(letter_accuracy)


class ANLS(ScorerMetric):
    """`anls`."""

    scorer = staticmethod(anls)


class IconQAAccuracy(ScorerMetric):
    """`iconqa_accuracy`."""

    scorer = staticmethod(iconqa_accuracy)


class AOKVQAMultipleChoice(ScorerMetric):
    """`aokvqa_multiple_choice`."""

    scorer = staticmethod(aokvqa_multiple_choice)


class AOKVQADirectAnswer(ScorerMetric):
    """`aokvqa_direct_answer`."""

    scorer = staticmethod(aokvqa_direct_answer)


class VSRAccuracy(ScorerMetric):
    """`vsr_accuracy`."""

    scorer = staticmethod(vsr_accuracy)


class ExactMatch(ScorerMetric):
    """`exact_match`."""

    scorer = staticmethod(exact_match)


class IVQAAccuracy(ScorerMetric):
    """`ivqa_accuracy`."""

    scorer = staticmethod(ivqa_accuracy)


class AUROC(ScorerMetric):
    """`auroc`."""

    scorer = staticmethod(auroc)


class CIDEr(ScorerMetric):
    """`cider`."""

    scorer = staticmethod(cider)


class ROUGE(ScorerMetric):
    """`rouge`."""

    scorer = staticmethod(rouge)


class RetrievalRecall(ScorerMetric):
    """`retrieval_recall`."""

    scorer = staticmethod(retrieval_recall)


class VisDial(ScorerMetric):
    """`visdial`."""

    scorer = staticmethod(visdial)


class VQAAccuracy(ScorerMetric):
    """`vqa_accuracy`."""

    scorer = staticmethod(vqa_accuracy)


class GQAAccuracy(ScorerMetric):
    """`gqa_accuracy`."""

    scorer = staticmethod(gqa_accuracy)


class OCRVQAAccuracy(ScorerMetric):
    """`ocr_vqa_accuracy`."""

    scorer = staticmethod(ocr_vqa_accuracy)
