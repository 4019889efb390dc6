from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from eosin.errors import PredictionsError
from eosin.evaluation import bootstrap as module
from eosin.evaluation.bootstrap import bootstrap, bootstrap_values, cluster_weights, paired_difference, two_sided_p
from eosin.evaluation.metrics import METRICS, make_metrics
from eosin.evaluation.weighted import mean_metric

Study = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.int64]]


def study(seed: int, *, patients: int = 60, rows: int = 8) -> Study:
    """Labels, probabilities and patients; the rows of a patient share a shift of their score."""
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(patients), rng.integers(1, rows + 1, size=patients))
    sick = rng.random(patients) < 0.5
    y = (rng.random(len(cluster)) < np.where(sick, 0.6, 0.0)[cluster]).astype(np.int64)
    score = y + rng.normal(size=patients)[cluster] + 0.5 * rng.normal(size=len(cluster))
    return y, 1 / (1 + np.exp(-score)), cluster


def all_weights(cluster: npt.ArrayLike, **options: object) -> npt.NDArray[np.float32]:
    return np.concatenate(list(cluster_weights(cluster, **options)))  # type: ignore[arg-type]


def test_a_resample_keeps_patients_whole_and_strata_full() -> None:
    y, _, cluster = study(0)
    weights = all_weights(cluster, strata=y, resamples=300, seed=1)
    assert weights.dtype == np.float32
    first = np.unique(cluster, return_index=True)[1]
    counts = weights[:, first]
    np.testing.assert_array_equal(weights, counts[:, cluster])
    positive = np.array([y[cluster == c].any() for c in range(60)])
    assert (counts[:, positive].sum(axis=1) == positive.sum()).all()
    assert (counts.sum(axis=1) == 60).all()
    assert counts.mean() == pytest.approx(1, abs=1e-6)
    expected = stats.binom(positive.sum(), 1 / positive.sum()).pmf(np.arange(4))
    seen = [(counts[:, positive] == times).mean() for times in range(4)]
    np.testing.assert_allclose(seen, expected, atol=0.02)


def test_draws_depend_on_the_seed_and_not_on_chunks_or_row_order(monkeypatch: pytest.MonkeyPatch) -> None:
    y, p, cluster = study(1)
    weights = all_weights(cluster, strata=y, resamples=50, seed=3)
    order = np.random.default_rng(0).permutation(len(y))
    np.testing.assert_array_equal(all_weights(cluster[order], strata=y[order], resamples=50, seed=3), weights[:, order])
    assert not np.array_equal(all_weights(cluster, strata=y, resamples=50, seed=4), weights)
    whole = bootstrap(METRICS["auroc"](y, p, 0.5), cluster, y=y, resamples=50, method="bca")
    monkeypatch.setattr(module, "CHUNK_CELLS", 7 * len(y))
    chunks = list(cluster_weights(cluster, strata=y, resamples=50, seed=3))
    assert [len(chunk) for chunk in chunks] == [7] * 7 + [1]
    np.testing.assert_array_equal(np.concatenate(chunks), weights)
    again = bootstrap(METRICS["auroc"](y, p, 0.5), cluster, y=y, resamples=50, method="bca")
    assert again.to_dict() == pytest.approx(whole.to_dict())


def test_values_equal_scikit_learn_on_the_repeated_rows() -> None:
    y, p, cluster = study(2)
    points, values = bootstrap_values(make_metrics(["auroc", "ba"], y, p), cluster, y=y, resamples=40, seed=2)
    weights = all_weights(cluster, strata=y, resamples=40, seed=2).astype(int)
    expected = [roc_auc_score(np.repeat(y, w), np.repeat(p, w)) for w in weights]
    np.testing.assert_allclose(values["auroc"], expected, rtol=1e-12)
    assert points["auroc"] == pytest.approx(roc_auc_score(y, p), rel=1e-12)
    assert values["ba"].shape == (40,)


def test_a_plain_function_of_row_weights_will_do() -> None:
    y, p, cluster = study(3)
    metric = METRICS["auroc"](y, p, 0.5)
    fast = bootstrap(metric, cluster, y=y, resamples=60)
    slow = bootstrap(lambda weights: metric(weights), cluster, y=y, resamples=60)
    assert slow.to_dict() == pytest.approx(fast.to_dict())


def test_percentile_interval_is_the_quantiles() -> None:
    y, p, cluster = study(4)
    metrics = make_metrics(["auroc", "ba"], y, p)
    intervals = bootstrap(metrics, cluster, y=y, resamples=400, level=0.9, seed=9)
    _, values = bootstrap_values(metrics, cluster, y=y, resamples=400, seed=9)
    for name, interval in intervals.items():
        np.testing.assert_allclose([interval.low, interval.high], np.quantile(values[name], [0.05, 0.95]))
        assert (interval.level, interval.clusters, interval.resamples) == (0.9, 60, 400)
        assert interval.n == len(y)
    alone = bootstrap(metrics["auroc"], cluster, y=y, resamples=400, level=0.9, seed=9)
    assert alone == intervals["auroc"]


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_independent_rows_give_what_scipy_gives(method: str) -> None:
    x = np.random.default_rng(5).exponential(size=80)
    ours = bootstrap(mean_metric(x), np.arange(80), resamples=40_000, method=method, seed=1)  # type: ignore[arg-type]
    scipys = stats.bootstrap(
        (x,), np.mean, n_resamples=40_000, method=method if method == "percentile" else "BCa", rng=2
    ).confidence_interval
    width = scipys.high - scipys.low
    assert ours.low == pytest.approx(scipys.low, abs=0.02 * width)
    assert ours.high == pytest.approx(scipys.high, abs=0.02 * width)
    assert ours.point == pytest.approx(x.mean())


