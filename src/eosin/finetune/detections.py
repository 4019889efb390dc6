"""Points that any detector found on a slide: GeoJSON, CSV or JSON, in pixels, micrometres or millimetres."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson
import shapely
from shapely.geometry import MultiPoint, shape

from eosin.cohort.reading import read_cells, row_phrase, squeeze
from eosin.errors import GeometryError, MissingMppError
from eosin.geometry import Mpp

Unit = Literal["px", "um", "mm"]

_UM = {"um": 1.0, "mm": 1000.0}
_SCORES = ("probability", "score", "confidence", "prob", "p", "detectionprobability")
_NAMES = ("name", "class", "label", "category", "classification")
_COLUMNS: tuple[tuple[tuple[str, str], Unit], ...] = (
    (("x", "y"), "px"),
    (("xpx", "ypx"), "px"),
    (("xum", "yum"), "um"),
    (("xmm", "ymm"), "mm"),
    (("centroidxpx", "centroidypx"), "px"),
    ((squeeze("Centroid X µm"), squeeze("Centroid Y µm")), "um"),
    (("centroidxum", "centroidyum"), "um"),
)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Detections:
    """n points of one slide.

    Attributes:
        xy: float64 (n, 2) level-0 pixels.
        score: float64 (n,) how sure the detector is, NaN where it does not say.
        name: (n,) what the detector calls the point, "" where it does not say.
    """

    xy: npt.NDArray[np.float64]
    score: npt.NDArray[np.float64]
    name: npt.NDArray[np.str_]

    def __len__(self) -> int:
        """Return the number of points."""
        return len(self.score)

    def take(self, rows: npt.ArrayLike) -> Detections:
        """Return the points of `rows` (indices, or a mask (n,)), in that order."""
        at = np.asarray(rows)
        return Detections(xy=self.xy[at], score=self.score[at], name=self.name[at])


def detections(xy: npt.ArrayLike, *, score: npt.ArrayLike | None = None, name: Sequence[str] | str = "") -> Detections:
    """Return points (n, 2) in level-0 pixels as `Detections`.

    Raises:
        GeometryError: a shape that does not fit, or coordinates that are not finite.
    """
    points = np.asarray(xy, dtype=np.float64).reshape(-1, 2) if np.size(xy) == 0 else np.asarray(xy, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise GeometryError(f"points have shape {points.shape}; needed (n, 2): x and y in level-0 pixels")
    n = len(points)
    scores = np.full(n, np.nan) if score is None else np.asarray(score, dtype=np.float64)
    names = np.array([name] * n if isinstance(name, str) else list(name), dtype=np.str_).reshape(-1)
    if scores.shape != (n,) or len(names) != n:
        raise GeometryError(f"{n} points with {scores.shape} scores and {len(names)} names")
    if not np.isfinite(points).all():
        at = int(np.flatnonzero(~np.isfinite(points).all(axis=1))[0])
        raise GeometryError(f"point {at} is {points[at].tolist()}; coordinates must be finite")
    return Detections(xy=points, score=scores, name=names)


def read_detections(
    path: Path | str, *, mpp: Mpp | None = None, size_px: tuple[int, int] | None = None, unit: Unit | None = None
) -> Detections:
    """Return the points of a detector's file, in level-0 pixels and in the order of the file.

    Read are: GeoJSON of points or of areas (their centroids), in level-0 pixels; the challenge's "Multiple points", in
    millimetres, without those called "non-mitotic figure"; a JSON list of [x, y], [x, y, score] or {"x", "y", ...};
    and tables with columns x and y, x_um and y_um, x_mm and y_mm, or the centroids that QuPath exports.

    Args:
        path: .geojson, .json, .csv, .tsv or .parquet.
        mpp: of the slide, for millimetres and micrometres.
        size_px: (width, height) of the slide, so that points off it are noticed.
        unit: of the coordinates, where the file means another than its kind says.

    Raises:
        GeometryError: not a file of points, or points off the slide.
        MissingMppError: physical units without `mpp`.
        CohortError: a table that cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() in (".csv", ".tsv", ".txt", ".parquet"):
        found, own = _from_table(path)
    else:
        found, own = _from_json(path)
    return _placed(found, unit or own, mpp, size_px, str(path))


def _placed(found: Detections, unit: Unit, mpp: Mpp | None, size_px: tuple[int, int] | None, where: str) -> Detections:
    xy = found.xy
    if unit != "px":
        if mpp is None:
            raise MissingMppError(
                f"{where}: the points are in {unit}, and the slide's microns per pixel are not known; give them"
            )
        xy = xy * _UM[unit] / np.array([mpp.x, mpp.y])
    if size_px is not None and len(xy):
        off = ((xy < -0.5) | (xy > np.array(size_px) + 0.5)).any(axis=1)
        if off.any():
            at = int(np.flatnonzero(off)[0])
            raise GeometryError(
                f"{where}: {int(off.sum())} of {len(xy)} points lie off the slide of {size_px[0]} x {size_px[1]} px "
                f"(first: point {at}, {found.xy[at].tolist()} {unit}); is this the right slide, and are they in {unit}?"
            )
    return detections(xy, score=found.score, name=found.name.tolist())


