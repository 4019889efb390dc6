"""Axial rotary positions as DINOv3 has them (arXiv 2508.10104, section 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Turn = tuple[Tensor, Tensor]
"""Cosine and sine (patches, head width) of the rotary angles of one crop size."""


def rotary_angles(rows: int, columns: int, head_dim: int, device: torch.device) -> Tensor:
    """Return DINOv3's axial rotary angles (rows * columns, head_dim): y's, x's, and both again.

    Patch centres lie at (i + 0.5) / n of each side, mapped to [-1, 1]; the angle is 2 pi coordinate / period with
    periods 100 ** (j / (head_dim / 4)).
    """
    y, x = ((torch.arange(n, device=device, dtype=torch.float32) + 0.5) / n * 2 - 1 for n in (rows, columns))
    centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
    periods = rotary_periods(head_dim).to(device)
    return (2 * math.pi * centres[:, :, None] / periods).flatten(1).tile(2)


def rotary_periods(head_dim: int) -> Tensor:
    """Return DINOv3's periods of base 100, (head_dim / 4,)."""
    return 100.0 ** (torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim // 4))


def turn_patches(x: Tensor, turn: Turn) -> Tensor:
    """Rotate the last tokens of queries or keys (B, heads, n, w), one for each row of `turn`; the others stay."""
    cos, sin = turn
    prefix, patches = x.split((x.shape[2] - len(cos), len(cos)), dim=2)
    left, right = patches.chunk(2, dim=-1)
    turned = patches * cos + torch.cat((-right, left), dim=-1) * sin
    return torch.cat((prefix, turned.to(x.dtype)), dim=2)
