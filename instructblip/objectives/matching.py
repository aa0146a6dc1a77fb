"""Image-text matching with hard negatives (BLIP-2, section 3.1; ALBEF, section 3.2).

Shape legend: B samples of a rank, N of the global batch.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from instructblip.data.mixture import seeded_generator
from instructblip.errors import UserError
from instructblip.models.base import Inputs
from instructblip.models.pairs import similarities
from instructblip.objectives.base import PairedObjective, PartnerRows, Term, WholeBatch, summed_cross_entropy

_PAIRS = 3  # of a sample: its own, its text with another image, its image with another text


class Matching(PairedObjective):
    """Whether image and text belong together, for each sample's own pair and for two wrong ones.

    The likelier the model finds a wrong pair, the likelier it is drawn: by the softmax of the similarities over the global
    batch, samples of the same image left out.
    """

    name = "matching"
    unit = "pairs"
    outputs = frozenset({"match_logits"})
    rows = ("image_projected", "text_projected")
    shared = ("temperature",)

    def count(self, inputs: Inputs) -> int:
        """Pairs, three a sample."""
        return _PAIRS * len(inputs)

    def draw(self, batch: WholeBatch, seed: int) -> PartnerRows:
        """For each text an image, for each image a text, by two numbers from the random stream of the sample's position.

        Candidates stand in the order of their positions: ranks and micro-batches change nothing.

        Raises:
            UserError: the global batch shows one image only.
        """
        same_BN = batch.same_image()
        if bool((batch.image_ids_N == batch.image_ids_N[0]).all()):
            raise UserError(
                f"a global batch of {same_BN.shape[1]} samples shows a single image, and matching needs wrong ones to draw; "
                "raise recipe.phases.NAME.batch_size, or train on more images"
            )
        own, everyone, temperature = batch.own, batch.everyone, batch.shared["temperature"]
        to_images_BN = similarities(everyone["image_projected"], own["text_projected"]).T / temperature
        to_texts_BN = similarities(own["image_projected"], everyone["text_projected"]) / temperature
        positions = batch.positions_N[batch.own_rows_B].tolist()
        streams = [seeded_generator(seed, "matching", place) for place in positions]
        numbers_2B = torch.from_numpy(np.stack([stream.random(2) for stream in streams], axis=1))
        images_B, answers_B = (
            _draw(scores_BN.masked_fill(same_BN, -torch.inf), batch.positions_N, numbers_B)
            for scores_BN, numbers_B in zip((to_images_BN, to_texts_BN), numbers_2B, strict=True)
        )
        return PartnerRows(images_B.tolist(), answers_B.tolist())

    def term(self, outputs: Mapping[str, Tensor], inputs: Inputs) -> Term:
        """From `match_logits` (3, B, 2): no match, match; the own pairs come first."""
        logits_S2 = outputs["match_logits"].transpose(0, 1).flatten(0, 1)
        labels_S = torch.tensor([1, *[0] * (_PAIRS - 1)] * len(inputs), device=logits_S2.device)
        return summed_cross_entropy(logits_S2, labels_S, [_PAIRS] * len(inputs))


def _draw(logits_BN: Tensor, positions_N: Tensor, numbers_B: Tensor) -> Tensor:
    """A column of each row, drawn by a number in [0, 1) from the row's softmax, columns laid out by position."""
    order_N = positions_N.argsort().cpu()
    # In float64 on the CPU: what is drawn must not depend on how a GPU sums.
    likelihood_BN = logits_BN.detach().cpu().double().softmax(dim=1)[:, order_N]
    upper_BN = likelihood_BN.cumsum(dim=1)
    drawn_B = torch.searchsorted(upper_BN, numbers_B[:, None] * upper_BN[:, -1:], right=True)[:, 0]
    # Rounding may reach past the last column that may be drawn.
    last_B = (likelihood_BN > 0).long().cumsum(dim=1).argmax(dim=1)
    return order_N[drawn_B.minimum(last_B)]
