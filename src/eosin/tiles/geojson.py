"""GeoJSON as QuPath writes and reads it: polygons in level-0 pixels with a class name.

A file is a FeatureCollection without a CRS block; each feature is a Polygon or
MultiPolygon with `properties.classification.name`. Reading is tolerant of what QuPath and
its users produce: a bare list of features, one single feature, derived classes
(`classification: {names: [...]}`), points and lines (left out), self-crossing outlines
(repaired).
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import shapely
from shapely.geometry import MultiPolygon, Polygon, mapping
from shapely.geometry.base import BaseGeometry

from eosin.errors import GeometryError

GeoJsonSource = Path | str | Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotation:
    """One area drawn on a slide.

    Attributes:
        geometry: valid Polygon or MultiPolygon, level-0 pixels, y downwards.
        name: class name ("Tissue"; derived classes joined by ": " as QuPath shows them), or
            None when the feature has no class.
        color: (r, g, b) of the class, or None.
        object_type: "annotation", "detection", "tile", ...
        properties: the other properties of the feature, untouched.
    """

    geometry: Polygon | MultiPolygon
    name: str | None = None
    color: tuple[int, int, int] | None = None
    object_type: str = "annotation"
    properties: Mapping[str, Any] | None = None


def read_geojson(source: GeoJsonSource) -> list[Annotation]:
    """Return the areas of a GeoJSON file or object, in its order.

    Args:
        source: path (`.geojson`, `.json`, optionally gzipped), or the parsed object.

    Raises:
        GeometryError: the file is missing, is not JSON or GeoJSON, or has coordinates that are not
            finite numbers; the message names the file and the feature.
    """
    origin, data = _load(source)
    if isinstance(data, Mapping) and data.get("type") == "FeatureCollection":
        features = data.get("features")
    elif isinstance(data, Mapping) and data.get("type") == "Feature":
        features = [data]
    elif isinstance(data, Mapping) and "coordinates" in data:
        features = [{"type": "Feature", "geometry": data, "properties": {}}]
    else:
        features = data
    if not isinstance(features, Sequence) or isinstance(features, str | bytes):
        raise GeometryError(
            f"{origin} is not GeoJSON: found a {type(data).__name__} without features; "
            "export it from QuPath with File > Export objects as GeoJSON"
        )
    found = []
    for index, feature in enumerate(features):
        annotation = _annotation(feature, f"{origin}, feature {index}")
        if annotation is not None:
            found.append(annotation)
    return found


def to_feature_collection(annotations: Iterable[Annotation]) -> dict[str, Any]:
    """Return `annotations` as a FeatureCollection that QuPath imports (level-0 pixels, no CRS)."""
    return {"type": "FeatureCollection", "features": [_feature(a) for a in annotations]}


def write_geojson(path: Path | str, annotations: Iterable[Annotation]) -> Path:
    """Write `annotations` to `path` and return it; the file appears whole or not at all."""
    path = Path(path)
    draft = path.with_name(path.name + ".part")
    draft.write_bytes(orjson.dumps(to_feature_collection(annotations)))
    draft.replace(path)
    return path


def areas(geometry: BaseGeometry) -> list[Polygon]:
    """Return the valid, non-empty polygons of any geometry; lines and points are left out."""
    if not geometry.is_valid:
        geometry = shapely.make_valid(geometry)
    parts = shapely.get_parts(geometry, return_index=False) if hasattr(geometry, "geoms") else [geometry]
    polygons: list[Polygon] = []
    for part in parts:
        if isinstance(part, Polygon):
            if part.area > 0:
                polygons.append(part)
        elif hasattr(part, "geoms"):
            polygons.extend(areas(part))
    return polygons


def _load(source: GeoJsonSource) -> tuple[str, Any]:
    if not isinstance(source, Path | str):
        return "the GeoJSON object", source
    path = Path(source)
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        return str(path), orjson.loads(raw)
    except OSError as error:
        raise GeometryError(f"cannot read the GeoJSON file {path}: {error}") from error
    except (ValueError, EOFError) as error:
        raise GeometryError(f"{path} is not valid JSON: {error}") from error


def _annotation(feature: Any, where: str) -> Annotation | None:
    if not isinstance(feature, Mapping) or not isinstance(feature.get("geometry"), Mapping):
        raise GeometryError(f"{where}: not a GeoJSON feature with a geometry")
    polygons = areas(_geometry(feature["geometry"], where))
    if not polygons:
        return None
    properties = feature.get("properties")
    properties = dict(properties) if isinstance(properties, Mapping) else {}
    classification = properties.pop("classification", None)
    name, color = _classification(classification)
    object_type = properties.pop("objectType", properties.pop("object_type", "annotation"))
    return Annotation(
        geometry=polygons[0] if len(polygons) == 1 else MultiPolygon(polygons),
        name=name,
        color=color,
        object_type=str(object_type),
        properties=properties,
    )


def _geometry(geometry: Mapping[str, Any], where: str) -> BaseGeometry:
    try:
        if geometry.get("type") == "GeometryCollection":
            parts = [_geometry(part, where) for part in geometry["geometries"]]
            return shapely.GeometryCollection(parts)
        if geometry.get("type") == "Polygon":
            rings = [_ring(ring) for ring in geometry["coordinates"]]
            return Polygon(rings[0], rings[1:])
        if geometry.get("type") == "MultiPolygon":
            # Parts may overlap or touch in files from elsewhere: their union is what was meant.
            parts = [Polygon(_ring(rings[0]), [_ring(r) for r in rings[1:]]) for rings in geometry["coordinates"]]
            return shapely.union_all([shapely.make_valid(part) for part in parts])
    except (KeyError, IndexError, TypeError, ValueError, shapely.errors.ShapelyError) as error:
        raise GeometryError(f"{where}: the coordinates do not make a polygon ({error})") from error
    if geometry.get("type") in {"Point", "MultiPoint", "LineString", "MultiLineString"}:
        return Polygon()
    raise GeometryError(f"{where}: unknown geometry type {geometry.get('type')!r}")


def _ring(points: Sequence[Sequence[float]]) -> np.ndarray:
    """Return (n, 2) finite coordinates; shapely closes a ring that is left open."""
    ring = np.array([(float(p[0]), float(p[1])) for p in points], dtype=np.float64)
    if len(ring) < 3 or not np.isfinite(ring).all():
        raise ValueError(f"a ring needs three finite points, found {len(ring)}")
    return ring


def _classification(value: Any) -> tuple[str | None, tuple[int, int, int] | None]:
    if isinstance(value, str):
        return value, None
    if not isinstance(value, Mapping):
        return None, None
    names = value.get("names")
    name = value.get("name")
    if name is None and isinstance(names, Sequence) and names:
        name = ": ".join(str(n) for n in names)
    color = value.get("color")
    if isinstance(color, Sequence) and len(color) >= 3:
        return name, (int(color[0]), int(color[1]), int(color[2]))
    if isinstance(value.get("colorRGB"), int):
        packed = value["colorRGB"] & 0xFFFFFF
        return name, (packed >> 16, packed >> 8 & 255, packed & 255)
    return name, None


def _feature(annotation: Annotation) -> dict[str, Any]:
    properties: dict[str, Any] = {"objectType": annotation.object_type, **(annotation.properties or {})}
    if annotation.name is not None:
        color = {} if annotation.color is None else {"color": list(annotation.color)}
        properties["classification"] = {"name": annotation.name, **color}
    return {"type": "Feature", "geometry": mapping(annotation.geometry), "properties": properties}
