"""Grids: anchored, without drift, inside the slide, chosen by tissue."""

from __future__ import annotations

import time

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from eosin.errors import GeometryError, MissingMppError, NoTissueError
from eosin.geometry import EDGE_POLICIES
from eosin.slides import Slide, open_slide
from eosin.tiles import TileGrid, TileSpec, TissueMask, plan_tiles, read_geojson, tile
from eosin.tiles.grid import grid_positions, inside_fraction
from eosin.tiles.qc import neighbours

WHOLE = np.ones((1, 1), dtype=bool)


def blank_slide(width: int, height: int, mpp: float | tuple[float, float] = 0.5) -> Slide:
    return open_slide(np.full((height, width, 3), 240, dtype=np.uint8), mpp=mpp)


def everywhere(slide: Slide) -> TissueMask:
    return TissueMask(WHOLE, (float(slide.size_px[0]), float(slide.size_px[1])), (0.0, 0.0), "test", {})


specs = st.builds(
    TileSpec,
    tile_px=st.integers(8, 64),
    mpp=st.floats(0.5, 3.0),
    overlap_px=st.integers(0, 7),
    min_tissue=st.just(0.0),
    edge=st.sampled_from(EDGE_POLICIES),
)


@settings(deadline=None, max_examples=60)
@given(spec=specs, width=st.integers(60, 500), height=st.integers(60, 500), x0=st.integers(0, 99))
def test_positions_keep_their_policy(spec, width, height, x0):
    size = (spec.tile_px * spec.mpp / 0.5,) * 2
    xy = grid_positions(spec, size0_px=size, bounds=(x0, 7, width, height))
    assert xy.dtype == np.int64
    np.testing.assert_array_equal(xy, xy[np.lexsort((xy[:, 0], xy[:, 1]))])
    assert len(np.unique(xy, axis=0)) == len(xy)
    step = size[0] * (spec.tile_px - spec.overlap_px) / spec.tile_px
    fits = width >= size[0] and height >= size[1]
    if spec.edge == "drop" or (spec.edge == "shift-in" and fits):
        assert (xy >= [x0, 7]).all()
        assert (xy[:, 0] + size[0] <= x0 + width + 0.25).all()
        assert (xy[:, 1] + size[1] <= 7 + height + 0.25).all()
    if spec.edge != "shift-in":  # every origin is the rounded exact product: no drift
        index = np.round((xy - [x0, 7]) / step)
        assert np.abs(xy - [x0, 7] - index * step).max(initial=0) <= 0.5
    if spec.edge == "pad-white" or (spec.edge == "shift-in" and fits):
        covered = np.zeros((height, width), dtype=bool)
        for x, y in xy - [x0, 7]:
            covered[y : int(np.ceil(y + size[1])), x : int(np.ceil(x + size[0]))] = True
        assert covered.all()


def test_another_mask_moves_no_tile():
    slide = blank_slide(3000, 2000)
    rng = np.random.default_rng(3)
    grids = []
    for _ in range(4):
        mask = TissueMask(rng.random((40, 60)) < 0.4, (50.0, 50.0), (0.0, 0.0), "test", {})
        grids.append(tile(slide, tile_px=100, mpp=0.5, min_tissue=0.4, mask=mask))
    everything = {tuple(p) for p in tile(slide, tile_px=100, mpp=0.5, min_tissue=0, mask=everywhere(slide)).xy.tolist()}
    for grid in grids:
        kept, left = ({tuple(p) for p in a.tolist()} for a in (grid.xy, grid.background_xy))
        assert kept
        assert left
        assert kept | left == everything
        assert not kept & left


