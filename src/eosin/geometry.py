"""Microns per pixel, levels, sizes and grids: pure arithmetic, numpy only.

All rounding of coordinates in eosin happens in this file. Frames: *level 0* is the finest
level of the file; the *read frame* is one level of the file reduced by
means over `scale` x `scale` boxes (1, 2, 4 or 8); a *tile* is what the encoder gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from eosin.errors import GeometryError, ImplausibleMppError, UpsampleError

PLAUSIBLE_MPP = (0.05, 5.0)
LEVEL_TOLERANCE = 0.01
SCALES = (1, 2, 4, 8)
MAX_UPSAMPLE = 2.0 * (1 + LEVEL_TOLERANCE)

EdgePolicy = Literal["drop", "pad-white", "shift-in"]
EDGE_POLICIES: tuple[EdgePolicy, ...] = ("drop", "pad-white", "shift-in")


def round_half_up(value: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return `value` rounded to int64, halves upwards (so that a grid never jitters)."""
    return np.floor(np.asarray(value, dtype=np.float64) + 0.5).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Mpp:
    """Microns per level-0 pixel along x and y."""

    x: float
    y: float

    @property
    def mean(self) -> float:
        """Geometric mean: the side of the square pixel of the same area."""
        return float(np.sqrt(self.x * self.y))

    @property
    def anisotropic(self) -> bool:
        """Whether x and y differ by more than 1 %."""
        return abs(self.x / self.y - 1) > LEVEL_TOLERANCE


