from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.utils.estimator_checks import parametrize_with_checks

from eosin.errors import LabelError, NonFiniteError
from eosin.heads import neighbours
from eosin.heads.knn import KnnHead
from eosin.heads.labels import default_splits
from eosin.heads.neighbours import nearest


def clustered(n, dim=24, *, seed=0, classes=4, spread=0.8, dtype=np.float32):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, dim)) + 2
    y = rng.integers(classes, size=n)
    return (centres[y] + spread * rng.normal(size=(n, dim))).astype(dtype), y


def by_definition(queries, base, k, metric):
    """All distances in float64, sorted by (distance, row)."""
    q, b = queries.astype(float), base.astype(float)
    if metric == "cosine":
        lengths = np.sqrt((q**2).sum(1))[:, None] * np.sqrt((b**2).sum(1))
        distance = 1 - np.array([[(row * other).sum() for other in b] for row in q]) / lengths
    else:
        distance = np.sqrt(((q[:, None] - b) ** 2).sum(-1))
    order = np.argsort(np.round(distance, 12), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distance, order, 1), order


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nearest_equals_scikit_learn(metric, dtype):
    base, _ = clustered(3000, seed=1, dtype=dtype)
    queries, _ = clustered(200, seed=2, dtype=dtype)
    distance, index = nearest(queries, base, 20, metric=metric, block=512)
    oracle = NearestNeighbors(n_neighbors=20, metric=metric, algorithm="brute").fit(base.astype(float))
    expected, rows = oracle.kneighbors(queries.astype(float))
    np.testing.assert_array_equal(index, rows)
    np.testing.assert_allclose(distance, expected, atol=1e-7)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("block", [1, 7, 64, 10_000])
def test_ties_go_to_the_lower_row_whatever_the_block(metric, block):
    """Every base row lies there eight times, more often than spare candidates for a small k can cover."""
    few, _ = clustered(40, seed=3)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(40), 8))
    base, queries = few[order], few[:10]
    distance, index = nearest(queries, base, 30, metric=metric, block=block)
    expected, rows = by_definition(queries, base, 30, metric)
    np.testing.assert_array_equal(index, rows)
    np.testing.assert_allclose(distance, expected, atol=1e-7)


def test_more_equal_rows_than_candidates_are_settled_in_row_order():
    base = np.ones((500, 8), np.float32)
    base[::5] += np.arange(8, dtype=np.float32)
    _, index = nearest(base[1:2], base, 9, block=50)
    np.testing.assert_array_equal(index[0], [1, 2, 3, 4, 6, 7, 8, 9, 11])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_near_ties_below_float32_are_told_apart(metric):
    """Distances differ by about 1e-10: a float32 search alone cannot order them."""
    rng = np.random.default_rng(5)
    base = np.ones(16) + 3e-5 * rng.normal(size=(2000, 16))
    queries = np.ones((5, 16)) + 3e-5 * rng.normal(size=(5, 16))
    _, index = nearest(queries, base, 10, metric=metric, block=256)
    high = np.longdouble
    q, b = queries.astype(high), base.astype(high)
    if metric == "cosine":
        lengths = np.sqrt((q**2).sum(1))[:, None] * np.sqrt((b**2).sum(1))
        exact = 1 - (q[:, None] * b).sum(-1) / lengths
        reached = np.take_along_axis(exact, index, 1)
        np.testing.assert_allclose(reached.astype(float), np.sort(exact, axis=1)[:, :10].astype(float), atol=3e-16)
    else:
        exact = ((q[:, None] - b) ** 2).sum(-1)
        np.testing.assert_array_equal(index, np.argsort(exact, axis=1)[:, :10])


def test_a_far_offset_does_not_blur_euclidean_distances():
    base, _ = clustered(2000, seed=6, dtype=np.float64)
    queries, _ = clustered(30, seed=7, dtype=np.float64)
    plain = nearest(queries, base, 5, metric="euclidean")
    moved = nearest(queries + 1e6, base + 1e6, 5, metric="euclidean")
    np.testing.assert_array_equal(plain[1], moved[1])
    np.testing.assert_allclose(plain[0], moved[0], rtol=1e-7)


def test_results_do_not_depend_on_how_queries_are_grouped():
    base, _ = clustered(1500, seed=8)
    queries, _ = clustered(64, seed=9)
    together = nearest(queries, base, 12, block=400)
    for at in (0, 31, 63):
        alone = nearest(queries[at : at + 1], base, 12, block=1111)
        np.testing.assert_array_equal(alone[1][0], together[1][at])
        np.testing.assert_array_equal(alone[0][0], together[0][at])


def test_rows_sorted_from_far_to_near_are_found():
    """The worst order for a running top-k: every block brings better rows for every query."""
    rng = np.random.default_rng(10)
    angle = np.linspace(2.5, 0.0, 4000)
    base = np.stack([np.cos(angle), np.sin(angle)], axis=1) * rng.uniform(0.5, 2, (4000, 1))
    _, index = nearest(np.array([[1.0, 0.0]]), base, 5, block=128)
    np.testing.assert_array_equal(index[0], [3999, 3998, 3997, 3996, 3995])


