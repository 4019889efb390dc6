"""Tissue masks: exact fractions, outlines, files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from eosin.errors import GeometryError, NoTissueError, TissueError
from eosin.geometry import Mpp
from eosin.tiles import TissueMask
from eosin.tiles.mask import rasterize


@dataclass
class Extent:
    """The part of a slide that a mask needs."""

    size_px: tuple[int, int]
    mpp: Mpp = field(default_factory=lambda: Mpp(0.5, 0.5))
    bounds: tuple[int, int, int, int] = (0, 0, 0, 0)

    def __post_init__(self) -> None:
        if self.bounds[2] == 0:
            self.bounds = (0, 0, *self.size_px)


def a_mask(array: np.ndarray, downsample=(1.0, 1.0), origin=(0.0, 0.0)) -> TissueMask:
    return TissueMask(np.asarray(array, dtype=bool), downsample, origin, "test", {})


masks = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12))


@given(
    mask=masks,
    corner=st.tuples(st.integers(-30, 60), st.integers(-30, 60)),
    size=st.tuples(st.floats(0.5, 50), st.floats(0.5, 50)),
    downsample=st.tuples(st.floats(0.7, 9), st.floats(0.7, 9)),
)
def test_fraction_is_the_sum_of_overlaps_with_each_tissue_pixel(mask, corner, size, downsample):
    origin = (3.5, -2.0)
    got = a_mask(mask, downsample, origin).fraction(np.array([corner]), size)[0]
    box = shapely.box(corner[0], corner[1], corner[0] + size[0], corner[1] + size[1])
    want = 0.0
    for row, column in zip(*np.nonzero(mask), strict=True):
        x, y = origin[0] + column * downsample[0], origin[1] + row * downsample[1]
        want += box.intersection(shapely.box(x, y, x + downsample[0], y + downsample[1])).area
    assert got == pytest.approx(want / box.area, abs=1e-5)
    assert got.dtype == np.float32


def test_fraction_on_whole_pixels_is_a_count():
    mask = np.random.default_rng(0).random((40, 60)) < 0.3
    xy = np.array([(x, y) for y in range(0, 32, 7) for x in range(0, 50, 9)])
    got = a_mask(mask).fraction(xy, (8, 8))
    assert got == pytest.approx([mask[y : y + 8, x : x + 8].mean() for x, y in xy])


@given(mask=masks)
def test_outlines_cover_exactly_the_mask(mask):
    found = a_mask(mask, (3.5, 2.0), (10.0, 20.0))
    polygons = found.polygons()
    assert all(p.is_valid for p in polygons)
    assert sum(p.area for p in polygons) == pytest.approx(mask.sum() * 7.0)
    assert shapely.union_all(polygons).area == pytest.approx(mask.sum() * 7.0)
    again = rasterize(polygons, shape=mask.shape, downsample=(3.5, 2.0), origin_px=(10.0, 20.0))
    np.testing.assert_array_equal(again, mask)


def test_rasterize_agrees_with_point_in_polygon_on_a_drawn_shape():
    shape = shapely.Point(31.3, 27.8).buffer(20.2).difference(shapely.Point(25, 27).buffer(7.1))
    got = rasterize([shape], shape=(60, 70), downsample=(1.0, 1.0), origin_px=(0.0, 0.0))
    columns, rows = np.meshgrid(np.arange(70) + 0.5, np.arange(60) + 0.5)
    np.testing.assert_array_equal(got, shapely.contains_xy(shape, columns, rows))


def test_area_is_in_square_millimetres():
    mask = np.zeros((100, 100), dtype=bool)
    mask[:50] = True
    assert a_mask(mask, (16.0, 8.0)).area_mm2(Mpp(0.5, 0.25)) == pytest.approx(5000 * 8e-3 * 2e-3)


def test_geojson_round_trip_on_the_slide():
    slide = Extent((8000, 6000))
    mask = np.zeros((375, 500), dtype=bool)
    mask[50:200, 60:300] = True
    mask[100:130, 100:140] = False
    made = a_mask(mask, (16.0, 16.0))
    again = TissueMask.from_geojson(made.to_geojson(), slide)
    np.testing.assert_array_equal(again.mask, mask)
    feature = made.to_geojson()["features"][0]
    assert feature["properties"]["classification"]["name"] == "Tissue"
    assert "crs" not in made.to_geojson()


def test_geojson_off_the_slide_is_no_tissue():
    away = {"type": "Polygon", "coordinates": [[[9e6, 0], [9e6, 9], [8e6, 9], [9e6, 0]]]}
    with pytest.raises(NoTissueError, match="level-0"):
        TissueMask.from_geojson(away, Extent((8000, 6000)))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
def test_mask_files_of_any_size_are_stretched_over_the_slide(tmp_path: Path, suffix: str):
    import tifffile

    values = np.zeros((75, 101), dtype=np.uint8)
    values[20:40, 30:60] = 1
    path = tmp_path / f"mask{suffix}"
    if suffix == ".npy":
        np.save(path, values)
    elif suffix == ".tif":
        tifffile.imwrite(path, values)
    else:
        Image.fromarray(values).save(path)
    found = TissueMask.from_file(path, Extent((8000, 6000)))
    assert found.downsample == pytest.approx((8000 / 101, 6000 / 75))
    assert found.area_mm2(Mpp(0.5, 0.5)) == pytest.approx(600 * 8000 / 101 * 6000 / 75 * 0.25e-6)


def test_mask_of_the_bounds_is_placed_at_the_bounds():
    slide = Extent((8000, 6000), bounds=(1000, 500, 2000, 4000))
    found = TissueMask.from_image(np.ones((40, 20)), slide)
    assert found.origin_px == (1000.0, 500.0)
    assert found.downsample == (100.0, 100.0)
    assert TissueMask.from_image(np.ones((60, 80)), slide).origin_px == (0.0, 0.0)


def test_masks_that_cannot_be(tmp_path: Path):
    slide = Extent((8000, 6000))
    with pytest.raises(GeometryError, match="crop"):
        TissueMask.from_image(np.ones((50, 50)), slide)
    with pytest.raises(NoTissueError):
        TissueMask.from_image(np.zeros((60, 80)), slide)
    with pytest.raises(TissueError, match="JPEG"):
        TissueMask.from_file(tmp_path / "a.jpg", slide)
    with pytest.raises(TissueError, match="no_such"):
        TissueMask.from_file(tmp_path / "no_such.png", slide)
    with pytest.raises(TissueError, match="shape"):
        TissueMask.from_image(np.ones(5), slide)
    with pytest.raises(GeometryError):
        a_mask(np.ones(4))
