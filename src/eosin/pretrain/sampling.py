"""What is drawn: a slide, microns per pixel, a place on its tissue. Arithmetic only; nothing is read here.

Every draw has a random stream of its own, addressed by (seed, sample, round, what) and never by what was drawn
before (the counter of Philox: Salmon et al., SC 2011). Sample number ``step * size * world + rank * size + i`` is
therefore the same tile however many workers read, after whatever resume; and the batches of all ranks together are
the one batch that a single process of ``world`` times the size would draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from eosin.errors import CohortError, GeometryError
from eosin.geometry import LEVEL_TOLERANCE, PLAUSIBLE_MPP, Mpp, round_half_up
from eosin.tiles.mask import TissueMask

Balance = Literal["slide", "site", "organ", "area"]
BALANCES: tuple[Balance, ...] = ("slide", "site", "organ", "area")
TRIES = 16
"""Positions tried on a drawn slide before another one is drawn."""
NEVER = 2**62

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class HsvFilter:
    """Tiles are kept when enough of their pixels have the hue of stained tissue.

    The defaults are those of Midnight (arXiv 2504.05186): 60 % of the pixels within 90-180, 8-255, 103-255, in
    OpenCV's hue (0-180), saturation and value (0-255).

    Attributes:
        low: least hue, saturation, value.
        high: greatest hue, saturation, value.
        min_share: least share of pixels within, 0-1.
    """

    low: tuple[int, int, int] = (90, 8, 103)
    high: tuple[int, int, int] = (180, 255, 255)
    min_share: float = 0.6

    def keeps(self, rgb: npt.NDArray[np.uint8]) -> bool:
        """Return whether a tile, uint8 (H, W, 3), passes."""
        within = cv2.inRange(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV), np.array(self.low), np.array(self.high))
        return cv2.countNonZero(within) >= self.min_share * within.size


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Which tiles are drawn from slides.

    Attributes:
        tile_px: side of a tile.
        mpp: (least, greatest) microns per pixel, drawn log-uniformly between.
        mpp_values: microns per pixel drawn uniformly from these instead, when there are any.
        balance: what is equally likely: each "slide"; each "site" or "organ", then each slide of it;
            "area": each mm² of tissue.
        min_tissue: least share of a tile that is tissue, by the slide's mask.
        hsv: filter on the pixels, or None.
        seed: at least 0.
    """

    tile_px: int = 256
    mpp: tuple[float, float] = (0.25, 2.0)
    mpp_values: tuple[float, ...] = ()
    balance: Balance = "slide"
    min_tissue: float = 0.4
    hsv: HsvFilter | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            GeometryError: a size, mpp or share that makes no tile.
            CohortError: an unknown balance, or a negative seed.
        """
        if self.tile_px < 8:
            raise GeometryError(f"tile_px is {self.tile_px}; a tile needs at least 8 pixels a side")
        for mpp in (*self.mpp, *self.mpp_values):
            if not PLAUSIBLE_MPP[0] <= mpp <= 64:
                raise GeometryError(f"mpp {mpp:g} is not plausible; expected {PLAUSIBLE_MPP[0]:g} to 64")
        if len(self.mpp) != 2 or self.mpp[0] > self.mpp[1]:
            raise GeometryError(
                f"mpp is {self.mpp}; it is (least, greatest) and drawn between; for fixed ones give mpp_values"
            )
        if not 0 <= self.min_tissue <= 1:
            raise GeometryError(f"min_tissue is {self.min_tissue:g}; it is a share from 0 to 1")
        if self.balance not in BALANCES:
            raise CohortError(f"unknown balance {self.balance!r}; one of {', '.join(BALANCES)}")
        if self.seed < 0:
            raise CohortError(f"seed is {self.seed}; it must be 0 or more")


def stream(seed: int, sample: int, round_: int = 0, what: int = 0) -> np.random.Generator:
    """Return the random stream of one draw; streams of different addresses never overlap in practice."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, what, round_, sample]))


