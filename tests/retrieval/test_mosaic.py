"""The mosaic: kinds of tissue found, all of the slide covered, the same on any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits

from eosin.errors import NonFiniteError, QueryError
from eosin.retrieval.mosaic import _dealt, farthest_points, mosaic


def slide(kinds: tuple[int, ...] = (200, 120, 60, 20), seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tiles on a grid of 224 px, of kinds that lie in bands; the last kinds are rare."""
    rng = np.random.default_rng(seed)
    kind = np.repeat(np.arange(len(kinds)), kinds)
    centre = rng.normal(size=(len(kinds), 16))
    x = (centre[kind] + 0.15 * rng.normal(size=(len(kind), 16))).astype(np.float32)
    xy = np.stack([np.arange(len(kind)) % 20, np.arange(len(kind)) // 20], axis=1) * 224
    return x * rng.uniform(0.5, 2, (len(kind), 1)).astype(np.float32), xy, kind


def test_every_kind_of_tissue_is_in_it() -> None:
    x, xy, kind = slide()
    found = mosaic(x, xy, clusters=4)
    assert len(found) == 20  # 5 % of 400
    assert set(kind[found.rows]) == {0, 1, 2, 3}
    assert adjusted_rand_score(kind[found.rows], found.cluster) == 1
    assert found.covers.sum() == 400
    for one in range(4):
        own = found.covers[kind[found.rows] == one]
        assert own.sum() == (200, 120, 60, 20)[one]
    assert np.bincount(kind[found.rows]).tolist() == [10, 6, 3, 1]


def test_clusters_are_those_of_k_means_on_directions() -> None:
    x, xy, _ = slide(seed=3)
    found = mosaic(x, xy, clusters=6, share=1.0, most=400)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    peer = KMeans(n_clusters=6, n_init=1, random_state=0).fit_predict(unit)
    assert adjusted_rand_score(peer, found.cluster) == 1
    np.testing.assert_array_equal(found.rows, np.arange(400))
    assert (found.covers == 1).all()


def test_length_and_scale_of_positions_do_not_matter() -> None:
    x, xy, _ = slide()
    found = mosaic(x, xy)
    np.testing.assert_array_equal(mosaic(x * 7, xy).rows, found.rows)
    np.testing.assert_array_equal(mosaic(x, xy * 4 + 1000).rows, found.rows)


def test_threads_do_not_matter() -> None:
    x, xy, _ = slide((3000, 2000, 1500, 900))
    with threadpool_limits(limits=2):
        two = mosaic(x, xy)
    with threadpool_limits(limits=1):
        one = mosaic(x, xy)
    np.testing.assert_array_equal(two.rows, one.rows)
    assert len(one) == 100  # 5 % would be 370


def test_the_farthest_point_is_found_by_brute_force() -> None:
    rng = np.random.default_rng(4)
    xy = rng.integers(0, 5000, (150, 2))
    chosen, nearest = farthest_points(xy, 12, first=7)
    away = cdist(xy, xy)
    assert chosen[0] == 7
    for at in range(1, 12):
        gap = away[:, chosen[:at]].min(axis=1)
        assert gap[chosen[at]] == gap.max()
    np.testing.assert_array_equal(nearest, away[:, chosen].argmin(axis=1))


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(0, 1000), st.integers(2, 6))
def test_the_largest_hole_is_at_most_twice_the_best(seed: int, count: int) -> None:
    """Gonzalez 1985, against all choices of `count` points of few."""
    from itertools import combinations

    xy = np.random.default_rng(seed).integers(0, 100, (9, 2))
    chosen, _ = farthest_points(xy, count)
    away = cdist(xy, xy)
    best = min(away[:, list(some)].min(axis=1).max() for some in combinations(range(9), count))
    assert away[:, chosen].min(axis=1).max() <= 2 * best + 1e-9
    assert len(set(chosen.tolist())) == count


def test_tiles_in_one_place_are_chosen_once_each() -> None:
    chosen, nearest = farthest_points(np.zeros((4, 2), np.int64), 4)
    assert sorted(chosen.tolist()) == [0, 1, 2, 3]
    assert sorted(nearest.tolist()) == [0, 1, 2, 3]


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(1, 300), min_size=1, max_size=9), st.integers(0, 80))
def test_tiles_are_dealt_by_size(sizes: list[int], more: int) -> None:
    n = np.array(sizes)
    total = min(int(n.sum()), len(n) + more)
    count = _dealt(n, total)
    assert count.sum() == total
    assert (count >= 1).all()
    assert (count <= n).all()
    larger = n[:, None] > n[None, :]
    assert (count[:, None] >= count[None, :])[larger].all()  # a larger cluster never gives fewer


def test_few_and_equal_tiles_make_a_small_mosaic() -> None:
    one = mosaic(np.ones((1, 8)), np.zeros((1, 2), np.int64))
    assert (one.rows.tolist(), one.cluster.tolist(), one.covers.tolist()) == ([0], [0], [1])
    equal = mosaic(np.ones((50, 8)), np.arange(100).reshape(50, 2))
    assert len(equal) == 2  # one kind, 5 % of 50, 2.5 rounded to even
    assert equal.covers.sum() == 50
    three = mosaic(np.eye(3, 8), np.arange(6).reshape(3, 2))
    assert len(three) == 3


def test_bad_input_is_named() -> None:
    x, xy, _ = slide((20,))
    with pytest.raises(QueryError, match=r"features \(0, 16\)"):
        mosaic(x[:0], xy[:0])
    with pytest.raises(QueryError, match=r"positions \(19, 2\)"):
        mosaic(x, xy[1:])
    with pytest.raises(QueryError, match="at most 5 tiles"):
        mosaic(x, xy, most=5)
    x[3] = 0
    with pytest.raises(NonFiniteError, match=r"1 of 20 tiles have no direction .* first row 3"):
        mosaic(x, xy)
    x[3] = np.nan
    with pytest.raises(NonFiniteError, match="first row 3"):
        mosaic(x, xy)
