"""Decision curves against dcurves, and closed forms."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from dcurves import dca

from eosin.errors import PredictionsError
from eosin.evaluation.usefulness import decision_curve


def sample(n: int = 500, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = np.round(rng.beta(1, 3, n), 3)
    return (rng.random(n) < p).astype(int), p


@pytest.mark.parametrize("prevalence", [None, 0.07])
def test_net_benefit_equals_dcurves(prevalence: float | None) -> None:
    y, p = sample()
    thresholds = np.round(np.arange(0.05, 0.6, 0.05), 2)
    own = decision_curve(y, p, thresholds=thresholds, prevalence=prevalence, resamples=50)
    oracle = dca(
        data=pd.DataFrame({"y": y, "m": p}), outcome="y", modelnames=["m"], thresholds=thresholds, prevalence=prevalence
    )
    for name, column in (("m", "net_benefit"), ("all", "treat_all"), ("none", "treat_none")):
        np.testing.assert_allclose(own[column], oracle[oracle["model"] == name]["net_benefit"], atol=1e-12)


def test_own_prevalence_changes_nothing() -> None:
    y, p = sample()
    a, b = (decision_curve(y, p, prevalence=q, resamples=20)["net_benefit"] for q in (None, y.mean()))
    np.testing.assert_allclose(a, b)


def test_a_perfect_model_gains_the_prevalence_and_a_useless_one_nothing() -> None:
    y, _ = sample()
    perfect = decision_curve(y, y.astype(float), resamples=50)
    np.testing.assert_allclose(perfect["net_benefit"], y.mean())
    assert len(perfect) == 99
    flat = decision_curve(y, np.full(500, 0.3), thresholds=[0.1, 0.2, 0.5], resamples=50)
    np.testing.assert_allclose(flat["net_benefit"], [*flat["treat_all"][:2], 0])
    np.testing.assert_allclose(flat["acted_on"], [1, 1, 0])
    assert (flat["gain"] <= 1e-12).all()


def test_patients_widen_the_interval() -> None:
    rng = np.random.default_rng(2)
    patient = np.repeat(np.arange(40), 25)
    base = rng.beta(1, 2, 40)[patient]
    y, p = (rng.random(1000) < base).astype(int), base
    rows, patients = (decision_curve(y, p, thresholds=[0.2], cluster=c, resamples=400).iloc[0] for c in (None, patient))
    assert patients["high"] - patients["low"] > 1.5 * (rows["high"] - rows["low"])
    assert patients["clusters"] == 40
    assert rows["clusters"] == rows["n"] == 1000
    for row in (rows, patients):
        assert row["low"] < row["net_benefit"] < row["high"]
        assert row["gain_low"] <= row["gain"] <= row["gain_high"]


def test_interval_is_that_of_a_slow_bootstrap() -> None:
    y, p = sample(300)
    own = decision_curve(y, p, thresholds=[0.25], resamples=2000).iloc[0]
    rng = np.random.default_rng(5)
    kinds = [np.flatnonzero(y == k) for k in (0, 1)]
    values = []
    for _ in range(2000):
        rows = np.concatenate([rng.choice(k, len(k)) for k in kinds])
        act = p[rows] >= 0.25
        values.append((act & (y[rows] == 1)).mean() - (act & (y[rows] == 0)).mean() / 3)
    np.testing.assert_allclose([own["low"], own["high"]], np.quantile(values, [0.025, 0.975]), atol=0.004)


@pytest.mark.parametrize("thresholds", [[0.0, 0.5], [0.2, 1.0]])
def test_thresholds_outside_are_refused(thresholds: list[float]) -> None:
    with pytest.raises(PredictionsError, match="between 0 and 1"):
        decision_curve(*sample(), thresholds=thresholds)
    with pytest.raises(PredictionsError, match="prevalence"):
        decision_curve(*sample(), prevalence=thresholds[-1] * 2)
