"""Calibration against netcal, scikit-learn, statsmodels, closed forms and simulations."""

from __future__ import annotations

import json
import math

import numpy as np
import numpy.typing as npt
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import statsmodels.api as sm
from netcal.metrics import ECE, MCE
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss
from statsmodels.stats.proportion import proportion_confint

from eosin.errors import PredictionsError
from eosin.evaluation import calibration as cal
from eosin.evaluation.bootstrap import bootstrap, cluster_weights
from eosin.evaluation.metrics import METRICS

Floats = npt.NDArray[np.float64]


def binary(
    n: int = 2000, *, slope: float = 1.0, shift: float = 0.0, seed: int = 0
) -> tuple[npt.NDArray[np.int64], Floats]:
    """Scores p whose true probability is expit(shift + slope logit p)."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(-0.5, 1.5, n)
    y = (rng.random(n) < scipy.special.expit(shift + slope * logit)).astype(np.int64)
    return y, scipy.special.expit(logit)


def multiclass(n: int = 1500, *, sharpen: float = 1.0, seed: int = 0) -> tuple[npt.NDArray[np.int64], Floats]:
    """Probabilities whose logits are `sharpen` times the true ones."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n, 4))
    truth = scipy.special.softmax(logits, axis=1)
    y = (rng.random(n)[:, None] > truth.cumsum(1)).sum(1)
    return y, scipy.special.softmax(sharpen * logits, axis=1)


@pytest.mark.parametrize("bins", [5, 15])
def test_binary_ece_and_mce_equal_netcal(bins: int) -> None:
    y, p = binary(slope=0.6)
    assert cal.ece(y, p, bins=bins) == pytest.approx(ECE(bins=bins).measure(p, y), abs=1e-12)
    assert cal.mce(y, p, bins=bins) == pytest.approx(MCE(bins=bins).measure(p, y), abs=1e-12)


def test_multiclass_ece_equals_netcal() -> None:
    y, p = multiclass(sharpen=2)
    assert cal.ece(y, p, bins=15) == pytest.approx(ECE(bins=15).measure(p, y), abs=1e-12)


@pytest.mark.parametrize(("scheme", "strategy"), [("width", "uniform"), ("mass", "quantile")])
def test_reliability_equals_scikit_learn(scheme: cal.Scheme, strategy: str) -> None:
    y, p = binary(777, slope=0.5)
    p = np.round(p, 2)
    table = cal.reliability(y, p, bins=10, scheme=scheme)
    frequency, score = calibration_curve(y, p, n_bins=10, strategy=strategy)
    np.testing.assert_allclose(table["frequency"], frequency)
    np.testing.assert_allclose(table["score"], score)
    assert table["n"].sum() == 777
    low, high = proportion_confint((table["frequency"] * table["n"]).round(), table["n"], method="wilson")
    np.testing.assert_allclose(table["frequency_low"], low, atol=1e-12)
    np.testing.assert_allclose(table["frequency_high"], high, atol=1e-12)
    by_hand = (table["n"] * (table["frequency"] - table["score"]).abs()).sum() / 777
    assert cal.ece(y, p, bins=10, scheme=scheme) == pytest.approx(by_hand)
    assert cal.mce(y, p, bins=10, scheme=scheme) == pytest.approx(table["gap"].abs().max())


def test_equal_mass_bins_hold_equal_shares_and_keep_ties_together() -> None:
    y, p = binary(1500)
    assert set(cal.reliability(y, p, scheme="mass")["n"]) == {100}
    tied = np.where(p < 0.4, 0.4, p)
    order = np.random.default_rng(1).permutation(1500)
    assert cal.ece(y, tied, scheme="mass") == pytest.approx(cal.ece(y[order], tied[order], scheme="mass"), abs=1e-12)
    assert (cal.reliability(y, tied, scheme="mass")["n"] >= 100).any()