def test_tissue_fraction_counts_and_the_limit_is_inclusive():
    slide = blank_slide(800, 400)
    mask = np.zeros((400, 800), dtype=bool)
    mask[:, :50] = True  # half of the first column of tiles
    mask[:100, 200:210] = True
    mask_of = TissueMask(mask, (1.0, 1.0), (0.0, 0.0), "test", {})
    grid = tile(slide, tile_px=100, mpp=0.5, min_tissue=0.5, mask=mask_of)
    assert grid.xy.tolist() == [[0, 0], [0, 100], [0, 200], [0, 300]]
    assert grid.tissue.tolist() == [0.5] * 4
    lower = tile(slide, tile_px=100, mpp=0.5, min_tissue=0.1, mask=mask_of)
    assert lower.xy.tolist() == [[0, 0], [200, 0], [0, 100], [0, 200], [0, 300]]
    assert len(tile(slide, tile_px=100, mpp=0.5, min_tissue=0, mask=mask_of)) == 32


def test_padded_tiles_know_their_valid_share():
    slide = blank_slide(250, 150)
    grid = tile(slide, tile_px=100, mpp=0.5, min_tissue=0, edge="pad-white", mask=everywhere(slide))
    assert grid.xy.tolist() == [[0, 0], [100, 0], [200, 0], [0, 100], [100, 100], [200, 100]]
    assert grid.valid.tolist() == [1, 1, 0.5, 0.5, 0.5, 0.25]
    assert grid.tissue == pytest.approx(grid.valid)


def test_anisotropic_pixels_give_square_tiles_in_microns():
    slide = blank_slide(1000, 1000, mpp=(0.25, 0.5))
    grid = tile(slide, tile_px=100, mpp=0.5, min_tissue=0, mask=everywhere(slide))
    assert grid.plan.size0_px == (200.0, 100.0)
    assert sorted(set(grid.xy[:, 0].tolist())) == list(range(0, 1000, 200))
    assert sorted(set(grid.xy[:, 1].tolist())) == list(range(0, 1000, 100))


