"""Image-text matching with hard negatives (BLIP-2, section 3.1; BLIP and ALBEF, section 3.2).

Shape legend: B samples of a rank, N of the global batch.
"""

from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from instructblip.data.mixture import seeded_generator
from instructblip.errors import UserError
from instructblip.models.base import Inputs
from instructblip.models.pairs import similarities
from instructblip.objectives.base import (
    ObjectiveSettings,
    PairedObjective,
    PartnerRows,
    Term,
    WholeBatch,
    summed_cross_entropy,
)

_PAIRS = 3  # of a sample: its own, its text with another image, its image with another text
_FLOOR = 1e-4  # of a wrong pair's likelihood in BLIP's pre-training (blip_pretrain.py)


class Matching(PairedObjective):
    """Whether image and text belong together, for each sample's own pair and for two wrong ones.

    The likelier the model finds a wrong pair, the likelier it is drawn: by the softmax of the similarities over the global
    batch, samples of the same image left out.

    Args:
        weight: as in `Objective`.
        among: samples of consecutive positions that wrong pairs are drawn within, as the released code of BLIP does within a
            GPU's share; None: all of the global batch.
    """

    name = "matching"
    unit = "pairs"
    outputs = frozenset({"match_logits"})
    rows: ClassVar[tuple[str, ...]] = ("image_projected", "text_projected")
    shared = ("temperature",)

    def __init__(self, weight: float = 1.0, among: int | None = None) -> None:
        super().__init__(weight)
        self.among = among

    @classmethod
    def of(cls, weight: float, settings: ObjectiveSettings) -> Self:
        """With the phase's choice of where negatives come from."""
        return cls(weight, settings.negatives_among)

    def count(self, inputs: Inputs) -> int:
        """Pairs, three a sample."""
        return _PAIRS * len(inputs)

    def draw(self, batch: WholeBatch, seed: int) -> PartnerRows:
        """For each text an image, for each image a text, by two numbers from the random stream of the sample's position.

        Candidates stand in the order of their positions: ranks and micro-batches change nothing.

        Raises:
            UserError: all that a sample may be paired with shows its own image.
        """
        # Of all samples, own or not: all ranks must refuse.
        every = batch._replace(own_rows_B=torch.arange(len(batch.positions_N), device=batch.positions_N.device))
        if not bool((self._near(every) & self._wrong(every)).any(dim=1).all()):
            raise UserError(
                f"a global batch of {len(batch.positions_N)} samples{self._within()} shows a single image, and matching "
                "needs wrong ones to draw; raise recipe.phases.NAME.batch_size, or train on more images"
            )
        near_BN, wrong_BN = self._near(batch).cpu(), self._wrong(batch).cpu()
        positions = batch.positions_N[batch.own_rows_B].tolist()
        streams = [seeded_generator(seed, "matching", place) for place in positions]
        numbers_2B = torch.from_numpy(np.stack([stream.random(2) for stream in streams], axis=1))
        images_B, answers_B = (
            # In float64 on the CPU: what is drawn must not depend on how a GPU sums.
            _draw(
                self._likelihoods(logits_BN.detach().cpu().double(), near_BN, wrong_BN),
                batch.positions_N,
                numbers_B,
            )
            for logits_BN, numbers_B in zip(self._logits(batch), numbers_2B, strict=True)
        )
        return PartnerRows(images_B.tolist(), answers_B.tolist())

    def term(self, outputs: Mapping[str, Tensor], inputs: Inputs) -> Term:
        """From `match_logits` (3, B, 2): no match, match; the own pairs come first."""
        logits_S2 = outputs["match_logits"].transpose(0, 1).flatten(0, 1)
        labels_S = torch.tensor([1, *[0] * (_PAIRS - 1)] * len(inputs), device=logits_S2.device)
        return summed_cross_entropy(logits_S2, labels_S, [_PAIRS] * len(inputs))

    def _logits(self, batch: WholeBatch) -> tuple[Tensor, Tensor]:
        """Similarities over temperature of each own text with all images, and of each own image with all texts: (B, N)."""
        own, everyone, temperature = batch.own, batch.everyone, batch.shared["temperature"]
        to_images_BN = similarities(everyone["image_projected"], own["text_projected"]).T / temperature
        to_texts_BN = similarities(own["image_projected"], everyone["text_projected"]) / temperature
        return to_images_BN, to_texts_BN

    def _near(self, batch: WholeBatch) -> Tensor:
        """Whether another sample is among those that may be drawn: (B, N)."""
        places_N = batch.positions_N - batch.positions_N.min()
        group_N = torch.zeros_like(places_N) if self.among is None else places_N // self.among
        return group_N[batch.own_rows_B, None] == group_N

    def _wrong(self, batch: WholeBatch) -> Tensor:
        """Whether another sample makes a wrong pair: (B, N)."""
        return ~batch.same_image()

    def _likelihoods(self, logits_BN: Tensor, near_BN: Tensor, wrong_BN: Tensor) -> Tensor:
        """How likely each sample is drawn, up to a factor a row."""
        return logits_BN.masked_fill(~(near_BN & wrong_BN), -torch.inf).softmax(dim=1)

    def _within(self) -> str:
        return "" if self.among is None else f" has {self.among} in a row (recipe.phases.NAME.negatives_among), which"


class PairMatching(Matching):
    """The same as in BLIP's pre-training: each sample but the own one may be wrong, the same image or not.

    Similarities are those with the momentum copies' features, and no sample's likelihood is below a floor.
    """

    name = "pair_matching"
    rows = ("image_projected", "text_projected", "image_projected_m", "text_projected_m")

    def _logits(self, batch: WholeBatch) -> tuple[Tensor, Tensor]:
        copies = {side: batch.everyone[f"{side}_m"] for side in ("image_projected", "text_projected")}
        return super()._logits(batch._replace(everyone=copies))

    def _wrong(self, batch: WholeBatch) -> Tensor:
        numbers_N = torch.arange(len(batch.positions_N), device=batch.own_rows_B.device)
        return batch.own_rows_B[:, None] != numbers_N

    def _likelihoods(self, logits_BN: Tensor, near_BN: Tensor, wrong_BN: Tensor) -> Tensor:
        likely_BN = logits_BN.masked_fill(~near_BN, -torch.inf).softmax(dim=1) + _FLOOR
        return likely_BN * (near_BN & wrong_BN)


def _draw(likelihood_BN: Tensor, positions_N: Tensor, numbers_B: Tensor) -> Tensor:
    """A column of each row, drawn by a number in [0, 1) from the row's likelihoods, columns laid out by position."""
    order_N = positions_N.argsort().cpu()
    likelihood_BN = likelihood_BN[:, order_N]
    upper_BN = likelihood_BN.cumsum(dim=1)
    drawn_B = torch.searchsorted(upper_BN, numbers_B[:, None] * upper_BN[:, -1:], right=True)[:, 0]
    # Rounding may reach past the last column that may be drawn.
    last_B = (likelihood_BN > 0).long().cumsum(dim=1).argmax(dim=1)
    return order_N[drawn_B.minimum(last_B)]
