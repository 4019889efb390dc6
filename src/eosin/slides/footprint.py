"""Which whole pixels a fractional rectangle needs, and the one resize that follows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from eosin.geometry import round_half_up
from eosin.slides.backend import Pixels

FILTER = Image.Resampling.BILINEAR
"""Pillow's BILINEAR widens its support by the reduction: it is antialiased."""
_EDGE_SLACK_PX = 0.5


@dataclass(frozen=True, slots=True)
class Footprint:
    """A rectangle of one read frame, in float read-frame pixels, and the size it becomes."""

    level: int
    scale: int
    origin: tuple[float, float]
    size: tuple[float, float]
    out_px: tuple[int, int]
    resample: bool


def snap(footprint: Footprint, frame: tuple[int, int], axis: int) -> int:
    """Return the first whole pixel along `axis`, kept inside the frame when it sticks out by one."""
    start, size, limit = int(round_half_up(footprint.origin[axis])), footprint.out_px[axis], frame[axis]
    return start - 1 if start + size == limit + 1 and start > 0 else start


def cover(footprint: Footprint, frame: tuple[int, int], axis: int) -> tuple[int, int, tuple[float, float]]:
    """Return first pixel, count, and the fractional box within them, along `axis`.

    An overhang of less than half a pixel comes from rounding, not from the caller: it is cut,
    so that no background bleeds into the last row.
    """
    first, last, limit = footprint.origin[axis], footprint.origin[axis] + footprint.size[axis], frame[axis]
    if limit < last < limit + _EDGE_SLACK_PX:
        last = float(limit)
    start, stop = int(np.floor(first + 1e-6)), int(np.ceil(last - 1e-6))
    stop = max(stop, start + 1)
    return start, stop - start, (max(0.0, first - start), min(last - start, float(stop - start)))


def resize(rgb: Pixels, out_px: tuple[int, int], box: tuple[float, float, float, float]) -> Pixels:
    """Return the fractional `box` (left, top, right, bottom) of `rgb` at (width, height), antialiased, writable."""
    return np.array(Image.fromarray(rgb).resize(out_px, FILTER, box=box))
