from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from MLstatkit import Delong_test
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as sm_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from eosin.errors import PredictionsError
from eosin.evaluation.bootstrap import paired_difference
from eosin.evaluation.comparisons import benjamini_hochberg, delong, holm, mcnemar, non_inferiority, tost
from eosin.evaluation.interval import Difference
from eosin.evaluation.metrics import METRICS, auroc
from eosin.evaluation.weighted import mean_metric

Floats = npt.NDArray[np.float64]


def two_models(seed: int, *, ties: bool = False, n: int = 250) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 0.4).astype(np.int64)
    shared = rng.normal(size=n)
    a, b = (1 / (1 + np.exp(-(y * gain + shared + rng.normal(size=n)))) for gain in (1.5, 1.2))
    return (y, np.round(a, 1), np.round(b, 1)) if ties else (y, a, b)


def placements(y: npt.NDArray[np.int64], *models: Floats) -> tuple[Floats, Floats]:
    """DeLong's structural components by the definition: psi over all pairs, averaged over the other class."""
    psi = np.stack([(p[y == 1][:, None] > p[y == 0]) + 0.5 * (p[y == 1][:, None] == p[y == 0]) for p in models])
    v10, v01 = psi.mean(axis=2), psi.mean(axis=1)
    covariance = np.atleast_2d(np.cov(v10)) / v10.shape[1] + np.atleast_2d(np.cov(v01)) / v01.shape[1]
    return v10.mean(axis=1), covariance


@pytest.mark.parametrize("ties", [False, True])
def test_delong_equals_mlstatkit(ties: bool) -> None:
    for seed in range(4):
        y, a, b = two_models(seed, ties=ties)
        _, p, (low, high), _, auc_a, auc_b, _ = Delong_test(y, a, b, verbose=0)
        ours = delong(y, a, b)
        assert ours.point == pytest.approx(auc_a - auc_b, rel=1e-9)
        assert ours.p == pytest.approx(p, rel=1e-6)
        single = delong(y, a)
        assert (single.low, single.high) == pytest.approx((low, high), rel=1e-6)
        assert single.point == pytest.approx(auroc(y, a), rel=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_delong_equals_its_definition(ties: bool) -> None:
    y, a, b = two_models(9, ties=ties)
    areas, covariance = placements(y, a, b)
    ours = delong(y, a, b)
    assert ours.point == pytest.approx(areas[0] - areas[1], rel=1e-12)
    assert ours.se == pytest.approx(np.sqrt(np.array([1, -1]) @ covariance @ np.array([1, -1])), rel=1e-9)
    assert ours.p == pytest.approx(2 * stats.norm.sf(abs(ours.point) / ours.se), rel=1e-9)
    single = delong(y, a, level=0.9)
    assert single.high - single.point == pytest.approx(stats.norm.ppf(0.95) * np.sqrt(covariance[0, 0]), rel=1e-9)


def test_delong_on_edges() -> None:
    y, a, _ = two_models(1)
    same = delong(y, a, a)
    assert (same.point, same.se, same.p) == (0, 0, 1)
    perfect = delong([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])
    assert (perfect.low, perfect.point, perfect.high) == (1, 1, 1)
    assert "no variance" in perfect.note
    with pytest.raises(PredictionsError, match="1 positives and 3 negatives"):
        delong([0, 0, 0, 1], [0.1, 0.2, 0.8, 0.9])
    with pytest.raises(PredictionsError, match="class 0"):
        delong([0, 0], [0.1, 0.2])


def test_delong_agrees_with_the_bootstrap_of_independent_rows() -> None:
    y, a, b = two_models(2, n=600)
    resampled = paired_difference(METRICS["auroc"](y, a, 0.5), METRICS["auroc"](y, b, 0.5), np.arange(600), y=y)
    exact = delong(y, a, b)
    assert resampled.se == pytest.approx(exact.se, rel=0.08)
    assert resampled.point == pytest.approx(exact.point)
    assert (resampled.low, resampled.high) == pytest.approx((exact.low, exact.high), abs=0.2 * exact.se)


@pytest.mark.parametrize(("only_a", "only_b"), [(3, 9), (0, 0), (24, 0), (12, 12), (13, 12), (40, 60), (100, 100)])
def test_mcnemar_equals_statsmodels(only_a: int, only_b: int) -> None:
    y = np.ones(only_a + only_b + 30, dtype=int)
    right_a = np.arange(len(y)) < only_a
    right_b = (np.arange(len(y)) >= only_a) & (np.arange(len(y)) < only_a + only_b)
    right_a[-10:] = right_b[-10:] = True
    ours = mcnemar(y, right_a, right_b)
    exact = only_a + only_b < 25
    theirs = sm_mcnemar([[10, only_a], [only_b, 20]], exact=exact, correction=True)
    assert (ours.only_a, ours.only_b, ours.exact, ours.n) == (only_a, only_b, exact, len(y))
    if only_a == only_b and not exact:  # statsmodels corrects 0 to 1 / (b + c); as R does, we leave it at 0
        assert (ours.statistic, ours.p) == (0, 1)
    else:
        assert ours.p == pytest.approx(theirs.pvalue, rel=1e-9)
        assert ours.statistic == pytest.approx(theirs.statistic, rel=1e-9)


def test_mcnemar_refuses_rows_that_do_not_match() -> None:
    with pytest.raises(PredictionsError, match="calls_b has 2 rows where the labels have 3"):
        mcnemar([0, 1, 1], [0, 1, 1], [0, 1])


def test_adjusted_p_values_equal_statsmodels() -> None:
    rng = np.random.default_rng(0)
    for p in (rng.random(20) ** 3, np.array([0.01, 0.01, 0.04, 0.04, 1.0]), np.array([0.03]), np.zeros(3)):
        np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1], rtol=1e-12)
        np.testing.assert_allclose(benjamini_hochberg(p), multipletests(p, method="fdr_bh")[1], rtol=1e-12)
    for bad in ([0.1, np.nan], [1.2], [], [[0.1]]):
        with pytest.raises(PredictionsError):
            holm(bad)


