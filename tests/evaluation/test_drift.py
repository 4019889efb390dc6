"""Drift tests against scipy, scikit-learn and double loops; their level under clustering by simulation."""

from __future__ import annotations

import json
import math

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import scipy.stats
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from eosin.errors import NonFiniteError, PredictionsError
from eosin.evaluation import drift
from eosin.evaluation.drift import c2st, ks_drift, mmd_drift, psi

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def clustered(
    rng: np.random.Generator, *, patients: int = 12, rows: int = 5, dim: int = 3, shift: float = 0.0
) -> tuple[Floats, Floats, Ints, Ints]:
    """Two periods whose rows are mostly their patient's: reference, current, patients of each."""
    patient = np.repeat(np.arange(2 * patients), rows)
    x = rng.normal(0, 1, (2 * patients, dim))[patient] + rng.normal(0, 0.3, (len(patient), dim))
    half = patients * rows
    return x[:half], x[half:] + shift, patient[:half], patient[half:]


def test_psi_by_hand() -> None:
    reference = np.arange(1000.0)
    current = np.r_[np.arange(0, 500.0), np.arange(0, 250.0), np.arange(500, 750.0)]
    found = psi(reference, current, bins=4)
    p, q = np.full(4, 0.25), np.array([0.5, 0.25, 0.25, 1e-4])
    assert found.value == pytest.approx(((q - p) * np.log(q / p)).sum())
    assert (found.band, found.bins, found.n_reference, found.n_current) == ("act", 4, 1000, 1000)


def test_psi_of_no_drift_is_about_what_is_expected() -> None:
    rng = np.random.default_rng(0)
    found = [psi(rng.normal(size=600), rng.normal(size=400)) for _ in range(200)]
    assert np.mean([f.value for f in found]) == pytest.approx(found[0].expected, rel=0.1)
    assert found[0].expected == pytest.approx(9 * (1 / 600 + 1 / 400))
    assert all(f.note == "" for f in found)
    assert "few rows" in psi(rng.normal(size=600), rng.normal(size=60)).note


@pytest.mark.parametrize(("shift", "band"), [(0.0, "stable"), (0.4, "watch"), (1.0, "act")])
def test_psi_bands(shift: float, band: str) -> None:
    rng = np.random.default_rng(1)
    assert psi(rng.normal(size=20_000), rng.normal(shift, 1, 20_000)).band == band


def test_psi_joins_equal_edges_and_refuses_rubbish() -> None:
    assert psi([0.0] * 50 + [1.0] * 50, [1.0] * 100).bins == 2
    with pytest.raises(PredictionsError, match="no bins"):
        psi([0.5] * 10, [0.5, 0.7])
    with pytest.raises(PredictionsError, match="non-empty"):
        psi([], [1.0])
    with pytest.raises(NonFiniteError, match="1 of 2"):
        psi([1.0, np.nan], [1.0])
    with pytest.raises(PredictionsError, match="2 bins"):
        psi([1.0], [1.0], bins=1)


def test_ks_of_independent_rows_equals_scipy() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(80, 4)), rng.normal(size=(60, 4)) + [0, 0, 0, 1.5]
    table = ks_drift(pd.DataFrame(a, columns=list("wxyz")), pd.DataFrame(b, columns=list("wxyz")))
    for k, row in table.iterrows():
        oracle = scipy.stats.ks_2samp(a[:, k], b[:, k])
        assert (row["statistic"], row["p"]) == pytest.approx((oracle.statistic, oracle.pvalue))
    np.testing.assert_allclose(table["q"], scipy.stats.false_discovery_control(table["p"]))
    assert list(table["feature"]) == list("wxyz")
    assert list(table["drift"]) == [False, False, False, True]


def test_ks_of_clusters_has_the_same_distance_and_a_wider_null() -> None:
    a, b, u, v = clustered(np.random.default_rng(3))
    a, b = np.round(a, 1), np.round(b, 1)
    rows, patients = ks_drift(a, b), ks_drift(a, b, cluster_reference=u, cluster_current=v, permutations=199)
    np.testing.assert_allclose(rows["statistic"], patients["statistic"])
    assert (patients["p"] >= rows["p"]).all()
    assert set(patients["clusters"]) == {24}


def test_ks_permutation_p_of_single_rows_is_near_the_exact_one() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(25, 3)), rng.normal(0.5, 1, (20, 3))
    exact = [scipy.stats.ks_2samp(a[:, k], b[:, k], method="exact").pvalue for k in range(3)]
    ids = np.arange(45)
    own = ks_drift(a, b, cluster_reference=ids[:25], cluster_current=ids[25:], permutations=4000)["p"]
    np.testing.assert_allclose(own, exact, atol=0.03)


def unbiased_mmd2(x: Floats, y: Floats, sigma: float, cx: Ints, cy: Ints) -> float:
    def mean(a: Floats, b: Floats, skip: npt.NDArray[np.bool_] | None) -> float:
        values = []
        for i in range(len(a)):
            for j in range(len(b)):
                if skip is None or not skip[i, j]:
                    values.append(math.exp(-((a[i] - b[j]) ** 2).sum() / (2 * sigma**2)))
        return float(np.mean(values))

    same = [c[:, None] == c[None, :] for c in (cx, cy)]
    return mean(x, x, same[0]) + mean(y, y, same[1]) - 2 * mean(x, y, None)


