from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from eosin.errors import CohortError, GeometryError
from eosin.geometry import Mpp
from eosin.pretrain.sampling import (
    TRIES,
    Groups,
    HsvFilter,
    SampleConfig,
    SlideFacts,
    TissueRuns,
    draw_place,
    drawable_mpp,
    stream,
)
from eosin.tiles import TissueMask

DOWNSAMPLE, ORIGIN = (31.7, 33.1), (12.0, -5.5)


def blotches(seed: int = 0, shape: tuple[int, int] = (90, 120), share: float = 0.4) -> TissueMask:
    mask = np.random.default_rng(seed).random(shape) < share
    mask[20:60, 30:90] = True
    return TissueMask(mask, DOWNSAMPLE, ORIGIN, "test", {})


def facts(mask: TissueMask, mpp: tuple[float, float] = (0.25, 0.25)) -> SlideFacts:
    size = (round(mask.mask.shape[1] * mask.downsample[0]), round(mask.mask.shape[0] * mask.downsample[1]))
    return SlideFacts(
        size_px=size, bounds=(0, 0, *size), mpp=Mpp(*mpp), tissue=TissueRuns.from_mask(mask), area_mm2=1.0, stamp=None
    )


def test_the_fraction_of_runs_is_that_of_the_mask():
    mask = blotches()
    runs = TissueRuns.from_mask(mask)
    rng = np.random.default_rng(1)
    xy = rng.integers(-500, 4000, (300, 2))
    for size0 in ((3.0, 5.0), (57.3, 61.9), (911.2, 1040.0)):
        ours = [runs.fraction(corner, size0) for corner in xy]
        np.testing.assert_allclose(ours, mask.fraction(xy, size0), atol=1e-6)
    assert runs.pixels == mask.mask.sum()


def test_points_are_uniform_over_the_tissue():
    mask = blotches(share=0.1)
    rng = np.random.default_rng(2)
    points = TissueRuns.from_mask(mask).points(rng.random(40_000), rng.random(40_000))
    inside = (points - ORIGIN) / DOWNSAMPLE
    column, row = inside.astype(int).T
    assert mask.mask[row, column].all()
    hits = np.zeros(mask.mask.shape, dtype=int)
    np.add.at(hits, (row, column), 1)
    assert stats.chisquare(hits[mask.mask]).pvalue > 1e-3
    for axis in (0, 1):
        assert stats.kstest(inside[:, axis] % 1, "uniform").pvalue > 1e-3


def test_points_reach_the_first_and_the_last_pixel():
    mask = blotches()
    runs = TissueRuns.from_mask(mask)
    rows, columns = np.nonzero(mask.mask)
    ends = runs.points(np.array([0.0, np.nextafter(1, 0)]), np.array([0.0, 0.999]))
    np.testing.assert_array_equal(((ends - ORIGIN) / DOWNSAMPLE + 1e-9).astype(int)[0], [columns[0], rows[0]])
    last = (ends[1] - ORIGIN) / DOWNSAMPLE
    assert columns[-1] <= last[0] <= columns[-1] + 1
    assert int(last[1]) == rows[-1]


def test_streams_differ_by_every_part_of_their_address():
    addresses = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 10**12, 3, 10**6)]
    drawn = {tuple(stream(*address).random(4)) for address in addresses}
    assert len(drawn) == len(addresses)
    assert tuple(stream(5, 7, 1, 2).random(3)) == tuple(stream(5, 7, 1, 2).random(3))
    values = np.array([stream(3, sample).random() for sample in range(20_000)])
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03


@pytest.mark.parametrize("balance", ["slide", "site", "area"])
def test_balance(balance: str):
    sites = ["a"] * 1 + ["b"] * 3 + ["c"] * 6
    areas = np.arange(1.0, 11.0)
    groups = Groups.of(sites if balance == "site" else ["all"] * 10, areas if balance == "area" else None)
    lost = np.zeros(10, dtype=bool)
    drawn = np.bincount([groups.pick(stream(0, n), lost) for n in range(20_000)], minlength=10)
    expected = {
        "slide": np.full(10, 0.1),
        "site": np.array([1 / 3] + [1 / 9] * 3 + [1 / 18] * 6),
        "area": areas / areas.sum(),
    }[balance]
    assert stats.chisquare(drawn, expected * drawn.sum()).pvalue > 1e-3


def test_a_lost_slide_is_replaced_from_its_own_site():
    groups = Groups.of(["a", "b", "b", "b", "c"])
    lost = np.array([False, True, False, False, False])
    drawn = np.bincount([groups.pick(stream(0, n), lost) for n in range(20_000)], minlength=5)
    expected = np.array([2, 1, 1, 2]) / 6
    assert drawn[1] == 0
    assert stats.chisquare(drawn[[0, 2, 3, 4]], expected * drawn.sum()).pvalue > 1e-3
    lost[0] = True
    drawn = np.bincount([groups.pick(stream(1, n), lost) for n in range(20_000)], minlength=5)
    assert stats.chisquare(drawn[[2, 3, 4]], np.array([1, 1, 2]) / 4 * drawn.sum()).pvalue > 1e-3


