"""Masks: closed forms, brute force and MONAI."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cdist

from eosin.errors import ImplausibleMppError, PredictionsError
from eosin.evaluation.segmentation import dice, hd95, iou, panoptic_quality, segmentation_table

masks = arrays(np.bool_, (9, 11), elements=st.booleans())


def disc(radius: float, size: int = 120, centre: tuple[float, float] = (60, 60)) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    return (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2


def blobs(seed: int, *, shift: int = 0, drop: int = 0) -> np.ndarray:
    """Squares of 8 px on a grid, the i-th shifted by up to `shift` px to the right, the first `drop` missing."""
    labels = np.zeros((120, 120), dtype=np.int32)
    rng = np.random.default_rng(seed)
    for i in range(36):
        y, x = 4 + 20 * (i // 6), 4 + 20 * (i % 6) + (int(rng.integers(0, shift + 1)) if shift else 0)
        if i >= drop:
            labels[y : y + 8, x : x + 8] = i + 1
    return labels


def test_overlap_of_shifted_squares_has_its_closed_form() -> None:
    a, b = np.zeros((2, 50, 50), dtype=np.uint8)
    a[10:30, 10:30] = 255
    b[10:30, 15:35] = 1
    assert dice(a, b) == pytest.approx(15 / 20)
    assert iou(a, b) == pytest.approx(15 / 25)


@settings(max_examples=50, deadline=None)
@given(masks, masks)
def test_dice_and_iou_are_one_number_in_two_forms(a: np.ndarray, b: np.ndarray) -> None:
    j = iou(a, b)
    assert dice(a, b) == pytest.approx(2 * j / (1 + j))
    assert dice(a, b) == dice(b, a)


def test_distance_between_concentric_discs_is_the_difference_of_their_radii_in_microns() -> None:
    assert hd95(disc(40), disc(30), mpp=0.5) == pytest.approx(10 * 0.5, abs=0.5)
    assert hd95(disc(40), disc(30), mpp=0.25) == pytest.approx(hd95(disc(40), disc(30), mpp=0.5) / 2)


def test_a_shift_moves_the_boundary_by_itself() -> None:
    a, b = np.zeros((2, 60, 60), dtype=bool)
    a[10:40, 10:40] = True
    b[10:40, 17:47] = True
    assert hd95(a, b, mpp=1, percentile=100) == 7


def edge(mask: np.ndarray) -> np.ndarray:
    """Coordinates of pixels inside with a 4-neighbour outside, by looking at every one."""
    padded = np.pad(mask, 1)
    points = []
    for y, x in np.argwhere(mask):
        around = padded[y, x + 1], padded[y + 2, x + 1], padded[y + 1, x], padded[y + 1, x + 2]
        if not all(around):
            points.append((y, x))
    return np.array(points)


@settings(max_examples=60, deadline=None)
@given(masks, masks, st.sampled_from([50.0, 95.0, 100.0]))
def test_distance_equals_brute_force(a: np.ndarray, b: np.ndarray, percentile: float) -> None:
    found = hd95(a, b, mpp=0.5, percentile=percentile)
    if not a.any() or not b.any():
        assert found == (0 if a.any() == b.any() else math.inf)
        return
    apart = cdist(edge(a), edge(b))
    expected = max(np.percentile(apart.min(0), percentile), np.percentile(apart.min(1), percentile))
    assert found == pytest.approx(0.5 * expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
def test_monai_agrees() -> None:
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("monai.metrics")
    rng = np.random.default_rng(0)
    for _ in range(10):
        a = disc(rng.uniform(10, 40), centre=tuple(rng.uniform(45, 75, 2))) ^ disc(rng.uniform(3, 8))
        b = disc(rng.uniform(10, 40), centre=tuple(rng.uniform(45, 75, 2)))
        tensors = [torch.from_numpy(x[None, None].astype(np.float32)) for x in (b, a)]
        theirs = metrics.compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=0.25)
        assert hd95(a, b, mpp=0.25) == pytest.approx(float(theirs), rel=1e-5)
        assert dice(a, b) == pytest.approx(float(metrics.compute_dice(*tensors, include_background=True)), rel=1e-5)
        assert iou(a, b) == pytest.approx(float(metrics.compute_iou(*tensors, include_background=True)), rel=1e-5)


def test_empty_masks_are_defined() -> None:
    nothing, something = np.zeros((8, 8), dtype=bool), np.eye(8, dtype=bool)
    assert (dice(nothing, nothing), iou(nothing, nothing), hd95(nothing, nothing, mpp=1)) == (1, 1, 0)
    assert (dice(nothing, something), iou(something, nothing), hd95(nothing, something, mpp=1)) == (0, 0, math.inf)
    assert panoptic_quality(nothing, nothing).pq == 1
    assert panoptic_quality(nothing, something).to_dict() == {"pq": 0, "sq": 0, "rq": 0, "tp": 0, "fp": 1, "fn": 0}


def brute_pq(truth: np.ndarray, prediction: np.ndarray) -> tuple[float, float]:
    matches = []
    names = [n for n in np.unique(prediction) if n]
    for t in [n for n in np.unique(truth) if n]:
        overlaps = [iou(truth == t, prediction == p) for p in names]
        matches += [value for value in overlaps if value > 0.5]
    total = (len(np.unique(truth[truth > 0])) + len(names)) / 2
    return sum(matches) / total, len(matches) / total


@pytest.mark.slow  # importing monai takes seconds
@pytest.mark.parametrize("name", ["pq", "sq", "rq"])
def test_panoptic_quality_equals_monai(name: str) -> None:
    import torch
    from monai.metrics.panoptic_quality import compute_panoptic_quality

    truth, prediction = blobs(3), blobs(4, shift=3, drop=5)
    oracle = compute_panoptic_quality(torch.from_numpy(prediction), torch.from_numpy(truth), metric_name=name)
    assert getattr(panoptic_quality(truth, prediction), name) == pytest.approx(float(oracle), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_panoptic_quality_equals_brute_force(seed: int) -> None:
    truth, prediction = blobs(seed, drop=3), blobs(seed, shift=6)
    found = panoptic_quality(truth, prediction)
    assert (found.pq, found.rq) == pytest.approx(brute_pq(truth, prediction))
    assert found.pq == pytest.approx(found.sq * found.rq)
    assert (found.tp + found.fn, found.tp + found.fp) == (33, 36)
    assert found.tp < 33, "some pairs must overlap too little for the test to mean anything"


def test_half_an_overlap_is_no_match() -> None:
    truth, prediction = np.zeros((2, 4, 40), dtype=np.int64)
    truth[:, :20] = 7
    prediction[:, :10] = 2
    assert panoptic_quality(truth, prediction).tp == 0
    prediction[0, 10] = 2
    assert panoptic_quality(truth, prediction).sq == pytest.approx(41 / 80)


def test_renaming_instances_changes_nothing() -> None:
    truth, prediction = blobs(1), blobs(1, shift=5)
    assert panoptic_quality(truth, np.where(prediction > 0, 1000 - prediction, 0)) == panoptic_quality(
        truth, prediction
    )


def test_table_of_classes() -> None:
    truth, prediction = np.zeros((2, 30, 30), dtype=np.int64)
    truth[:10], prediction[:12] = 1, 1
    table = segmentation_table(truth, prediction, mpp=0.5, classes=3).set_index("class")
    assert table.loc[1, "dice"] == pytest.approx(2 * 300 / 660)
    assert table.loc[1, "hd95_um"] == pytest.approx(2 * 0.5)
    assert table.loc[2].tolist() == [0, 0, 1, 1, 0]
    assert table["truth_px"].sum() == 900


def test_bad_input_says_what_is_wrong() -> None:
    ok = np.ones((4, 4), dtype=np.uint8)
    with pytest.raises(PredictionsError, match=r"\(4, 4\) and \(5, 5\)"):
        dice(ok, np.ones((5, 5)))
    with pytest.raises(PredictionsError, match="threshold it"):
        iou(ok, np.full((4, 4), 0.3))
    with pytest.raises(PredictionsError, match="threshold it"):
        iou(ok, np.full((4, 4), np.nan))
    with pytest.raises(ImplausibleMppError, match="mpp is 0"):
        hd95(ok, ok, mpp=0)
    with pytest.raises(PredictionsError, match="whole numbers"):
        panoptic_quality(ok, ok * 0.5)
    with pytest.raises(PredictionsError, match="class 1 occurs"):
        segmentation_table(ok, ok, mpp=1, classes=1)


@pytest.mark.real
def test_real_nuclei_shrunk_by_one_pixel(real_data: Path) -> None:
    from PIL import Image
    from scipy.ndimage import binary_erosion, label

    nuclei = label(np.asarray(Image.open(real_data / "segmentation" / "label.png").convert("L")) > 0)[0]
    assert nuclei.max() > 20
    exact = panoptic_quality(nuclei, nuclei)
    assert (exact.pq, exact.tp) == (1, nuclei.max())
    shrunk = nuclei * binary_erosion(nuclei > 0)
    assert 0.5 < dice(nuclei > 0, shrunk > 0) < 1
    assert hd95(nuclei > 0, shrunk > 0, mpp=0.5) < 2
