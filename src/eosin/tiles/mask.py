"""Tissue masks: exact tissue fractions, areas, outlines, and masks that come from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt
import shapely
from shapely.geometry import Polygon

from eosin.errors import GeometryError, MissingMppError, NoTissueError, TissueError
from eosin.geometry import Mpp
from eosin.tiles.geojson import Annotation, GeoJsonSource, areas, read_geojson, to_feature_collection

if TYPE_CHECKING:
    from eosin.slides import Slide

MASK_MPP = 8.0
MASK_MAX_PX = 4096
MASK_MIN_PX = 64
ASPECT_TOLERANCE = 0.02
TISSUE_COLOR = (150, 60, 150)


@dataclass(frozen=True, eq=False)
class TissueMask:
    """Where the tissue is, as a coarse raster over a slide.

    Attributes:
        mask: bool (h, w).
        downsample: (dx, dy) level-0 pixels per mask pixel, floats.
        origin_px: (x, y) level-0 position of the corner of mask pixel (0, 0).
        method: what made it ("od-texture", "geojson", "image", ...).
        params: the numbers it was made with, for the record.
    """

    mask: npt.NDArray[np.bool_]
    downsample: tuple[float, float]
    origin_px: tuple[float, float]
    method: str
    params: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Check shapes.

        Raises:
            GeometryError: the mask is not a two-dimensional bool array, or the scale is not positive.
        """
        if self.mask.ndim != 2 or self.mask.dtype != np.bool_ or self.mask.size == 0:
            raise GeometryError(f"a tissue mask is a bool (h, w) array; got {self.mask.dtype} {self.mask.shape}")
        if min(self.downsample) <= 0:
            raise GeometryError(f"mask downsample {self.downsample} must be positive")

    def __getstate__(self) -> dict[str, Any]:
        """Leave the summed-area table out of pickles: it is quickly made again and 64 times the mask."""
        return {name: value for name, value in self.__dict__.items() if name != "_integral"}

    @cached_property
    def _integral(self) -> npt.NDArray[np.int64]:
        """Summed-area table (h + 1, w + 1): entry (i, j) counts the tissue in mask[:i, :j]."""
        table = np.zeros((self.mask.shape[0] + 1, self.mask.shape[1] + 1), dtype=np.int64)
        np.cumsum(self.mask, axis=0, out=table[1:, 1:])
        np.cumsum(table[1:, 1:], axis=1, out=table[1:, 1:])
        return table

    def fraction(self, xy: npt.NDArray[np.int64], size0_px: tuple[float, float]) -> npt.NDArray[np.float32]:
        """Return the share of each rectangle's area that is tissue; outside the mask is none.

        Exact for sub-pixel edges: the mask is constant in each of its pixels, so its integral is
        bilinear between the entries of the summed-area table (Crow, SIGGRAPH 1984).

        Args:
            xy: (n, 2) level-0 top-left corners.
            size0_px: (width, height) of every rectangle in level-0 pixels, not rounded.

        Returns:
            float32 (n,) in 0..1.
        """
        height, width = self.mask.shape
        corner = np.asarray(xy, dtype=np.float64) - np.asarray(self.origin_px, dtype=np.float64)
        left = np.clip(corner[:, 0] / self.downsample[0], 0, width)
        right = np.clip((corner[:, 0] + size0_px[0]) / self.downsample[0], 0, width)
        top = np.clip(corner[:, 1] / self.downsample[1], 0, height)
        bottom = np.clip((corner[:, 1] + size0_px[1]) / self.downsample[1], 0, height)
        tissue = self._upto(right, bottom) - self._upto(left, bottom) - self._upto(right, top) + self._upto(left, top)
        area = size0_px[0] / self.downsample[0] * size0_px[1] / self.downsample[1]
        return np.clip(tissue / area, 0, 1).astype(np.float32)

    def _upto(self, u: npt.NDArray[np.float64], v: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the integral of the mask over [0, u] x [0, v], in mask pixels."""
        height, width = self.mask.shape
        column = np.minimum(u.astype(np.int64), width - 1)
        row = np.minimum(v.astype(np.int64), height - 1)
        fu, fv = u - column, v - row
        flat = self._integral.ravel()
        index = row * (width + 1) + column
        upper = flat[index] * (1 - fu) + flat[index + 1] * fu
        lower = flat[index + width + 1] * (1 - fu) + flat[index + width + 2] * fu
        return upper * (1 - fv) + lower * fv

    def area_mm2(self, mpp: Mpp) -> float:
        """Return the tissue area in mm², for level-0 pixels of `mpp`."""
        pixel_um2 = self.downsample[0] * mpp.x * self.downsample[1] * mpp.y
        return float(np.count_nonzero(self.mask) * pixel_um2 / 1e6)

    def polygons(self) -> list[Polygon]:
        """Return the outlines of the tissue, with holes, in level-0 pixels.

        The rings run along pixel edges: their area is exactly that of the mask, and rasterising
        them on the same grid gives the mask back.
        """
        doubled = cv2.resize(self.mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
        contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        if not contours:
            return []
        # On the doubled grid even pixels touch an edge on their low side, odd ones on their high side.
        rings = [((contour[:, 0, :] + 1) // 2) * self.downsample + self.origin_px for contour in contours]
        holes: dict[int, list[np.ndarray]] = {}
        for index, parent in enumerate(hierarchy[0, :, 3]):
            if parent >= 0:
                holes.setdefault(int(parent), []).append(rings[index])
        found: list[Polygon] = []
        for index, parent in enumerate(hierarchy[0, :, 3]):
            if parent < 0:
                found.extend(areas(Polygon(rings[index], holes.get(index, []))))
        return found

    def to_geojson(self) -> dict[str, Any]:
        """Return the outlines as a QuPath FeatureCollection, class "Tissue", level-0 pixels."""
        return to_feature_collection(
            Annotation(geometry=polygon, name="Tissue", color=TISSUE_COLOR) for polygon in self.polygons()
        )

    @classmethod
    def from_geojson(cls, source: GeoJsonSource, slide: Slide) -> TissueMask:
        """Return the mask of all areas of a GeoJSON file or object (level-0 pixels).

        A mask pixel is tissue when its centre lies inside; the raster has about 8 µm per pixel.

        Raises:
            GeometryError: not readable as GeoJSON.
            NoTissueError: no area in it lies on the slide.
        """
        origin = str(source) if isinstance(source, Path | str) else "the GeoJSON object"
        merged = shapely.union_all([annotation.geometry for annotation in read_geojson(source)])
        width, height = mask_size(slide)
        downsample = (slide.size_px[0] / width, slide.size_px[1] / height)
        mask = rasterize(areas(merged), shape=(height, width), downsample=downsample, origin_px=(0.0, 0.0))
        if not mask.any():
            raise NoTissueError(
                f"{origin} has no area on this slide of {slide.size_px[0]} x {slide.size_px[1]} pixels; "
                "coordinates must be level-0 pixels"
            )
        return cls(mask, downsample, (0.0, 0.0), "geojson", {"source": origin})

    @classmethod
    def from_image(cls, source: Path | str | npt.NDArray[Any], slide: Slide) -> TissueMask:
        """Return a mask from an image of any size, stretched over the slide.

        Values above zero (above 0.5 for floats; in any colour channel) are tissue. It covers the
        whole slide or, where the slide has smaller bounds and their shape fits better, the bounds.

        Args:
            source: PNG, TIFF, BMP or `.npy` file, or an array (h, w) or (h, w, c).
            slide: what it belongs to.

        Raises:
            TissueError: the file cannot be read as a mask, or is a JPEG (its edges are not exact).
            GeometryError: its aspect ratio differs from the slide's by more than 2 %.
            NoTissueError: it is empty.
        """
        origin = str(source) if isinstance(source, Path | str) else "the mask array"
        values = _read_mask(Path(source)) if isinstance(source, Path | str) else np.asarray(source)
        mask = _binarize(values, origin)
        full = (0, 0, *slide.size_px)
        aspect = mask.shape[1] / mask.shape[0]
        extents = sorted({full, tuple(slide.bounds)}, key=lambda box: (abs(aspect * box[3] / box[2] - 1), box != full))
        x, y, width, height = extents[0]
        if abs(aspect * height / width - 1) > ASPECT_TOLERANCE:
            raise GeometryError(
                f"{origin} is {mask.shape[1]} x {mask.shape[0]} (aspect {aspect:.3f}) but the slide is "
                f"{width} x {height} (aspect {width / height:.3f}); a mask must cover the whole slide, not a crop of it"
            )
        if not mask.any():
            raise NoTissueError(f"{origin} has no pixel above zero: no tissue")
        downsample = (width / mask.shape[1], height / mask.shape[0])
        return cls(
            mask, downsample, (float(x), float(y)), "image", {"source": origin, "size_px": list(mask.shape[::-1])}
        )

    @classmethod
    def from_file(cls, path: Path | str, slide: Slide) -> TissueMask:
        """Return the mask in a GeoJSON or image file, told apart by its suffix."""
        name = Path(path).name.lower()
        if name.endswith((".geojson", ".json", ".geojson.gz", ".json.gz")):
            return cls.from_geojson(path, slide)
        return cls.from_image(path, slide)


def mask_size(slide: Slide, mpp: float = MASK_MPP) -> tuple[int, int]:
    """Return (width, height) of a raster over the slide at about `mpp`; long side 64 to 4096 px."""
    width, height = slide.size_px
    try:
        shrink = min(1.0, slide.mpp.mean / mpp)
    except MissingMppError:
        shrink = 1.0
    longest = max(width, height)
    shrink = min(1.0, max(shrink, MASK_MIN_PX / longest), MASK_MAX_PX / longest)
    return max(1, round(width * shrink)), max(1, round(height * shrink))


def rasterize(
    polygons: Sequence[Polygon],
    *,
    shape: tuple[int, int],
    downsample: tuple[float, float],
    origin_px: tuple[float, float],
) -> npt.NDArray[np.bool_]:
    """Return a bool (h, w) raster, True where a pixel's centre lies inside `polygons`.

    Even-odd scan conversion of every edge at once; the polygons must not overlap.
    """
    height, width = shape
    toggles = np.zeros((height, width + 1), dtype=np.int32)
    rings = [ring for polygon in polygons for ring in (polygon.exterior, *polygon.interiors)]
    for ring in rings:
        points = (np.asarray(ring.coords)[:, :2] - origin_px) / downsample
        low, high = points[:-1], points[1:]
        swap = low[:, 1] > high[:, 1]
        low, high = np.where(swap[:, None], high, low), np.where(swap[:, None], low, high)
        # Rows whose centre (row + 0.5) lies in [low.y, high.y).
        first = np.clip(np.ceil(low[:, 1] - 0.5), 0, height).astype(np.int64)
        last = np.clip(np.ceil(high[:, 1] - 0.5), 0, height).astype(np.int64)
        count = last - first
        edge = np.repeat(np.arange(len(low)), count)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
        slope = (high[edge, 0] - low[edge, 0]) / (high[edge, 1] - low[edge, 1])
        crossing = low[edge, 0] + (row + 0.5 - low[edge, 1]) * slope
        column = np.clip(np.ceil(crossing - 0.5), 0, width).astype(np.int64)
        np.add.at(toggles, (row, column), 1)
    return (np.cumsum(toggles, axis=1)[:, :width] & 1).astype(bool)


def _read_mask(path: Path) -> npt.NDArray[Any]:
    suffix = path.suffix.lower()
    if suffix in {".jpg", ".jpeg"}:
        raise TissueError(f"{path} is a JPEG: its values are not exact; save the mask as PNG, TIFF or .npy")
    try:
        if suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if suffix in {".tif", ".tiff"}:
            import tifffile

            return tifffile.imread(path)
        from PIL import Image

        with Image.open(path) as image:
            return np.asarray(image.convert("RGB") if image.mode in {"RGBA", "P", "LA", "PA"} else image)
    except (OSError, ValueError) as error:
        raise TissueError(f"cannot read {path} as a tissue mask: {error}") from error


def _binarize(values: npt.NDArray[Any], origin: str) -> npt.NDArray[np.bool_]:
    if values.ndim == 3:
        values = values[..., :3].max(axis=-1) if values.shape[-1] <= 4 else values.max(axis=0)
    if values.ndim != 2 or values.size == 0:
        raise TissueError(f"{origin} has shape {values.shape}; a mask is (h, w) or (h, w, channels)")
    return values > 0.5 if np.issubdtype(values.dtype, np.floating) else values > 0