@pytest.mark.parametrize("edge", EDGE_POLICIES)
@pytest.mark.parametrize("bounds", [None, (101, 57, 1200, 900)])
def test_coords_of_tiles_that_are_not_resized_tell_where_their_pixels_are(edge, bounds, monkeypatch):
    """Footprint of 100.2 half pixels: rounding its multiples at level 0 would give odd corners, between two pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (1001, 1501, 3), dtype=np.uint8)
    slide = open_slide(pixels, mpp=0.2495)
    if bounds is not None:
        monkeypatch.setattr(slide.backend, "bounds", bounds)
    grid = tile(slide, tile_px=100, mpp=0.5, min_tissue=0, edge=edge, mask=everywhere(slide))
    assert (grid.plan.scale, grid.plan.resample) == (2, False)
    assert len(grid) >= 20
    assert (grid.xy % 2 == 0).all()
    x0, y0, width, height = grid.bounds
    half = np.floor(pixels[:1000, :1500].reshape(500, 2, 750, 2, 3).mean(axis=(1, 3)) + 0.5)
    for x, y in grid.xy:
        if x + 202 <= min(x0 + width, 1500) and y + 202 <= min(y0 + height, 1000):
            got = slide.read_tile((int(x), int(y)), grid.plan).rgb
            np.testing.assert_array_equal(got, half[y // 2 : y // 2 + 100, x // 2 : x // 2 + 100])
    assert neighbours(grid.xy, grid.step0_px).max() == 1


def test_several_mpp_share_one_mask():
    slide = blank_slide(2000, 2000)
    mask = everywhere(slide)
    fine, coarse = plan_tiles(slide, [TileSpec(mpp=0.5), TileSpec(mpp=2.0)], mask=mask)
    assert fine.mask is mask
    assert coarse.mask is mask
    assert (len(fine), len(coarse)) == (64, 4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tile_px": 0},
        {"overlap_px": 224},
        {"overlap_px": -1},
        {"min_tissue": 1.5},
        {"edge": "wrap"},
        {"mpp": 0.0},
        {"mpp": float("nan")},
    ],
)
def test_specs_that_make_no_grid(wrong):
    with pytest.raises(GeometryError):
        TileSpec(**wrong)


def test_spec_goes_through_a_dict():
    spec = TileSpec(tile_px=256, mpp=0.25, overlap_px=32, min_tissue=0.3, edge="shift-in")
    assert TileSpec(**spec.to_dict()) == spec


def square(x0: float, y0: float, x1: float, y1: float) -> dict:
    return {"type": "Polygon", "coordinates": [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]]}


def test_roi_keeps_tiles_with_half_their_area_inside():
    slide = blank_slide(1000, 1000)
    found = tile(slide, tile_px=100, mpp=0.5, mask=everywhere(slide), roi=square(150, 200, 349, 400))
    # x 150: exactly half of the tile at 100 is inside; 349: a little less than half of the one at 300.
    assert found.xy.tolist() == [[100, 200], [200, 200], [100, 300], [200, 300]]
    with pytest.raises(GeometryError, match="no polygon"):
        tile(slide, mask=everywhere(slide), roi={"type": "Point", "coordinates": [1, 1]})


def test_share_inside_an_area_agrees_with_counting_points():
    area = read_geojson(square(33, 21, 70, 90))[0].geometry.union(read_geojson(square(60, 60, 130, 75))[0].geometry)
    xy = np.array([(x, y) for x in range(0, 120, 20) for y in range(0, 100, 20)])
    columns, rows = np.meshgrid(np.arange(20) + 0.5, np.arange(20) + 0.5)
    want = [shapely.contains_xy(area, x + columns, y + rows).mean() for x, y in xy]
    assert inside_fraction(area, xy, (20, 20)) == pytest.approx(want, abs=1e-9)


def test_rectangles_for_qupath():
    slide = blank_slide(300, 200)
    grid = tile(slide, tile_px=100, mpp=0.5, min_tissue=0, mask=everywhere(slide))
    names = ["kept", "blurred"] * 3
    found = read_geojson(grid.to_geojson(names))
    assert [a.name for a in found] == names
    assert [a.geometry.bounds[:2] for a in found] == [tuple(map(float, p)) for p in grid.xy.tolist()]
    assert all(a.geometry.area == 10_000 for a in found)
    with pytest.raises(GeometryError, match="names"):
        grid.to_geojson(["kept"])


def test_a_slide_without_mpp_or_tissue_says_so():
    pixels = np.full((400, 400, 3), 240, dtype=np.uint8)
    with pytest.raises(MissingMppError):
        tile(open_slide(pixels))
    with pytest.raises(NoTissueError, match="glass"):
        tile(open_slide(pixels, mpp=0.5))


def test_a_million_positions_in_under_a_second():
    slide = blank_slide(64, 64)
    mask = TissueMask(np.random.default_rng(0).random((1000, 1000)) < 0.5, (100.0, 100.0), (0.0, 0.0), "test", {})
    spec = TileSpec(tile_px=100, mpp=0.5)
    best, xy, tissue = np.inf, np.empty((0, 2)), np.empty(0)
    for _ in range(2):
        start = time.process_time()
        xy = grid_positions(spec, size0_px=(100.0, 100.0), bounds=(0, 0, 100_000, 100_000))
        tissue = mask.fraction(xy, (100.0, 100.0))
        best = min(best, time.process_time() - start)
    assert len(xy) == 1_000_000
    np.testing.assert_allclose(tissue.reshape(1000, 1000), mask.mask, atol=1e-6)
    assert best < 1
    assert isinstance(tile(slide, tile_px=32, mask=everywhere(slide)), TileGrid)


def test_synthetic_slide_yields_tiles_where_its_tissue_is(he_slide):
    with open_slide(he_slide.path) as slide:
        grid = tile(slide, tile_px=64, mpp=0.5, min_tissue=0.5)
    assert len(grid) > 50
    truth = TissueMask(he_slide.mask, (1.0, 1.0), (0.0, 0.0), "truth", {})
    assert np.mean(truth.fraction(grid.xy, grid.plan.size0_px) > 0.3) > 0.97
    assert np.mean(truth.fraction(grid.background_xy, grid.plan.size0_px) < 0.7) > 0.97
