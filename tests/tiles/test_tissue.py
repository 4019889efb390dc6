"""Tissue detection on drawn overviews with known masks, and on real slides."""

from __future__ import annotations

import importlib.util
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from eosin.errors import NotBrightfieldError, NoTissueError, TissueError
from eosin.slides import open_slide
from eosin.tiles import filters, tissue_mask
from eosin.tiles.tissue import segment_tissue

UM = (8.0, 8.0)


@pytest.fixture(scope="module")
def drawn():
    """The cases of benchmarks/tissue.py."""
    path = Path(__file__).parents[2] / "benchmarks" / "tissue.py"
    spec = importlib.util.spec_from_file_location("tissue_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tissue_benchmark"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("case", "least"),
    [
        ("H&E", 0.95),
        ("H&E, pale", 0.92),
        ("fat", 0.90),
        ("IHC, brown", 0.95),
        ("IHC, blue", 0.90),
        ("pen, green", 0.85),
        ("pen, blue", 0.85),
        ("pen, black", 0.90),
        ("pen, red", 0.85),
        ("all tissue", 0.99),
        ("dust and coverslip", 0.93),
        ("noise, JPEG 45", 0.93),
        ("grey vignette", 0.93),
        ("white filling", 0.93),
    ],
)
def test_agrees_with_the_drawn_mask(drawn, case: str, least: float):
    rgb, truth = drawn.CASES[case](np.random.default_rng(77))
    found, params = segment_tissue(rgb, pixel_um=UM)
    assert drawn.iou(found, truth) >= least
    assert params["tissue_share"] == pytest.approx(found.mean(), abs=1e-3)


@pytest.mark.parametrize("case", ["H&E", "pen, blue", "noise, JPEG 45", "grey vignette", "fat"])
def test_no_bit_depends_on_the_bands_of_rows(drawn, case: str, monkeypatch):
    rgb, _ = drawn.CASES[case](np.random.default_rng(3))
    answers = []
    for rows in (10**6, 128, 37, 1):
        monkeypatch.setattr(filters, "BAND_ROWS", rows)
        answers.append(segment_tissue(rgb[:: 8 if rows == 1 else 1], pixel_um=UM))
    for mask, params in answers[1:3]:
        np.testing.assert_array_equal(mask, answers[0][0])
        assert params == answers[0][1]
    monkeypatch.setattr(filters, "BAND_ROWS", 10**6)
    np.testing.assert_array_equal(answers[3][0], segment_tissue(rgb[::8], pixel_um=UM)[0])


def test_a_pixel_of_the_thumbnail_costs_some_twenty_bytes(drawn):
    """A large slide's thumbnail has 4096 x 4096 pixels: with every plane held whole that would be 1.4 GB."""
    rgb = np.tile(drawn.CASES["pen, green"](np.random.default_rng(1))[0], (2, 2, 1))
    tracemalloc.start()
    segment_tissue(rgb, pixel_um=UM)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / (rgb.shape[0] * rgb.shape[1]) < 26


def test_pen_and_dust_alone_are_no_tissue(drawn):
    rng = np.random.default_rng(5)
    od = np.zeros((*drawn.SIZE, 3))
    drawn.stroke(rng, od, np.array([40.0, 150.0, 80.0]), drawn.blob(rng, 0.2))
    rgb = drawn.render(rng, od, drawn.flat((243, 242, 244)))
    with pytest.raises(NoTissueError, match="ink"):
        segment_tissue(rgb, pixel_um=UM)
    rgb, _ = drawn.blank(rng)
    with pytest.raises(NoTissueError, match="glass"):
        segment_tissue(rgb, pixel_um=UM)


@pytest.mark.parametrize("level", [190, 215, 240, 254])
def test_dimmer_glass_changes_little(drawn, level: int):
    rng = np.random.default_rng(9)
    truth = drawn.blob(rng, 0.3)
    od = drawn.stained(rng, truth, drawn.HEMATOXYLIN, drawn.EOSIN, 0.3)
    found, params = segment_tissue(drawn.render(rng, od, drawn.flat((level,) * 3)), pixel_um=UM)
    assert params["glass_rgb"] == pytest.approx([level] * 3, abs=3)
    assert drawn.iou(found, truth) >= 0.95


def test_dark_slide_is_refused():
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 12, (200, 300, 3)).astype(np.uint8)
    rgb[50:90, 60:120, 2] = 220
    with pytest.raises(NotBrightfieldError, match="darker than"):
        segment_tissue(rgb, pixel_um=UM)


def test_mask_of_a_synthetic_slide(he_slide):
    with open_slide(he_slide.path) as slide:
        found = tissue_mask(slide)
        rows = ((np.arange(1500) + 0.5) / found.downsample[1]).astype(int)
        columns = ((np.arange(2000) + 0.5) / found.downsample[0]).astype(int)
        full = found.mask[np.ix_(rows.clip(max=found.mask.shape[0] - 1), columns.clip(max=found.mask.shape[1] - 1))]
        assert np.count_nonzero(full & he_slide.mask) / np.count_nonzero(full | he_slide.mask) > 0.85
        assert found.area_mm2(slide.mpp) == pytest.approx(he_slide.mask.sum() * 0.25e-6, rel=0.15)
        with pytest.raises(TissueError, match="od-texture"):
            tissue_mask(slide, method="magic")


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "mpp", "low", "high"),
    [
        ("CMU-1-Small-Region.svs", None, 0.33, 0.48),
        ("tcga-cr-7395-01a-01-ts1.svs", 1.0, 0.58, 0.70),
        ("OS-1-detail.ome.tif", None, 0.98, 1.0),
        ("OS-2-ndpi.ome.tif", None, 0.75, 0.97),
        ("OS-2-vsi.ome.tif", None, 0.75, 0.97),
        ("prostate-2500px.jpeg", 1.0, 0.75, 0.93),
    ],
)
def test_real_slides_hold_the_tissue_seen_on_them(
    real_data: Path, name: str, mpp: float | None, low: float, high: float
):
    with open_slide(real_data / "slides" / name, mpp=mpp) as slide:
        assert low <= tissue_mask(slide).mask.mean() <= high


@pytest.mark.real
def test_two_scanners_agree_on_one_field(real_data: Path):
    shares = []
    for name in ("OS-2-ndpi.ome.tif", "OS-2-vsi.ome.tif"):
        with open_slide(real_data / "slides" / name) as slide:
            shares.append(tissue_mask(slide).area_mm2(slide.mpp))
    assert shares[0] == pytest.approx(shares[1], rel=0.12)


@pytest.mark.real
def test_fluorescence_is_refused(real_data: Path):
    with (
        open_slide(real_data / "slides" / "hamamatsu-dapi.ndpi") as slide,
        pytest.raises(NotBrightfieldError, match=r"^hamamatsu-dapi\.ndpi is not brightfield"),
    ):
        tissue_mask(slide)
