"""From tokens to one vector a tile: free functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eosin.encoders.spec import POOLINGS, Pooling, Tokens
from eosin.errors import GeometryError

if TYPE_CHECKING:
    from eosin.encoders.encoder import Encoder


def pool(tokens: Tokens, how: Pooling) -> Tensor:
    """Return one vector for each image.

    Args:
        tokens: cls (B, W), registers (B, R, W), patches (B, h, w, W).
        how: "cls"; "mean" of the patches; "cls+mean", both side by side.

    Returns:
        (B, W), or (B, 2 W) for "cls+mean".
    """
    if how == "cls":
        return tokens.cls
    mean = tokens.patches.flatten(1, 2).mean(1)
    if how == "mean":
        return mean
    if how == "cls+mean":
        return torch.cat((tokens.cls, mean), dim=-1)
    raise GeometryError(f"pooling {how!r} does not exist; choose one of {POOLINGS}")


class Pooled(nn.Module):
    """A backbone and its pooling as one module: normalised (B, 3, H, W) to (B, D)."""

    def __init__(self, backbone: nn.Module, how: Pooling) -> None:
        """Join `backbone` (images to `Tokens`) and `how`."""
        super().__init__()
        self.backbone = backbone
        self.how: Pooling = how

    def forward(self, images: Tensor) -> Tensor:
        """Return the pooled vectors, (B, D)."""
        return pool(self.backbone(images), self.how)


def multi_depth_cls(encoder: Encoder, images: Tensor, depths: Sequence[int]) -> Tensor:
    """Return the class tokens after several blocks, each through the final norm, side by side.

    Args:
        encoder: an encoder whose network has blocks and a class token.
        images: normalised (B, 3, H, W).
        depths: block numbers from 0; negative ones count from the last block.

    Returns:
        (B, len(depths) * W), in the order of `depths`.

    Raises:
        GeometryError: a depth outside the network.
    """
    return torch.cat([tokens.cls for tokens in encoder.layers(images, depths)], dim=-1)
