"""Build a timm network of a spec and give its tokens; resize its position embedding as the release does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import timm
import timm.layers
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from eosin.encoders.spec import EncoderSpec, Interpolation, Tokens, check_side
from eosin.errors import GeometryError, WeightsError

SHORT_SEQUENCE = 300
"""Tokens up to which attention by plain products trains faster than torch's fused kernel, in bfloat16 on a CPU
(benchmarks/attention.py); 224 px are 201 to 261 of them."""


def resize_position(position: Tensor, grid: tuple[int, int], how: Interpolation, *, prefix: int) -> Tensor:
    """Return a learned position embedding for another grid of patches.

    Args:
        position: (1, prefix + M * M, W), square grid.
        grid: rows and columns wanted.
        how: "bicubic-offset0.1" scales by (n + 0.1) / M without antialiasing (DINOv2 without
            registers); "bicubic-antialias" and "bicubic" go to the exact size with and without it.
        prefix: leading entries that belong to class and register tokens; they stay.

    Returns:
        (1, prefix + rows * columns, W), dtype of `position`; `position` itself when the grid fits.
    """
    side = math.isqrt(position.shape[1] - prefix)
    if grid == (side, side):
        return position
    patches = position[:, prefix:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if how == "bicubic-offset0.1":
        scale = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
        patches = functional.interpolate(patches, scale_factor=scale, mode="bicubic")
    else:
        patches = functional.interpolate(patches, size=grid, mode="bicubic", antialias=how == "bicubic-antialias")
    patches = patches.permute(0, 2, 3, 1).flatten(1, 2).to(position.dtype)
    return torch.cat((position[:, :prefix], patches), dim=1)


def build_network(arch: str, args: Mapping[str, Any], *, img_size: int | None = None) -> nn.Module:
    """Return a timm network without a classifier, its pooling set so that the final norm is applied to all tokens.

    Args:
        arch: timm architecture.
        args: its arguments; `mlp_layer` is the name of a class of `timm.layers`, `norm_eps` the epsilon of LayerNorm.
        img_size: side of the position embedding, pixels; None keeps the architecture's own.

    Raises:
        WeightsError: timm has no such architecture.
    """
    if not timm.is_model(arch):
        raise WeightsError(f"timm {timm.__version__} has no architecture {arch!r}")
    options: dict[str, Any] = {"num_classes": 0, **args}
    if "mlp_layer" in options:
        options["mlp_layer"] = getattr(timm.layers, options["mlp_layer"])
    if "norm_eps" in options:
        options["norm_layer"] = partial(nn.LayerNorm, eps=options.pop("norm_eps"))
    if img_size is not None:
        options["img_size"] = img_size
    network = timm.create_model(arch, pretrained=False, **options)
    pooled_by_mean = getattr(network, "global_pool", "") == "avg" and getattr(network, "cls_token", None) is not None
    return timm.create_model(arch, pretrained=False, global_pool="token", **options) if pooled_by_mean else network


def position_px(spec: EncoderSpec) -> int | None:
    """Return the input side the position embedding is made for, None where the architecture has its own."""
    return None if spec.interpolation in ("rope", "none") else spec.native_px


class Backbone(nn.Module):
    """A timm network that returns `Tokens`."""

    def __init__(self, network: nn.Module, spec: EncoderSpec) -> None:
        """Wrap `network`; its position embedding is kept at its native size for later resizing."""
        super().__init__()
        self.network = network
        self.spec = spec
        self._native: Tensor | None = None
        self._grid: tuple[int, int] | None = None
        if isinstance(network, VisionTransformer) and network.pos_embed is not None:
            self._native = network.pos_embed.detach()
            network.patch_embed.strict_img_size = False

    def fit(self, height_px: int, width_px: int) -> None:
        """Make the network ready for images of this size.

        Raises:
            GeometryError: a side is no multiple of the patch, or the network takes one size only.
        """
        check_side(self.spec, height_px, width_px)
        network = self.network
        if isinstance(network, VisionTransformer) and self._native is not None:
            grid = (height_px // self.spec.patch_px, width_px // self.spec.patch_px)
            if grid == self._grid:
                return
            prefix = 0 if network.no_embed_class else network.num_prefix_tokens
            current = cast(Tensor, network.pos_embed)
            with torch.inference_mode(False), torch.no_grad():
                native = self._native.to(current.device)
                position = resize_position(native, grid, self.spec.interpolation, prefix=prefix).to(current.dtype)
                network.pos_embed = nn.Parameter(position.clone(), requires_grad=current.requires_grad)
            self._grid = grid
        elif self.spec.interpolation == "none" and hasattr(network, "patch_embed"):
            side = self.spec.native_px
            if (height_px, width_px) != (side, side):
                raise GeometryError(f"{self.spec.name} takes images of {side} x {side} px only")

    def _split(self, tokens: Tensor, height_px: int, width_px: int) -> Tokens:
        """Return `Tokens` of a sequence (B, prefix + n, W) or a feature map."""
        if tokens.ndim == 4:
            channels_last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
            patches = tokens if channels_last else tokens.permute(0, 2, 3, 1)
            mean = patches.flatten(1, 2).mean(1)
            return Tokens(mean, mean[:, None, :][:, :0], patches)
        prefix = int(getattr(self.network, "num_prefix_tokens", 0))
        grid = (height_px // self.spec.patch_px, width_px // self.spec.patch_px)
        patches = tokens[:, prefix:].unflatten(1, grid)
        cls = tokens[:, 0] if prefix else tokens.mean(1)
        return Tokens(cls, tokens[:, 1:prefix] if prefix else tokens[:, :0], patches)

    def forward(self, images: Tensor) -> Tokens:
        """Return the tokens of normalised images (B, 3, H, W) of the size last given to `fit`."""
        tokens = cast(Any, self.network).forward_features(images)
        head = getattr(self.network, "head", None)
        if isinstance(head, nn.Linear):
            tokens = head(tokens)
        return self._split(tokens, images.shape[-2], images.shape[-1])

    def layers(self, images: Tensor, depths: Sequence[int]) -> list[Tokens]:
        """Return the tokens after the blocks `depths` (negative: from the end), through the final norm."""
        network = self.network
        if not isinstance(network, VisionTransformer | Eva):
            raise GeometryError(f"{self.spec.name} is no vision transformer with blocks")
        count = len(network.blocks)
        bad = [depth for depth in depths if not -count <= depth < count]
        if bad:
            raise GeometryError(f"{self.spec.name} has {count} blocks; there is no block {bad[0]}")
        wanted = [depth % count for depth in depths]
        order = sorted(set(wanted))
        pairs: Any = network.forward_intermediates(
            images, indices=order, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        found = {depth: torch.cat((prefix, patches), 1) for depth, (patches, prefix) in zip(order, pairs, strict=True)}
        return [self._split(found[depth], images.shape[-2], images.shape[-1]) for depth in wanted]