@pytest.mark.parametrize("rows", [1, 4])
def test_mmd_equals_a_double_loop(rows: int) -> None:
    a, b, u, v = clustered(np.random.default_rng(5), patients=8, rows=rows, shift=0.5)
    a, u = a[: -2 * rows], u[: -2 * rows]
    found = mmd_drift(a, b, cluster_reference=u, cluster_current=v, permutations=50)
    pooled = np.vstack([a, b])
    distances = [np.linalg.norm(pooled[i] - pooled[j]) for i in range(len(pooled)) for j in range(i)]
    assert found.bandwidth == pytest.approx(math.sqrt(np.median(np.square(distances))))
    assert found.bandwidth is not None
    assert found.statistic == pytest.approx(unbiased_mmd2(a, b, found.bandwidth, u, v))
    if rows == 1:
        assert mmd_drift(a, b, permutations=50).statistic == pytest.approx(found.statistic)


def test_mmd_is_unbiased_for_clustered_rows() -> None:
    rng = np.random.default_rng(6)
    values = []
    for _ in range(200):
        a, b, u, v = clustered(rng, patients=6)
        values.append(mmd_drift(a, b, cluster_reference=u, cluster_current=v, permutations=1).statistic)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(200)


@pytest.mark.parametrize("test", [mmd_drift, c2st], ids=["mmd", "c2st"])
def test_type_one_error_holds_for_patients_and_not_for_rows(test, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "bootstrap", lambda *args, **options: None)  # the interval is not looked at here
    rng = np.random.default_rng(7)
    rejected = {"patients": 0, "rows": 0}
    for seed in range(120):
        a, b, u, v = clustered(rng)
        rejected["patients"] += test(a, b, cluster_reference=u, cluster_current=v, permutations=59, seed=seed).p <= 0.05
        rejected["rows"] += test(a, b, permutations=59, seed=seed).p <= 0.05
    assert rejected["patients"] <= 13  # binomial(120, 0.05): P(> 13) = 0.004
    assert rejected["rows"] >= 50


@pytest.mark.parametrize("test", [mmd_drift, c2st], ids=["mmd", "c2st"])
def test_a_shift_is_found(test) -> None:
    a, b, u, v = clustered(np.random.default_rng(8), patients=25, shift=1.2)
    found = test(a, b, cluster_reference=u, cluster_current=v, permutations=99)
    assert found.p == 0.01
    assert (found.n_reference, found.clusters_reference, found.clusters_current) == (125, 25, 25)
    assert found.statistic > found.null_mean
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["permutations"] == 99


def test_c2st_interval_excludes_one_half_under_drift() -> None:
    a, b, u, v = clustered(np.random.default_rng(8), patients=25, shift=1.2)
    found = c2st(a, b, cluster_reference=u, cluster_current=v, permutations=9)
    assert found.interval is not None
    assert 0.5 < found.interval.low < found.statistic < found.interval.high
    assert found.interval.point == pytest.approx(found.statistic)
    assert found.interval.clusters == 50


@pytest.mark.parametrize("dim", [3, 90])
def test_c2st_scores_are_ridge_regressions(dim: int) -> None:
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(60, dim)), (rng.random(60) < 0.5).astype(float)
    x[:, 0] += y
    fold = np.arange(60) % 4
    own = drift._ridge_smoother(x, fold) @ y
    z = (x - x.mean(0)) / x.std(0)
    for k in range(4):
        train, held = fold != k, fold == k
        fit = Ridge(alpha=0.1 * train.sum()).fit(z[train], y[train])
        np.testing.assert_allclose(own[held], fit.predict(z[held]) - y[train].mean(), atol=1e-9)
    labels = np.stack([y, rng.permutation(y)])
    scores = np.round(np.stack([own, own]), 1)
    oracle = [roc_auc_score(row, s) for row, s in zip(labels, scores, strict=True)]
    np.testing.assert_allclose(drift._auroc_rows(labels, scores), oracle)


def test_too_many_rows_are_thinned_and_said_so() -> None:
    a, b, u, v = clustered(np.random.default_rng(10), patients=20, rows=10)
    found = mmd_drift(a, b, cluster_reference=u, cluster_current=v, permutations=9, max_rows=100)
    assert found.n_reference + found.n_current == 100
    assert "100 of 400" in found.note
    again = mmd_drift(a, b, cluster_reference=u, cluster_current=v, permutations=9, max_rows=100)
    assert found == again


def test_few_clusters_are_said() -> None:
    a, b, u, v = clustered(np.random.default_rng(11), patients=2)
    assert "6 ways" in mmd_drift(a, b, cluster_reference=u, cluster_current=v, permutations=20).note
    with pytest.raises(PredictionsError, match="at least 2"):
        mmd_drift(a[:5], b, cluster_reference=u[:5], cluster_current=v)


def test_bad_arguments_are_named() -> None:
    a, b, u, v = clustered(np.random.default_rng(12))
    with pytest.raises(PredictionsError, match="same d"):
        mmd_drift(a, b[:, :2])
    with pytest.raises(PredictionsError, match="both or neither"):
        mmd_drift(a, b, cluster_reference=u)
    with pytest.raises(PredictionsError, match="in reference and current both"):
        mmd_drift(a, b, cluster_reference=u, cluster_current=v - 1)
    with pytest.raises(PredictionsError, match="cluster ids"):
        mmd_drift(a, b, cluster_reference=u[:-1], cluster_current=v)
    with pytest.raises(NonFiniteError, match="NaN"):
        c2st(np.where(a == a[0, 0], np.nan, a), b)
    with pytest.raises(PredictionsError, match="all rows"):
        mmd_drift(np.ones((5, 2)), np.ones((6, 2)))
    with pytest.raises(PredictionsError, match="same columns"):
        ks_drift(pd.DataFrame({"a": [1.0]}), pd.DataFrame({"b": [1.0]}))
