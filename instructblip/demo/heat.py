"""Where queries look, drawn over the picture.

Shape legend: L layers, Q queries, R rows and C columns of patches, H and W pixels.
"""

import base64
import io
from typing import NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image

from instructblip.errors import UserError
from instructblip.models.attention import ImageAttention

Floats = npt.NDArray[np.float32]

_SIDE = 448  # pixels of a drawn picture's longer side
_COLORS = matplotlib.colormaps["inferno"]
_SHADE = 0.75  # how much of the picture the colours cover where they are brightest
_LEAST = 0.35  # and where they are darkest
_UNEVEN = 3.0  # even shares that the brightest colour stands for, where no patch has more


class Panel(NamedTuple):
    """One drawn map.

    Attributes:
        title: which layers.
        note: how uneven it is, and what lies on no patch.
        data: the picture as a data URL.
    """

    title: str
    note: str
    data: str


def panels(picture: Image.Image, attention: ImageAttention, query: int) -> list[Panel]:
    """The mean over all layers, and each layer; heads are averaged.

    Args:
        picture: what was looked at.
        attention: of that picture alone.
        query: the one that looks, from 1; 0: the mean over all of them.

    Raises:
        UserError: there is no such query.
    """
    maps_LQRC = attention.maps()[:, 0, 0].cpu().numpy()
    if query > maps_LQRC.shape[1]:
        raise UserError(f"there is no query {query}; the model has {maps_LQRC.shape[1]}")
    maps_LRC = maps_LQRC.mean(axis=1) if query == 0 else maps_LQRC[:, query - 1]
    layers = list(attention.weights)
    named = [(f"layer {layer}", shares_RC) for layer, shares_RC in zip(layers, maps_LRC, strict=True)]
    if len(layers) > 1:
        named.insert(0, (f"mean of {len(layers)} layers", maps_LRC.mean(axis=0)))
    tokens = attention.prefix + maps_LRC[0].size
    return [
        Panel(title, _note(shares_RC, tokens, attention.prefix), _data_url(overlay(picture, shares_RC * tokens)))
        for title, shares_RC in named
    ]


def _note(shares_RC: Floats, tokens: int, prefix: int) -> str:
    """The brightest patch against an even share of all image tokens; and the share of those that are no patches."""
    note = f"brightest patch {shares_RC.max() * tokens:.1f} x even"
    return f"{note}, {1 - shares_RC.sum():.0%} on no patch" if prefix else note


def overlay(picture: Image.Image, evens_RC: Floats) -> Image.Image:
    """The picture under a map of its patches, which lie over all of it: the model saw it squeezed to a square.

    Args:
        picture: in any size.
        evens_RC: shares of the patches, as multiples of an even one. The largest has the brightest colour, if it is three or
            more, so that a gaze without a goal looks like one.
    """
    drawn = picture.convert("RGB")
    drawn.thumbnail((_SIDE, _SIDE))
    scaled_RC = (evens_RC / max(float(evens_RC.max()), _UNEVEN)).astype(np.float32)
    scaled_HW = np.asarray(Image.fromarray(scaled_RC).resize(drawn.size, Image.Resampling.BICUBIC)).clip(0, 1)
    colors_HW3 = _COLORS(scaled_HW)[..., :3] * 255
    grey_HW1 = np.asarray(drawn.convert("L"), dtype=np.float32)[..., None]
    cover_HW1 = (_LEAST + (_SHADE - _LEAST) * scaled_HW)[..., None]
    return Image.fromarray((grey_HW1 * (1 - cover_HW1) + colors_HW3 * cover_HW1).astype(np.uint8))


def _data_url(picture: Image.Image) -> str:
    """A JPEG within the page, which leaves no file behind."""
    written = io.BytesIO()
    picture.save(written, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode()
