from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eosin.errors import GeometryError, ImplausibleMppError, UpsampleError
from eosin.geometry import Mpp, axis_origins, check_mpp, covered_fraction, frame_origin, plan_read, round_half_up

PYRAMID = ((1.0, 1.0), (4.0, 4.0), (16.0, 16.0))


@pytest.mark.parametrize(
    ("mpp", "expected"),
    [
        (0.25, (0, 1)),
        (0.5, (0, 2)),
        (0.9, (0, 2)),
        (1.0, (1, 1)),
        (1.01, (1, 1)),
        (2.0, (1, 2)),
        (4.0, (2, 1)),
        (8.0, (2, 2)),
    ],
)
def test_the_coarsest_frame_not_coarser_than_asked(mpp: float, expected: tuple[int, int]) -> None:
    plan = plan_read(tile_px=224, mpp=mpp, slide_mpp=Mpp(0.25, 0.25), level_downsamples=PYRAMID)
    assert (plan.level, plan.scale) == expected


@given(
    st.floats(0.1, 2.0),
    st.floats(0.98, 1.02),
    st.floats(0.1, 8.0),
    st.integers(16, 1024),
    st.floats(1.5, 5.0),
)
def test_a_plan_never_reads_coarser_than_asked_nor_needlessly_fine(
    mpp0: float, skew: float, target: float, tile_px: int, step: float
) -> None:
    slide_mpp = Mpp(mpp0, mpp0 * skew)
    downsamples = tuple((step**i, step**i * 1.0003) for i in range(4))
    if max(slide_mpp.x, slide_mpp.y) / target > 2.0:
        return
    plan = plan_read(tile_px=tile_px, mpp=target, slide_mpp=slide_mpp, level_downsamples=downsamples)
    read_mpp = max(plan.downsample[0] * slide_mpp.x, plan.downsample[1] * slide_mpp.y)
    if plan.upsample <= 1.01:
        assert read_mpp <= target * 1.01 + 1e-12
    # Physical size is exact, whatever was read: footprint x mpp = tile_px x target.
    assert plan.size0_px[0] * slide_mpp.x == pytest.approx(tile_px * target)
    assert plan.read_px[1] * plan.downsample[1] == pytest.approx(plan.size0_px[1])
    coarse = [max(dx * slide_mpp.x, dy * slide_mpp.y) for dx, dy in downsamples]
    assert not any(coarse[plan.level] * 1.0001 < c <= target * 1.0099 for c in coarse)
    if plan.scale < 8:
        assert coarse[plan.level] * plan.scale * 2 > target * 1.0099


def test_a_pyramid_rounded_up_is_not_truncated() -> None:
    """An odd level-0 size gives downsample 1.9998; int() of it would halve the magnification."""
    plan = plan_read(tile_px=256, mpp=1.0, slide_mpp=Mpp(0.5, 0.5), level_downsamples=((1, 1), (1.9998, 1.9998)))
    assert plan.level == 1
    assert plan.size0_px == (512.0, 512.0)
    assert plan.read_px[0] == pytest.approx(256.0256)
    assert not plan.resample


def test_resample_only_when_a_pixel_would_move() -> None:
    near = plan_read(tile_px=224, mpp=0.5, slide_mpp=Mpp(0.499, 0.499), level_downsamples=((1, 1),))
    assert not near.resample
    far = plan_read(tile_px=224, mpp=0.5, slide_mpp=Mpp(0.4987, 0.4987), level_downsamples=((1, 1),))
    assert far.resample


def test_upsampling_is_bounded_and_said() -> None:
    plan = plan_read(tile_px=224, mpp=0.5, slide_mpp=Mpp(1, 1), level_downsamples=((1, 1),))
    assert plan.upsample == 2.0
    with pytest.raises(UpsampleError, match="--mpp 1 or coarser"):
        plan_read(tile_px=224, mpp=0.25, slide_mpp=Mpp(1, 1), level_downsamples=((1, 1),))


@pytest.mark.parametrize("bad", [0.0, -1.0, 0.049, 5.01, 353.0, float("nan"), float("inf")])
def test_implausible_mpp_raises(bad: float) -> None:
    with pytest.raises(ImplausibleMppError, match="slide-mpp"):
        check_mpp(bad, "x.svs")