def _from_table(path: Path) -> tuple[Detections, Unit]:
    cells = read_cells(path)
    columns = {squeeze(str(name)): [str(text) for text in cells[name].tolist()] for name in cells.columns}
    for (x, y), unit in _COLUMNS:
        if x in columns and y in columns:
            numbers = [_numbers(columns[axis], cells.index, axis, str(path)) for axis in (x, y)]
            score = next((columns[name] for name in _SCORES if name in columns), None)
            names = next((columns[name] for name in _NAMES if name in columns), "")
            scores = None if score is None else _numbers(score, cells.index, "score", str(path))
            return detections(np.stack(numbers, axis=1), score=scores, name=names), unit
    raise GeometryError(
        f"{path}: no columns of coordinates among {', '.join(map(str, cells.columns))}; needed are x and y in level-0 "
        "pixels, x_um and y_um, or x_mm and y_mm"
    )


def _numbers(texts: Sequence[str], rows: Any, name: str, where: str) -> npt.NDArray[np.float64]:
    values = []
    for at, text in enumerate(texts):
        try:
            values.append(float(text))
        except ValueError as error:
            raise GeometryError(f"{where}, {row_phrase([rows[at]])}: {name} {text!r} is not a number") from error
    return np.array(values, dtype=np.float64)


def _from_json(path: Path) -> tuple[Detections, Unit]:
    try:
        data = orjson.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise GeometryError(f"{path}: no such file of detections") from error
    except ValueError as error:
        raise GeometryError(f"{path}: not JSON ({error}); needed are points as GeoJSON, JSON or a table") from error
    try:
        if isinstance(data, Mapping) and "points" in data:
            return _from_challenge(data["points"]), "mm"
        if isinstance(data, Mapping) and data.get("type") in ("FeatureCollection", "Feature"):
            return _from_geojson(data.get("features", [data])), "px"
        if isinstance(data, list):
            geojson = bool(data) and isinstance(data[0], Mapping) and "geometry" in data[0]
            return (_from_geojson(data) if geojson else _from_list(data)), "px"
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, shapely.errors.ShapelyError) as error:
        if isinstance(error, GeometryError):
            raise
        raise GeometryError(f"{path}: not a file of points ({type(error).__name__}: {error})") from error
    raise GeometryError(f"{path}: found a {type(data).__name__} without points, features or coordinates")


def _from_challenge(points: Sequence[Mapping[str, Any]]) -> Detections:
    """Return the points of "Multiple points", without those that are called no mitotic figure."""
    kept = [point for point in points if str(point.get("name", "")) != "non-mitotic figure"]
    return detections(
        [point["point"][:2] for point in kept],
        score=[float(point.get("probability", np.nan)) for point in kept],
        name=[str(point.get("name", "")) for point in kept],
    )


def _from_list(items: Sequence[Any]) -> Detections:
    rows = [item if isinstance(item, Mapping) else dict(zip(("x", "y", "score"), item, strict=False)) for item in items]
    return detections(
        [(float(row["x"]), float(row["y"])) for row in rows],
        score=[_score(row) for row in rows],
        name=[_name(row) for row in rows],
    )


def _from_geojson(features: Sequence[Mapping[str, Any]]) -> Detections:
    xy, scores, names = [], [], []
    for feature in features:
        geometry = shape(feature["geometry"])
        properties = feature.get("properties") or {}
        points = list(geometry.geoms) if isinstance(geometry, MultiPoint) else [geometry.centroid]
        xy += [(point.x, point.y) for point in points]
        scores += [_score(properties)] * len(points)
        names += [_name(properties)] * len(points)
    return detections(xy, score=scores, name=names)


def _score(properties: Mapping[str, Any]) -> float:
    """Return the detector's score among the properties or QuPath's measurements, NaN without one."""
    measured = properties.get("measurements") or {}
    if isinstance(measured, Sequence):
        measured = {entry["name"]: entry["value"] for entry in measured}
    values = {squeeze(str(key)): value for key, value in [*measured.items(), *properties.items()]}
    return next((float(values[name]) for name in _SCORES if name in values), float("nan"))


def _name(properties: Mapping[str, Any]) -> str:
    kind = next((properties[name] for name in ("classification", *_NAMES) if properties.get(name)), "")
    return str(kind.get("name", "")) if isinstance(kind, Mapping) else str(kind)
