"""GeoJSON as QuPath writes it, and edits that come back."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import orjson
import pytest
import shapely
from shapely.affinity import translate

from eosin.errors import GeometryError
from eosin.slides import open_slide
from eosin.tiles import Annotation, TissueMask, read_geojson, to_feature_collection, write_geojson

RING = [[0, 0], [100, 0], [100, 100], [0, 100], [0, 0]]
HOLE = [[20, 20], [20, 40], [40, 40], [40, 20], [20, 20]]


def feature(geometry: dict, **properties: object) -> dict:
    return {"type": "Feature", "id": "a-b-c", "geometry": geometry, "properties": properties}


def test_round_trip_keeps_shapes_names_and_properties(tmp_path: Path):
    parts = shapely.MultiPolygon([shapely.box(0, 0, 5, 5), shapely.Point(50, 50).buffer(9)])
    made = [
        Annotation(geometry=shapely.Polygon(RING, [HOLE]), name="Tumor", color=(200, 0, 0)),
        Annotation(geometry=parts, name=None, object_type="detection", properties={"measurements": {"a": 1.5}}),
    ]
    path = write_geojson(tmp_path / "a.geojson", made)
    again = read_geojson(path)
    assert [a.name for a in again] == ["Tumor", None]
    assert again[0].color == (200, 0, 0)
    assert again[1].object_type == "detection"
    assert again[1].properties == {"measurements": {"a": 1.5}}
    assert all(a.geometry.equals(b.geometry) for a, b in zip(made, again, strict=True))
    data = orjson.loads(path.read_bytes())
    assert "crs" not in data
    assert data["features"][0]["geometry"]["coordinates"][0][0] == data["features"][0]["geometry"]["coordinates"][0][-1]
    assert list(tmp_path.iterdir()) == [path]


def test_a_polygon_moved_in_qupath_moves_the_mask(tmp_path: Path):
    slide = open_slide(np.full((1600, 2400, 3), 240, dtype=np.uint8), mpp=0.5)
    mask = np.zeros((100, 150), dtype=bool)
    mask[10:30, 10:40] = True
    mask[60:90, 100:130] = True
    path = tmp_path / "tissue.geojson"
    path.write_bytes(orjson.dumps(TissueMask(mask, (16.0, 16.0), (0.0, 0.0), "test", {}).to_geojson()))
    edited = read_geojson(path)
    first = min(range(2), key=lambda i: edited[i].geometry.bounds[0])
    edited[first] = Annotation(geometry=translate(edited[first].geometry, 320, 160), name="Tissue")
    write_geojson(path, edited)
    want = np.zeros_like(mask)
    want[20:40, 30:60] = True
    want[60:90, 100:130] = True
    np.testing.assert_array_equal(TissueMask.from_geojson(path, slide).mask, want)


@pytest.mark.parametrize("wrap", [lambda f: [f], lambda f: f, lambda f: {"type": "FeatureCollection", "features": [f]}])
def test_lists_single_features_and_collections_are_read(wrap):
    found = read_geojson(wrap(feature({"type": "Polygon", "coordinates": [RING, HOLE]}, classification={"name": "T"})))
    assert found[0].geometry.area == 100 * 100 - 20 * 20
    assert found[0].name == "T"


@pytest.mark.parametrize(
    ("classification", "name", "color"),
    [
        ({"names": ["Tumor", "CD8"], "color": [1, 2, 3]}, "Tumor: CD8", (1, 2, 3)),
        ({"name": "Stroma", "colorRGB": -3670016}, "Stroma", (200, 0, 0)),
        ("Tumor", "Tumor", None),
        (None, None, None),
    ],
)
def test_classes_in_every_dialect(classification, name, color):
    source = feature({"type": "Polygon", "coordinates": [RING]}, classification=classification, objectType="annotation")
    (found,) = read_geojson(source)
    assert (found.name, found.color) == (name, color)


def test_repairs_and_leaves_out():
    bow = [[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]
    still_open = RING[:-1]
    features = [
        feature({"type": "Polygon", "coordinates": [bow]}),
        feature({"type": "Point", "coordinates": [1, 1]}),
        feature({"type": "Polygon", "coordinates": [still_open]}),
        feature({"type": "MultiPolygon", "coordinates": [[RING], [[[50, 50], [150, 50], [150, 100], [50, 50]]]]}),
        feature({"type": "Polygon", "coordinates": [[[0, 0], [5, 5], [0, 0], [0, 0]]]}),
    ]
    found = read_geojson(features)
    assert [round(a.geometry.area) for a in found] == [50, 10_000, 10_000 + round(100 * 50 / 2 - 50 * 25 / 2)]
    assert all(a.geometry.is_valid for a in found)


def test_gzip(tmp_path: Path):
    path = tmp_path / "a.geojson.gz"
    path.write_bytes(gzip.compress(orjson.dumps(feature({"type": "Polygon", "coordinates": [RING]}))))
    assert len(read_geojson(path)) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b'"text"', "not GeoJSON"),
        (b'{"type": "FeatureCollection"}', "not GeoJSON"),
        (b"[1, 2]", "feature 0"),
        (b'[{"type": "Feature", "geometry": {"type": "Blob"}}]', "Blob"),
        (b'[{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}}]', "feature 0"),
        (b'[{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": "x"}}]', "feature 0"),
        (b'[{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1, null], [2, 2]]]}}]', "0"),
    ],
)
def test_errors_name_the_file(tmp_path: Path, content: bytes, said: str):
    path = tmp_path / "broken.geojson"
    path.write_bytes(content)
    with pytest.raises(GeometryError, match=said) as raised:
        read_geojson(path)
    assert "broken.geojson" in str(raised.value)


def test_missing_file():
    with pytest.raises(GeometryError, match="no_such"):
        read_geojson("no_such.geojson")


def test_empty_collection():
    assert to_feature_collection([]) == {"type": "FeatureCollection", "features": []}
    assert read_geojson({"type": "FeatureCollection", "features": []}) == []
