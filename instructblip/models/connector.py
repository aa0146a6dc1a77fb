"""Connectors that are no Q-Former: image tokens of a frame in, visual tokens of the LLM's width out, whatever is asked.

* `LinearConnector`: one linear map (LLaVA, arXiv:2304.08485, section 4.1).
* `MLPConnector`: two layers with GELU between (LLaVA-1.5, arXiv:2310.03744, section 3.2).
* `Resampler`: Flamingo's Perceiver resampler (arXiv:2204.14198, section 3.1 and figure 5) in the form that transformers'
  `IdeficsPerceiverResampler` gives it (norms in front, no biases, ReLU), and a linear map into the LLM.

Shape legend: N frames, P image tokens, C those that are read, V vision width, Q visual tokens, W resampler width, L
language-model width, H heads, E width of a head.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instructblip.models.vision import VisionEncoder

LATENTS = 64  # as in Flamingo
_GELU_POWER = 0.4252  # mean square of gelu(x), x of a normal distribution


class Patches(nn.Module):
    """Chooses what a connector reads of the image tokens, and averages patches to fewer.

    Args:
        vision: image encoder.
        class_token: what stands in front of the patches (a ViT's [CLS], registers) is read too.
        tokens: how many come out, that included: patches are average-pooled to the rectangle of so many that is nearest to
            a square. None: all of them.

    Raises:
        ValueError: a class token of an encoder that has none, a number that no rectangle of patches has.
    """

    def __init__(self, vision: VisionEncoder, *, class_token: bool = False, tokens: int | None = None) -> None:
        super().__init__()
        if class_token and not vision.prefix_tokens:
            raise ValueError("connector.class_token=true: this vision encoder has no class token; leave it out")
        self.prefix, self.class_token = vision.prefix_tokens, class_token
        self.grid = vision.patch_grid
        kept = self.prefix if class_token else 0
        self.pooled = self.grid if tokens is None else rectangle(tokens - kept, self.grid, kept)
        self.tokens = kept + math.prod(self.pooled)

    @property
    def pools(self) -> bool:
        """Whether patches are averaged."""
        return self.pooled != self.grid

    def forward(self, tokens_NPV: Tensor) -> Tensor:
        """Tokens (N, C, V) of image tokens (N, P, V)."""
        prefix, patches = tokens_NPV[:, : self.prefix], tokens_NPV[:, self.prefix :]
        if self.pools:
            map_NVHW = patches.unflatten(1, self.grid).movedim(-1, 1)
            patches = F.adaptive_avg_pool2d(map_NVHW, self.pooled).flatten(2).transpose(1, 2)
        return torch.cat([prefix, patches], dim=1) if self.class_token else patches


def rectangle(count: int, grid: tuple[int, int], beside: int = 0) -> tuple[int, int]:
    """Rows and columns of so many places within a grid, as near to a square as can be.

    Args:
        count: of the places.
        grid: rows and columns of the patches.
        beside: tokens that come on top of them, for the message.

    Raises:
        ValueError: no rectangle within the grid has so many; names the nearest numbers.
    """
    if count in (found := rectangles(grid)):
        return found[count]
    near = sorted(sorted(found, key=lambda other: abs(other - count))[:2])
    raise ValueError(
        f"connector.tokens={count + beside}: no rectangle within {grid[0]} x {grid[1]} patches has so many; set it to "
        f"{' or '.join(str(other + beside) for other in near)}"
    )


def rectangles(grid: tuple[int, int]) -> dict[int, tuple[int, int]]:
    """Numbers of places that rectangles within a grid have -> the one of them that is nearest to a square."""
    found: dict[int, tuple[int, int]] = {}
    for rows in range(1, grid[0] + 1):
        for columns in range(1, grid[1] + 1):
            other = found.get(rows * columns)
            if other is None or abs(rows - columns) < abs(other[0] - other[1]):
                found[rows * columns] = rows, columns
    return found


class Connector(nn.Module, ABC):
    """Image tokens of frames -> visual tokens.

    Attributes:
        kind: as the configuration calls it.
        patches: what it reads.
        tokens: Q, of a frame.
        output: its last layer, into the LLM.
    """

    kind: ClassVar[str]
    patches: Patches
    tokens: int
    output: nn.Linear

    @property
    @abstractmethod
    def first(self) -> nn.Module:
        """The layer that alone reads image tokens."""

    @abstractmethod
    def forward(self, tokens_NPV: Tensor) -> Tensor:
        """Visual tokens (N, Q, L) of normalised image tokens (N, P, V)."""

    @property
    @abstractmethod
    def output_power(self) -> float:
        """Expected square of what the last layer reads, where image tokens have unit power, as behind a norm."""

    def layers(self) -> list[nn.Module]:
        """Its repeated blocks."""
        return []

    def settings(self) -> list[Any]:
        """What its outputs depend on besides weights."""
        return [self.kind, self.patches.class_token, list(self.patches.pooled)]

    @torch.no_grad()
    def start(self, deviation: Tensor) -> None:
        """Draw the last layer so that visual tokens are as large as embeddings of that deviation.

        A language model fed with inputs of another scale starts from a loss several times that of ignoring them.
        """
        power = self.output.in_features * self.output_power
        self.output.weight.normal_().mul_(deviation / math.sqrt(power))
        self.output.bias.zero_()


class LinearConnector(Connector):
    """One linear map of every token.

    Args:
        patches: what it reads.
        vision_width: V.
        llm_width: L.
    """

    kind = "linear"

    def __init__(self, patches: Patches, *, vision_width: int, llm_width: int) -> None:
        super().__init__()
        self.patches, self.tokens = patches, patches.tokens
        self.output = nn.Linear(vision_width, llm_width)

    @property
    def first(self) -> nn.Module:
        """The only one."""
        return self.output

    @property
    def output_power(self) -> float:
        """Image tokens as they are."""
        return 1.0

    def forward(self, tokens_NPV: Tensor) -> Tensor:
        """See the base."""
        return self.output(self.patches(tokens_NPV))


class MLPConnector(Connector):
    """Two layers over every token, GELU between.

    Args:
        patches, vision_width, llm_width: as `LinearConnector`.
        hidden_width: of the first layer's outputs; None: L, as LLaVA.
    """

    kind = "mlp"

    def __init__(
        self,
        patches: Patches,
        *,
        vision_width: int,
        llm_width: int,
        hidden_width: int | None = None,
    ) -> None:
        super().__init__()
        self.patches, self.tokens = patches, patches.tokens
        self.hidden = nn.Linear(vision_width, hidden_width or llm_width)
        self.output = nn.Linear(self.hidden.out_features, llm_width)
        with torch.no_grad():
            self.hidden.weight.normal_(std=vision_width**-0.5)
            self.hidden.bias.zero_()

    @property
    def first(self) -> nn.Module:
        """In front of GELU."""
        return self.hidden

    @property
    def output_power(self) -> float:
        """Behind GELU."""
        return _GELU_POWER

    def forward(self, tokens_NPV: Tensor) -> Tensor:
        """See the base."""
        return self.output(F.gelu(self.hidden(self.patches(tokens_NPV))))


class ResamplerLayer(nn.Module):
    """Latents attend to what is read and to themselves, then a feed-forward; norms in front, residuals around.

    Args:
        width: W.
        heads: H.
        hidden_width: of the feed-forward.

    Raises:
        ValueError: heads that do not divide the width.
    """

    def __init__(self, width: int, heads: int, hidden_width: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"connector.heads={heads} does not divide the resampler's width of {width}; change one of them"
            )
        self.heads = heads
        self.media_norm = nn.LayerNorm(width)
        self.latent_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, width, bias=False)

    def forward(self, latents_NQW: Tensor, media_NCW: Tensor) -> Tensor:
        """Latents (N, Q, W) after the layer."""
        normed_NQW = self.latent_norm(latents_NQW)
        source_NKW = torch.cat([self.media_norm(media_NCW), normed_NQW], dim=1)
        parts = (self.query(normed_NQW), self.key(source_NKW), self.value(source_NKW))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        latents_NQW = latents_NQW + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return latents_NQW + self.down(F.relu(self.up(self.ffn_norm(latents_NQW))))


class Resampler(Connector):
    """A Perceiver resampler: learned latents read the tokens in several layers; a linear map makes visual tokens of them.

    Args:
        patches, vision_width, llm_width: as `LinearConnector`; patches are not pooled.
        tokens: latents.
        width: W; None: V. Where it is not V, a linear map stands in front.
        depth: layers, six in Flamingo.
        heads: of each.
        hidden_width: of the feed-forwards; None: 4 W.

    Raises:
        ValueError: heads that do not divide the width.
    """

    kind = "resampler"

    def __init__(
        self,
        patches: Patches,
        *,
        vision_width: int,
        llm_width: int,
        tokens: int | None = None,
        width: int | None = None,
        depth: int = 6,
        heads: int = 8,
        hidden_width: int | None = None,
    ) -> None:
        super().__init__()
        width = width or vision_width
        self.patches, self.tokens, self.heads = patches, tokens or LATENTS, heads
        self.input = nn.Identity() if width == vision_width else nn.Linear(vision_width, width, bias=False)
        self.latents = nn.Parameter(torch.randn(self.tokens, width))
        self.blocks = nn.ModuleList(ResamplerLayer(width, heads, hidden_width or 4 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, llm_width)

    @property
    def first(self) -> nn.Module:
        """Into its width, if that is another; else each layer reads them behind a norm of its own."""
        return self.input

    @property
    def output_power(self) -> float:
        """Behind a norm."""
        return 1.0

    def layers(self) -> list[nn.Module]:
        """The resampler's."""
        return list(self.blocks)

    def settings(self) -> list[Any]:
        """With the heads."""
        return [*super().settings(), self.heads]

    def forward(self, tokens_NPV: Tensor) -> Tensor:
        """See the base."""
        media_NCW = self.input(self.patches(tokens_NPV))
        latents_NQW = self.latents.expand(len(media_NCW), -1, -1)
        for block in self.blocks:
            latents_NQW = block(latents_NQW, media_NCW)
        return self.output(self.norm(latents_NQW))
