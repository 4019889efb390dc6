"""The plan of tiles over a slide: where they lie and how much tissue each holds. No pixels.

The grid is anchored to the slide (the origin of its bounds), never to a contour: another
tissue mask keeps other tiles of the same grid, and moves none. Where tiles are stored pixels
that are not resized, it lies on whole pixels of the frame that is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import shapely

from eosin.errors import GeometryError
from eosin.geometry import (
    EDGE_POLICIES,
    PLAUSIBLE_MPP,
    EdgePolicy,
    Mpp,
    ReadPlan,
    axis_origins,
    covered_fraction,
)
from eosin.tiles.geojson import Annotation, GeoJsonSource, read_geojson, to_feature_collection
from eosin.tiles.mask import TissueMask
from eosin.tiles.tissue import tissue_mask

if TYPE_CHECKING:
    from eosin.slides import Slide

ROI_FRACTION = 0.5
MAX_TILES = 50_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class TileSpec:
    """What tiles are wanted.

    Attributes:
        tile_px: side of a tile in its own pixels.
        mpp: microns per pixel of the tile, continuous.
        overlap_px: pixels (of the tile) shared by neighbours.
        min_tissue: a tile is kept when its tissue fraction is >= this; 0 keeps every position.
        edge: what to do with tiles that stick out at the right and bottom.
    """

    tile_px: int = 224
    mpp: float = 0.5
    overlap_px: int = 0
    min_tissue: float = 0.10
    edge: EdgePolicy = "drop"

    def __post_init__(self) -> None:
        """Check every number.

        Raises:
            GeometryError: a value that makes no grid; the message names it.
        """
        if self.tile_px < 1:
            raise GeometryError(f"tile_px is {self.tile_px}; a tile needs at least 1 pixel")
        if not (np.isfinite(self.mpp) and PLAUSIBLE_MPP[0] <= self.mpp <= 64):
            raise GeometryError(f"tile mpp is {self.mpp:g}; expected {PLAUSIBLE_MPP[0]:g} to 64 microns per pixel")
        if not 0 <= self.overlap_px < self.tile_px:
            raise GeometryError(
                f"overlap_px is {self.overlap_px} but must be at least 0 and less than tile_px ({self.tile_px}); "
                "with more the grid would never advance"
            )
        if not 0 <= self.min_tissue <= 1:
            raise GeometryError(f"min_tissue is {self.min_tissue:g}; it is a fraction from 0 to 1")
        if self.edge not in EDGE_POLICIES:
            raise GeometryError(f"unknown edge policy {self.edge!r}; one of {', '.join(EDGE_POLICIES)}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for a recipe."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class TileGrid:
    """A frozen plan of tiles, sorted by (y, x).

    Attributes:
        spec: what was asked for.
        plan: how each tile is read.
        slide_size_px: (width, height) of the slide, level 0.
        slide_mpp: microns per level-0 pixel.
        bounds: (x, y, width, height) of the scanned area, level 0.
        mask: the tissue mask that chose the tiles.
        xy: int64 (n, 2) level-0 top-left corners of the kept tiles.
        tissue: float32 (n,) tissue fraction of each.
        valid: float32 (n,) share of each tile that lies inside `bounds`.
        background_xy: int64 (m, 2) positions of the same grid with less than `min_tissue`.
        background_tissue: float32 (m,) their tissue fraction.
    """

    spec: TileSpec
    plan: ReadPlan
    slide_size_px: tuple[int, int]
    slide_mpp: Mpp
    bounds: tuple[int, int, int, int]
    mask: TissueMask
    xy: npt.NDArray[np.int64]
    tissue: npt.NDArray[np.float32]
    valid: npt.NDArray[np.float32]
    background_xy: npt.NDArray[np.int64]
    background_tissue: npt.NDArray[np.float32]

    def __len__(self) -> int:
        """Return the number of kept tiles."""
        return len(self.xy)

    @property
    def step0_px(self) -> tuple[float, float]:
        """(x, y) distance between neighbouring tiles in level-0 pixels, not rounded."""
        share = (self.spec.tile_px - self.spec.overlap_px) / self.spec.tile_px
        return self.plan.size0_px[0] * share, self.plan.size0_px[1] * share

    def to_geojson(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Return one rectangle per kept tile as a QuPath FeatureCollection.

        Args:
            names: class of each tile, for instance the reason it was rejected; "kept" when None.

        Raises:
            GeometryError: `names` is not one per tile.
        """
        if names is not None and len(names) != len(self):
            raise GeometryError(f"{len(names)} names for {len(self)} tiles")
        left, top, right, bottom = _corners(self.xy, self.plan.size0_px)
        boxes = shapely.box(left, top, right, bottom)
        return to_feature_collection(
            Annotation(
                geometry=box,
                name=names[i] if names is not None else "kept",
                object_type="tile",
                properties={"measurements": {"tissue": round(float(self.tissue[i]), 4)}, "index": i},
            )
            for i, box in enumerate(boxes)
        )


