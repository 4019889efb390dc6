"""Matched tiles: closed forms on a circle, brute force, and what a collapsed encoder gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eosin.errors import NonFiniteError, PredictionsError
from eosin.evaluation.matched import matched_tiles


def circle(n: int, turned_by: float = 0.0) -> np.ndarray:
    """n directions evenly round the circle, turned by so many of their steps."""
    angle = 2 * np.pi * (np.arange(n) + turned_by) / n
    return np.column_stack([np.cos(angle), np.sin(angle)])


def brute(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Share of tiles whose counterpart is among the k nearest of both sets, both directions; no ties expected."""
    hits = []
    for query, other in ((a, b), (b, a)):
        both = np.concatenate([query, other]).astype(np.float64)
        both /= np.linalg.norm(both, axis=1, keepdims=True)
        for i in range(len(query)):
            similarity = both @ both[i]
            similarity[i] = -2
            hits.append(len(query) + i in np.argsort(-similarity)[:k])
    return float(np.mean(hits))


def test_identical_views_are_always_found() -> None:
    a = np.random.default_rng(0).normal(size=(300, 16))
    found = matched_tiles(a, a.copy())
    assert found.cosine == pytest.approx(np.ones(300), abs=1e-6)
    assert found.top_k(1).min() == 1
    assert matched_tiles(a, 3 * a).top_k(1).min() == 1, "length must not matter"


@pytest.mark.parametrize("degrees", [1, 30, 90, 180])
def test_rotation_has_the_cosine_of_its_angle(degrees: float) -> None:
    a = np.random.default_rng(1).normal(size=(50, 8))
    angle = np.deg2rad(degrees)
    turn = np.kron(np.eye(4), [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    assert matched_tiles(a, a @ turn.T).cosine == pytest.approx(np.full(50, np.cos(angle)), abs=1e-5)


def test_a_turned_circle_has_known_ranks() -> None:
    """Turned by 2.3 steps: nearer are 2 + 2 of the own set, and of the other those 0.3, 0.7, 1.3, 1.7 steps away."""
    found = matched_tiles(circle(100), circle(100, 2.3))
    assert (found.closer == 8).all()
    assert (found.tied == 0).all()
    assert (found.top_k(8).max(), found.top_k(9).min()) == (0, 1)


def test_ties_count_by_chance() -> None:
    """Turned by 2.5 steps, a candidate on the other side is exactly as far as the counterpart."""
    found = matched_tiles(circle(100), circle(100, 2.5))
    assert (found.closer == 8).all()
    assert (found.tied == 1).all()
    assert [found.top_k(k).mean() for k in (8, 9, 10)] == [0, 0.5, 1]


def test_a_collapsed_encoder_is_no_better_than_a_coin() -> None:
    n = 200
    found = matched_tiles(np.ones((n, 4)), np.ones((n, 4)))
    assert found.to_dict((10,)) == pytest.approx(
        {"n": n, "cosine": 1, "cosine_unmatched": 1, "top_10": 10 / (2 * n - 1)}, abs=1e-6
    )


@pytest.mark.parametrize("k", [1, 3, 10])
def test_top_k_equals_brute_force_across_blocks(k: int) -> None:
    rng = np.random.default_rng(2)
    a = rng.normal(size=(700, 6))
    b = a + 0.4 * rng.normal(size=a.shape)
    assert matched_tiles(a, b).top_k(k).mean() == pytest.approx(brute(a, b, k), abs=2e-3)


def test_unmatched_cosine_equals_the_mean_off_the_diagonal() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 40, 5)) + 1
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    products = unit[0] @ unit[1].T
    expected = products[~np.eye(40, dtype=bool)].mean()
    assert matched_tiles(a, b).cosine_unmatched == pytest.approx(expected, abs=1e-6)


def test_both_directions_count() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 60, 5))
    one, other = matched_tiles(a, b), matched_tiles(b, a)
    assert np.array_equal(one.closer, other.closer[::-1])
    assert np.array_equal(one.top_k(10), other.top_k(10))


def test_intervals_resample_clusters() -> None:
    rng = np.random.default_rng(5)
    core = np.repeat(np.arange(20), 30)
    a = rng.normal(size=(600, 8))
    b = a + rng.uniform(0, 2, size=20)[core, None] * rng.normal(size=a.shape)
    found = matched_tiles(a, b)
    tiles, cores = found.summary(resamples=300), found.summary(core, resamples=300)
    assert cores["cosine"].point == pytest.approx(float(found.cosine.mean()))
    assert cores["top_10"].clusters == 20
    assert cores["cosine"].high - cores["cosine"].low > 2 * (tiles["cosine"].high - tiles["cosine"].low)


def test_bad_input_says_what_is_wrong() -> None:
    a = np.ones((3, 2))
    with pytest.raises(PredictionsError, match=r"\(3, 2\) and \(4, 2\)"):
        matched_tiles(a, np.ones((4, 2)))
    with pytest.raises(NonFiniteError, match="1 rows of b"):
        matched_tiles(a, np.array([[1, 1], [np.nan, 1], [1, 1]]))
    with pytest.raises(PredictionsError, match="rows of a are zero"):
        matched_tiles(np.zeros((3, 2)), a)


@pytest.mark.real
def test_the_same_field_on_two_scanners_is_recognised_by_its_pixels(real_data: Path) -> None:
    """Ki67 on two scanners: coarse optical density finds the counterpart far more often than chance."""
    import cv2
    import tifffile

    views = []
    for name in ("OS-2-ndpi.ome.tif", "OS-2-vsi.ome.tif"):
        pixels = np.squeeze(tifffile.imread(real_data / "slides" / name))
        pixels = np.moveaxis(pixels, 0, -1) if pixels.shape[0] == 3 else pixels
        small = cv2.resize(pixels, (192, 192), interpolation=cv2.INTER_AREA).astype(np.float64)
        od = -np.log((small + 1) / 256)
        tiles = od.reshape(12, 16, 12, 16, 3).swapaxes(1, 2).reshape(144, -1)
        views.append(tiles - tiles.mean(axis=0))
    found = matched_tiles(*views)
    assert found.top_k(10).mean() > 5 * 10 / 287
    assert found.cosine.mean() > found.cosine_unmatched + 0.2
