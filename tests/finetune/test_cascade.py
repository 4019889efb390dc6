from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pytest
from scipy.stats import poisson
from shapely.geometry import box

import slidegen
from eosin.errors import ConfigError, GeometryError, MissingMppError, NonFiniteError, PredictionsError, UpsampleError
from eosin.finetune.cascade import (
    ATYPICAL,
    NORMAL,
    classify,
    count_atypical,
    crops,
    density,
    per_mm2,
    region_mm2,
    summary,
    write_cells,
)
from eosin.finetune.detections import detections, read_detections
from eosin.finetune.joins import read_boxes
from eosin.geometry import Mpp
from eosin.slides import open_slide
from eosin.tiles import read_geojson, tissue_mask


class Redness:
    """Calls a crop atypical by the red value of its centre, of any batch alike."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def scores(self, tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        self.batches.append(len(tiles))
        middle = tiles.shape[1] // 2
        return tiles[:, middle, middle, 0] / 255.0


class Says:
    def __init__(self, value: object) -> None:
        self.value = value

    def scores(self, tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        return np.asarray(self.value, dtype=np.float64)


@pytest.mark.parametrize("style", [{"mpp": 0.25}, {"mpp": 0.25, "factors": ()}])
def test_crops_hold_the_stored_pixels_around_each_point(make_slide: Callable[..., Path], style: dict) -> None:
    pixels = slidegen.coordinates(900, 700)
    with open_slide(make_slide(pixels, **style)) as slide:
        (tiles, valid), (rest, _) = crops(slide, [(300, 200), (64, 64), (500.4, 400.2)], batch=2)
    assert np.array_equal(tiles[0], pixels[136:264, 236:364])
    assert np.array_equal(tiles[1], pixels[:128, :128])
    assert np.array_equal(rest[0], pixels[336:464, 436:564])
    assert valid.tolist() == [1, 1]


@pytest.mark.parametrize("mpp", [0.125, 0.2])
def test_crops_of_a_finer_slide_show_the_same_tissue(make_slide: Callable[..., Path], mpp: float) -> None:
    # Twice or 1.25 times as fine: the crop covers 32 micrometres all the same, its centre the point.
    side = 1200
    with open_slide(make_slide(slidegen.ramp(side, side), mpp=mpp, factors=())) as slide:
        ((tiles, _),) = crops(slide, [(700, 500)])
    want = np.array([700, 500]) * 255 / side
    assert np.abs(tiles[0, 63:65, 63:65, :2].astype(float).mean(axis=(0, 1)) - want).max() < 0.7
    span = tiles[0, 60:68, -1, 0].mean() - tiles[0, 60:68, 0, 0].mean()
    assert span == pytest.approx(127 * 0.25 / mpp * 255 / side, abs=1.0)


def test_every_point_gets_the_score_of_its_own_crop(make_slide: Callable[..., Path]) -> None:
    rng = np.random.default_rng(0)
    pixels = slidegen.coordinates(900, 700)
    xy = rng.integers((70, 70), (830, 630), (300, 2))
    classifier = Redness()
    with open_slide(make_slide(pixels, mpp=0.25)) as slide:
        found = classify(slide, detections(xy, score=rng.random(300)), classifier, threshold=0.4)
    assert classifier.batches == [256, 44]
    assert np.allclose(found.p_atypical, pixels[xy[:, 1], xy[:, 0], 0] / 255)
    assert np.array_equal(found.atypical, found.p_atypical >= 0.4)
    assert found.notes == ()


def test_no_points_make_no_cells(make_slide: Callable[..., Path], tmp_path: Path) -> None:
    with open_slide(make_slide(slidegen.coordinates(300, 300), mpp=0.25)) as slide:
        found = classify(slide, detections([]), Redness())
    assert len(found) == 0
    counted = density(found, area_mm2=2.0)
    assert (counted.atypical.point, counted.atypical.low, counted.atypical.n) == (0, 0, 0)
    assert read_geojson(write_cells(tmp_path / "none.geojson", found)) == []


def test_crops_over_the_edge_are_padded_and_counted(make_slide: Callable[..., Path]) -> None:
    with open_slide(make_slide(slidegen.coordinates(400, 400), mpp=0.25)) as slide:
        found = classify(slide, detections([(0, 200), (200, 200)]), Redness())
    assert found.valid_fraction.tolist() == [0.5, 1]
    assert found.notes == ("1 of 2 crops reach over the edge of what was scanned",)


def test_a_coarser_slide_is_enlarged_with_a_note_and_then_refused(make_slide: Callable[..., Path]) -> None:
    pixels = slidegen.coordinates(600, 600)
    with open_slide(make_slide(pixels, name="half.svs", mpp=0.45)) as slide:
        found = classify(slide, detections([(300, 300)]), Redness())
    assert found.notes[0].startswith("the crops are 1.80x finer than the slide's own 0.45")
    with open_slide(make_slide(pixels, name="one.svs", mpp=1.0)) as slide, pytest.raises(UpsampleError):
        classify(slide, detections([(300, 300)]), Redness())
    with open_slide(make_slide(pixels, name="none.svs", mpp=None)) as slide, pytest.raises(MissingMppError):
        classify(slide, detections([(300, 300)]), Redness())


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([0.5], PredictionsError, r"shape \(1,\) for 2 crops"),
        ([[0.5], [0.5]], PredictionsError, "needed"),
        ([0.5, np.nan], NonFiniteError, "1 scores of 2"),
        ([-2.0, 3.0], PredictionsError, "apply a sigmoid"),
    ],
)
def test_a_classifier_that_gives_no_probabilities(
    make_slide: Callable[..., Path], value: object, error: type[Exception], message: str
) -> None:
    with (
        open_slide(make_slide(slidegen.coordinates(300, 300), mpp=0.25)) as slide,
        pytest.raises(error, match=message),
    ):
        classify(slide, detections([(100, 100), (150, 150)]), Says(value))


def test_a_threshold_is_a_probability(make_slide: Callable[..., Path]) -> None:
    with (
        open_slide(make_slide(slidegen.coordinates(300, 300), mpp=0.25)) as slide,
        pytest.raises(ConfigError, match="threshold is 50"),
    ):
        classify(slide, detections([(100, 100)]), Redness(), threshold=50)


@pytest.mark.parametrize("n", [0, 1, 7, 40])
def test_a_density_has_the_exact_poisson_interval(n: int) -> None:
    found = per_mm2(n, 2.5)
    assert found.point == n / 2.5
    assert found.n == n
    # Garwood: at the upper end so few, at the lower end so many, have a chance of 2.5 %.
    assert poisson.cdf(n, found.high * 2.5) == pytest.approx(0.025)
    assert found.low == 0 if n == 0 else poisson.sf(n - 1, found.low * 2.5) == pytest.approx(0.025)
    assert "below" not in found.note
    assert "below the 2 mm²" in per_mm2(n, 1.9).note


def test_cells_are_counted_in_a_region(make_slide: Callable[..., Path]) -> None:
    with open_slide(make_slide(slidegen.coordinates(1000, 800), mpp=0.25)) as slide:
        found = classify(slide, detections([(100, 100), (300, 100), (900, 700)]), Redness(), threshold=0.3)
    assert found.atypical.tolist() == [True, False, True]  # red is x mod 256: 100, 44, 132
    region = box(0, 0, 400, 400)
    area = region_mm2(region, Mpp(0.25, 0.25))
    assert area == pytest.approx(0.01)
    counted = density(found, area_mm2=area, region=region)
    assert (counted.figures.n, counted.atypical.n) == (2, 1)
    assert counted.atypical.point == pytest.approx(100)
    whole = density(found, area_mm2=2.0)
    assert (whole.figures.point, whole.atypical.point) == (1.5, 1.0)
    line = summary("a.svs", found, [counted, whole])
    assert orjson.loads(orjson.dumps(line))["areas"][0]["atypical"]["n"] == 1
    with pytest.raises(GeometryError, match="area is 0 mm²"):
        density(found, area_mm2=0)


def test_qupath_gets_squares_with_both_classes(make_slide: Callable[..., Path], tmp_path: Path) -> None:
    with open_slide(make_slide(slidegen.coordinates(600, 400), mpp=0.25)) as slide:
        points = detections([(100, 100), (300.25, 110)], score=[0.9, np.nan])
        found = classify(slide, points, Redness(), threshold=0.3)
    path = write_cells(tmp_path / "cells.geojson", found)
    drawn = read_geojson(path)
    assert [one.name for one in drawn] == [ATYPICAL, NORMAL]
    assert {one.object_type for one in drawn} == {"detection"}
    # 12.5 micrometres are 50 px.
    assert [one.geometry.bounds for one in drawn] == [(75, 75, 125, 125), (275.25, 85, 325.25, 135)]
    first = (drawn[0].properties or {})["measurements"]
    assert first == {"P(atypical)": pytest.approx(100 / 255, abs=1e-6), "Detection probability": 0.9}
    assert "Detection probability" not in (drawn[1].properties or {})["measurements"]
    # The file is one that the cascade reads again.
    again = read_detections(path, size_px=(600, 400))
    assert np.allclose(again.xy, found.xy)
    assert again.name.tolist() == [ATYPICAL, NORMAL]
    assert again.score[0] == 0.9


def test_one_call_from_slide_to_files(he_slide: Any, tmp_path: Path) -> None:
    region = box(0, 0, 1000, 1500)
    xy = [(400, 400), (600, 900), (1500, 700)]
    with open_slide(he_slide.path) as slide:
        found = count_atypical(slide, detections(xy), Redness(), out=tmp_path / "out", threshold=0.0, region=region)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["he.svs.geojson", "he.svs.json"]
    assert orjson.loads((tmp_path / "out" / "he.svs.json").read_bytes()) == orjson.loads(orjson.dumps(found))
    assert len(read_geojson(tmp_path / "out" / "he.svs.geojson")) == 3
    tissue, spot = orjson.loads(orjson.dumps(found))["areas"]
    truth = float(he_slide.mask.sum() * he_slide.mpp**2 / 1e6)
    assert tissue["area_mm2"] == pytest.approx(truth, rel=0.1)
    assert (tissue["atypical"]["n"], spot["atypical"]["n"]) == (3, 2)
    assert spot["area_mm2"] == pytest.approx(0.5 * 0.75)


@pytest.mark.real
def test_boxes_of_the_challenge_as_points_of_a_real_slide(real_data: Path, tmp_path: Path) -> None:
    # The pixels of a real slide at 0.227 microns per pixel, at positions drawn from MIDOG++.
    boxes = read_boxes(real_data / "labels" / "MIDOGpp.json")
    with open_slide(real_data / "slides" / "OS-1-detail.ome.tif") as slide:
        width, height = slide.size_px
        xy = boxes.xy[(boxes.xy < (width, height)).all(axis=1)][:40]
        classifier = Redness()
        found = classify(slide, detections(xy), classifier, threshold=0.5)
        area = tissue_mask(slide).area_mm2(slide.mpp)
        counted = density(found, area_mm2=area)
        level = slide.read((0, 0), (width, height), level=0)
    assert len(found) == 40
    assert 0 < area <= width * height * 0.228**2 / 1e6
    assert counted.figures.n == 40
    assert "below the 2 mm²" in counted.figures.note
    # A crop's centre is the point: resampled by 1.1, so compared over a few pixels.
    inner = found.valid_fraction == 1
    around = np.array([level[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2, 0].mean() for x, y in xy[inner]])
    assert np.corrcoef(around, found.p_atypical[inner])[0, 1] > 0.9
    assert len(read_geojson(write_cells(tmp_path / "cells.geojson", found))) == 40
