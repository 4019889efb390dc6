"""Which whole pixels a fractional rectangle needs, and the one resize that follows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from eosin.geometry import ReadPlan, frame_origin, round_half_up
from eosin.slides.backend import Pixels

FILTER = "mean of 2^k x 2^k boxes, k <= 3, then antialiased bilinear"
"""How pixels become coarser: part of every recipe, the same for every codec."""
_RESIZE = Image.Resampling.BILINEAR
# Pillow's BILINEAR widens its support by the reduction: it is antialiased.
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


def footprint(plan: ReadPlan, xy: tuple[int, int], out_px: tuple[int, int], frame: tuple[int, int]) -> Footprint:
    """Return what is read for `out_px` pixels of a plan at the level-0 corner `xy`.

    Stored pixels are taken as they are only where the corner is a whole pixel of the frame and all of
    them lie inside it; a footprint that ends inside must not become a tile that sticks out.
    """
    size = (plan.read_px[0] * out_px[0] / plan.tile_px, plan.read_px[1] * out_px[1] / plan.tile_px)
    origin = (xy[0] / plan.downsample[0], xy[1] / plan.downsample[1])
    resample = plan.resample
    if not resample:
        origin = (frame_origin(xy[0], plan.downsample[0]), frame_origin(xy[1], plan.downsample[1]))
        resample = any(
            at % 1 != 0 or limit - count < at <= limit - exact + _EDGE_SLACK_PX
            for at, count, exact, limit in zip(origin, out_px, size, frame, strict=True)
        )
    return Footprint(plan.level, plan.scale, origin, size, out_px, resample)


def snap(footprint: Footprint, frame: tuple[int, int], axis: int) -> int:
    """Return the nearest whole pixel along `axis`; the one before, where rounding up would make it stick out."""
    origin, size, limit = footprint.origin[axis], footprint.out_px[axis], frame[axis]
    start = int(round_half_up(origin))
    return start - 1 if start > origin and start + size == limit + 1 else start


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
    return np.array(Image.fromarray(rgb).resize(out_px, _RESIZE, box=box))