def test_certificate_and_second_search_are_both_used(monkeypatch):
    settled = []
    settle = neighbours._settle
    monkeypatch.setattr(neighbours, "_settle", lambda *given: settled.append(len(given[0])) or settle(*given))
    base, _ = clustered(3000, dim=64, seed=1)
    nearest(base[:100], base, 5)
    assert sum(settled) < 5
    crowd = np.repeat(base[:10], 100, axis=0)
    nearest(base[:10], crowd, 5)
    assert settled[-1] == 10


def test_memory_does_not_grow_with_the_base():
    peaks = []
    for n in (4_000, 32_000):
        base, _ = clustered(n, dim=32, seed=11)
        tracemalloc.start()
        nearest(base[:256], base, 10, block=1000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 28_000 * 40  # a few numbers a row, not a row


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": 0}, ValueError, "1 to 50"),
        ({"k": 51}, ValueError, "1 to 50"),
        ({"metric": "dot"}, ValueError, "cosine, euclidean"),
        ({"block": 0}, ValueError, "at least 1"),
        ({"queries": np.ones((2, 3))}, ValueError, "same D"),
        ({"queries": np.zeros((2, 24))}, NonFiniteError, "first row 0 of length 0"),
        ({"queries": np.full((2, 24), np.nan)}, NonFiniteError, "2 query rows"),
    ],
)
def test_bad_searches_say_what_is_wrong(change, error, words):
    base, _ = clustered(50)
    given = {"queries": base[:2], "k": 3, **change}
    with pytest.raises(error, match=words):
        nearest(given.pop("queries"), base, given.pop("k"), **given)


def test_a_zero_row_is_a_place_for_euclidean_distance():
    base = np.zeros((3, 4))
    base[1] = 1
    distance, index = nearest(np.zeros((1, 4)), base, 3, metric="euclidean")
    np.testing.assert_array_equal(index[0], [0, 2, 1])
    np.testing.assert_allclose(distance[0], [0, 0, 2])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 4, 10])
def test_head_equals_scikit_learn(metric, k):
    x, y = clustered(600, seed=12, spread=3.0)
    test, _ = clustered(300, seed=13, spread=3.0)
    names = np.array(["d", "a", "c", "b"])[y]
    head = KnnHead(k_grid=(k,), metric=metric).fit(x, names)
    oracle = KNeighborsClassifier(k, metric=metric, algorithm="brute").fit(x.astype(float), names)
    np.testing.assert_array_equal(head.classes_, oracle.classes_)
    np.testing.assert_allclose(head.predict_proba(test), oracle.predict_proba(test.astype(float)))
    np.testing.assert_array_equal(head.predict(test), oracle.predict(test.astype(float)))


def test_k_is_the_best_mean_macro_f1_over_the_given_splits():
    x, y = clustered(400, seed=14, spread=4.0)
    rng = np.random.default_rng(0)
    splits = [np.split(rng.permutation(400), [300]) for _ in range(3)]
    grid = (1, 3, 10, 30, 290, 350)
    head = KnnHead(k_grid=grid, metric="euclidean").fit(x, y, splits=splits)
    expected = {}
    for k in grid[:-1]:  # 350 neighbours cannot be had from 300 rows
        fits = [KNeighborsClassifier(k, algorithm="brute").fit(x[a].astype(float), y[a]) for a, _ in splits]
        scores = [
            f1_score(y[b], fit.predict(x[b].astype(float)), average="macro", zero_division=0)
            for fit, (_, b) in zip(fits, splits, strict=True)
        ]
        expected[k] = np.mean(scores)
    assert head.k_scores_ == pytest.approx(expected)
    assert head.k_ == max(expected, key=expected.get)
    assert head.k_ not in (1, 290)


def test_default_splits_keep_groups_whole_and_classes_everywhere():
    rng = np.random.default_rng(1)
    groups = rng.integers(12, size=300)
    codes = ((groups % 3 == 0) ^ (rng.random(300) < 0.1)).astype(np.int64)
    splits = default_splits(codes, groups)
    assert len(splits) == 5
    assert sorted(np.concatenate([val for _, val in splits])) == list(range(300))
    for train, val in splits:
        assert not set(groups[train]) & set(groups[val])
        assert set(codes[train]) == {0, 1}


def test_a_class_in_one_group_cannot_be_validated():
    x, y = clustered(60, classes=2)
    with pytest.raises(LabelError, match="one group only"):
        KnnHead().fit(x, y, groups=y)


def test_one_class_and_too_large_a_k_are_refused():
    x, _ = clustered(30)
    with pytest.raises(LabelError, match="1 class"):
        KnnHead().fit(x, np.zeros(30))
    with pytest.raises(ValueError, match="30 training rows"):
        KnnHead(k_grid=(31,)).fit(x, np.arange(30) % 2)
    with pytest.raises(ValueError, match="at least one k"):
        KnnHead(k_grid=()).fit(x, np.arange(30) % 2)


@parametrize_with_checks([KnnHead(k_grid=(3,), metric="euclidean")])
def test_scikit_learn_contract(estimator, check):
    check(estimator)