def difference(point: float, se: float) -> Difference:
    return Difference(
        point=point, low=point - 2 * se, high=point + 2 * se, p=1.0, se=se, level=0.95, n=9, clusters=9, method="delong"
    )


def test_equivalence_equals_statsmodels_on_many_pairs() -> None:
    rng = np.random.default_rng(3)
    d = rng.normal(0.02, 0.3, size=4000)
    found = paired_difference(mean_metric(d), mean_metric(np.zeros(4000)), np.arange(4000), resamples=8000)
    exact = difference(float(d.mean()), float(d.std(ddof=1) / np.sqrt(4000)))
    assert found.se == pytest.approx(exact.se, rel=0.03)
    for margin in (0.015, 0.03, 0.05):
        p, *_ = DescrStatsW(d).ttost_mean(-margin, margin)
        assert tost(exact, margin=margin).p == pytest.approx(p, abs=2e-4)
        larger = stats.t.sf((exact.point + margin) / exact.se, df=3999)
        assert non_inferiority(exact, margin=margin).p == pytest.approx(larger, abs=2e-4)
        assert tost(found, margin=margin).p == pytest.approx(p, abs=0.02)


@pytest.mark.parametrize("point", [-0.03, -0.011, 0.0, 0.011, 0.03])
def test_the_interval_and_the_p_value_decide_alike(point: float) -> None:
    d = difference(point, 0.005)
    both = tost(d, margin=0.02)
    assert both.established == (both.low > -0.02 and both.high < 0.02) == (abs(point) < 0.0118)
    one = non_inferiority(d, margin=0.02)
    assert one.established == (one.low > -0.02) == (point > -0.0102)
    assert one.to_dict()["high"] is None


def test_margins_that_make_no_sense_are_refused() -> None:
    with pytest.raises(PredictionsError, match="margin is 0"):
        tost(difference(0, 0.1), margin=0)
    with pytest.raises(PredictionsError, match=r"alpha is 0\.95"):
        non_inferiority(difference(0, 0.1), margin=0.1, alpha=0.95)
    with pytest.raises(PredictionsError, match="standard error 0"):
        tost(difference(0, 0.0), margin=0.1)


def test_sizes_of_the_paired_test_under_no_difference() -> None:
    """With two exchangeable models the p-value of the cluster bootstrap rejects about as often as it says."""
    rng, rejected = np.random.default_rng(0), 0
    for seed in range(200):
        a, b = rng.normal(size=(2, 50))
        rejected += paired_difference(mean_metric(a), mean_metric(b), np.arange(50), resamples=400, seed=seed).p < 0.05
    assert 0.02 <= rejected / 200 <= 0.10