def check_mpp(value: float, what: str) -> float:
    """Return `value` as float, or raise `ImplausibleMppError` naming `what`."""
    low, high = PLAUSIBLE_MPP
    if not (np.isfinite(value) and low <= value <= high):
        raise ImplausibleMppError(
            f"{what}: {value:g} microns per pixel is not plausible (expected {low:g} to {high:g}); "
            "if the file is wrong, give the right value with --slide-mpp or the cohort column 'mpp'"
        )
    return float(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadPlan:
    """How a tile of `tile_px` at `mpp` is read from one slide.

    Attributes:
        tile_px: side of the tile that comes out.
        mpp: microns per pixel asked for.
        level: level of the file that is read (0 = finest).
        scale: reduction of that level by box means, in the decoder where it can: 1, 2, 4 or 8.
        downsample: (x, y) level-0 pixels per read-frame pixel, `scale` included.
        size0_px: (width, height) of the tile's footprint in level-0 pixels, not rounded.
        read_px: (width, height) of the footprint in the read frame, not rounded.
        resample: whether a resize follows; False when the footprint is within half a
            read-frame pixel of `tile_px`, so that no pixel moves by more than a quarter.
            The grid then lies on whole read-frame pixels; a tile that does not is resized too.
        upsample: factor > 1 by which the tile is finer than the slide, else 1.0.
    """

    tile_px: int
    mpp: float
    level: int
    scale: int
    downsample: tuple[float, float]
    size0_px: tuple[float, float]
    read_px: tuple[float, float]
    resample: bool
    upsample: float


def plan_read(
    *,
    tile_px: int,
    mpp: float,
    slide_mpp: Mpp,
    level_downsamples: Sequence[tuple[float, float]],
) -> ReadPlan:
    """Return the coarsest level that is not coarser than `mpp`, within 1 %, and its largest such scale.

    The level comes first: a coarser level costs the decoder less than a finer one reduced. The scale
    depends on sizes alone, never on the file's codec, and leaves a factor of less than 2 to the resize
    (more only where the slide's pyramid lacks levels).

    Args:
        tile_px: side of the tile in pixels.
        mpp: target microns per pixel, continuous.
        slide_mpp: microns per level-0 pixel.
        level_downsamples: (x, y) level-0 pixels per pixel of each level, as floats.

    Raises:
        GeometryError: `tile_px` < 1.
        ImplausibleMppError: `mpp` outside 0.05-5 (coarser is allowed up to 64 for overviews).
        UpsampleError: the tile would be more than 2x finer than level 0.
    """
    if tile_px < 1:
        raise GeometryError(f"tile_px is {tile_px}; a tile needs at least 1 pixel")
    if not (np.isfinite(mpp) and PLAUSIBLE_MPP[0] <= mpp <= 64):
        raise ImplausibleMppError(f"target mpp {mpp:g} is not plausible (expected 0.05 to 64)")
    upsample = max(slide_mpp.x, slide_mpp.y) / mpp
    if upsample > MAX_UPSAMPLE:
        raise UpsampleError(
            f"tiles at {mpp:g} mpp would be {upsample:.2f}x finer than the slide's own "
            f"{slide_mpp.x:g} x {slide_mpp.y:g} mpp; ask for --mpp {slide_mpp.mean:.3g} or coarser"
        )
    limit = mpp * (1 + LEVEL_TOLERANCE)
    coarse = [max(dx * slide_mpp.x, dy * slide_mpp.y) for dx, dy in level_downsamples]
    level = max((i for i, c in enumerate(coarse) if c <= limit), key=lambda i: coarse[i], default=0)
    scale = max((s for s in SCALES if coarse[level] * s <= limit), default=1)
    dx, dy = level_downsamples[level][0] * scale, level_downsamples[level][1] * scale
    size0 = (tile_px * mpp / slide_mpp.x, tile_px * mpp / slide_mpp.y)
    read = (size0[0] / dx, size0[1] / dy)
    return ReadPlan(
        tile_px=tile_px,
        mpp=float(mpp),
        level=level,
        scale=scale,
        downsample=(dx, dy),
        size0_px=size0,
        read_px=read,
        resample=max(abs(read[0] - tile_px), abs(read[1] - tile_px)) >= 0.5,
        upsample=max(1.0, float(upsample)),
    )


def frame_origin(start_px: float, downsample: float) -> float:
    """Return a level-0 coordinate in the read frame.

    That is the whole read-frame pixel k where the coordinate is ``round(k * downsample)``, as those of
    a grid are, and the exact quotient elsewhere.
    """
    exact = start_px / downsample
    whole = round_half_up(exact)
    return float(whole) if round_half_up(whole * downsample) == start_px else exact


def axis_origins(
    *, start_px: int, extent_px: int, size_px: float, step_px: float, edge: EdgePolicy, pixel_px: float = 1.0
) -> npt.NDArray[np.int64]:
    """Return the level-0 origins of the tiles along one axis, ascending.

    Origin i is the level-0 coordinate, rounded, of read-frame pixel ``first + round(i * step / pixel)``,
    where `first` is the first at or after `start_px`: rounded from the exact product, never a sum of
    rounded steps, so a grid does not drift across a slide. With pixels of 1 that is
    ``start + round(i * step)``.

    Args:
        start_px: level-0 coordinate of the axis's first pixel (the slide's bounds).
        extent_px: pixels along the axis.
        size_px: footprint of a tile, not rounded.
        step_px: distance between tiles, not rounded.
        edge: what to do with a last tile that would stick out. ``drop`` leaves it out,
            ``pad-white`` keeps it, ``shift-in`` moves it back inside (when the axis is
            shorter than one tile it is padded; what is less than a pixel may stay uncovered).
        pixel_px: level-0 pixels per pixel of the frame whose whole pixels tiles start on.

    Raises:
        GeometryError: a size, step or pixel that is not positive, or an unknown policy.
    """
    if not (size_px > 0 and step_px > 0 and pixel_px > 0):
        raise GeometryError(
            f"tile size {size_px:g}, step {step_px:g} and pixel {pixel_px:g} must be positive "
            "(is the overlap >= the tile?)"
        )
    if edge not in EDGE_POLICIES:
        raise GeometryError(f"unknown edge policy {edge!r}; one of {', '.join(EDGE_POLICIES)}")
    if extent_px <= 0:
        return np.empty(0, dtype=np.int64)
    first = int(np.ceil(start_px / pixel_px - 1e-9))
    count = int(np.ceil(extent_px / step_px))
    pixels = first + round_half_up(np.arange(count) * (step_px / pixel_px))
    pixels = pixels[pixels * pixel_px < start_px + extent_px]
    # A quarter of a pixel of slack: a footprint of 448.2 fits an extent of 448.
    room = start_px + extent_px - size_px + 0.25
    inside = pixels * pixel_px <= room
    if edge == "drop":
        pixels = pixels[inside]
    elif edge == "shift-in":
        pixels[~inside] = max(first, int(np.floor(room / pixel_px)))
        pixels = np.unique(pixels)
    return round_half_up(pixels * pixel_px)


def covered_fraction(
    xy: npt.NDArray[np.int64], size_px: tuple[float, float], bounds: tuple[int, int, int, int]
) -> npt.NDArray[np.float32]:
    """Return, per tile, the share of its area inside `bounds` (x, y, width, height), level 0."""
    x0, y0, width, height = bounds
    overlap_x = np.minimum(xy[:, 0] + size_px[0], x0 + width) - np.maximum(xy[:, 0], x0)
    overlap_y = np.minimum(xy[:, 1] + size_px[1], y0 + height) - np.maximum(xy[:, 1], y0)
    area = np.clip(overlap_x, 0, None) * np.clip(overlap_y, 0, None)
    return np.clip(area / (size_px[0] * size_px[1]), 0, 1).astype(np.float32)