@given(st.floats(0.3, 900), st.integers(1, 200_000), st.integers(-500, 500))
def test_a_grid_does_not_drift(step: float, extent: int, start: int) -> None:
    origins = axis_origins(start_px=start, extent_px=extent, size_px=step, step_px=step, edge="pad-white")
    assert np.abs(origins - start - np.arange(len(origins)) * step).max(initial=0) <= 0.5
    assert len(origins) == 0 or start <= origins[0]
    assert (origins < start + extent).all()


@given(st.integers(1, 3000), st.floats(1, 700), st.floats(0.2, 1.0))
def test_edge_policies(extent: int, size: float, share: float) -> None:
    step = size * share
    grids = {
        edge: axis_origins(start_px=0, extent_px=extent, size_px=size, step_px=step, edge=edge)
        for edge in ("drop", "pad-white", "shift-in")
    }
    assert (grids["drop"] + size <= extent + 0.25).all()
    assert set(grids["drop"]) <= set(grids["pad-white"])
    if extent >= size:
        assert (grids["shift-in"] + size <= extent + 0.25).all()
        assert (np.diff(grids["shift-in"]) <= step + 1).all()
        assert grids["shift-in"][-1] + size >= extent - 1.25
    padded = grids["pad-white"]
    assert padded[-1] + max(size, step) >= extent - 1


@given(st.integers(0, 100_000), st.floats(1, 40))
def test_a_whole_pixel_of_the_read_frame_is_found_again(pixel: int, downsample: float) -> None:
    assert frame_origin(int(round_half_up(pixel * downsample)), downsample) == pixel


def test_an_origin_between_pixels_keeps_its_fraction() -> None:
    assert [frame_origin(x, 2.0) for x in (6, 7, 8, -3)] == [3.0, 3.5, 4.0, -1.5]
    assert frame_origin(7, 2001 / 1001) == pytest.approx(7 * 1001 / 2001)
    assert frame_origin(7, 1.0) == 7.0


@given(
    st.integers(-500, 500),
    st.integers(100, 60_000),
    st.integers(4, 300),
    st.sampled_from([1.0, 2.0, 1.9998, 2.0005, 4.0, 4.0021, 8.0, 32.07]),
    st.floats(-0.49, 0.49),
    st.sampled_from(["drop", "pad-white", "shift-in"]),
)
def test_a_grid_on_whole_pixels_of_a_frame(start, extent, side, pixel, off, edge) -> None:
    size = (side + off) * pixel
    origins = axis_origins(start_px=start, extent_px=extent, size_px=size, step_px=size, edge=edge, pixel_px=pixel)
    whole = [frame_origin(int(x), pixel) for x in origins]
    assert all(k == round(k) for k in whole)
    first = np.ceil(start / pixel - 1e-9)
    places = np.asarray(whole) - first
    if edge != "shift-in":  # no drift: half a pixel of the frame, wherever on the slide
        assert np.abs(places - np.arange(len(places)) * size / pixel).max(initial=0) <= 0.5 + 1e-6
    assert (places >= 0).all()
    if edge == "drop" or (edge == "shift-in" and extent >= size + pixel):
        assert ((places + first) * pixel + size <= start + extent + 0.25 + 1e-6).all()
    if edge == "shift-in" and extent >= size + pixel:
        assert (places[-1] + first) * pixel + size >= start + extent - pixel - 0.75


def test_grids_refuse_nonsense() -> None:
    with pytest.raises(GeometryError, match="positive"):
        axis_origins(start_px=0, extent_px=10, size_px=5, step_px=0, edge="drop")
    with pytest.raises(GeometryError, match="edge policy"):
        axis_origins(start_px=0, extent_px=10, size_px=5, step_px=5, edge="wrap")  # type: ignore[arg-type]


def test_covered_fraction_is_area() -> None:
    xy = np.array([[0, 0], [-5, 0], [95, 95], [200, 0]])
    np.testing.assert_allclose(covered_fraction(xy, (10, 10), (0, 0, 100, 100)), [1, 0.5, 0.25, 0])


@given(st.integers(-(10**9), 10**9))
def test_halves_round_up_everywhere(value: int) -> None:
    assert round_half_up(value + 0.5) == value + 1
    assert round_half_up(value) == value
