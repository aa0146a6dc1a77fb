"""Learned position embeddings of a ViT for another image size than they were trained with.

Shape legend: N positions, of which the first ones may belong to prefix tokens (class, registers); D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from instructblip.errors import UserError


def resize_position_embedding(embedding_1ND: Tensor, patches: tuple[int, int], *, prefix_tokens: int = 1) -> Tensor:
    """Interpolate the square grid of positions to `patches` rows and columns; prefix tokens keep theirs.

    Bicubic with align_corners=False and without antialiasing, in float32: as LAVIS does at load. A grid that fits already
    is returned as it is.

    Args:
        embedding_1ND: positions (1, N, D), prefix tokens first.
        patches: wanted rows and columns of patches.
        prefix_tokens: how many positions do not belong to patches.

    Raises:
        UserError: the patches' positions do not form a square.
    """
    prefix_1ND, grid_1ND = embedding_1ND[:, :prefix_tokens], embedding_1ND[:, prefix_tokens:]
    side = math.isqrt(grid_1ND.shape[1])
    if side**2 != grid_1ND.shape[1]:
        raise UserError(
            f"a position embedding of {tuple(embedding_1ND.shape)} without its first {prefix_tokens} is no square grid; "
            "use weights that were trained on square images"
        )
    if patches == (side, side):
        return embedding_1ND
    grid_1DHW = grid_1ND.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized_1DHW = F.interpolate(grid_1DHW, size=patches, mode="bicubic", align_corners=False)
    resized_1ND = resized_1DHW.flatten(2).transpose(1, 2).to(embedding_1ND.dtype)
    return torch.cat([prefix_1ND, resized_1ND], dim=1)
