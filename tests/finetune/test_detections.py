from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from eosin.errors import CohortError, GeometryError, MissingMppError
from eosin.finetune.detections import detections, read_detections
from eosin.geometry import Mpp

MPP = Mpp(0.25, 0.5)
POINTS = np.array([[100.0, 40.0], [12.5, 800.0]])


def saved(path: Path, value: Any) -> Path:
    path.write_bytes(value.encode() if isinstance(value, str) else orjson.dumps(value))
    return path


def feature(x: float, y: float, **properties: Any) -> dict[str, Any]:
    return {"type": "Feature", "geometry": {"type": "Point", "coordinates": [x, y]}, "properties": properties}


def square(x: float, y: float, half: float = 10) -> dict[str, Any]:
    ring = [
        [x - half, y - half],
        [x + half, y - half],
        [x + half, y + half],
        [x - half, y + half],
        [x - half, y - half],
    ]
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}


# The two points of POINTS in every form: 0.25 and 0.5 microns per pixel make 100 px 25 um = 0.025 mm along x.
FORMS: dict[str, Any] = {
    "challenge.json": {
        "name": "Points of interest",
        "type": "Multiple points",
        "points": [
            {"name": "mitotic figure", "point": [0.025, 0.02, 0], "probability": 0.9},
            {"name": "non-mitotic figure", "point": [0.001, 0.001, 0], "probability": 0.1},
            {"name": "mitotic figure", "point": [0.003125, 0.4, 0], "probability": 0.7},
        ],
    },
    "points.geojson": {
        "type": "FeatureCollection",
        "features": [
            feature(100, 40, classification={"name": "mitotic figure"}, measurements={"Probability": 0.9}),
            feature(12.5, 800, classification="mitotic figure", measurements=[{"name": "score", "value": 0.7}]),
        ],
    },
    "bare.geojson": [
        feature(100, 40, score=0.9, name="mitotic figure"),
        feature(12.5, 800, p=0.7, name="mitotic figure"),
    ],
    "list.json": [
        {"x": 100, "y": 40, "score": 0.9, "label": "mitotic figure"},
        {"x": 12.5, "y": 800, "probability": 0.7, "label": "mitotic figure"},
    ],
    "px.csv": "x,y,probability,class\n100,40,0.9,mitotic figure\n12.5,800,0.7,mitotic figure\n",
    "um.csv": "X_um;Y_um;Score;Name\n25;20;0.9;mitotic figure\n3.125;400;0.7;mitotic figure\n",
    "mm.tsv": "x_mm\ty_mm\tconfidence\tlabel\n0.025\t0.02\t0.9\tmitotic figure\n0.003125\t0.4\t0.7\tmitotic figure\n",
    "qupath.tsv": (
        "Name\tCentroid X µm\tCentroid Y µm\tProbability\n"
        "mitotic figure\t25\t20\t0.9\nmitotic figure\t3.125\t400\t0.7\n"
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_the_same_points(tmp_path: Path, name: str) -> None:
    found = read_detections(saved(tmp_path / name, FORMS[name]), mpp=MPP, size_px=(1000, 1000))
    assert np.allclose(found.xy, POINTS)
    assert found.score.tolist() == [0.9, 0.7]
    assert found.name.tolist() == ["mitotic figure"] * 2


def test_areas_and_groups_of_points(tmp_path: Path) -> None:
    group = {"type": "MultiPoint", "coordinates": [[1, 2], [3, 4]]}
    grouped = {"type": "Feature", "geometry": group, "properties": {"probability": 0.5}}
    found = read_detections(
        saved(tmp_path / "f.geojson", {"type": "FeatureCollection", "features": [square(100, 40), grouped]})
    )
    assert np.allclose(found.xy, [[100, 40], [1, 2], [3, 4]])
    assert np.isnan(found.score[0])
    assert found.score[1:].tolist() == [0.5, 0.5]
    assert len(read_detections(saved(tmp_path / "none.json", []))) == 0


def test_a_unit_can_be_told(tmp_path: Path) -> None:
    path = saved(tmp_path / "list.json", [[25, 20], [3.125, 400]])
    assert np.allclose(read_detections(path, mpp=MPP, unit="um").xy, POINTS)
    assert np.allclose(read_detections(path).xy, [[25, 20], [3.125, 400]])
    assert np.isnan(read_detections(path).score).all()


def test_millimetres_need_the_slides_resolution(tmp_path: Path) -> None:
    path = saved(tmp_path / "challenge.json", FORMS["challenge.json"])
    with pytest.raises(MissingMppError, match="points are in mm"):
        read_detections(path)


def test_pixels_taken_for_millimetres_lie_off_the_slide(tmp_path: Path) -> None:
    path = saved(tmp_path / "list.json", [[100, 40]])
    with pytest.raises(GeometryError, match=r"1 of 1 points lie off the slide of 1000 x 900 px.*\[100\.0, 40\.0\] mm"):
        read_detections(path, mpp=MPP, size_px=(1000, 900), unit="mm")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a.json", "[1, 2", "not JSON"),
        ("b.json", {"boxes": []}, "found a dict without points"),
        ("c.json", [[1]], "not a file of points"),
        ("d.json", {"points": [{"name": "x"}]}, "not a file of points"),
        ("e.csv", "u,v\n1,2\n", "no columns of coordinates among u, v"),
        ("f.csv", "x,y\n1,2\n3,far\n", "row 3: y 'far' is not a number"),
        ("g.csv", "x,y\n1,nan\n", "must be finite"),
    ],
)
def test_files_that_are_no_points(tmp_path: Path, name: str, value: Any, message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        read_detections(saved(tmp_path / name, value))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(GeometryError, match=r"gone\.json: no such file"):
        read_detections(tmp_path / "gone.json")
    with pytest.raises(CohortError, match=r"gone\.csv: no such file"):
        read_detections(tmp_path / "gone.csv")


def test_points_from_arrays() -> None:
    found = detections(POINTS, score=[0.1, 0.2], name="cell")
    assert found.take([1]).name.tolist() == ["cell"]
    assert found.take(np.array([False, True])).xy.tolist() == [POINTS[1].tolist()]
    with pytest.raises(GeometryError, match=r"needed \(n, 2\)"):
        detections(np.zeros((2, 3)))
    with pytest.raises(GeometryError, match="2 points with"):
        detections(POINTS, score=[0.1])
