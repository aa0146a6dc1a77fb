"""How well BLIP-2's first stage finds each picture's caption in a validation set, and each caption's picture.

What its training watches: features alone, without the matching head, and one caption a picture.

Shape legend: N pairs, Q queries, E width of the projected features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from instructblip.data.feature_cache import ReadImage
from instructblip.distributed import ALONE, Ranks
from instructblip.errors import DamagedSample, UserError
from instructblip.evaluation.protocol import EvaluationSample, Task
from instructblip.models.blip2 import BLIP2, similarities

_ROWS = 64  # pictures whose similarities with all captions are held at a time


def caption_pairs(task: Task) -> tuple[EvaluationSample, ...]:
    """Samples of a task, one a picture, whose first caption is the picture's.

    Raises:
        UserError: there are none.
    """
    pairs: dict[str, EvaluationSample] = {}
    for sample in task.samples:
        if sample.record.captions:
            pairs.setdefault(sample.image_key, sample)
    if not pairs:
        raise UserError(
            f"suite.held_in names {task.card.name}, which has no captions, and a model without a language model answers no "
            "questions; name datasets with captions, or set suite=none"
        )
    return tuple(pairs.values())


@torch.inference_mode()
def pair_recall(
    model: BLIP2, pairs: Sequence[EvaluationSample], read_image: ReadImage, *, batch_size: int, ranks: Ranks = ALONE
) -> float:
    """Per cent of the pictures that are nearest to their own caption and of captions that are nearest to their own picture.

    The mean of both. A tie is a miss.

    Args:
        model: every rank has it.
        pairs: pictures and captions; ranks share them.
        read_image: gives a picture's pixels or tokens.
        batch_size: pairs of a pass.
        ranks: all of which call this.

    Raises:
        UserError: a damaged picture.
    """
    image_NQE, text_NE = _features(model, pairs, read_image, batch_size, ranks)
    own_N = torch.full((len(pairs),), -torch.inf, device=text_NE.device)
    best_text_N, best_image_N = own_N.clone(), own_N.clone()  # of the wrong ones
    for start in range(0, len(pairs), _ROWS):
        rows = torch.arange(start, min(start + _ROWS, len(pairs)), device=text_NE.device)
        scores_RN = similarities(image_NQE[rows], text_NE)
        own_N[rows] = scores_RN[rows - start, rows]
        scores_RN[rows - start, rows] = -torch.inf
        best_text_N[rows] = scores_RN.amax(dim=1)
        best_image_N = best_image_N.maximum(scores_RN.amax(dim=0))
    found = (own_N > best_text_N).sum() + (own_N > best_image_N).sum()
    return 100 * int(found) / (2 * len(pairs))


def _features(
    model: BLIP2, pairs: Sequence[EvaluationSample], read_image: ReadImage, batch_size: int, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Projected features of all pictures (N, Q, E) and captions (N, E), on every rank."""
    own = ranks.share(pairs) or pairs[:1]  # features of somebody else's, which nobody will look at
    images, texts = [], []
    for start in range(0, len(own), batch_size):
        batch = own[start : start + batch_size]
        tokens = model.image_tokens(torch.stack([_read(sample, read_image) for sample in batch]))
        images.append(model.encode_images(tokens).projected_BQE)
        texts.append(model.encode_texts(*model.tokenize([sample.record.captions[0] for sample in batch])).projected_BE)
    image_NQE, text_NE = (_all_ranks(torch.cat(parts), len(pairs), ranks) for parts in (images, texts))
    return image_NQE, text_NE


def _read(sample: EvaluationSample, read_image: ReadImage) -> Tensor:
    try:
        return read_image(sample.shard, sample.row)
    except DamagedSample as error:
        raise UserError(f"{sample.id}: {error}; prepare the dataset again") from None


def _all_ranks(own: Tensor, count: int, ranks: Ranks) -> Tensor:
    """The rows of all pairs, of which rank r has numbers r, r + world size, ..."""
    each = -(-count // ranks.world_size)
    padded = torch.cat([own[:each].float(), own.new_zeros(max(each - len(own), 0), *own.shape[1:]).float()])
    gathered = ranks.gather_rows(padded)
    rows = [(number % ranks.world_size) * each + number // ranks.world_size for number in range(count)]
    return gathered[rows]
