"""A text while it is written: what `generate` tells its caller after each new token."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from instructblip.models.arguments import OnText

OnIds = Callable[[Tensor], None]  # new token ids of one row so far (1, T)

_CUT_CHARACTER = "\ufffd"  # how tokenizers write bytes that are no whole character yet


def on_ids(on_text: OnText | None, decode: Callable[[Tensor], list[str]]) -> OnIds | None:
    """What hands on the text of token ids (1, T); a character of which bytes are missing waits for them."""
    if on_text is None:
        return None
    return lambda ids_1T: on_text(decode(ids_1T)[0].rstrip(_CUT_CHARACTER).rstrip())


class NewTokens(BaseStreamer):
    """What transformers' generation hands its tokens to, one call a token, for one row.

    Args:
        listener: is given all new ones so far.
    """

    def __init__(self, listener: OnIds) -> None:
        self._listener = listener
        self._ids: list[Tensor] = []
        self._started = False

    def put(self, value: Tensor) -> None:
        """The first call brings what generation begins with, no token of the text."""
        if self._started:
            self._ids.append(value.reshape(1, 1))
            self._listener(torch.cat(self._ids, dim=1))
        self._started = True

    def end(self) -> None:
        """Nothing is held back."""
