"""Figures over windows: each found once, wherever it lies; and what cannot be scanned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson
import pytest
import torch
from detectgen import paint
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist
from torch import Tensor

import slidegen
from eosin.errors import MissingMppError, NonFiniteError, NoTissueError, UpsampleError
from eosin.finetune.detections import detections, read_detections
from eosin.finetune.detector_scan import detect_slide, find, suppress, windows, write_figures
from eosin.finetune.matching import HIT_UM, count
from eosin.geometry import Mpp
from eosin.slides import open_slide
from eosin.tiles import read_geojson, tissue_mask
from eosin.tiles.mask import TissueMask


class Dark:
    """Sees dark discs: blurred darkness in cells of 4 px."""

    def __init__(self, window_px: int = 64, mpp: float = 0.25) -> None:
        self.window_px, self.mpp = window_px, mpp
        self.windows = 0

    def heat(self, tiles: npt.NDArray[np.uint8]) -> Tensor:
        self.windows += len(tiles)
        cells = self.window_px // 4
        dark = (235 - tiles[..., 0].astype(np.float64)).clip(0) / 165
        small = dark.reshape(len(tiles), cells, 4, cells, 4).mean(axis=(2, 4))
        return torch.from_numpy(gaussian_filter(small, (0, 1.5, 1.5), mode="constant").clip(1e-4, 0.999)).logit()


class Says:
    """Gives the same map of every window."""

    def __init__(self, heat: npt.NDArray[np.float64], window_px: int = 224) -> None:
        self.map, self.window_px, self.mpp = heat, window_px, 0.25

    def heat(self, tiles: npt.NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(np.repeat(self.map[None], len(tiles), axis=0))


@settings(max_examples=60, deadline=None)
@given(x=st.integers(0, 299), y=st.integers(0, 219), window=st.sampled_from([64, 96]))
def test_a_figure_anywhere_is_found_once(x: int, y: int, window: int) -> None:
    slide = open_slide(paint((300, 220), np.array([(x, y)])), mpp=0.25)
    found = find(slide, Dark(window), threshold=0.1)
    assert len(found) == 1
    off = np.hypot(*(found.xy[0] - (x, y)))
    inner = 12 <= x < 288 and 12 <= y < 208
    assert off < (2 if inner else 12)


def test_a_figure_on_every_seam_and_crossing_is_found_once() -> None:
    size = (260, 230)
    corners = windows(open_slide(paint(size, np.empty((0, 2))), mpp=0.25), _plan(size))
    seams = np.unique(np.concatenate([corners, corners + 64, corners + 48]), axis=0)  # starts, ends, half-way lines
    seams = seams[((seams >= 12) & (seams <= np.array(size) - 12)).all(axis=1)]
    assert len(seams) > 30
    for seam in seams:
        found = find(open_slide(paint(size, seam[None]), mpp=0.25), Dark(), threshold=0.1)
        assert len(found) == 1, seam
        assert np.abs(found.xy[0] - seam).max() < 2


def _plan(size: tuple[int, int]):
    return open_slide(paint(size, np.empty((0, 2))), mpp=0.25).plan(tile_px=64, mpp=0.25)


@settings(max_examples=30, deadline=None)
@given(x=st.integers(40, 240), y=st.integers(40, 160), angle=st.floats(0, 6.28))
def test_two_figures_beside_each_other_are_two(x: int, y: int, angle: float) -> None:
    both = np.array([(x, y), (x + 36 * np.cos(angle), y + 36 * np.sin(angle))])
    found = find(open_slide(paint((300, 220), both, radius=8), mpp=0.25), Dark(), threshold=0.1)
    assert len(found) == 2
    assert count(both, found.xy, radius=3) == count(both, both, radius=3)


@pytest.mark.parametrize("mpp", [0.2, 0.25, 0.5, (0.25, 0.3)])
def test_places_are_level_0_pixels_whatever_the_mpp(mpp: float | tuple[float, float]) -> None:
    own = np.array(mpp if isinstance(mpp, tuple) else (mpp, mpp))
    truth = np.array([(210.0, 150.0), (90.0, 60.0), (320.0, 290.0)])
    pixels = paint((400, 330), truth, radius=2.5 / own.mean())
    found = find(open_slide(pixels, mpp=mpp), Dark(), threshold=0.1)
    assert len(found) == 3
    assert cdist(truth * own, found.xy * own).min(axis=1).max() < 0.5
    assert (np.diff(found.xy[:, 1]) > 0).all()  # from the top down


def test_a_peak_at_a_windows_edge_is_left_to_the_window_that_sees_it_whole() -> None:
    heat = np.full((56, 56), -9.0)
    heat[28, 55] = 3.0
    slide = open_slide(np.full((224, 704, 3), 235, np.uint8), mpp=0.25)
    found = find(slide, Says(heat), threshold=0.5)
    assert len(found) == 1  # only where the slide ends there
    assert found.xy[0] == pytest.approx((702, 114))


def test_results_do_not_depend_on_the_batch() -> None:
    slide = open_slide(paint((300, 220), np.array([(100, 96), (200, 64)])), mpp=0.25)
    one, many = (find(slide, Dark(), threshold=0.1, batch=batch) for batch in (1, 1000))
    assert np.array_equal(one.xy, many.xy)
    assert np.array_equal(one.score, many.score)


def test_progress_counts_windows_and_the_mask_leaves_some_out() -> None:
    slide = open_slide(paint((640, 320), np.array([(100, 100), (500, 100)])), mpp=0.25)
    told: list[tuple[int, int]] = []
    maker = Dark()
    assert len(find(slide, maker, threshold=0.1, batch=16, progress=lambda *at: told.append(at))) == 2
    assert told[-1] == (maker.windows, maker.windows)
    half = np.zeros((10, 20), dtype=bool)
    half[:, :10] = True
    mask = TissueMask(half, (32.0, 32.0), (0.0, 0.0), "given", {})
    less = Dark()
    found = find(slide, less, threshold=0.1, mask=mask)
    assert found.xy.tolist() == [pytest.approx([100, 100], abs=2)]
    assert less.windows < 0.6 * maker.windows
    none = TissueMask(np.zeros_like(half), (32.0, 32.0), (0.0, 0.0), "given", {})
    assert len(find(slide, Dark(), mask=none)) == 0


def test_a_slide_smaller_than_a_window_has_no_figure_off_it() -> None:
    slide = open_slide(paint((100, 90), np.array([(80, 70)])), mpp=0.25)
    found = find(slide, Dark(224), threshold=0.1)
    assert found.xy.tolist() == [pytest.approx([80, 70], abs=2)]
    heat = np.full((56, 56), -9.0)
    heat[10, 10] = heat[10, 40] = 3.0  # on the slide, and on the white beside it
    found = find(slide, Says(heat), threshold=0.5)
    assert found.xy.tolist() == [[42.0, 42.0]]


def test_suppression_leaves_none_within_the_radius_and_covers_all() -> None:
    rng = np.random.default_rng(0)
    xy, score = rng.uniform(0, 120, (300, 2)), rng.integers(0, 20, 300) / 20
    kept = suppress(xy, score)
    plain: list[int] = []
    for at in sorted(range(300), key=lambda i: (-score[i], xy[i, 1], xy[i, 0])):
        if all(np.hypot(*(xy[at] - xy[other])) > HIT_UM for other in plain):
            plain.append(at)
    assert sorted(kept.tolist()) == sorted(plain)
    order = rng.permutation(300)
    assert np.array_equal(xy[order][suppress(xy[order], score[order])], xy[kept])
    assert len(suppress(np.empty((0, 2)), np.empty(0))) == 0


def test_geojson_reads_back_as_detections(tmp_path: Path) -> None:
    found = detections([(100.5, 200.25), (30.0, 40.0)], score=[0.9, 0.625])
    path = write_figures(tmp_path / "a.geojson", found, mpp=Mpp(0.25, 0.5))
    again = read_detections(path)
    assert again.xy == pytest.approx(found.xy)
    assert again.score.tolist() == [0.9, 0.625]
    drawn = read_geojson(path)
    assert {one.name for one in drawn} == {"Mitotic figure"}
    assert drawn[0].object_type == "detection"
    assert drawn[0].geometry.bounds == pytest.approx((75.5, 187.75, 125.5, 212.75))  # 12.5 microns each way


def test_a_slide_is_counted_on_its_tissue(make_slide: Callable[..., Path], tmp_path: Path) -> None:
    pixels, _ = slidegen.histology(900, 700, seed=3, mpp=0.25, blobs=-1)
    with open_slide(make_slide(pixels, mpp=0.25)) as slide:
        told = detect_slide(slide, Dark(224), tissue_mask(slide), out=tmp_path, name="site/a.svs", threshold=0.3)
    assert orjson.loads((tmp_path / "site" / "a.svs.json").read_bytes()) == told
    found = read_detections(tmp_path / "site" / "a.svs.geojson")
    assert len(found) == told["figures"] > 0
    assert told["notes"] == []
    assert told["per_mm2"]["point"] == pytest.approx(told["figures"] / told["tissue_mm2"])


def test_enlarged_windows_are_told_of(tmp_path: Path) -> None:
    slide = open_slide(paint((320, 320), np.array([(100, 100)]), radius=5), mpp=0.5)
    mask = TissueMask(np.ones((10, 10), dtype=bool), (32.0, 32.0), (0.0, 0.0), "given", {})
    told = detect_slide(slide, Dark(), mask, out=tmp_path, name="a", threshold=0.1)
    assert told["figures"] == 1
    assert told["notes"] == ["windows are 2.00x finer than the slide's own 0.5 microns per pixel: enlarged"]


def test_what_cannot_be_scanned(tmp_path: Path) -> None:
    pixels = paint((300, 220), np.array([(100, 96)]))
    with pytest.raises(MissingMppError, match="microns per pixel"):
        find(open_slide(pixels), Dark())
    with pytest.raises(UpsampleError):
        find(open_slide(pixels, mpp=1.0), Dark())
    with pytest.raises(NonFiniteError, match="array: the detector gave NaN"):
        find(open_slide(pixels, mpp=0.25), Says(np.full((16, 16), np.nan), 64))
    empty = TissueMask(np.zeros((7, 9), dtype=bool), (32.0, 32.0), (0.0, 0.0), "given", {})
    with pytest.raises(NoTissueError, match="the tissue mask is empty"):
        detect_slide(open_slide(pixels, mpp=0.25), Dark(), empty, out=tmp_path, name="a", threshold=0.5)
    assert not list(tmp_path.iterdir())
    with pytest.raises(NoTissueError):
        tissue_mask(open_slide(np.full((800, 900, 3), 240, np.uint8), mpp=0.25))
