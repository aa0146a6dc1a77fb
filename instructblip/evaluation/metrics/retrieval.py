"""Recall of retrieval in both directions: how often what is right stands among the first 1, 5 and 10.

As LAVIS reports it (`tasks/retrieval.py`): an image finds its captions when any of them is among the first k of all
captions, a caption its image when that is among the first k of all images; and the means of these. Equal to torchmetrics'
`retrieval_hit_rate`, which asks for the scores of a whole row; here a row has no more than its first ten places left.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from instructblip.evaluation.metrics.metric import Outputs, Records
from instructblip.evaluation.metrics.score import Score, same_length

AT = (1, 5, 10)
TO_TEXT, TO_IMAGE = "TR", "IR"  # as the papers call text retrieval (an image is given) and image retrieval

Ranks = Sequence[int | None]


def retrieval_recall(text_ranks: Ranks, image_ranks: Sequence[Ranks]) -> Score:
    """Mean of the six recalls, in percent; the recalls and the mean of each direction are its parts.

    An image is a sample, with all its captions: an image with more captions weighs more in the direction from text to image.

    Args:
        text_ranks: for each image the place of its first right caption, 0 for the best; None: not found.
        image_ranks: for each image, for each of its captions, the place of the image.

    Raises:
        ValueError: different lengths, no images, or an image without captions.
    """
    same_length("lists of image ranks", text_ranks, image_ranks)
    if not text_ranks:
        raise ValueError("recall of no images is not defined")
    if not all(image_ranks):
        raise ValueError("an image has no captions")
    captions_N = np.array([len(ranks) for ranks in image_ranks], dtype=np.float64)
    images_N = np.ones_like(captions_N)
    parts: dict[str, Score] = {}
    shares = []
    for direction, rows, weights_N in (
        (TO_TEXT, [[rank] for rank in text_ranks], images_N),
        (TO_IMAGE, image_ranks, captions_N),
    ):
        hits_NK = 100 * np.array([[_found(row, k) for k in AT] for row in rows], dtype=np.float64)
        for k, hits_N in zip(AT, hits_NK.T, strict=True):
            parts[f"{direction}@{k}"] = _ratio([(hits_N, weights_N)])
        shares.append((hits_NK.mean(axis=1), weights_N))
        parts[f"{direction} mean"] = _ratio(shares[-1:])
    return _ratio(shares, parts)


def recall_of_records(outputs: Outputs, records: Records) -> Score:
    """`retrieval_recall` of what `retrieve` mode found.

    Raises:
        ValueError: as there, or an output of another mode.
    """
    for output, record in zip(outputs, records, strict=True):
        if len(output.ranks) != 1 + len(record.captions):
            raise ValueError(f"record {record.id!r} has {len(record.captions)} captions and {len(output.ranks)} ranks")
    return retrieval_recall([output.ranks[0] for output in outputs], [output.ranks[1:] for output in outputs])


def chance_of_recall(captions: Sequence[int]) -> float:
    """`retrieval_recall` that is expected of random orders, for images with so many captions each."""
    images, texts = len(captions), sum(captions)
    missed = [[math.comb(texts - own, min(k, texts)) / math.comb(texts, min(k, texts)) for own in captions] for k in AT]
    to_text = 1 - np.mean(missed)
    to_image = np.mean([min(1.0, k / images) for k in AT])
    return float(100 * (to_text + to_image) / 2)


def _found(ranks: Ranks, k: int) -> int:
    return sum(rank is not None and rank < k for rank in ranks)


def _ratio(
    shares: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], parts: dict[str, Score] | None = None
) -> Score:
    """The mean over (hits, weights) of sum of hits / sum of weights, N images each, with its value on resamples."""

    def resampled(times_RN: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.mean([(times_RN @ hits_N) / (times_RN @ weights_N) for hits_N, weights_N in shares], axis=0)

    count = len(shares[0][0])
    # What each image adds, so that their mean is the value.
    per_image = np.mean([hits_N * count / weights_N.sum() for hits_N, weights_N in shares], axis=0)
    return Score(float(per_image.mean()), tuple(per_image.tolist()), count, parts=parts or {}, resampled=resampled)