@dataclass(frozen=True, eq=False)
class TissueRuns:
    """A tissue mask as runs of pixels along its rows: a hundredth of its memory, and quick to draw from.

    Attributes:
        row: int32 (n,) row of each run, ascending.
        left: int32 (n,) first column.
        right: int32 (n,) column after the last.
        downsample: (dx, dy) level-0 pixels per mask pixel.
        origin_px: (x, y) level-0 position of the mask's corner.
    """

    row: npt.NDArray[np.int32]
    left: npt.NDArray[np.int32]
    right: npt.NDArray[np.int32]
    downsample: tuple[float, float]
    origin_px: tuple[float, float]

    @classmethod
    def from_mask(cls, mask: TissueMask) -> TissueRuns:
        """Return the runs of `mask`."""
        step = np.diff(np.pad(mask.mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        row, left = (at.astype(np.int32) for at in np.nonzero(step == 1))
        right = np.nonzero(step == -1)[1].astype(np.int32)
        return cls(row, left, right, mask.downsample, mask.origin_px)

    @cached_property
    def _upto(self) -> Ints:
        """Tissue pixels up to the end of each run, (n,)."""
        return np.cumsum(self.right.astype(np.int64) - self.left)

    @property
    def pixels(self) -> int:
        """Number of mask pixels that are tissue."""
        return int(self._upto[-1]) if len(self._upto) else 0

    def points(self, u: Floats, v: Floats) -> Floats:
        """Return (k, 2) level-0 points, uniform over the tissue for `u` and `v` (k,) uniform in [0, 1)."""
        upto = self._upto
        at = u * upto[-1]
        run = np.minimum(np.searchsorted(upto, at, side="right"), len(upto) - 1)
        column = self.right[run] - (upto[run] - at)
        points = np.stack([column, self.row[run] + v], axis=1)
        return points * self.downsample + self.origin_px

    def fraction(self, xy: Sequence[float] | Ints, size0_px: tuple[float, float]) -> float:
        """Return the share of a level-0 rectangle that is tissue; exactly `TissueMask.fraction`.

        Args:
            xy: (2,) top-left corner.
            size0_px: (width, height), not rounded.
        """
        left, top = ((at - start) / by for at, start, by in zip(xy, self.origin_px, self.downsample, strict=True))
        width, height = (size / by for size, by in zip(size0_px, self.downsample, strict=True))
        first, last = np.searchsorted(self.row, np.array([np.floor(top), np.ceil(top + height)], dtype=np.int32))
        row = self.row[first:last]
        tall = np.minimum(row + 1, top + height) - np.maximum(row, top)
        wide = np.minimum(self.right[first:last], left + width) - np.maximum(self.left[first:last], left)
        return float(tall @ np.maximum(wide, 0)) / (width * height) if len(row) else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class SlideFacts:
    """What drawing needs to know of a slide.

    Attributes:
        size_px: (width, height) of level 0.
        bounds: x, y, width, height of what was scanned, level 0.
        mpp: microns per level-0 pixel.
        tissue: where the tissue is.
        area_mm2: of the tissue.
        stamp: (bytes, modification time in ns) of the file when it was looked at; None for an array.
    """

    size_px: tuple[int, int]
    bounds: tuple[int, int, int, int]
    mpp: Mpp
    tissue: TissueRuns
    area_mm2: float
    stamp: tuple[int, int] | None


def drawable_mpp(facts: SlideFacts, config: SampleConfig, name: str) -> tuple[float, ...]:
    """Return the part of the wanted mpp that a slide has: (least, greatest), or the values.

    Not finer than the slide's own pixels (within 1 %), nor so coarse that a tile is larger than the slide.

    Raises:
        GeometryError: nothing of it.
    """
    finest = max(facts.mpp.x, facts.mpp.y)
    coarsest = min(facts.bounds[2] * facts.mpp.x, facts.bounds[3] * facts.mpp.y) / config.tile_px
    wanted = config.mpp_values or config.mpp
    if config.mpp_values:
        had = tuple(v for v in wanted if finest <= v * (1 + LEVEL_TOLERANCE) and v <= coarsest)
    elif finest <= wanted[1] * (1 + LEVEL_TOLERANCE) and wanted[0] <= coarsest:
        low, high = max(wanted[0], min(finest, wanted[1])), min(wanted[1], coarsest)
        had = (low, high) if low <= high else ()
    else:
        had = ()
    if not had:
        raise GeometryError(
            f"{name}: tiles of {config.tile_px} px were asked for at {', '.join(f'{v:g}' for v in wanted)} mpp, but "
            f"the slide has {finest:.3g} mpp and ends above {coarsest:.3g}; tiles are neither enlarged nor padded"
        )
    return had


@dataclass(frozen=True, eq=False)
class Groups:
    """Units (slides, tiles) in groups that are equally likely.

    Attributes:
        names: of the groups.
        members: int64 arrays of unit indices, one a group.
        upto: cumulative weights of each group's members, ending in 1.
    """

    names: tuple[str, ...]
    members: tuple[Ints, ...]
    upto: tuple[Floats, ...]

    @classmethod
    def of(cls, names: Sequence[str], weights: Floats | None = None) -> Groups:
        """Return the groups of units named `names` (n,), each unit weighing 1 or `weights` (n,)."""
        known, code = np.unique(np.asarray(names, dtype=np.str_), return_inverse=True)
        order = np.argsort(code, kind="stable")
        members = np.split(order, np.flatnonzero(np.diff(code[order])) + 1)
        weights = np.ones(len(code)) if weights is None else weights
        sums = [np.cumsum(weights[of]) for of in members]
        return cls(tuple(known.tolist()), tuple(members), tuple(total / total[-1] for total in sums))

    def pick(self, random: np.random.Generator, lost: npt.NDArray[np.bool_]) -> int:
        """Return a unit that is not `lost` (n,), of which there must be one.

        Another unit of the same group takes the place of a lost one, so the balance between groups stays.
        """
        group = None
        while True:
            if group is None:
                group = int(random.random() * len(self.members))
            members, upto = self.members[group], self.upto[group]
            unit = int(members[min(np.searchsorted(upto, random.random(), side="right"), len(members) - 1)])
            if not lost[unit]:
                return unit
            if lost[members].all():
                group = None


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Place:
    """Where on a slide one tile may be read.

    Attributes:
        mpp: microns per pixel.
        xy: int64 (k, 2) level-0 top-left corners, to be tried in this order.
        skipped: (k + 1,) positions with too little tissue drawn before each of them, and in all.
    """

    mpp: float
    xy: Ints
    skipped: tuple[int, ...]


def draw_place(
    facts: SlideFacts, config: SampleConfig, had: tuple[float, ...], random: np.random.Generator, limit: int
) -> Place:
    """Draw microns per pixel, and up to `limit` of `TRIES` positions that hold enough tissue.

    The centre of a tile is uniform over the tissue; a tile that would leave the slide is moved inside.

    Args:
        facts: of the slide.
        config: what is wanted.
        had: see `drawable_mpp`.
        random: the draw's own stream.
        limit: positions wanted.
    """
    u = float(random.random())
    if config.mpp_values:
        mpp = had[min(int(u * len(had)), len(had) - 1)]
    else:
        mpp = float(np.exp(np.log(had[0]) + u * (np.log(had[1]) - np.log(had[0]))))
    size0 = (config.tile_px * mpp / facts.mpp.x, config.tile_px * mpp / facts.mpp.y)
    centres = facts.tissue.points(random.random(TRIES), random.random(TRIES))
    x, y, width, height = facts.bounds
    corner = centres - np.array(size0) / 2
    far = np.maximum((x + width - size0[0], y + height - size0[1]), (x, y))
    corners = round_half_up(np.clip(corner, (x, y), far))
    kept: list[int] = []
    skipped: list[int] = []
    failed = 0
    for index in range(TRIES):
        if len(kept) == limit:
            break
        if facts.tissue.fraction(corners[index], size0) >= config.min_tissue:
            kept.append(index)
            skipped.append(failed)
        else:
            failed += 1
    return Place(mpp=mpp, xy=corners[kept], skipped=(*skipped, failed))
