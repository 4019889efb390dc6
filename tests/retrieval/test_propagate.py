"""Label propagation: against scikit-learn's LabelSpreading, the closed form, and what must never be labelled."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from sklearn.semi_supervised import LabelSpreading

from eosin.errors import NonFiniteError, QueryError
from eosin.retrieval.propagate import Propagation, knn_graph, propagate, spread_mass


def blobs(n: int, dim: int, classes: int, *, apart: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    centres = rng.standard_normal((classes, dim))
    centres *= apart / np.linalg.norm(centres, axis=1, keepdims=True)
    return centres[y] + rng.standard_normal((n, dim)) / np.sqrt(dim), y


def some_labels(y: np.ndarray, count: int, seed: int) -> np.ndarray:
    codes = np.full(len(y), -1)
    rng = np.random.default_rng(seed)
    for code in np.unique(y):
        codes[rng.choice(np.flatnonzero(y == code), count, replace=False)] = code
    return codes


def test_the_graph_joins_what_scikit_learn_finds_nearest() -> None:
    x, _ = blobs(300, 12, 3, apart=1.0, seed=0)
    found = NearestNeighbors(n_neighbors=9, metric="cosine").fit(x)
    distance, index = found.kneighbors(x)
    dense = np.zeros((300, 300))
    np.put_along_axis(dense, index[:, 1:], np.clip(1 - distance[:, 1:], 0, None), axis=1)
    np.testing.assert_allclose(knn_graph(x, k=8).toarray(), np.maximum(dense, dense.T), atol=1e-12)


def test_equal_rows_are_neighbours_of_each_other_and_none_of_itself() -> None:
    x = np.repeat(np.eye(3), 4, axis=0)
    graph = knn_graph(x, k=3).toarray()
    expected = np.kron(np.eye(3), np.ones((4, 4)) - np.eye(4))
    np.testing.assert_allclose(graph, expected, atol=1e-12)


@pytest.mark.parametrize(("alpha", "classes"), [(0.9, 2), (0.9, 4), (0.2, 3)])
def test_mass_is_that_of_scikit_learn_and_of_the_closed_form(alpha: float, classes: int) -> None:
    x, y = blobs(240, 10, classes, apart=1.2, seed=1)
    codes = some_labels(y, 4, seed=2)
    graph = knn_graph(x, k=15)
    mass = spread_mass(graph, codes, classes, alpha=alpha)

    dense = graph.toarray()
    root = 1 / np.sqrt(dense.sum(axis=1))
    smooth = root[:, None] * dense * root[None, :]
    source = np.zeros((len(x), classes))
    source[codes >= 0, codes[codes >= 0]] = 1
    closed = (1 - alpha) * np.linalg.solve(np.eye(len(x)) - alpha * smooth, source)
    np.testing.assert_allclose(mass, closed, atol=1e-7)

    oracle = LabelSpreading(kernel=lambda a, b: dense, alpha=alpha, max_iter=20_000, tol=1e-11).fit(x, codes)
    share = mass / mass.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(share, oracle.label_distributions_, atol=1e-6)
    np.testing.assert_array_equal(mass.argmax(axis=1), oracle.transduction_)


def test_a_path_by_hand() -> None:
    """Rows 0 - 1 - 2, one label at the left end: S has entries 1/sqrt(2), so F solves a 3 x 3 system."""
    graph = scipy.sparse.csr_array(np.array([[0, 1.0, 0], [1, 0, 1], [0, 1, 0]]))
    alpha, a = 0.5, 0.5 / np.sqrt(2)
    # F0 = a F1 + 1/2, F1 = a F0 + a F2, F2 = a F1
    f1 = a / 2 / (1 - 2 * a**2)
    mass = spread_mass(graph, [0, -1, -1], 2, alpha=alpha)
    np.testing.assert_allclose(mass[:, 0], [a * f1 + 0.5, f1, a * f1], atol=1e-8)
    assert not mass[:, 1].any()


def test_clear_groups_are_filled_and_what_lies_between_is_left() -> None:
    rng = np.random.default_rng(3)
    left = np.array([1.0, 0, 0]) + 0.03 * rng.standard_normal((60, 3))
    right = np.array([0, 1.0, 0]) + 0.03 * rng.standard_normal((60, 3))
    between = np.array([0.7, 0.7, 0]) + 0.03 * rng.standard_normal((6, 3))
    x = np.vstack([left, right, between])
    codes = np.full(126, -1)
    codes[[0, 1, 2]], codes[[60, 61, 62]] = 0, 1
    graph = knn_graph(x, k=15)
    found = propagate(graph, codes, 2, allowed=np.ones(126, bool))
    assert set(found.rows) >= set(range(3, 60)) | set(range(63, 120))
    np.testing.assert_array_equal(found.codes, (found.rows >= 60).astype(int))
    assert (found.margin >= 0.5).all()
    assert (found.purity >= 0.9).all()
    assert not set(found.rows) & {0, 1, 2, 60, 61, 62}
    assert found.reached == 120
    assert found.rows.max() < 120  # rows between are reached from both sides, and left alone


def test_an_island_without_a_label_stays_empty() -> None:
    graph = scipy.sparse.csr_array(np.kron(np.eye(2), np.ones((3, 3)) - np.eye(3)))
    found = propagate(graph, [0, -1, 1, -1, -1, -1], 2, allowed=np.ones(6, bool), how=Propagation(margin=0, purity=0))
    np.testing.assert_array_equal(found.rows, [1])
    assert found.reached == 1


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), barred=st.floats(0.1, 0.9), margin=st.floats(0, 1), purity=st.floats(0, 1))
def test_a_test_row_is_never_labelled(seed: int, barred: float, margin: float, purity: float) -> None:
    x, y = blobs(60, 5, 2, apart=1.5, seed=seed)
    allowed = np.random.default_rng(seed).random(60) >= barred
    codes = np.where(allowed & (np.arange(60) % 7 == 0), y, -1)
    how = Propagation(k=5, margin=margin, purity=purity)
    found = propagate(knn_graph(x, k=5), codes, 2, allowed=allowed, how=how)
    assert allowed[found.rows].all()
    assert (codes[found.rows] == -1).all()
    assert 0 < found.weight < 1
    everywhere = propagate(knn_graph(x, k=5), codes, 2, allowed=np.ones(60, bool), how=how)
    assert found.barred == len(everywhere.rows) - len(found.rows)


def test_more_margin_is_less_error() -> None:
    x, y = blobs(1500, 8, 3, apart=1.1, seed=5)
    graph, codes = knn_graph(x, k=15), some_labels(y, 10, seed=6)
    errors = []
    for how in (Propagation(margin=0, purity=0), Propagation()):
        found = propagate(graph, codes, 3, allowed=np.ones(len(x), bool), how=how)
        errors.append(float((found.codes != y[found.rows]).mean()))
    assert len(found.rows) > 300
    assert errors[1] < 0.7 * errors[0]


def test_bad_input_is_named() -> None:
    x, _ = blobs(20, 4, 2, apart=1.0, seed=7)
    graph, codes = knn_graph(x, k=3), np.full(20, -1)
    with pytest.raises(QueryError, match="at least 31 rows; there are 20"):
        knn_graph(x, k=30)
    with pytest.raises(NonFiniteError, match="first row 4"):
        knn_graph(np.where(np.arange(20)[:, None] == 4, 0, x), k=3)
    with pytest.raises(QueryError, match="needed -1 to 1"):
        spread_mass(graph, np.full(20, 2), 2)
    with pytest.raises(QueryError, match="not symmetric"):
        spread_mass(scipy.sparse.csr_array(np.triu(np.ones((20, 20)), 1)), codes, 2)
    with pytest.raises(QueryError, match="two are needed"):
        propagate(graph, codes, 1, allowed=np.ones(20, bool))
    with pytest.raises(QueryError, match="test split"):
        propagate(graph, np.zeros(20, int), 2, allowed=np.arange(20) > 0)
    with pytest.raises(QueryError, match="do not fit"):
        propagate(graph, codes, 2, allowed=np.ones(19, bool))
    for name in ("k", "alpha", "margin", "weight"):
        with pytest.raises(QueryError, match=name):
            Propagation(**{name: 0 if name == "k" else 1.5})
