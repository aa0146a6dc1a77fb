"""Vision backbones from timm, ViT or CNN, as one thing: images in, tokens out.

timm is imported where a backbone is built: it takes as long as PyTorch itself, and what only counts does without.

Shape legend: B batch, F frames, H and W pixels, P image tokens, V vision width.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from instructblip.images import resize_square, to_rgb
from instructblip.models.exact_buffers import ExactBuffers

# Tensors are image tokens (B, F, P, V), or uint8 frames (B, F, 3, H, W); pictures are PIL images or lists of frames.
Images = Tensor | Sequence[Image.Image | Sequence[Image.Image]]


class _AllTappedError(Exception):
    """Every wanted layer has run: what the backbone would still compute is not needed."""


class VisionEncoder(ExactBuffers):
    """A timm backbone that turns uint8 images into tokens.

    Args:
        backbone: name of a timm model; built without its classification head.
        image_size: side of the square input, pixels.
        mean, std: per-channel normalisation on the 0..255 scale.
        layers: names of backbone modules whose outputs become the tokens; empty takes the backbone's own final
            features. Feature maps are average-pooled (or interpolated, where they are coarser) to one grid and
            concatenated on the channel axis, so a CNN can give its early stages too: late ones have lost colour.
        grid: side of that grid, tokens; needed with `layers`.
        options: further arguments of the timm model, such as a depth of 39 for the released EVA-CLIP-g.
        final_norm: False leaves the backbone's own last norm out, where `ln_vision` takes its place.
        norm_eps: of the backbone's own norms; None: timm's.

    Raises:
        ValueError: an unknown backbone, layer name or option, an image size that the backbone cannot be built for, `layers`
            without `grid`, a layer that gives no feature map or never runs, no final norm to leave out.
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
        options: Mapping[Any, Any] | None = None,
        final_norm: bool = True,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.backbone = _create_backbone(backbone, image_size, dict(options or {}))
        if not final_norm:
            _leave_out_final_norm(backbone, self.backbone)
        if norm_eps is not None:
            for module in self.backbone.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = norm_eps
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
        self.eval()  # before the probe, which would move batch-norm statistics
        with torch.no_grad():
            probe = self.forward(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8))
        self.tokens, self.width = probe.shape[1:]

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Encode uint8 images (B, 3, H, W) to tokens (B, P, V); frozen, without gradient."""
        frozen = not any(parameter.requires_grad for parameter in self.backbone.parameters())
        with torch.no_grad() if frozen else contextlib.nullcontext():
            pixels = ((images_B3HW.to(self.mean.dtype) - self.mean) / self.std).to(self.dtype)
            self._maps = []  # whatever an interrupted pass left there
            try:
                features = self.backbone.forward_features(pixels)
            except _AllTappedError:
                maps, self._maps = self._maps, []
                return _tokens_on_grid([self._channels_first(output) for output in maps], self.grid or 1)
            if self.layers:
                raise ValueError(f"of the vision layers {', '.join(self.layers)} only {len(self._maps)} come into use")
            return features if features.ndim == 3 else self._channels_first(features).flatten(2).transpose(1, 2)

    def layers_of_parameters(self) -> dict[str, int]:
        """Name of each parameter -> how many layers stand behind its own: 1 in the last block, 0 in what follows it."""
        from timm.models import group_parameters

        layers = group_parameters(self.backbone, self.backbone.group_matcher(coarse=False), reverse=True)
        in_blocks = [layer for name, layer in layers.items() if name.startswith("blocks.")]
        end = 1 + max(in_blocks or layers.values())
        return {f"backbone.{name}": max(0, int(end - layer)) for name, layer in layers.items()}

    @property
    def class_token(self) -> bool:
        """Whether the first token is a ViT's [CLS], which has gathered the whole image; a CNN's is its first place."""
        return not self.layers and getattr(self.backbone, "cls_token", None) is not None

    @property
    def prefix_tokens(self) -> int:
        """Tokens in front of the patches: a ViT's [CLS], and its registers."""
        return 0 if self.layers else int(getattr(self.backbone, "num_prefix_tokens", 0))

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of the places that the other tokens are of; one row where they make no square."""
        places = self.tokens - self.prefix_tokens
        side = math.isqrt(places)
        return (side, side) if side * side == places else (1, places)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, in which images are encoded; mean and deviation stay in float32."""
        return next(self.backbone.parameters()).dtype

    def exact_buffers(self) -> Iterator[tuple[nn.Module, str]]:
        """Pixel statistics and rotary angles."""
        yield from ((self, "mean"), (self, "std"))
        rotary = _rotary()
        for module in self.backbone.modules():
            if isinstance(module, rotary):
                yield from ((module, name) for name, _ in module.named_buffers(recurse=False))

    def _channels_first(self, features: Tensor) -> Tensor:
        # Swin and its kin keep channels last and say so.
        last = features.ndim == 4 and getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
        return features.permute(0, 3, 1, 2) if last else features

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


def as_frames(images: Images, size: int) -> Tensor:
    """Pictures or lists of frames as uint8 frames (B, F, 3, size, size); tensors pass through."""
    if isinstance(images, Tensor):
        return images
    clips = [[image] if isinstance(image, Image.Image) else list(image) for image in images]
    return torch.stack([torch.stack([resize_square(to_rgb(frame), size) for frame in clip]) for clip in clips])


def _rotary() -> tuple[type[nn.Module], ...]:
    """timm's position embeddings whose buffers are angles, or frequencies that become angles.

    In half precision those of far patches would run together.
    """
    from timm.layers import pos_embed_sincos

    return tuple(value for name, value in vars(pos_embed_sincos).items() if name.startswith("RotaryEmbedding"))


def _create_backbone(name: str, image_size: int, options: dict[str, Any]) -> Any:
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:3]
        raise ValueError(f"timm knows no backbone {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
    config = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    if config.fixed_input_size and image_size != config.input_size[-1]:
        options = {"img_size": image_size, **options}
    try:
        backbone = timm.create_model(name, pretrained=False, num_classes=0, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"timm cannot build {name} for images of {image_size} pixels with {options}: {error}"
        ) from None
    # A convolution over patches passes over what is left of them at the right and at the bottom.
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", (1,))
    side = patch[0] if isinstance(patch, tuple) else int(patch)
    if image_size % side:
        raise ValueError(
            f"images of {image_size} pixels are no whole number of {name}'s patches of {side}; "
            f"set image_size to {image_size // side * side} or {(image_size // side + 1) * side}"
        )
    return backbone


def _leave_out_final_norm(name: str, backbone: Any) -> None:
    if not isinstance(getattr(backbone, "norm", None), nn.Module):
        raise ValueError(f"vision backbone {name} has no final norm to leave out; set final_norm to true")
    # A backbone that pools before its last norm calls it fc_norm; its tokens never meet it.
    for part in ("norm", "fc_norm"):
        if hasattr(backbone, part):
            setattr(backbone, part, nn.Identity())


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


class ChannelNorm(ExactBuffers):
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
        return ((tokens_BPV - self.mean) / self.std).to(tokens_BPV.dtype)

    def exact_buffers(self) -> Iterator[tuple[nn.Module, str]]:
        """Both statistics."""
        yield from ((self, "mean"), (self, "std"))