def test_mpp_is_log_uniform_within_what_the_slide_has():
    mask = blotches(share=1.0)
    config = SampleConfig(tile_px=64, mpp=(0.1, 2.0), min_tissue=0.0)
    known = facts(mask, (0.3, 0.35))
    had = drawable_mpp(known, config, "a")
    assert had == pytest.approx((0.35, 2.0))
    drawn = [draw_place(known, config, had, stream(0, n), 1).mpp for n in range(5_000)]
    law = stats.uniform(np.log(0.35), np.log(2.0) - np.log(0.35))
    assert stats.kstest(np.log(drawn), law.cdf).pvalue > 1e-3


def test_listed_mpp_are_equally_likely_and_those_too_fine_are_not_drawn():
    known = facts(blotches(share=1.0), (0.45, 0.45))
    config = SampleConfig(tile_px=64, mpp_values=(0.25, 0.45, 1.0, 2.0))
    had = drawable_mpp(known, config, "a")
    assert had == (0.45, 1.0, 2.0)
    drawn = [draw_place(known, config, had, stream(0, n), 1).mpp for n in range(6_000)]
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == [0.45, 1.0, 2.0]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_the_upper_mpp_ends_where_a_tile_fills_the_slide():
    known = facts(blotches(), (0.25, 0.25))
    size_um = min(known.size_px) * 0.25
    config = SampleConfig(tile_px=256, mpp=(0.25, 64.0))
    assert drawable_mpp(known, config, "a") == pytest.approx((0.25, size_um / 256))


@pytest.mark.parametrize(
    ("slide_mpp", "mpp", "values", "allowed"),
    [
        (0.2521, (0.25, 0.25), (), True),  # within 1 %, as Aperio writes 0.2521 for 0.25
        (0.2630, (0.25, 0.25), (), False),
        (0.5, (0.25, 0.49), (), False),
        (0.5, (0.25, 2.0), (0.25,), False),
        (0.5, (60.0, 64.0), (), False),
    ],
)
def test_a_slide_without_the_wanted_mpp_is_refused(slide_mpp, mpp, values, allowed):
    known = facts(blotches(), (slide_mpp, slide_mpp))
    config = SampleConfig(tile_px=64, mpp=mpp, mpp_values=values)
    if allowed:
        assert drawable_mpp(known, config, "a")
    else:
        with pytest.raises(GeometryError, match=r"a\.svs: tiles of 64 px .* neither enlarged nor padded"):
            drawable_mpp(known, config, "a.svs")


def test_places_hold_enough_tissue_and_stay_inside_the_bounds():
    mask = blotches(share=0.3)
    known = facts(mask)
    config = SampleConfig(tile_px=200, mpp=(0.25, 4.0), min_tissue=0.5)
    had = drawable_mpp(known, config, "a")
    skipped = 0
    for n in range(400):
        place = draw_place(known, config, had, stream(0, n), TRIES)
        side = 200 * place.mpp / 0.25
        assert len(place.skipped) == len(place.xy) + 1
        assert place.skipped[-1] + len(place.xy) == TRIES
        assert list(place.skipped) == sorted(place.skipped)
        skipped += place.skipped[-1]
        if len(place.xy):
            assert (mask.fraction(place.xy, (side, side)) >= 0.5 - 1e-6).all()
            assert (place.xy >= 0).all()
            assert (place.xy + side <= np.array(known.size_px) + 0.5).all()
    assert 0 < skipped < 400 * TRIES


def test_fewer_positions_are_the_first_of_more():
    known, config = facts(blotches()), SampleConfig(tile_px=64, mpp=(0.25, 1.0), min_tissue=0.2)
    had = drawable_mpp(known, config, "a")
    few, many = (draw_place(known, config, had, stream(0, 5), limit) for limit in (2, TRIES))
    np.testing.assert_array_equal(few.xy, many.xy[:2])
    assert few.skipped[:2] == many.skipped[:2]


def test_the_hsv_filter_counts_pixels():
    # Pink (255, 150, 200): hue 166, saturation 105, value 255; grey has saturation 0.
    tile = np.full((10, 10, 3), 200, dtype=np.uint8)
    tile[:6] = (255, 150, 200)
    assert HsvFilter().keeps(tile)
    tile[5, 9] = 200
    assert not HsvFilter().keeps(tile)
    assert HsvFilter(min_share=0.5).keeps(tile)


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        ({"tile_px": 4}, GeometryError, "tile_px is 4"),
        ({"mpp": (2.0, 0.5)}, GeometryError, "least, greatest"),
        ({"mpp": (0.0, 0.5)}, GeometryError, "mpp 0 is not plausible"),
        ({"mpp_values": (0.5, float("nan"))}, GeometryError, "mpp nan is not plausible"),
        ({"min_tissue": 1.5}, GeometryError, r"min_tissue is 1\.5"),
        ({"balance": "patient"}, CohortError, "unknown balance 'patient'; one of slide, site"),
        ({"seed": -1}, CohortError, "seed is -1"),
    ],
)
def test_bad_values_are_refused(bad, error, match):
    with pytest.raises(error, match=match):
        SampleConfig(**bad)
