"""Geometry of a batch: flips, and rotation, shear, scale and shift of each image in one resample.

A new pixel looks up where it comes from: source = A target + b, in pixels from the image's centre. Outside the image
the tissue goes on as its mirror image, so that no corner is ever black.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def flip(images: Tensor, *, horizontal: Tensor, vertical: Tensor) -> Tensor:
    """Return images with some of them mirrored left to right, some top to bottom, pixels moved and not altered.

    Args:
        images: (B, 3, S, S).
        horizontal: bool (B,), mirror x.
        vertical: bool (B,), mirror y.
    """
    across, down = (flag.to(images.device)[:, None, None, None] for flag in (horizontal, vertical))
    images = torch.where(across, images.flip(3), images)
    return torch.where(down, images.flip(2), images)


def affine(*, angle_deg: Tensor, shear_deg: Tensor, scale: Tensor, shift_px: Tensor) -> Tensor:
    """Return the matrices (B, 2, 3), target to source, of images that are sheared, rotated, scaled and shifted.

    The content is sheared (x moves by tan(shear) y), turned by the angle (positive is clockwise to the eye, y being
    down), magnified, and moved by `shift_px`, in this order: torchvision's `affine` with a shear of [shear, 0]. The
    matrix is the inverse of that, in float64.

    Args:
        angle_deg: (B,).
        shear_deg: (B,), of x along y.
        scale: (B,), 2 shows the content twice as large.
        shift_px: (B, 2), x and y.
    """
    turn, lean = torch.deg2rad(angle_deg.double()), torch.tan(torch.deg2rad(shear_deg.double()))
    cos, sin, one, none = turn.cos(), turn.sin(), torch.ones_like(turn), torch.zeros_like(turn)
    back = torch.stack([cos, sin, -sin, cos], 1).reshape(-1, 2, 2)  # rotation by -angle
    upright = torch.stack([one, lean, none, one], 1).reshape(-1, 2, 2)
    linear = upright @ back / scale.double()[:, None, None]
    return torch.cat([linear, -linear @ shift_px.double()[..., None]], 2)


def warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Return images resampled once, bilinearly, mirrored about their edges where the source lies outside.

    Args:
        images: (B, 3, S, S) float.
        matrix: (B, 2, 3) from `affine`; positions count from the image's centre.
    """
    height, width = images.shape[2:]
    half = torch.tensor([width / 2, height / 2], dtype=torch.float64, device=matrix.device)
    linear = matrix[:, :, :2] * half / half[:, None]  # torch counts in half widths and half heights
    theta = torch.cat([linear, matrix[:, :, 2:] / half[:, None]], 2).to(images)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
