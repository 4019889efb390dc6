"""LinearProbe against scikit-learn's own pipeline, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from eosin.errors import LabelError
from eosin.heads.linear import LinearProbe


def data(n: int = 400, d: int = 24, classes: int = 2, seed: int = 0) -> tuple[Any, Any]:
    """Correlated features with offsets, and noisy labels of uneven classes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + 5 * rng.standard_normal(d)
    score = (x - x.mean(axis=0)) @ rng.standard_normal((d, classes)) / d
    return x, (score + rng.gumbel(size=score.shape) + np.linspace(0, 1, classes)).argmax(axis=1)


def oracle(x: Any, y: Any, c: float, **how: Any) -> Pipeline:
    model = LogisticRegression(C=c, **{"solver": "newton-cholesky", "tol": 1e-10, "max_iter": 100_000, **how})
    return make_pipeline(StandardScaler(), model).fit(np.asarray(x, np.float64), y)


@parametrize_with_checks([LinearProbe(c_grid=(0.01, 1.0))])
def test_keeps_the_scikit_learn_contract(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("class_weight", [None, "balanced", {0: 3.0}])
@pytest.mark.parametrize("c", [1e-3, 1.0, 100.0])
def test_equals_scikit_learn_at_equal_c(classes: int, class_weight: Any, c: float) -> None:
    x, y = data(classes=classes)
    probe = LinearProbe(c_grid=(c,), class_weight=class_weight).fit(x, y)
    expected = oracle(x, y, c, class_weight=class_weight)
    scaler, model = expected[0], expected[-1]
    np.testing.assert_allclose(probe.coef_ * scaler.scale_, model.coef_, atol=1e-5)
    np.testing.assert_allclose(probe.predict_proba(x), expected.predict_proba(x), atol=1e-5)
    np.testing.assert_array_equal(probe.predict(x), expected.predict(x))
    margin = expected.decision_function(x)
    np.testing.assert_allclose(probe.decision_function(x), margin, rtol=1e-5, atol=1e-4)
    lbfgs = oracle(x, y, c, class_weight=class_weight, solver="lbfgs")  # stops earlier, by the loss
    np.testing.assert_allclose(probe.coef_ * scaler.scale_, lbfgs[-1].coef_, atol=1e-4)


def test_without_standardizing_equals_plain_logistic_regression() -> None:
    x, y = data(d=6)
    probe = LinearProbe(c_grid=(0.5,), standardize=False).fit(x, y)
    model = LogisticRegression(C=0.5, tol=1e-10, max_iter=100_000).fit(x, y)
    np.testing.assert_allclose(probe.coef_, model.coef_, atol=1e-5)
    np.testing.assert_allclose(probe.intercept_, model.intercept_, atol=1e-4)


@pytest.mark.parametrize("classes", [2, 3])
def test_fewer_rows_than_features(classes: int) -> None:
    x, y = data(n=40, d=150, classes=classes)
    probe = LinearProbe(c_grid=(1.0,)).fit(x, y)
    expected = oracle(x, y, 1.0)
    np.testing.assert_allclose(probe.coef_ * expected[0].scale_, expected[-1].coef_, atol=1e-5)
    fresh = data(n=50, d=150, seed=3)[0]
    np.testing.assert_allclose(probe.predict_proba(fresh), expected.predict_proba(fresh), atol=1e-5)


def test_constant_features_get_no_weight() -> None:
    x, y = data()
    x = np.hstack([x, np.full((len(x), 1), 0.1), np.zeros((len(x), 1))]).astype(np.float32)
    probe = LinearProbe(c_grid=(1.0,)).fit(x, y)
    np.testing.assert_array_equal(np.abs(probe.coef_[:, -2:]) < 1e-12, True)
    np.testing.assert_allclose(probe.predict_proba(x), oracle(x, y, 1.0).predict_proba(x), atol=1e-5)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_half_and_single_precision_features_give_the_exact_answer(kind: Any) -> None:
    x, y = data()
    x = x.astype(kind)
    probe = LinearProbe(c_grid=(10.0,)).fit(x, y)
    expected = oracle(x, y, 10.0)
    np.testing.assert_allclose(probe.coef_ * expected[0].scale_, expected[-1].coef_, atol=1e-5)


def test_a_feature_of_large_mean_does_not_cancel() -> None:
    x, y = data()
    x[:, 0] = 1e6 + x[:, 0]
    probe = LinearProbe(c_grid=(1.0,)).fit(x, y)
    np.testing.assert_allclose(probe.predict_proba(x), oracle(x, y, 1.0).predict_proba(x), atol=1e-5)


def grid_scores(x: Any, y: Any, grid: Any, splits: Any, metric: Any) -> Any:
    rows = []
    for train, val in splits:
        models = [oracle(x[train], y[train], c) for c in grid]
        rows.append([metric(y[val], model.predict_proba(x[val])) for model in models])
    return np.array(rows)


METRICS = {
    "balanced_accuracy": lambda y, p: balanced_accuracy_score(y, p.argmax(axis=1)),
    "auroc": lambda y, p: roc_auc_score(y, p[:, 1]) if p.shape[1] == 2 else roc_auc_score(y, p, multi_class="ovr"),
    "log_loss": lambda y, p: -log_loss(y, p),
}


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("scoring", list(METRICS))
def test_chooses_c_on_the_validation_parts_and_refits_on_all(scoring: Any, classes: int) -> None:
    x, y = data(n=240, d=30, classes=classes)
    groups = np.repeat(np.arange(60), 4)
    splits = list(StratifiedGroupKFold(3).split(x, y, groups))
    grid = (1.0, 1e-3, 100.0)  # in no order
    probe = LinearProbe(c_grid=grid, scoring=scoring).fit(x, y, splits=splits)
    expected = grid_scores(x, y, grid, splits, METRICS[scoring])
    np.testing.assert_allclose(probe.c_scores_, expected, atol=1e-5)
    assert probe.c_ == grid[expected.mean(axis=0).argmax()]
    np.testing.assert_allclose(probe.predict_proba(x), oracle(x, y, probe.c_).predict_proba(x), atol=1e-5)


def test_equal_scores_take_the_strongest_penalty() -> None:
    x = np.random.default_rng(0).standard_normal((60, 2))
    x[:, 0] += np.repeat([-20.0, 20.0], 30)
    y = np.repeat([0, 1], 30)
    probe = LinearProbe(c_grid=(10.0, 0.1, 1.0)).fit(x, y, groups=np.arange(60))
    assert np.all(probe.c_scores_ == 1.0)
    assert probe.c_ == 0.1


def test_groups_keep_patients_out_of_both_parts() -> None:
    rng = np.random.default_rng(1)
    signature = rng.standard_normal((40, 60))  # a patient is recognisable, its label is noise
    groups = np.repeat(np.arange(40), 10)
    x = signature[groups] + 0.1 * rng.standard_normal((400, 60))
    y = rng.permutation(np.repeat([0, 1], 20))[groups]
    by_row = LinearProbe().fit(x, y, groups=rng.permutation(400)).c_scores_.mean(axis=0).max()
    by_patient = LinearProbe().fit(x, y, groups=groups).c_scores_.mean(axis=0).max()
    assert by_row > 0.95
    assert by_patient < 0.75


def several(n: int = 300, d: int = 12) -> tuple[Any, Any]:
    x, _ = data(n, d)
    rng = np.random.default_rng(5)
    score = (x - x.mean(axis=0)) @ rng.standard_normal((d, 3)) / 8 + rng.logistic(size=(n, 3)) + [0.0, 1.0, -1.5]
    return x, (score > 0).astype(int)


@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_several_labels_are_separate_probes(class_weight: Any) -> None:
    x, y = several()
    grid, splits = (1e-3, 0.1, 10.0), list(GroupKFold(4).split(x, groups=np.arange(len(x)) // 3))
    probe = LinearProbe(c_grid=grid, scoring="auroc", class_weight=class_weight).fit(x, y, splits=splits)
    assert probe.c_scores_.shape == (4, 3, 3)
    for label in range(3):
        single = LinearProbe(c_grid=grid, scoring="auroc", class_weight=class_weight)
        single.fit(x, y[:, label], splits=splits)
        assert probe.c_[label] == single.c_
        np.testing.assert_allclose(probe.c_scores_[:, :, label], single.c_scores_, atol=1e-6)
        expected = oracle(x, y[:, label], single.c_, class_weight=class_weight).predict_proba(x)[:, 1]
        np.testing.assert_allclose(probe.predict_proba(x)[:, label], expected, atol=1e-5)
    np.testing.assert_array_equal(probe.predict(x), probe.predict_proba(x) > 0.5)


def test_several_labels_choose_folds_by_themselves() -> None:
    x, y = several()
    probe = LinearProbe(c_grid=(0.1, 1.0)).fit(x, y, groups=np.arange(len(x)) // 3)
    assert probe.c_scores_.shape == (5, 2, 3)


def test_one_class_raises_and_says_where() -> None:
    x, y = data(n=40, d=5)
    with pytest.raises(LabelError, match="1 class"):
        LinearProbe(c_grid=(1.0,)).fit(x, np.zeros(40))
    ones, zeros = np.flatnonzero(y == 1), np.flatnonzero(y == 0)
    with pytest.raises(LabelError, match=r"training rows of split 1 hold no \[0\]"):
        LinearProbe().fit(x, y, splits=[(np.arange(30), np.arange(30, 40)), (ones, zeros)])
    with pytest.raises(LabelError, match=r"validation rows of split 0 hold no \[1\]"):
        LinearProbe().fit(x, y, splits=[(np.arange(30), zeros)])
    with pytest.raises(LabelError, match="label 1 has one value only"):
        LinearProbe(c_grid=(1.0,)).fit(x, np.column_stack([y, np.ones(40, int), y]))
    with pytest.raises(LabelError, match="one group only"):
        LinearProbe().fit(x, y, groups=y)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"c_grid": ()}, "at least one"),
        ({"c_grid": (0.0, 1.0)}, "above zero"),
        ({"c_grid": (np.inf,)}, "finite"),
        ({"scoring": "aurocs"}, "auroc"),
    ],
)
def test_bad_settings_raise(arguments: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LinearProbe(**arguments).fit(*data(n=30, d=3))


def test_bad_input_raises() -> None:
    x, y = data(n=30, d=3)
    with pytest.raises(NotFittedError):
        LinearProbe().predict(x)
    with pytest.raises(ValueError, match="groups has shape"):
        LinearProbe().fit(x, y, groups=np.arange(5))
    with pytest.raises(LabelError, match="0 or 1"):
        LinearProbe().fit(x, np.column_stack([y, y + 1]))
    probe = LinearProbe(c_grid=(1.0,)).fit(x, y)
    with pytest.raises(ValueError, match="features"):
        probe.predict(x[:, :2])
    x[3, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        LinearProbe().fit(x, y)


def test_string_labels_and_clone() -> None:
    x, y = data(n=60, d=4)
    names = np.array(["normal", "tumour"])[y]
    probe = clone(LinearProbe(c_grid=(1.0,), class_weight={"tumour": 2.0})).fit(x, names)
    expected = oracle(x, names, 1.0, class_weight={"tumour": 2.0})
    assert probe.classes_.tolist() == ["normal", "tumour"]
    np.testing.assert_array_equal(probe.predict(x), expected.predict(x))
    np.testing.assert_allclose(probe.predict_proba(x), expected.predict_proba(x), atol=1e-5)


@pytest.mark.real
def test_real_tiles_tumour_against_normal(real_data: Path) -> None:
    """Mean and spread of colour over a 4 x 4 grid: collinear, of very different size, few rows."""
    files = sorted((real_data / "tiles" / "camelyon16").rglob("*.png"))
    y = np.array([file.parent.name == "tumor" for file in files]).astype(int)
    assert np.bincount(y).tolist() == [45, 44]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB").resize((32, 32))) for file in files])
    cells = pixels.reshape(len(files), 4, 8, 4, 8, 3).astype(np.float32)
    x = np.hstack([cells.mean(axis=(2, 4)).reshape(len(files), -1), cells.std(axis=(2, 4)).reshape(len(files), -1)])
    for c in (1e-2, 1.0, 100.0):
        probe, expected = LinearProbe(c_grid=(c,)).fit(x, y), oracle(x, y, c)
        np.testing.assert_allclose(probe.coef_ * expected[0].scale_, expected[-1].coef_, atol=1e-4)
        np.testing.assert_allclose(probe.predict_proba(x), expected.predict_proba(x), atol=1e-4)
