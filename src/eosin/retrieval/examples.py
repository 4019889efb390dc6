"""What is searched for: a tile, a region, an annotation, a slide or an image, as vectors of one index."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import shapely

from eosin.errors import MissingMppError, QueryError, closest
from eosin.features.store import FeatureStore
from eosin.geometry import LEVEL_TOLERANCE
from eosin.retrieval.build import store_spec
from eosin.retrieval.filters import Is
from eosin.retrieval.inputs import unit_queries
from eosin.retrieval.protocol import Floats, Ids, IndexSpec, VectorIndex, check_same_features
from eosin.slides import open_slide
from eosin.tiles import Annotation, tile

Kind = Literal["tile", "region", "annotation", "slide", "image"]
Encode = Callable[[npt.NDArray[np.uint8]], Floats]

ABOUT = ("patient_id", "site", "scanner", "stain", "organ", "label")
"""Fields of which an example knows the values of its tiles."""
BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Example:
    """One thing to look for, or to stay away from.

    Attributes:
        kind: what it is.
        name: the same in words, such as "tile of a.svs at (448, 0)".
        vectors: its tiles, float32 (n, dim), of unit length.
        xy: level-0 top-left corners of its tiles (n, 2); in pixels of the file for an image.
        slide_id: slide it lies on; None for an image file.
        size0_px: (width, height) of a tile in the same pixels; None when not known.
        ids: of its tiles in the index, uint64; empty when they are not in it.
        about: field -> value -> tiles that have it.
        path: file of an image.
    """

    kind: Kind
    name: str
    vectors: Floats
    xy: npt.NDArray[np.int64]
    slide_id: str | None = None
    size0_px: tuple[float, float] | None = None
    ids: Ids = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    about: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    path: Path | None = None

    @property
    def mean(self) -> Floats:
        """The mean of its tiles, (dim,), of unit length.

        Raises:
            QueryError: the tiles point in opposite directions and leave no mean.
        """
        mean = self.vectors.mean(axis=0, dtype=np.float64)
        length = np.linalg.norm(mean)
        if not length > 1e-6:
            raise QueryError(f"{self.name}: its tiles cancel and leave nothing to look for; choose fewer of them")
        return (mean / length).astype(np.float32)


def footprint(payload: Mapping[str, npt.NDArray[Any]], row: int) -> tuple[float, float] | None:
    """Return (width, height) of a tile of the index in level-0 pixels; None when the index does not know."""
    if "size0_px" not in payload:
        return None
    width = float(payload["size0_px"][row])
    height = float(payload["size0_height_px"][row]) if "size0_height_px" in payload else width
    return (width, height) if width > 0 and height > 0 else None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SlideTiles:
    """The tiles of one slide, from an index or from a feature store.

    Attributes:
        slide_id: the slide.
        where: "the index" or the folder of the store, for messages.
        vectors: float32 (n, dim), unit length.
        xy: int64 (n, 2) level-0 top-left corners.
        size0_px: (width, height) of a tile in level-0 pixels; None when not known.
        ids: uint64 (n,) in the index; empty for tiles of a store.
        payload: columns (n,) of the index; empty for tiles of a store.
    """

    slide_id: str
    where: str
    vectors: Floats
    xy: npt.NDArray[np.int64]
    size0_px: tuple[float, float] | None
    ids: Ids
    payload: Mapping[str, npt.NDArray[Any]]

    @property
    def centres(self) -> npt.NDArray[np.float64]:
        """Level-0 centres of the tiles (n, 2).

        Raises:
            QueryError: the size of the tiles on the slide is not known.
        """
        if self.size0_px is None:
            raise QueryError(
                f"{self.slide_id}: {self.where} does not know how large its tiles are on the slide, so no region can "
                "be looked for; name a tile by its corner, slide:x,y"
            )
        return self.xy + np.asarray(self.size0_px) / 2

    def example(self, rows: npt.NDArray[np.intp], kind: Kind, name: str) -> Example:
        """Return some of the tiles as an example."""
        about = {}
        for column in ABOUT:
            values = self.payload[column][rows].tolist() if column in self.payload else []
            counts = {value: values.count(value) for value in sorted({str(v) for v in values}) if value}
            if counts:
                about[column] = counts
        return Example(
            kind=kind,
            name=name,
            vectors=self.vectors[rows],
            slide_id=self.slide_id,
            xy=self.xy[rows],
            size0_px=self.size0_px,
            ids=self.ids[rows] if len(self.ids) else self.ids,
            about=about,
        )


def indexed_tiles(index: VectorIndex, slide_id: str) -> SlideTiles:
    """Return the tiles of a slide that the index holds.

    Raises:
        QueryError: it holds none; the message lists the closest names.
    """
    parts = list(index.scroll(where=Is(field="slide_id", values=(slide_id,))))
    if not sum(len(part.ids) for part in parts):
        known = index.facet("slide_id")
        raise QueryError(
            f"slide {slide_id!r} is not in the index ({len(known)} slides; the closest are: "
            f"{closest(slide_id, known)}); for a slide from elsewhere, extract its features and give their folder "
            "with --features"
        )
    payload = {name: np.concatenate([part.payload[name] for part in parts]) for name in parts[0].payload}
    vectors = [part.vectors for part in parts if part.vectors is not None]
    xy = np.stack([payload["x"], payload["y"]], axis=1).astype(np.int64)
    return SlideTiles(
        slide_id=slide_id,
        where="the index",
        vectors=np.concatenate(vectors),
        xy=xy,
        size0_px=footprint(payload, 0),
        ids=np.concatenate([part.ids for part in parts]),
        payload=payload,
    )


def stored_tiles(store: FeatureStore, slide_id: str, spec: IndexSpec) -> SlideTiles:
    """Return the kept tiles of a slide of a feature store, for a search in an index made like it.

    Raises:
        IndexMismatchError: other encoder, weights, microns per pixel or tile size than the index.
        StoreError: no such slide.
        QueryError: quality control kept none of its tiles.
    """
    check_same_features(spec, store_spec(store), str(store.path))
    features = store[slide_id]
    if not features.kept.any():
        raise QueryError(f"{features.slide_id}: quality control kept none of its {len(features)} tiles in {store.path}")
    return SlideTiles(
        slide_id=features.slide_id,
        where=str(store.path),
        vectors=unit_queries(features.x[features.kept], spec),
        xy=features.xy[features.kept],
        size0_px=features.size0_px,
        ids=np.empty(0, dtype=np.uint64),
        payload={},
    )


def tile_at(tiles: SlideTiles, xy: tuple[int, int]) -> Example:
    """Return the tile whose corner is `xy`, or else the one nearest in centre that covers the point.

    Raises:
        QueryError: no tile covers it; the message names the nearest.
    """
    exact = np.flatnonzero((tiles.xy == np.asarray(xy)).all(axis=1))
    if len(exact):
        row = int(exact[0])
    else:
        away = np.abs(tiles.centres - np.asarray(xy, dtype=np.float64))
        width, height = tiles.size0_px or (0.0, 0.0)
        row = int(np.argmin(np.square(away).sum(axis=1)))
        inside = np.flatnonzero((away[:, 0] <= width / 2) & (away[:, 1] <= height / 2))
        if not len(inside):
            near = tuple(tiles.xy[row].tolist())
            raise QueryError(
                f"{tiles.slide_id}: no tile covers ({xy[0]}, {xy[1]}); positions are level-0 pixels. Background and "
                f"tiles that quality control rejected are not in {tiles.where}; the nearest tile is at {near}"
            )
        row = int(inside[np.argmin(np.square(away[inside]).sum(axis=1))])
    x, y = tiles.xy[row].tolist()
    return tiles.example(np.array([row]), "tile", f"tile of {tiles.slide_id} at ({x}, {y})")


def tiles_in_rectangle(tiles: SlideTiles, xy: tuple[int, int], size_px: tuple[int, int]) -> Example:
    """Return the tiles whose centre lies in a rectangle: left and top edge inside, right and bottom not.

    Raises:
        QueryError: an empty rectangle, or no centre inside.
    """
    if min(size_px) < 1:
        raise QueryError(f"a region of {size_px[0]} x {size_px[1]} pixels is empty")
    x, y = tiles.centres.T
    inside = (x >= xy[0]) & (x < xy[0] + size_px[0]) & (y >= xy[1]) & (y < xy[1] + size_px[1])
    middle = (xy[0] + size_px[0] // 2, xy[1] + size_px[1] // 2)
    rows = _some(tiles, inside, middle)
    name = f"{_many(len(rows))} of {tiles.slide_id} in ({xy[0]}, {xy[1]}), {size_px[0]} x {size_px[1]} px"
    return tiles.example(rows, "region", name)


def tiles_in_annotations(tiles: SlideTiles, annotations: Sequence[Annotation], *, name: str) -> Example:
    """Return the tiles whose centre lies in one of the areas.

    Args:
        tiles: of the slide the areas were drawn on.
        annotations: areas in level-0 pixels.
        name: what to call them.

    Raises:
        QueryError: no areas, or no centre inside.
    """
    if not annotations:
        raise QueryError(f"{name} holds no area; draw a polygon in QuPath and export it as GeoJSON")
    area = shapely.union_all([one.geometry for one in annotations])
    shapely.prepare(area)
    inside = np.asarray(shapely.contains_xy(area, tiles.centres), dtype=np.bool_)
    point = area.representative_point()
    rows = _some(tiles, inside, (round(point.x), round(point.y)))
    return tiles.example(rows, "annotation", f"{_many(len(rows))} of {tiles.slide_id} in {name}")


def whole_slide(tiles: SlideTiles) -> Example:
    """Return all tiles of a slide."""
    rows = np.arange(len(tiles.xy))
    return tiles.example(rows, "slide", f"slide {tiles.slide_id}, {_many(len(rows))}")


def image_tiles(path: Path, spec: IndexSpec, encode: Encode, *, mpp: float | None = None, icc: bool = False) -> Example:
    """Return an image file as tiles of the index's size and microns per pixel.

    It is read as a slide is. An image of one tile's size is one tile; a larger one is tiled where it holds tissue, the
    last tiles moved inwards; a smaller one is refused, for what is padded on would be a part of the query.

    Args:
        path: any image or slide that eosin reads.
        spec: of the index.
        encode: (n, S, S, 3) uint8 -> (n, dim).
        mpp: microns per pixel of the image; what the file says when None.
        icc: convert to sRGB through the file's profile, as the index's slides were.

    Raises:
        MissingMppError: neither the file nor `mpp` says it.
        QueryError: the index does not know its tiles, or the image is smaller than one.
        UpsampleError: the image is far coarser than the index's tiles.
        NoTissueError: an image larger than a tile holds no tissue.
    """
    if spec.mpp is None or spec.tile_px is None:
        raise QueryError(
            "the index does not say how large its tiles are (it was imported so): an image cannot be read at their "
            "scale; give a tile of an indexed slide, or a slide of a feature store with --features"
        )
    with open_slide(path, mpp=mpp, icc=icc) as image:
        try:
            plan = image.plan(tile_px=spec.tile_px, mpp=spec.mpp)
        except MissingMppError as error:
            raise MissingMppError(
                f"{path.name}: the image does not say its microns per pixel, and tiles of the index have {spec.mpp:g}; "
                "give it with --mpp (0.25 for a 40x scan, 0.5 for 20x), or name a tile of an indexed slide instead"
            ) from error
        room = np.asarray(image.size_px) / np.asarray(plan.size0_px)
        if room.min() < 1 - LEVEL_TOLERANCE:
            side = spec.tile_px * spec.mpp
            width, height = room * side
            raise QueryError(
                f"{path.name} shows {width:.0f} x {height:.0f} µm; a tile of the index is {side:.0f} µm wide and is "
                "never padded: cut a larger image, or check --mpp"
            )
        if room.max() < 1 + LEVEL_TOLERANCE:
            xy = np.zeros((1, 2), dtype=np.int64)
        else:
            xy = tile(image, tile_px=spec.tile_px, mpp=spec.mpp, edge="shift-in").xy
        parts = []
        for start in range(0, len(xy), BATCH):
            corners = [(int(x), int(y)) for x, y in xy[start : start + BATCH]]
            parts.append(encode(np.stack([image.read_tile(corner, plan).rgb for corner in corners])))
    return Example(
        kind="image",
        name=f"image {path.name}, {_many(len(xy))}",
        vectors=unit_queries(np.concatenate(parts), spec),
        xy=xy,
        size0_px=plan.size0_px,
        path=path,
    )


def _some(tiles: SlideTiles, inside: npt.NDArray[np.bool_], middle: tuple[int, int]) -> npt.NDArray[np.intp]:
    rows = np.flatnonzero(inside)
    if not len(rows):
        width, height = tiles.size0_px or (0.0, 0.0)
        raise QueryError(
            f"{tiles.slide_id}: none of its {len(inside)} tiles has its centre in the region (a tile is "
            f"{width:.0f} x {height:.0f} level-0 pixels wide); draw it larger, or name the tile in its middle: "
            f"{tiles.slide_id}:{middle[0]},{middle[1]}"
        )
    return rows


def _many(count: int) -> str:
    return "1 tile" if count == 1 else f"{count} tiles"
