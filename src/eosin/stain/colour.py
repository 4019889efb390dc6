"""Image batches to numbers and back: optical density, CIELAB, masked percentiles."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eosin.errors import StainError

TISSUE_OD = 0.15
"""A pixel is tissue from this OD on (beta of Macenko 2009)."""

LIGHT = 240.0
"""Grey value of the unstained light path, plus one, in the code released with Macenko 2009."""

MIN_TISSUE_PX = 100
"""Fewer tissue pixels than this cannot carry a 1 % percentile: the image is left as it is."""

_RGB_TO_XYZ = torch.tensor(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ],
    dtype=torch.float64,
)
_D65 = _RGB_TO_XYZ.sum(1)
_RGB_TO_WHITE = _RGB_TO_XYZ / _D65[:, None]
_WHITE_TO_RGB = torch.linalg.inv(_RGB_TO_WHITE)
_LAB_DELTA = 6 / 29


def to_batch(images: Tensor | npt.NDArray[np.uint8]) -> Tensor:
    """Return `images` as a tensor (B, 3, H, W).

    Args:
        images: tensor (B, 3, H, W), uint8 in 0-255 or float in 0-1; or uint8 array (B, H, W, 3).

    Raises:
        StainError: another shape or dtype, or an empty batch.
    """
    if isinstance(images, np.ndarray):
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise StainError(f"expected a uint8 array (B, H, W, 3), found {images.dtype} {images.shape}")
        images = torch.from_numpy(np.require(images, requirements=["C", "W"])).movedim(-1, 1)
    if images.ndim != 4 or images.shape[1] != 3 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise StainError(
            f"expected a tensor (B, 3, H, W), uint8 or float in 0-1, found {images.dtype} {tuple(images.shape)}"
        )
    if images.numel() == 0:
        raise StainError(f"expected at least one image of at least one pixel, found shape {tuple(images.shape)}")
    return images


def to_grey_values(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return pixels (B, 3, H * W) in 0-255 as float32 or float64, and which images are finite (B,).

    Images with NaN or infinity come out as zeros, so that nothing downstream meets them.
    """
    values = images.flatten(2)
    if images.dtype == torch.uint8:
        return values.float(), torch.ones(len(images), dtype=torch.bool, device=images.device)
    values = values if values.dtype == torch.float64 else values.float()
    finite = values.sum(dim=(1, 2), dtype=torch.float64).isfinite()
    return torch.where(finite[:, None, None], values, torch.zeros_like(values)) * 255, finite


def from_grey_values(values: Tensor, images: Tensor, changed: Tensor) -> Tensor:
    """Return `values` (B, 3, H * W) clipped, in the shape and dtype of `images`; `images` where not `changed`."""
    values = values.clamp(0, 255)
    values = values.round_() if images.dtype == torch.uint8 else values.div_(255)
    out = values.to(images.dtype).reshape(images.shape)
    return torch.where(changed[:, None, None, None], out, images)


def grey_to_od(values: Tensor, light: float) -> Tensor:
    """Return the natural optical density -ln((I + 1) / light); the 1 keeps black finite."""
    return torch.log((values + 1) / light).neg_()


def od_to_grey(od: Tensor, light: float) -> Tensor:
    """Return grey values: the exact inverse of `grey_to_od`, not clipped."""
    return torch.exp(-od).mul_(light).sub_(1)


def tissue_pixels(od: Tensor, beta: float) -> Tensor:
    """Return which pixels (B, P) of `od` (B, 3, P) have a mean OD over the channels of at least `beta`."""
    return od.mean(1) >= beta


def mix(weights: Tensor, channels: Tensor) -> Tensor:
    """Return `weights` (B or 1, K, C) times `channels` (B, C, P): (B, K, P).

    Written channel by channel rather than as a matrix product, so that the bits of one image
    do not depend on how many others are in the batch.
    """
    weights = weights.to(channels.dtype)
    rows = []
    for k in range(weights.shape[1]):
        row = weights[:, k, 0, None] * channels[:, 0]
        for c in range(1, channels.shape[1]):
            row = row + weights[:, k, c, None] * channels[:, c]
        rows.append(row)
    return torch.stack(rows, 1)


def low_percentile(values: Tensor, percent: float, valid: Tensor | None = None) -> Tensor:
    """Return the `percent`-th percentile of each row, linearly interpolated like numpy's default.

    Args:
        values: (..., P).
        percent: 0-50. For the upper tail negate the values and the result.
        valid: bool (..., P), the entries that count; all when None.

    Returns:
        (...), infinite for rows without a valid entry.
    """
    size = values.shape[-1]
    if valid is None:
        count = torch.full(values.shape[:-1], size, device=values.device)
    else:
        count = valid.sum(-1)
        values = torch.where(valid, values, torch.full_like(values, torch.inf))
    needed = min(size, int(percent / 100 * (size - 1)) + 2)
    smallest = values.topk(needed, dim=-1, largest=False, sorted=True).values
    position = percent / 100 * (count - 1).clamp(min=0).double()
    below = position.floor()
    first = smallest.gather(-1, below.long()[..., None])[..., 0]
    second = smallest.gather(-1, position.ceil().long()[..., None])[..., 0]
    step = torch.where(position > below, second - first, torch.zeros_like(first))
    return first + (position - below).to(first.dtype) * step


def high_percentile(values: Tensor, percent: float) -> Tensor:
    """Return the `percent`-th percentile (50-100) of each row of `values` (..., P)."""
    return -low_percentile(-values, 100 - percent)


def grey_to_lab(values: Tensor) -> Tensor:
    """Return CIELAB (B, 3, P) of sRGB `values` (B, 3, P) in 0-255: L* 0-100, D65 white, IEC 61966-2-1."""
    rgb = values / 255
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).clamp(min=0) ** 2.4, rgb / 12.92)
    xyz = mix(_RGB_TO_WHITE.to(values.device)[None], linear)
    cube_root = xyz.clamp(min=_LAB_DELTA**3) ** (1 / 3)
    f = torch.where(xyz > _LAB_DELTA**3, cube_root, xyz / (3 * _LAB_DELTA**2) + 4 / 29)
    return torch.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def lab_to_grey(lab: Tensor) -> Tensor:
    """Return sRGB (B, 3, P) in 0-255 of CIELAB `lab`, clipped below at 0 in linear light and not above."""
    y = (lab[:, 0] + 16) / 116
    f = torch.stack([y + lab[:, 1] / 500, y, y - lab[:, 2] / 200], 1)
    white = torch.where(f > _LAB_DELTA, f**3, 3 * _LAB_DELTA**2 * (f - 4 / 29))
    linear = mix(_WHITE_TO_RGB.to(lab.device)[None], white).clamp(min=0)
    rgb = torch.where(linear > 0.0031308, 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055, 12.92 * linear)
    return rgb * 255
