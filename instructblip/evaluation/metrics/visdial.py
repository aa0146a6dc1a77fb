"""VisDial: where the right answer stands among 100 options, and how good the first options are."""

import math
from collections.abc import Sequence

from instructblip.evaluation.metrics.metric import Outputs, Records, labels_of
from instructblip.evaluation.metrics.score import Score, mean_score, same_length

_RECALL_AT = (1, 5, 10)


def visdial(
    scores: Sequence[Sequence[float]],
    labels: Sequence[int],
    relevance: Sequence[Sequence[float] | None] | None = None,
) -> Score:
    """Mean reciprocal rank of the right option, between 0 and 1; `details` has R@1, R@5, R@10, mean rank and NDCG.

    Das et al., "Visual Dialog", CVPR 2017, and the challenge's starter code. R@k and NDCG are between 0 and 1, higher is
    better; the mean rank counts from 1, lower is better. NDCG is the mean over the rounds that have relevances (one a
    dialog), of dcg / best dcg over the first k options, k the number of options with relevance above 0, and discount
    1 / log2(rank + 1). Equal scores rank in the order of the options (in the starter code: in no stated order). `parts` has
    R@k and NDCG with a value a round.

    Args:
        scores: of the options of each round; higher is better, such as log-likelihoods.
        labels: the number of the right option of each round, from 0.
        relevance: 0 to 1 for each option of a round, or None for a round without; None: no NDCG.

    Raises:
        ValueError: different lengths, no rounds, a label that names no option, a score that is NaN, or relevances that
            do not fit the options or are all 0.
    """
    same_length("labels", scores, labels)
    relevances = [None] * len(scores) if relevance is None else relevance
    same_length("lists of relevances", scores, relevances)
    ranks, gains, annotated = [], [], []
    for number, (row, label, relevant) in enumerate(zip(scores, labels, relevances, strict=True)):
        order = _order(row, number)
        if not 0 <= label < len(row):
            raise ValueError(f"round {number} has {len(row)} options, none of them number {label}")
        ranks.append(order.index(label) + 1)
        if relevant is not None:
            gains.append(_ndcg(order, relevant, number))
            annotated.append(number)
    details: dict[str, float | int | None] = {
        f"r@{k}": sum(rank <= k for rank in ranks) / max(1, len(ranks)) for k in _RECALL_AT
    }
    details["mean_rank"] = sum(ranks) / max(1, len(ranks))
    details["ndcg"] = sum(gains) / len(gains) if gains else None
    details["ndcg_count"] = len(gains)
    parts = {
        f"r@{k}": mean_score([float(rank <= k) for rank in ranks], metric="VisDial", table_factor=100)
        for k in _RECALL_AT
        if ranks
    }
    if gains:
        parts["ndcg"] = mean_score(gains, metric="NDCG", table_factor=100, scored=tuple(annotated))
    return mean_score([1 / rank for rank in ranks], metric="VisDial", table_factor=100, details=details, parts=parts)


def option_ranks(scores: Sequence[float]) -> list[int]:
    """Rank from 1 (best) of each option, equal scores in the order of the options; what a VisDial submission holds."""
    ranks = [0] * len(scores)
    for rank, option in enumerate(_order(scores, 0), start=1):
        ranks[option] = rank
    return ranks


def visdial_of_records(outputs: Outputs, records: Records) -> Score:
    """By the log-likelihoods of each record's choices.

    Raises:
        ValueError: a choice without a score; otherwise as `visdial`.
    """
    for output, record in zip(outputs, records, strict=True):
        if len(output.scores) != len(record.choices) or output.classes not in ((), record.choices):
            raise ValueError(
                f"record {record.id!r} has {len(record.choices)} options but {len(output.scores)} scores; rank its choices"
            )
    scores = [output.scores for output in outputs]
    return visdial(scores, labels_of(records), [record.relevance or None for record in records])


def chance_of_options(options: int) -> float:
    """Mean reciprocal rank of an even draw, times 100: the mean of 1/rank."""
    return 100 * sum(1 / rank for rank in range(1, options + 1)) / options


def _order(scores: Sequence[float], number: int) -> list[int]:
    """Numbers of the options, best first."""
    if any(math.isnan(score) for score in scores):
        raise ValueError(f"round {number} has an option whose score is NaN")
    return sorted(range(len(scores)), key=lambda option: -scores[option])


def _ndcg(order: Sequence[int], relevance: Sequence[float], number: int) -> float:
    from torchmetrics.functional.retrieval import retrieval_normalized_dcg  # slow to import, and for one metric

    if len(relevance) != len(order):
        raise ValueError(f"round {number} has {len(order)} options but {len(relevance)} relevances")
    import torch  # a table of scores needs none

    ordered = torch.tensor([relevance[option] for option in order], dtype=torch.float64)
    count = int(ordered.count_nonzero())
    if count == 0:
        raise ValueError(f"round {number} has no relevant option, so its NDCG is not defined")
    # Places, not scores: it would average over equal scores, and the challenge does not.
    places = torch.arange(len(order), 0, -1, dtype=torch.float64)
    return float(retrieval_normalized_dcg(places, ordered, top_k=count))