def test_bca_acceleration_of_a_mean_is_its_skewness(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(6).exponential(size=3000)
    closed_form = stats.skew(x) / (6 * np.sqrt(len(x)))
    monkeypatch.setattr(module, "JACKKNIFE_GROUPS", 5000)
    exact = module._study({"m": mean_metric(x)}, np.arange(3000), None).acceleration(0)["m"]
    assert exact == pytest.approx(closed_form, rel=1e-6)
    monkeypatch.setattr(module, "JACKKNIFE_GROUPS", 1000)
    grouped = [module._study({"m": mean_metric(x)}, np.arange(3000), None).acceleration(s)["m"] for s in range(20)]
    assert np.mean(grouped) == pytest.approx(closed_form, abs=0.002)


def test_bca_acceleration_over_two_strata_equals_scipy() -> None:
    rng = np.random.default_rng(7)
    a, b = rng.exponential(size=40), rng.exponential(size=25) ** 2
    y = np.repeat([0, 1], [40, 25])
    x = np.concatenate([a, b])

    def difference(weights: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        means = [(weights[:, y == c] @ x[y == c]) / weights[:, y == c].sum(axis=1) for c in (0, 1)]
        return means[0] - means[1]

    acceleration = module._study({"d": difference}, np.arange(65), y).acceleration(0)["d"]
    scipys = stats.bootstrap(
        (a, b), lambda u, v, axis: u.mean(axis=axis) - v.mean(axis=axis), n_resamples=3000, method="BCa", rng=2
    )
    drawn = scipys.bootstrap_distribution
    tails = module._bca_tails(drawn, a.mean() - b.mean(), acceleration, np.array([0.025, 0.975]))
    np.testing.assert_allclose(np.quantile(drawn, tails), scipys.confidence_interval, rtol=1e-9)


def test_repeating_every_row_does_not_narrow_the_interval() -> None:
    y, p, cluster = study(8)
    once = bootstrap(METRICS["auroc"](y, p, 0.5), cluster, y=y, resamples=300)
    metric = METRICS["auroc"](np.tile(y, 5), np.tile(p, 5), 0.5)
    five = bootstrap(metric, np.tile(cluster, 5), y=np.tile(y, 5), resamples=300)
    assert (five.low, five.high) == pytest.approx((once.low, once.high))
    rows = bootstrap(metric, np.arange(5 * len(y)), y=np.tile(y, 5), resamples=300)
    assert rows.high - rows.low < 0.6 * (once.high - once.low)


def test_degenerate_resamples_are_counted_and_left_out() -> None:
    y = np.array([1, 0, 0, 0, 0, 0])
    p = np.array([0.9, 0.1, 0.95, 0.3, 0.4, 0.2])
    metric = METRICS["auroc"](y, p, 0.5)
    free = bootstrap(metric, np.arange(6), resamples=4000)
    assert free.degenerate / 4000 == pytest.approx((5 / 6) ** 6, abs=0.03)
    assert "degenerate" in free.note
    assert "only 6 clusters" in free.note
    assert 0 <= free.low <= free.point <= free.high <= 1
    assert bootstrap(metric, np.arange(6), y=y, resamples=400).degenerate == 0


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_an_undefined_metric_is_flagged(method: str) -> None:
    y, p = np.zeros(30, dtype=int), np.full(30, 0.2)
    interval = bootstrap(METRICS["auroc"](y, p, 0.5), np.arange(30), y=y, resamples=50, method=method)  # type: ignore[arg-type]
    assert interval.degenerate == 50
    assert interval.to_dict()["point"] is None
    assert interval.to_dict()["low"] is None
    assert "50 of 50" in interval.note


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_a_perfect_model_has_no_spread(method: str) -> None:
    y = np.repeat([0, 1], 30)
    interval = bootstrap(METRICS["auroc"](y, y * 0.5, 0.5), np.arange(60), y=y, resamples=50, method=method)  # type: ignore[arg-type]
    assert (interval.low, interval.point, interval.high) == (1, 1, 1)


def test_few_clusters_are_flagged() -> None:
    y = (np.arange(90) < 6).astype(int)
    p = 0.2 + 0.5 * y + np.linspace(0, 0.2, 90)
    metric = METRICS["sensitivity"](y, p, 0.5)
    assert bootstrap(metric, np.arange(90) // 3, y=y, resamples=50).note == "only 2 clusters whose highest class is 1"
    assert "only 9 clusters: " in bootstrap(metric, np.arange(90) // 10, resamples=50).note
    assert bootstrap(METRICS["brier"](y, p, 0.5), np.arange(90), resamples=50).note == ""


def test_bca_says_when_it_cannot() -> None:
    """A number that every resample makes smaller, as repeated rows do for a maximum: no correction is finite."""

    def never_above(weights: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        return -(weights - 1).astype(np.float64).var(axis=1)

    interval = bootstrap(never_above, np.arange(200), resamples=100, method="bca")
    assert interval.to_dict()["low"] is None
    assert "one side" in interval.note


def test_paired_difference_uses_the_same_resamples() -> None:
    y, p, cluster = study(9)
    a, b = METRICS["auroc"](y, p, 0.5), METRICS["auroc"](y, p**3, 0.5)
    same = paired_difference(a, b, cluster, y=y, resamples=200)
    assert (same.point, same.low, same.high, same.se, same.p) == (0, 0, 0, 0, 1)
    noisy = np.clip(p + np.random.default_rng(0).normal(size=len(p)), 0, 1)
    c = METRICS["auroc"](y, noisy, 0.5)
    forward = paired_difference(a, c, cluster, y=y, resamples=500)
    back = paired_difference(c, a, cluster, y=y, resamples=500)
    assert forward.point == pytest.approx(roc_auc_score(y, p) - roc_auc_score(y, noisy))
    assert (back.point, back.low, back.high) == pytest.approx((-forward.point, -forward.high, -forward.low))
    assert back.p == forward.p
    _, values = bootstrap_values({"a": a, "c": c}, cluster, y=y, resamples=500)
    difference = values["a"] - values["c"]
    np.testing.assert_allclose([forward.low, forward.high], np.quantile(difference, [0.025, 0.975]))
    assert forward.se == pytest.approx(np.std(difference, ddof=1))


def test_p_is_never_zero() -> None:
    assert two_sided_p(np.ones(1999)) == 2 / 2000
    assert two_sided_p(-np.ones(1999)) == 2 / 2000
    assert two_sided_p(np.array([-1.0, 1.0, 1.0])) == 1.0
    assert two_sided_p(np.concatenate([-np.ones(10), np.ones(989)])) == 2 * 11 / 1000
    assert np.isnan(two_sided_p(np.array([])))


def test_wrong_calls_are_refused() -> None:
    y, p, cluster = study(10)
    metric = METRICS["ba"](y, p, 0.5)
    with pytest.raises(PredictionsError, match="unknown bootstrap method"):
        bootstrap(metric, cluster, method="basic")  # type: ignore[call-overload]
    with pytest.raises(PredictionsError, match="confidence level is 95"):
        bootstrap(metric, cluster, level=95)
    with pytest.raises(PredictionsError, match="0 resamples"):
        bootstrap(metric, cluster, resamples=0)
    with pytest.raises(PredictionsError, match="cluster has"):
        bootstrap(metric, cluster, y=y[:-1])
    with pytest.raises(PredictionsError, match="no rows"):
        bootstrap(metric, [])


@pytest.mark.slow
def test_a_hundred_thousand_predictions_take_seconds() -> None:
    rng = np.random.default_rng(0)
    y = (rng.random(100_000) < 0.15).astype(int)
    p = rng.random(100_000) * 0.5 + 0.3 * y
    started = time.perf_counter()
    bootstrap(make_metrics(["auroc", "ba"], y, p), np.arange(100_000) // 100, y=y, resamples=2000)
    assert time.perf_counter() - started < 20


@pytest.mark.slow
def test_cluster_intervals_cover_and_row_intervals_do_not() -> None:
    """500 cohorts of 60 patients of 12 rows; the truth of sensitivity-like means and of AUROC is known."""
    patients, rows, cohorts = 60, 12, 500
    truth = float(stats.norm.cdf(1 / np.sqrt(2)))  # P(score of a positive > of a negative), unit total variance
    rng = np.random.default_rng(0)
    covered = {"clusters": 0, "bca": 0, "rows": 0}
    for cohort in range(cohorts):
        cluster = np.repeat(np.arange(patients), rows)
        y = (cluster % 2).astype(int)
        shift, noise = rng.normal(size=patients)[cluster], rng.normal(size=len(cluster))
        p = stats.norm.cdf(y + np.sqrt(0.4) * shift + np.sqrt(0.6) * noise)
        metric = METRICS["auroc"](y, p, 0.5)
        for name, unit, method in (
            ("clusters", cluster, "percentile"),
            ("bca", cluster, "bca"),
            ("rows", np.arange(len(y)), "percentile"),
        ):
            interval = bootstrap(metric, unit, y=y, resamples=400, method=method, seed=cohort)  # type: ignore[arg-type]
            covered[name] += interval.low <= truth <= interval.high
    assert 0.93 <= covered["clusters"] / cohorts <= 0.97
    assert 0.93 <= covered["bca"] / cohorts <= 0.97
    assert covered["rows"] / cohorts < 0.90
