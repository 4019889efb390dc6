"""Quality numbers answer to what was done to the tile."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from eosin.errors import GeometryError, TissueError
from eosin.slides import open_slide
from eosin.tiles import DEFAULT_RULES, QC_COLUMNS, REASONS, Rule, TissueMask, qc_table, reject_reason, tile, tile_qc
from eosin.tiles.qc import PIXEL_COLUMNS, STAIN_OD, neighbours


@pytest.fixture
def tissue() -> np.ndarray:
    """An H&E-like tile of 224 px at 0.5 mpp: eosin ground with dark nuclei."""
    rng = np.random.default_rng(1)
    od = np.full((448, 448), 0.25)[..., None] * STAIN_OD[1]
    nuclei = np.zeros((448, 448), np.float32)
    for _ in range(120):
        cv2.circle(nuclei, tuple(int(v) for v in rng.integers(0, 448, 2)), int(rng.integers(8, 14)), 1.0, -1)
    nuclei *= np.clip(0.6 + 0.2 * rng.standard_normal((448, 448)), 0, 1).astype(np.float32)
    od = od + nuclei[..., None] * 0.8 * STAIN_OD[0] + 0.05 * rng.random((448, 448, 1))
    rgb = np.clip(245 * 10**-od, 0, 255).astype(np.uint8)
    return cv2.resize(rgb, (224, 224), interpolation=cv2.INTER_AREA)


def reason(rgb: np.ndarray, mpp: float = 0.5) -> str:
    table = {name: np.array([value]) for name, value in tile_qc(rgb, mpp).items()}
    return REASONS[reject_reason(table)[0]]


def test_names_and_finite_numbers(tissue):
    found = tile_qc(tissue, 0.5)
    assert tuple(found) == PIXEL_COLUMNS
    assert set(PIXEL_COLUMNS) < set(QC_COLUMNS)
    for rgb in (tissue, np.zeros((8, 8, 3), np.uint8), np.full((33, 57, 3), 255, np.uint8)):
        assert all(type(v) is float and np.isfinite(v) for v in tile_qc(rgb, 0.5).values())
    assert reason(tissue) == "kept"


def test_focus_falls_with_every_step_of_blur(tissue):
    focus = [tile_qc(tissue, 0.5)["focus"]]
    for sigma_um in (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0):
        focus.append(tile_qc(cv2.GaussianBlur(tissue, (0, 0), sigma_um / 0.5), 0.5)["focus"])
    assert all(a > b for a, b in pairwise(focus))
    assert reason(cv2.GaussianBlur(tissue, (0, 0), 4)) == "blurred"


def test_focus_hardly_depends_on_mpp_or_stain_strength(tissue):
    sharp = tile_qc(tissue, 0.5)["focus"]
    finer = cv2.resize(tissue, (448, 448), interpolation=cv2.INTER_NEAREST)
    assert tile_qc(finer, 0.25)["focus"] == pytest.approx(sharp, rel=1e-6)
    paler = (255 - (255 - tissue.astype(float)) * 0.5).astype(np.uint8)
    assert tile_qc(paler, 0.5)["focus"] == pytest.approx(sharp, rel=0.15)


@pytest.mark.parametrize("color", [(40, 150, 80), (35, 60, 170), (205, 20, 30)])
def test_pen_strokes_are_measured_by_area(tissue, color):
    shares = []
    for width in (0, 20, 60, 120):
        painted = tissue.copy()
        painted[:, 50 : 50 + width] = color
        shares.append(tile_qc(painted, 0.5)["pen"])
    assert shares == pytest.approx([0, 20 / 224, 60 / 224, 120 / 224], abs=0.01)
    assert reason(painted) == "pen"


def test_black_and_white_areas_are_measured(tissue):
    painted = tissue.copy()
    painted[:, :112] = 10
    assert tile_qc(painted, 0.5)["black"] == pytest.approx(0.5, abs=0.01)
    painted[:, :140] = 10
    assert reason(painted) == "black"
    painted = tissue.copy()
    painted[:210] = (242, 241, 243)
    assert tile_qc(painted, 0.5)["white"] == pytest.approx(210 / 224, abs=0.01)
    assert reason(painted) == "white"


def test_a_fold_is_thick_tissue(tissue):
    layers = {n: np.clip(245 * (tissue / 245.0) ** n, 0, 255).astype(np.uint8) for n in (1, 2, 4, 6)}
    shares = [tile_qc(rgb, 0.5)["fold"] for rgb in layers.values()]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] > 0.95
    half = np.where(np.arange(224)[:, None, None] < 112, layers[6], tissue)
    assert tile_qc(half, 0.5)["fold"] == pytest.approx(0.5, abs=0.05)
    assert reason(layers[6]) == "fold"


@pytest.mark.parametrize(("hematoxylin", "eosin"), [(0.3, 0.0), (0.0, 0.4), (0.2, 0.3)])
def test_stain_densities_come_back(hematoxylin, eosin):
    unit = STAIN_OD / np.linalg.norm(STAIN_OD, axis=1, keepdims=True)
    rgb = np.round(255 * 10 ** -(hematoxylin * unit[0] + eosin * unit[1])).astype(np.uint8)
    found = tile_qc(np.broadcast_to(rgb, (64, 64, 3)), 0.5)
    assert found["od_hematoxylin"] == pytest.approx(hematoxylin, abs=0.01)
    assert found["od_eosin"] == pytest.approx(eosin, abs=0.01)


def test_saturation_is_that_of_hsv(tissue):
    flat = np.broadcast_to(np.array([200, 100, 150], np.uint8), (32, 32, 3))
    assert tile_qc(flat, 0.5)["saturation"] == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [np.zeros((16, 16), np.uint8), np.zeros((16, 16, 4), np.uint8), np.zeros((16, 16, 3))])
def test_only_rgb_tiles(bad):
    with pytest.raises(GeometryError, match="uint8"):
        tile_qc(bad, 0.5)


def grid_of(mask: np.ndarray, **kwargs):
    slide = open_slide(np.full((mask.shape[0] * 10, mask.shape[1] * 10, 3), 240, np.uint8), mpp=0.5)
    return tile(slide, tile_px=10, mpp=0.5, mask=TissueMask(mask, (10.0, 10.0), (0.0, 0.0), "test", {}), **kwargs)


def test_neighbours_agree_with_counting():
    mask = np.random.default_rng(2).random((12, 17)) < 0.6
    mask[:, 8] = False  # an empty column must not let its two sides touch
    grid = grid_of(mask, min_tissue=0.5)
    kept = np.random.default_rng(3).random(len(grid)) < 0.8
    there = np.zeros((14, 19), dtype=int)
    cells = grid.xy // 10
    there[cells[kept, 1] + 1, cells[kept, 0] + 1] = 1
    want = [there[y : y + 3, x : x + 3].sum() - there[y + 1, x + 1] for x, y in cells]
    np.testing.assert_array_equal(neighbours(grid.xy, grid.step0_px, kept), np.array(want) / 8)
    assert neighbours(grid.xy[:0], grid.step0_px).shape == (0,)


def test_neighbours_with_a_column_shifted_in():
    xy = np.array([(x, y) for y in (0, 10, 15) for x in (0, 10, 20, 23)])
    found = neighbours(xy, (10.0, 10.0)).reshape(3, 4)
    assert found[1].tolist() == [5 / 8, 1, 1, 5 / 8]
    assert found[0].tolist() == [3 / 8, 5 / 8, 5 / 8, 3 / 8]


def test_table_marks_what_could_not_be_read(tissue):
    grid = grid_of(np.ones((2, 3), dtype=bool))
    rows: list[dict[str, float] | None] = [tile_qc(tissue, 0.5) for _ in range(6)]
    rows[1] = None
    rows[4] = tile_qc(cv2.GaussianBlur(tissue, (0, 0), 5), 0.5)
    table = qc_table(grid, rows)
    assert tuple(table) == QC_COLUMNS
    assert table["read_status"].tolist() == [0, 1, 0, 0, 0, 0]
    assert np.isnan(table["focus"]).tolist() == [False, True, False, False, False, False]
    assert table["neighbours"][0] == 2 / 8
    codes = reject_reason(table)
    assert codes.dtype == np.int8
    assert [REASONS[c] for c in codes] == ["kept", "unreadable", "kept", "kept", "blurred", "kept"]
    with pytest.raises(GeometryError, match="5 rows"):
        qc_table(grid, rows[:5])


def test_rules_are_data_and_the_first_wins():
    table = {"pen": np.array([0.9, 0.0, 0.9]), "focus": np.array([0.0, 0.0, 1.0]), "mine": np.array([0, 0, 9])}
    assert [REASONS[c] for c in reject_reason(table)] == ["pen", "blurred", "pen"]
    rules = (Rule("focus", "<", 0.5, "blurred"), Rule("mine", ">=", 9, "fold"))
    assert [REASONS[c] for c in reject_reason(table, rules)] == ["blurred", "blurred", "fold"]
    assert {rule.reason for rule in DEFAULT_RULES} == set(REASONS[1:])
    for wrong in (Rule("nothing", "<", 0, "pen"), Rule("pen", "~", 0, "pen"), Rule("pen", "<", 0, "ugly")):  # type: ignore[arg-type]
        with pytest.raises(TissueError, match="unknown"):
            reject_reason(table, (wrong,))


def test_a_tile_takes_about_a_millisecond(tissue):
    cv2.setNumThreads(1)
    best = np.inf
    for _ in range(5):
        start = time.process_time()
        for _ in range(50):
            tile_qc(tissue, 0.5)
        best = min(best, (time.process_time() - start) / 50)
    assert best < 1.5e-3  # 0.5 ms on a free core


@pytest.mark.real
@pytest.mark.parametrize(
    ("folder", "every", "least"), [("camelyon16/*", 1, 1.0), ("amf/atnorm-br", 5, 0.99), ("amf/midog21", 12, 0.97)]
)
def test_clean_tiles_of_real_slides_are_kept(real_data: Path, folder: str, every: int, least: float):
    paths = sorted((real_data / "tiles").glob(f"{folder}/*.png"))[::every]
    kept = [reason(np.asarray(Image.open(path).convert("RGB")), 0.25) == "kept" for path in paths]
    assert len(kept) > 50
    assert np.mean(kept) >= least
