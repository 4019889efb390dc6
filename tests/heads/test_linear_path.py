"""The path solver: stationarity, independence of blocks, threads and neighbours, weights, hard cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from eosin.heads import logistic
from eosin.heads.logistic import logistic_path


def problem(n: int, d: int, classes: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Return features, codes, and targets as the solver takes them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) * 10 ** rng.uniform(-2, 2, d) + rng.standard_normal(d)
    score = (x / x.std(axis=0)) @ rng.standard_normal((d, classes)) + rng.gumbel(size=(n, classes))
    codes = score.argmax(axis=1)
    codes[:classes] = np.arange(classes)
    targets = np.eye(classes)[codes]
    return x, codes, targets[:, 1:] if classes == 2 else targets


def link(targets: Any) -> Any:
    return "sigmoid" if targets.shape[1] == 1 else "softmax"


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(12, 120),
    d=st.integers(1, 60),
    classes=st.integers(2, 4),
    power=st.floats(-4, 3),
    seed=st.integers(0, 99),
)
def test_the_gradient_vanishes(n: int, d: int, classes: int, power: float, seed: int) -> None:
    x, codes, targets = problem(n, d, classes, seed)
    found = logistic_path(x, targets, [10**power], link=link(targets))
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    standard = found.coef[0] * x.std(axis=0)
    margin = x @ found.coef[0].T + found.intercept[0]
    logits = np.hstack([np.zeros((n, 1)), margin]) if classes == 2 else margin
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    residual = p / p.sum(axis=1, keepdims=True) - np.eye(classes)[codes]
    residual = residual[:, 1:] if classes == 2 else residual
    # a gradient of this size moves no coefficient by more than 1e-5 where the curvature is largest
    curvature = np.linalg.eigvalsh(0.25 * z.T @ z)[-1] + 10**-power
    slope = residual.T @ z + standard / 10**power
    assert np.abs(slope).max() < 1e-5 * curvature * max(1.0, np.abs(standard).max())
    assert np.abs(residual.sum(axis=0)).max() < 1e-5 * n


@pytest.mark.parametrize("classes", [2, 3])
def test_order_and_company_of_the_grid_do_not_matter(classes: int) -> None:
    x, _, targets = problem(200, 10, classes)
    grid = [1.0, 1e-4, 100.0, 1e-2]
    together = logistic_path(x, targets, grid, link=link(targets))
    for at, c in enumerate(grid):
        alone = logistic_path(x, targets, [c], link=link(targets))
        np.testing.assert_allclose(together.coef[at], alone.coef[0], atol=1e-5 / x.std(axis=0).min())
        np.testing.assert_allclose(
            x @ together.coef[at].T + together.intercept[at], x @ alone.coef[0].T + alone.intercept[0], atol=1e-4
        )


@pytest.mark.parametrize("classes", [2, 4])
def test_blocks_threads_and_single_precision_curvature_change_nothing(
    monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    x, _, targets = problem(1500, 20, classes)
    whole = logistic_path(x, targets, [1e-3, 1.0], link=link(targets))
    monkeypatch.setattr(logistic, "SMALL_CELLS", 0)  # threads, float32 curvature
    monkeypatch.setattr(logistic, "PASS_CELLS", 20 * 64)
    monkeypatch.setattr(logistic, "GRAM_CELLS", 20 * 100)
    monkeypatch.setattr(logistic, "threadpool_info", lambda: [{"user_api": "blas", "num_threads": 3}])
    cut = logistic_path(x, targets, [1e-3, 1.0], link=link(targets))
    np.testing.assert_allclose(cut.coef * x.std(axis=0), whole.coef * x.std(axis=0), atol=1e-5)
    again = logistic_path(x, targets, [1e-3, 1.0], link=link(targets))
    np.testing.assert_array_equal(cut.coef, again.coef)


@pytest.mark.parametrize("classes", [2, 3])
def test_weight_two_is_the_row_twice(classes: int) -> None:
    x, _, targets = problem(100, 8, classes)
    twice = np.r_[np.arange(100), np.arange(30)]
    weight = np.where(np.arange(100) < 30, 2.0, 1.0)[:, None]
    how = {"link": link(targets), "standardize": False}
    z = x / x.std(axis=0)
    weighted = logistic_path(z, targets, [0.3], weight=weight, **how)
    repeated = logistic_path(z[twice], targets[twice], [0.3], **how)
    np.testing.assert_allclose(weighted.coef, repeated.coef, atol=1e-5)
    np.testing.assert_allclose(weighted.intercept, repeated.intercept, atol=1e-5)


def test_each_label_may_have_its_own_strength_and_weights() -> None:
    x, _, targets = problem(150, 6, 3)  # one-hot columns taken as separate labels
    rng = np.random.default_rng(2)
    weight = rng.uniform(0.5, 2, (150, 3))
    together = logistic_path(x, targets, [[0.01, 1.0, 100.0]], link="sigmoid", weight=weight)
    z = StandardScaler().fit_transform(x)
    for label, c in enumerate((0.01, 1.0, 100.0)):
        model = LogisticRegression(C=c, tol=1e-10, solver="newton-cholesky", max_iter=1000)
        model.fit(z, targets[:, label], sample_weight=weight[:, label])
        np.testing.assert_allclose(together.coef[0, label] * x.std(axis=0), model.coef_[0], atol=1e-5)


def hard_cases() -> dict[str, tuple[Any, Any]]:
    rng = np.random.default_rng(3)
    plain = rng.standard_normal((300, 20))
    graded = rng.standard_normal((600, 30)) @ np.diag(10.0 ** np.linspace(-4, 4, 30)) @ rng.standard_normal((30, 30))
    noisy = graded[:, 0] / graded[:, 0].std() + 0.3 * rng.standard_normal(600)
    far = rng.standard_normal((500, 8))
    far[:4, 1] = 1e4
    return {
        "separable": (plain, (plain[:, 0] > 0).astype(int)),
        "collinear": (np.hstack([graded, graded[:, :5]]), (noisy > 1.5).astype(int)),
        "outliers": (far, (far[:, 2] + rng.standard_normal(500) > 2).astype(int)),
        "three positives": (plain, np.r_[np.ones(3, int), np.zeros(297, int)]),
    }


@pytest.mark.parametrize("name", list(hard_cases()))
def test_hard_cases_equal_newtons_method(name: str) -> None:
    x, y = hard_cases()[name]
    grid = [1e-5, 1e-2, 1.0, 1e3]
    found = logistic_path(x, y[:, None].astype(float), grid, link="sigmoid")
    scaler = StandardScaler().fit(x)
    for at, c in enumerate(grid):
        model = LogisticRegression(C=c, tol=1e-12, solver="newton-cholesky", max_iter=1000).fit(scaler.transform(x), y)
        size = max(1.0, np.abs(model.coef_).max())
        np.testing.assert_allclose(found.coef[at] * scaler.scale_, model.coef_, atol=2e-5 * size)


def test_curvature_is_computed_once_for_an_easy_path() -> None:
    x, _, targets = problem(2000, 30, 2)
    found = logistic_path(x, targets, [1e-4, 1e-3, 1e-2], link="sigmoid")
    assert found.curvatures == 1
    assert found.passes < 45


def test_no_convergence_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "ROUND", 1)
    monkeypatch.setattr(logistic, "ROUNDS", 1)
    x, _, targets = problem(200, 10, 2)
    with pytest.raises(ArithmeticError, match="did not converge"):
        logistic_path(x, targets, [10.0], link="sigmoid")


@pytest.mark.slow
def test_wide_single_precision_features_equal_scikit_learn() -> None:
    x, y, targets = problem(8000, 768, 2)
    x = x.astype(np.float32)
    found = logistic_path(x, targets, [1e-3, 10.0], link="sigmoid")
    scaler = StandardScaler().fit(x.astype(np.float64))
    for at, c in enumerate((1e-3, 10.0)):
        model = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(scaler.transform(x.astype(np.float64)), y)
        np.testing.assert_allclose(found.coef[at] * scaler.scale_, model.coef_, atol=1e-4)