def tile(
    slide: Slide,
    *,
    tile_px: int = 224,
    mpp: float = 0.5,
    overlap_px: int = 0,
    min_tissue: float = 0.10,
    edge: EdgePolicy = "drop",
    mask: TissueMask | Path | str | None = None,
    roi: GeoJsonSource | None = None,
) -> TileGrid:
    """Return the tiles of a slide that hold tissue.

    Args:
        slide: an open slide.
        tile_px: side of a tile in pixels.
        mpp: microns per pixel of the tiles.
        overlap_px: pixels shared by neighbouring tiles.
        min_tissue: least tissue fraction of a kept tile.
        edge: policy at the right and bottom edge.
        mask: a tissue mask, or a GeoJSON or image file of one; found by `tissue_mask` when None.
        roi: GeoJSON; only positions with at least half their area inside it belong to the grid.

    Raises:
        GeometryError: sizes that make no grid, or an unreadable `roi`.
        MissingMppError: the slide does not say its mpp.
        NoTissueError: blank slide.
        NotBrightfieldError: dark slide and no `mask` given.
    """
    spec = TileSpec(tile_px=tile_px, mpp=mpp, overlap_px=overlap_px, min_tissue=min_tissue, edge=edge)
    return plan_tiles(slide, [spec], mask=mask, roi=roi)[0]


def plan_tiles(
    slide: Slide,
    specs: Sequence[TileSpec],
    *,
    mask: TissueMask | Path | str | None = None,
    roi: GeoJsonSource | None = None,
) -> list[TileGrid]:
    """Return one grid per spec, all on one tissue mask.

    The arguments and errors are those of `tile`.
    """
    slide_mpp = slide.mpp
    if mask is None:
        mask = tissue_mask(slide)
    elif not isinstance(mask, TissueMask):
        mask = TissueMask.from_file(mask, slide)
    area = None if roi is None else _roi(roi)
    return [_grid(slide, slide_mpp, spec, mask, area) for spec in specs]


def grid_positions(
    spec: TileSpec,
    *,
    size0_px: tuple[float, float],
    bounds: tuple[int, int, int, int],
    pixel0_px: tuple[float, float] = (1.0, 1.0),
) -> npt.NDArray[np.int64]:
    """Return every position of the grid over `bounds`: int64 (n, 2) level 0, sorted by (y, x).

    Args:
        spec: what tiles are wanted.
        size0_px: (width, height) of a tile, level 0, not rounded.
        bounds: (x, y, width, height), level 0.
        pixel0_px: (x, y) level-0 pixels per pixel of the frame whose whole pixels tiles start on.

    Raises:
        GeometryError: more than 50 million positions (the tiles are too small for this slide).
    """
    share = (spec.tile_px - spec.overlap_px) / spec.tile_px
    x0, y0, width, height = bounds
    expected = (width / (size0_px[0] * share) + 1) * (height / (size0_px[1] * share) + 1)
    if expected > MAX_TILES:
        raise GeometryError(
            f"about {expected:.2g} tiles of {spec.tile_px} px at {spec.mpp:g} mpp: more than {MAX_TILES}"
        )
    xs, ys = (
        axis_origins(
            start_px=start,
            extent_px=extent,
            size_px=size,
            step_px=size * share,
            edge=spec.edge,
            pixel_px=pixel,
        )
        for start, extent, size, pixel in (
            (x0, width, size0_px[0], pixel0_px[0]),
            (y0, height, size0_px[1], pixel0_px[1]),
        )
    )
    return np.stack([np.tile(xs, len(ys)), np.repeat(ys, len(xs))], axis=1)


def inside_fraction(
    area: shapely.Geometry, xy: npt.NDArray[np.int64], size0_px: tuple[float, float]
) -> npt.NDArray[np.float64]:
    """Return the share of each tile's area that lies inside `area`, float64 (n,)."""
    result = np.zeros(len(xy))
    left, top, right, bottom = _corners(xy, size0_px)
    west, north, east, south = shapely.bounds(area)
    near = np.flatnonzero((right > west) & (left < east) & (bottom > north) & (top < south))
    boxes = shapely.box(left[near], top[near], right[near], bottom[near])
    shapely.prepare(area)
    whole = shapely.contains(area, boxes)
    cut = ~whole & shapely.intersects(area, boxes)
    result[near[whole]] = 1.0
    result[near[cut]] = shapely.area(shapely.intersection(boxes[cut], area)) / (size0_px[0] * size0_px[1])
    return result


def _grid(slide: Slide, slide_mpp: Mpp, spec: TileSpec, mask: TissueMask, area: shapely.Geometry | None) -> TileGrid:
    plan = slide.plan(tile_px=spec.tile_px, mpp=spec.mpp)
    bounds = slide.bounds
    pixel0 = (1.0, 1.0) if plan.resample else plan.downsample
    xy = grid_positions(spec, size0_px=plan.size0_px, bounds=bounds, pixel0_px=pixel0)
    if area is not None:
        xy = xy[inside_fraction(area, xy, plan.size0_px) >= ROI_FRACTION]
    tissue = mask.fraction(xy, plan.size0_px)
    keep = tissue >= np.float32(spec.min_tissue)
    return TileGrid(
        spec=spec,
        plan=plan,
        slide_size_px=slide.size_px,
        slide_mpp=slide_mpp,
        bounds=bounds,
        mask=mask,
        xy=xy[keep],
        tissue=tissue[keep],
        valid=covered_fraction(xy[keep], plan.size0_px, bounds),
        background_xy=xy[~keep],
        background_tissue=tissue[~keep],
    )


def _roi(roi: GeoJsonSource) -> shapely.Geometry:
    area = shapely.union_all([annotation.geometry for annotation in read_geojson(roi)])
    if area.is_empty:
        origin = roi if isinstance(roi, Path | str) else "the GeoJSON object"
        raise GeometryError(f"the region of interest {origin} holds no polygon; draw an area, not a point or a line")
    return area


def _corners(xy: npt.NDArray[np.int64], size0_px: tuple[float, float]) -> tuple[np.ndarray, ...]:
    left, top = xy[:, 0].astype(np.float64), xy[:, 1].astype(np.float64)
    return left, top, left + size0_px[0], top + size0_px[1]
