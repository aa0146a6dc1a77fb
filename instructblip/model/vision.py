"""Frozen vision backbones from timm, ViT or CNN, as one thing: images in, tokens out.

Shape legend: B batch, H and W pixels, P image tokens, V vision width.
"""

from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instructblip.model.frozen import FrozenModule


class _AllTappedError(Exception):
    """Every wanted layer has run: what the backbone would still compute is not needed."""


class VisionEncoder(FrozenModule):
    """A frozen timm backbone that turns uint8 images into tokens.

    Args:
        backbone: name of a timm model; built without its classification head.
        image_size: side of the square input, pixels.
        mean, std: per-channel normalisation on the 0..255 scale.
        layers: names of backbone modules whose outputs become the tokens; empty takes the backbone's own final
            features. Feature maps are average-pooled (or interpolated, where they are coarser) to one grid and
            concatenated on the channel axis, so a CNN can give its early stages too: late ones have lost colour.
        grid: side of that grid, tokens; needed with `layers`.

    Raises:
        ValueError: an unknown backbone or layer name, an image size that the backbone is not built for, `layers` without
            `grid`, or a layer that gives no feature map or never runs.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        backbone: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        layers: Sequence[str] = (),
        grid: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone = _create_backbone(backbone, image_size)
        self.image_size = image_size
        self.grid = grid
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        if layers and grid is None:
            raise ValueError("vision layers of different sizes need a common grid")
        self.layers = tuple(layers)
        self._maps: list[Tensor] = []
        for name in layers:
            self._tap(backbone, name)
        self.freeze()  # before the probe, which would move batch-norm statistics
        probe = self.forward(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8))
        self.tokens, self.width = probe.shape[1:]

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Encode uint8 images (B, 3, H, W) to tokens (B, P, V), without gradient."""
        with torch.no_grad():
            pixels = (images_B3HW.to(self.mean.dtype) - self.mean) / self.std
            self._maps = []  # whatever an interrupted pass left there
            try:
                features = self.backbone.forward_features(pixels)
            except _AllTappedError:
                maps, self._maps = self._maps, []
                return _tokens_on_grid(maps, self.grid or 1)
            if self.layers:
                raise ValueError(f"of the vision layers {', '.join(self.layers)} only {len(self._maps)} come into use")
            return features if features.ndim == 3 else features.flatten(2).transpose(1, 2)

    def _tap(self, backbone: str, name: str) -> None:
        try:
            module = self.backbone.get_submodule(name)
        except AttributeError:
            raise ValueError(f"vision backbone {backbone} has no layer {name}") from None
        module.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self._maps.append(output)
        if len(self._maps) == len(self.layers):
            raise _AllTappedError


def _create_backbone(name: str, image_size: int) -> Any:
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:3]
        raise ValueError(f"timm knows no backbone {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
    backbone: Any = timm.create_model(name, pretrained=False, num_classes=0)
    side = backbone.default_cfg["input_size"][-1]
    if backbone.default_cfg.get("fixed_input_size") and image_size != side:
        raise ValueError(f"vision backbone {name} takes images of {side} pixels, not {image_size}")
    return backbone


def _tokens_on_grid(maps: list[Tensor], grid: int) -> Tensor:
    resized = []
    for map_BCHW in maps:
        if map_BCHW.ndim != 4:
            raise ValueError(f"vision layers must give feature maps, one gives {map_BCHW.ndim} dimensions")
        if map_BCHW.shape[-1] >= grid:
            resized.append(F.adaptive_avg_pool2d(map_BCHW, grid))
        else:
            resized.append(F.interpolate(map_BCHW, size=(grid, grid), mode="bilinear", align_corners=False))
    return torch.cat(resized, dim=1).flatten(2).transpose(1, 2)


class ChannelNorm(nn.Module):
    """Standardise each channel with fixed statistics, measured once on training images and kept in the checkpoint.

    Concatenated CNN stages differ in scale by orders of magnitude from channel to channel; a LayerNorm, made for a ViT's
    single residual stream, lets the largest ones drown the rest.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    @torch.no_grad()
    def calibrate(self, tokens_BPV: Tensor) -> None:
        """Take mean and deviation over all tokens of a calibration batch."""
        self.mean.copy_(tokens_BPV.float().mean(dim=(0, 1)))
        self.std.copy_(tokens_BPV.float().std(dim=(0, 1)).clamp_min(1e-4))

    def forward(self, tokens_BPV: Tensor) -> Tensor:
        return (tokens_BPV - self.mean) / self.std
