from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from eosin.heads.ridge import RidgePca, pearson, pearson_over_splits


def expression(n, dim, targets=5, *, seed=0):
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(n, 8))
    x = latent @ rng.normal(size=(8, dim)) * rng.uniform(0.1, 10, dim) + rng.normal(size=(n, dim)) + 5
    return x, latent @ rng.normal(size=(8, targets)) + rng.normal(size=(n, targets)) + 2


def pipeline(components, alpha):
    return make_pipeline(StandardScaler(), PCA(components, svd_solver="full"), Ridge(alpha=alpha))


@pytest.mark.parametrize(("n", "dim", "components"), [(300, 40, 12), (50, 120, 20), (300, 40, 40), (50, 120, 49)])
def test_equals_the_scikit_learn_pipeline(n, dim, components):
    x, y = expression(n, dim)
    x[:, 3] = 7.0  # a constant feature
    head = RidgePca(components=components, alpha=3.0).fit(x, y)
    oracle = pipeline(components, 3.0).fit(x, y)
    test, _ = expression(30, dim, seed=1)
    np.testing.assert_allclose(head.predict(test), oracle.predict(test), rtol=1e-7, atol=1e-7)
    variance = oracle[1].explained_variance_
    np.testing.assert_allclose(head.explained_variance_, variance, rtol=1e-8, atol=1e-10)


def test_hest_penalty_and_no_intercept_give_the_same_pearson():
    x, y = expression(200, 30, targets=4)
    test, truth = expression(60, 30, targets=4, seed=2)
    head = RidgePca(components=10).fit(x, y)
    assert head.alpha_ == pytest.approx(100 / (10 * 4))
    hest = make_pipeline(StandardScaler(), PCA(10), Ridge(solver="lsqr", alpha=2.5, fit_intercept=False, tol=1e-12))
    expected = [pearsonr(truth[:, at], hest.fit(x, y).predict(test)[:, at])[0] for at in range(4)]
    np.testing.assert_allclose(pearson(truth, head.predict(test)), expected, rtol=1e-6)


def test_float32_and_one_target():
    x, y = expression(200, 30, targets=1)
    head = RidgePca(components=10, alpha=1.0).fit(x.astype(np.float32), y[:, 0])
    found = head.predict(x.astype(np.float32))
    assert found.shape == (200,)
    oracle = pipeline(10, 1.0).fit(x.astype(np.float32).astype(float), y[:, 0])
    np.testing.assert_allclose(found, oracle.predict(x), rtol=1e-4, atol=1e-4)


def test_pearson_of_constants_is_nan_and_else_scipy():
    rng = np.random.default_rng(3)
    y, predicted = rng.normal(size=(40, 4)), rng.normal(size=(40, 4))
    y[:, 1], predicted[:, 2] = 0.1, -0.3
    predicted[:, 3] = 4 - 2 * y[:, 3]
    found = pearson(y, predicted)
    assert np.isnan(found[1:3]).all()
    assert found[0] == pytest.approx(pearsonr(y[:, 0], predicted[:, 0])[0])
    assert found[3] == pytest.approx(-1)


def test_splits_are_fitted_apart():
    x, y = expression(160, 20, targets=2)
    order = np.random.default_rng(4).permutation(160)
    splits = [(order[40:], order[:40]), (order[:120], order[120:])]
    table = pearson_over_splits(x, y, splits, components=8, alpha=1.0, names=["EPCAM", "CD3E"])
    assert table.columns.tolist() == ["split", "n_train", "n_test", "target", "pearson"]
    for at, (train, test) in enumerate(splits):
        predicted = pipeline(8, 1.0).fit(x[train], y[train]).predict(x[test])
        expected = [pearsonr(y[test][:, j], predicted[:, j])[0] for j in range(2)]
        part = table[table["split"] == at]
        assert part["target"].tolist() == ["EPCAM", "CD3E"]
        np.testing.assert_allclose(part["pearson"], expected, rtol=1e-8)


def test_bad_input_says_what_is_wrong():
    x, y = expression(20, 30)
    with pytest.raises(ValueError, match="allow 1 to 20"):
        RidgePca().fit(x, y)
    with pytest.raises(ValueError, match="0 or more"):
        RidgePca(components=5, alpha=-1.0).fit(x, y)
    with pytest.raises(ValueError, match="must be the same"):
        pearson(y, y[:, :2])
    with pytest.raises(ValueError, match="one name a target"):
        pearson_over_splits(x, y, [], names=["a"])


@parametrize_with_checks(
    [RidgePca(components=1, alpha=1.0)],
    expected_failed_checks=lambda head: {"check_regressors_train": "one component explains too little of ten features"},
)
def test_scikit_learn_contract(estimator, check):
    check(estimator)