def test_classwise_ece_is_the_mean_of_the_binary_ones() -> None:
    y, p = multiclass(sharpen=1.5)
    each = [cal.ece((y == c).astype(int), p[:, c]) for c in range(4)]
    assert cal.classwise_ece(y, p) == pytest.approx(np.mean(each))


def test_ece_tells_calibrated_from_overconfident() -> None:
    good, bad = binary(20_000), binary(20_000, slope=0.4)
    assert cal.ece(*good) < 0.012 < 0.08 < cal.ece(*bad)


@pytest.mark.parametrize("n", [20, 101])
def test_floor_equals_the_binomial_mean_deviation(n: int) -> None:
    rate = 0.3
    k = np.arange(n + 1)
    exact = (scipy.stats.binom.pmf(k, n, rate) * np.abs(k / n - rate)).sum()
    assert cal.ece_floor(np.full(n, rate), draws=4000) == pytest.approx(exact, rel=0.04)


def test_floor_of_several_classes_is_what_calibrated_scores_show() -> None:
    shown = [cal.ece(*multiclass(300, seed=s)) for s in range(60)]
    assert cal.ece_floor(multiclass(300)[1]) == pytest.approx(np.mean(shown), rel=0.1)


@pytest.mark.parametrize("scheme", ["width", "mass"])
def test_weighted_ece_is_that_of_repeated_rows(scheme: cal.Scheme) -> None:
    y, p = binary(200)
    metric = cal.weighted_ece(y, p, scheme=scheme)
    assert metric(np.ones((1, 200), dtype=np.float32))[0] == pytest.approx(cal.ece(y, p, scheme=scheme))
    weights = np.concatenate(list(cluster_weights(np.arange(200) // 4, resamples=5)))
    edges = np.quantile(p, np.linspace(0, 1, 16)) if scheme == "mass" else np.linspace(0, 1, 16)
    for row, value in zip(weights, metric(weights), strict=True):
        rows = np.repeat(np.arange(200), row.astype(int))
        ids = np.searchsorted(edges[1:-1], p[rows])
        gaps = [abs((p[rows][ids == b] - y[rows][ids == b]).sum()) for b in range(15)]
        assert value == pytest.approx(sum(gaps) / len(rows))
    assert np.isnan(metric(np.zeros((1, 200), dtype=np.float32))[0])


def test_ece_is_bootstrapped_by_name() -> None:
    y, p = binary(600, slope=0.5)
    found = bootstrap(METRICS["ece"](y, p, 0.5), np.arange(600) // 3, y=y, resamples=200)
    assert found.point == pytest.approx(cal.ece(y, p))
    assert found.clusters == 200
    assert 0.05 < found.low < found.high < 0.25


@pytest.mark.parametrize("scheme", ["width", "mass"])
def test_brier_parts_add_up(scheme: cal.Scheme) -> None:
    y, p = binary(500, slope=0.7)
    parts = cal.brier_decomposition(y, p, scheme=scheme)
    assert parts.brier == pytest.approx(brier_score_loss(y, p))
    rebuilt = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bins
    assert rebuilt == pytest.approx(parts.brier, abs=1e-12)
    ids = cal._bin_ids(p, 15, scheme)
    within = 0.0
    for b in np.unique(ids):
        s, h = p[ids == b], y[ids == b]
        within += len(s) / 500 * (s.var() - 2 * np.cov(s, h, bias=True)[0, 1])
    assert parts.within_bins == pytest.approx(within, abs=1e-12)


def test_brier_parts_of_few_distinct_forecasts_are_murphys() -> None:
    rng = np.random.default_rng(3)
    p = rng.choice([0.1, 0.35, 0.8], 400)
    y = (rng.random(400) < 0.5 * p + 0.2).astype(int)
    parts = cal.brier_decomposition(y, p, bins=10)
    rate = y.mean()
    groups = [(value, (p == value).mean(), y[p == value].mean()) for value in np.unique(p)]
    assert parts.bins == 3
    assert parts.within_bins == pytest.approx(0, abs=1e-12)
    assert parts.reliability == pytest.approx(sum(w * (v - f) ** 2 for v, w, f in groups))
    assert parts.resolution == pytest.approx(sum(w * (f - rate) ** 2 for _, w, f in groups))
    assert parts.uncertainty == pytest.approx(rate * (1 - rate))


def test_brier_parts_of_several_classes() -> None:
    y, p = multiclass()
    parts = cal.brier_decomposition(y, p)
    assert parts.brier == pytest.approx(((p - np.eye(4)[y]) ** 2).sum(1).mean())


@pytest.mark.parametrize("slope", [0.5, 1.0, 2.0])
def test_slope_and_intercept_equal_statsmodels(slope: float) -> None:
    y, p = binary(800, slope=slope, shift=0.3)
    x = scipy.special.logit(p)
    found = cal.calibration_slope_intercept(y, p)
    joint = sm.GLM(y, sm.add_constant(x), family=sm.families.Binomial()).fit(tol=1e-12)
    large = sm.GLM(y, np.ones(800), family=sm.families.Binomial(), offset=x).fit(tol=1e-12)
    assert found.slope.point == pytest.approx(joint.params[1], abs=1e-8)
    assert found.joint_intercept.point == pytest.approx(joint.params[0], abs=1e-8)
    assert found.intercept.point == pytest.approx(large.params[0], abs=1e-8)
    np.testing.assert_allclose([found.slope.low, found.slope.high], joint.conf_int()[1], atol=1e-6)
    np.testing.assert_allclose([found.intercept.low, found.intercept.high], large.conf_int()[0], atol=1e-6)
    assert found.slope.low < slope < found.slope.high


def test_clustered_slope_equals_statsmodels_sandwich() -> None:
    rng = np.random.default_rng(4)
    patient = np.repeat(np.arange(60), 10)
    logit = rng.normal(0, 1.2, 600)
    y = (rng.random(600) < scipy.special.expit(logit + rng.normal(0, 1, 60)[patient])).astype(int)
    p = scipy.special.expit(logit)
    found = cal.calibration_slope_intercept(y, p, cluster=patient)
    fit = sm.GLM(y, sm.add_constant(logit), family=sm.families.Binomial()).fit(
        tol=1e-12, cov_type="cluster", cov_kwds={"groups": patient, "use_correction": False}
    )
    error = np.sqrt(np.diag(fit.cov_params()))
    reach = scipy.stats.t.isf(0.025, 59) * np.sqrt(60 / 59)
    assert found.slope.high - found.slope.point == pytest.approx(reach * error[1], rel=1e-5)
    assert found.joint_intercept.high - found.joint_intercept.point == pytest.approx(reach * error[0], rel=1e-5)
    alone = cal.calibration_slope_intercept(y, p)
    assert found.intercept.high - found.intercept.low > 1.5 * (alone.intercept.high - alone.intercept.low)
    assert found.slope.clusters == 60


@pytest.mark.parametrize(
    ("p", "says"), [([0.1, 0.2, 0.7, 0.9], "separate"), ([0.9, 0.8, 0.2, 0.1], "separate"), ([0.4] * 4, "equal")]
)
def test_a_slope_that_does_not_exist_is_nan_with_a_reason(p: list[float], says: str) -> None:
    found = cal.calibration_slope_intercept([0, 0, 1, 1], p)
    assert math.isnan(found.slope.point)
    assert says in found.slope.note
    assert math.isfinite(found.intercept.point)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["slope"]["point"] is None


def test_scores_of_0_and_1_are_counted() -> None:
    y, p = binary(300)
    p[:3] = [0, 1, 1]
    assert cal.calibration_slope_intercept(y, p).clipped == 3


@pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
def test_temperature_is_the_minimum_of_scikit_learns_log_loss(true: float) -> None:
    y, p = multiclass(4000, sharpen=true)
    fitted = cal.TemperatureScaling.fit(y, p)
    loss = lambda t: log_loss(y, scipy.special.softmax(np.log(p) / t, axis=1))  # noqa: E731
    best = scipy.optimize.minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-8}).x
    assert fitted.temperature == pytest.approx(best, rel=1e-4)
    assert fitted.temperature == pytest.approx(true, rel=0.1)
    scaled = fitted.apply(p)
    np.testing.assert_allclose(scaled.sum(1), 1)
    np.testing.assert_array_equal(scaled.argmax(1), p.argmax(1))
    np.testing.assert_allclose(scaled, scipy.special.softmax(np.log(p) / fitted.temperature, axis=1), atol=1e-4)


def test_binary_temperature_equals_that_of_two_columns() -> None:
    y, p = binary(3000, slope=0.5)
    one = cal.TemperatureScaling.fit(y, p)
    two = cal.TemperatureScaling.fit(y, np.column_stack([1 - p, p]))
    assert one.temperature == pytest.approx(two.temperature, rel=1e-6)
    assert one.temperature == pytest.approx(2, rel=0.15)
    np.testing.assert_allclose(one.apply(p), two.apply(np.column_stack([1 - p, p]))[:, 1], atol=1e-9)
    fresh, q = binary(3000, slope=0.5, seed=9)
    assert cal.ece(fresh, one.apply(q)) < 0.5 * cal.ece(fresh, q)


def test_temperature_refuses_what_has_none() -> None:
    with pytest.raises(PredictionsError, match="without an error"):
        cal.TemperatureScaling.fit([0, 0, 1, 1], [0.1, 0.2, 0.7, 0.9])
    with pytest.raises(PredictionsError, match="positive class"):
        cal.TemperatureScaling.fit([1, 1, 0, 0], [0.1, 0.2, 0.7, 0.9])


def test_isotonic_equals_the_max_min_formula() -> None:
    y, p = binary(60, slope=0.5)
    order = np.argsort(p)
    h = y[order].astype(float)
    means = [[h[a : b + 1].mean() if a <= b else 0 for b in range(60)] for a in range(60)]
    exact = [max(min(means[a][b] for b in range(i, 60)) for a in range(i + 1)) for i in range(60)]
    np.testing.assert_allclose(cal.IsotonicScaling.fit(y, p).apply(p[order]), exact, atol=1e-9)


def test_isotonic_mends_new_rows_binary_and_multiclass() -> None:
    y, p = binary(4000, slope=0.4)
    fresh, q = binary(4000, slope=0.4, seed=5)
    assert cal.ece(fresh, cal.IsotonicScaling.fit(y, p).apply(q)) < 0.5 * cal.ece(fresh, q)
    many, scores = multiclass(4000, sharpen=3)
    scaled = cal.IsotonicScaling.fit(many, scores).apply(scores)
    np.testing.assert_allclose(scaled.sum(1), 1)
    assert cal.ece(many, scaled) < 0.5 * cal.ece(many, scores)
    with pytest.raises(PredictionsError, match="columns"):
        cal.IsotonicScaling.fit(many, scores).apply(scores[:, :3])


def test_bad_arguments_are_named() -> None:
    y, p = binary(50)
    with pytest.raises(PredictionsError, match="scheme"):
        cal.ece(y, p, scheme="quantile")  # pyright: ignore[reportArgumentType]
    with pytest.raises(PredictionsError, match="bins"):
        cal.ece(y, p, bins=0)
    with pytest.raises(PredictionsError, match="NaN"):
        cal.ece(y, np.where(p < 0.2, np.nan, p))


def test_one_cluster_has_estimates_without_intervals() -> None:
    y, p = np.array([0, 1, 0, 1, 1, 0]), np.array([0.2, 0.4, 0.5, 0.7, 0.9, 0.3])
    one = cal.calibration_slope_intercept(y, p, cluster=["a"] * 6)
    rows = cal.calibration_slope_intercept(y, p)
    assert one.slope.point == pytest.approx(rows.slope.point)
    assert np.isnan(one.slope.low)
    assert np.isnan(one.slope.high)
    assert "one cluster" in one.slope.note
