"""Subgroup tables against scikit-learn level by level, the plain bootstrap, and simulations."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, roc_auc_score

from eosin.errors import PredictionsError
from eosin.evaluation.bootstrap import bootstrap
from eosin.evaluation.calibration import calibration_slope_intercept, ece
from eosin.evaluation.metrics import METRICS
from eosin.evaluation.subgroups import calibration_table, describe, pooled_and_domains, subgroup_table

Data = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.str_], npt.NDArray[np.int64]]


def cohort(seed: int = 0, *, worse: float = 0.0, patients: int = 40, rows: int = 5) -> Data:
    """Three sites of `patients` patients each; site c separates the classes less well by `worse`; site d is tiny."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(3 * patients + 2), rows)
    site = np.array(["a", "b", "c"])[np.minimum(patient // patients, 2)]
    site = np.where(patient >= 3 * patients, "d", site)
    y = (rng.random(len(patient)) < np.where(patient % 2, 0.6, 0.2)).astype(np.int64)
    signal = np.where(site == "c", 2 - worse, 2.0)
    score = signal * (y - 0.5) + rng.normal(0, 1, len(y)) + rng.normal(0, 0.4, patient.max() + 1)[patient]
    return y, 1 / (1 + np.exp(-score)), site, patient


def test_every_level_equals_scikit_learn() -> None:
    y, p, site, patient = cohort()
    found = subgroup_table(y, p, site, patient, metrics=["auroc", "ba", "brier"], resamples=100)
    for _, row in found.table.iterrows():
        mine = site == row["level"]
        oracle = {
            "auroc": lambda m: roc_auc_score(y[m], p[m]),
            "ba": lambda m: balanced_accuracy_score(y[m], p[m] >= 0.5),
            "brier": lambda m: brier_score_loss(y[m], p[m]),
        }[row["metric"]]
        assert row["point"] == pytest.approx(oracle(mine))
        assert row["n"] == mine.sum()
        assert row["positives"] == y[mine].sum()
        assert row["clusters"] == len(np.unique(patient[mine]))
        assert row["low"] <= row["point"] <= row["high"]
    assert len(found.table) == 12


def test_one_level_is_the_plain_bootstrap() -> None:
    y, p, _, patient = cohort()
    row = subgroup_table(y, p, ["all"] * len(y), patient, metrics=["auroc"], resamples=300, seed=3).table.iloc[0]
    plain = bootstrap(METRICS["auroc"](y, p, 0.5), patient, y=y, resamples=300, seed=3)
    assert (row["point"], row["low"], row["high"]) == pytest.approx((plain.point, plain.low, plain.high))


def test_tiny_levels_are_flagged_and_left_out_of_the_gap() -> None:
    y, p, site, patient = cohort(worse=1.2)
    found = subgroup_table(y, p, site, patient, metrics=["auroc", "brier"], resamples=300)
    flags = found.table.set_index(["level", "metric"])["flag"]
    assert "2 clusters" in flags["d", "auroc"]
    assert (flags.drop("d", level="level") == "").all()
    gaps = found.gaps.set_index("metric")
    assert set(gaps["worst"]) == {"c"}
    assert (gaps["gap"] > 0).all()
    assert (gaps["low"] < gaps["gap"]).all()
    assert (gaps["gap"] < gaps["high"]).all()
    assert gaps.loc["auroc", "flag"] == "left out: d"
    point = found.table.set_index(["metric", "level"])["point"]
    best, worst = gaps.loc["brier", ["best", "worst"]]
    assert gaps.loc["brier", "gap"] == pytest.approx(point["brier", worst] - point["brier", best])


def test_positives_of_few_patients_are_flagged() -> None:
    y = np.array([1] * 20 + [0] * 40)
    flag = describe(y, np.full(60, 0.5), np.r_[np.zeros(20), np.arange(40)], np.arange(60))["flag"]
    assert flag == "too few: 20 positives in 1 clusters"


def test_gap_interval_is_that_of_a_slow_bootstrap() -> None:
    y, p, site, patient = cohort(worse=1.0)
    keep = site != "d"
    y, p, site, patient = y[keep], p[keep], site[keep], patient[keep]
    gap = subgroup_table(y, p, site, patient, metrics=["ba"], resamples=1500).gaps.iloc[0]
    rng = np.random.default_rng(8)
    rows_of = {k: np.flatnonzero(patient == k) for k in np.unique(patient)}
    sick = {k: y[r].max() for k, r in rows_of.items()}
    values = []
    for _ in range(400):
        each = {}
        for level in (gap["best"], gap["worst"]):
            here = np.unique(patient[site == level])
            kinds = [[k for k in here if sick[k] == kind] for kind in (0, 1)]
            drawn = np.concatenate([rng.choice(kind, len(kind)) for kind in kinds if kind])
            rows = np.concatenate([rows_of[k] for k in drawn])
            each[level] = balanced_accuracy_score(y[rows], p[rows] >= 0.5)
        values.append(each[gap["best"]] - each[gap["worst"]])
    assert gap["high"] - gap["low"] == pytest.approx(np.ptp(np.quantile(values, [0.025, 0.975])), rel=0.15)


def test_one_class_level_has_no_auroc_but_keeps_its_row() -> None:
    y, p, site, patient = cohort()
    y = np.where(site == "d", 0, y)
    found = subgroup_table(y, p, site, patient, metrics=["auroc", "specificity"], resamples=50)
    row = found.table[(found.table["level"] == "d") & (found.table["metric"] == "auroc")].iloc[0]
    assert np.isnan(row["point"])
    assert "0 positives" in row["flag"]
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert any(r["point"] is None for r in plain["table"])
    alone = subgroup_table(y, p, np.where(site == "d", "d", "rest"), patient, resamples=50)
    assert "fewer than two levels" in alone.gaps["flag"].iloc[0]


def test_patients_on_two_scanners_share_their_resamples() -> None:
    rng = np.random.default_rng(0)
    patient = np.tile(np.arange(60), 2)
    base = rng.normal(0, 1, 60)
    y = np.tile((base + rng.normal(0, 1, 60) > 0).astype(int), 2)
    p = 1 / (1 + np.exp(-(np.tile(base, 2) + np.r_[np.zeros(60), rng.normal(0, 0.1, 60)])))
    scanner = np.repeat(["x", "y"], 60)
    found = subgroup_table(y, p, scanner, patient, metrics=["auroc"], resamples=400)
    gap, widths = found.gaps.iloc[0], found.table["high"] - found.table["low"]
    assert gap["high"] - gap["low"] < 0.5 * widths.min()


def test_pooled_domains_mean_and_worst() -> None:
    y, p, site, patient = cohort(worse=1.2)
    table = pooled_and_domains(y, p, site, patient, metrics=["ba", "auroc"], resamples=200)
    for name, oracle in (
        ("ba", lambda m: balanced_accuracy_score(y[m], p[m] >= 0.5)),
        ("auroc", lambda m: roc_auc_score(y[m], p[m])),
    ):
        mine = table[table["metric"] == name].set_index("scope")
        assert mine.loc["pooled", "point"] == pytest.approx(oracle(slice(None)))
        each = [oracle(site == s) for s in "abcd"]
        np.testing.assert_allclose(mine.loc["domain", "point"], each)
        assert mine.loc["domain_mean", "point"] == pytest.approx(np.mean(each))
        assert mine.loc["domain_mean", "level"] == "mean of 4 domains"
        assert "1 of 4 domains" in mine.loc["domain_mean", "flag"]
        assert mine.loc["worst_domain", "level"] == "c"
        assert mine.loc["worst_domain", "low"] == mine.loc["domain"].set_index("level").loc["c", "low"]
        assert (mine["low"] <= mine["point"]).all()
        assert (mine["n"] > 0).all()
    assert list(table["scope"].unique()) == ["pooled", "domain", "domain_mean", "worst_domain"]


def test_pooled_and_domain_mean_can_disagree_on_the_winner() -> None:
    y = np.tile([0, 1], 300)
    domain = np.repeat(["big", "small"], [500, 100])
    patient = np.arange(600) // 2
    good_on_big = np.where(domain == "big", y, 1 - y).astype(float)
    good_on_small = np.where((domain == "small") | (np.arange(600) % 10 < 7), y, 1 - y).astype(float)
    values = [
        pooled_and_domains(y, p, domain, patient, metrics=["ba"], resamples=20).set_index("scope")["point"]
        for p in (good_on_big, good_on_small)
    ]
    assert values[0]["pooled"] > values[1]["pooled"]
    assert values[0]["domain_mean"] < values[1]["domain_mean"]


def test_calibration_by_scanner_finds_the_shifted_one() -> None:
    rng = np.random.default_rng(3)
    scanner = np.repeat(["s1", "s2", "s3"], 800)
    logit = rng.normal(0, 1.3, 2400)
    y = (rng.random(2400) < 1 / (1 + np.exp(-logit))).astype(int)
    p = 1 / (1 + np.exp(-(logit + np.where(scanner == "s2", 1.2, 0))))
    patient = np.arange(2400) // 4
    table = calibration_table(y, p, scanner, patient, resamples=100).set_index("level")
    assert list(table.index) == ["all", "s1", "s2", "s3"]
    assert table.loc["s2", "ece_low"] > table.loc["s2", "ece_floor"] * 2
    assert table.loc["s1", "ece"] < table.loc["s1", "ece_floor"] * 1.7
    assert table.loc["s2", "intercept_high"] < -0.8
    assert table.loc["s1", "intercept_low"] < 0 < table.loc["s1", "intercept_high"]
    mine = scanner == "s2"
    assert table.loc["s2", "ece"] == pytest.approx(ece(y[mine], p[mine]))
    assert table.loc["s2", "brier"] == pytest.approx(brier_score_loss(y[mine], p[mine]))
    fit = calibration_slope_intercept(y[mine], p[mine], cluster=patient[mine])
    assert table.loc["s2", "slope"] == pytest.approx(fit.slope.point)
    assert table.loc["s2", "slope_low"] == pytest.approx(fit.slope.low)
    aurocs = subgroup_table(y, p, scanner, patient, metrics=["auroc"], resamples=20).table["point"]
    assert np.ptp(aurocs) < 0.06


def test_calibration_of_a_level_of_one_class_is_flagged() -> None:
    y, p, site, patient = cohort()
    table = calibration_table(np.where(site == "d", 1, y), p, site, patient, resamples=30).set_index("level")
    assert np.isnan(table.loc["d", "slope"])
    assert "one class only" in table.loc["d", "flag"]
    assert np.isfinite(table.loc["d", "ece"])


def test_multiclass_levels() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 600)
    p = rng.dirichlet([1, 1, 1], 600) * 0.5 + 0.5 * np.eye(3)[y]
    site = np.where(np.arange(600) < 590, "a", "b")
    table = subgroup_table(y, p, site, np.arange(600) // 2, metrics=["ba", "macro_f1"], resamples=30).table
    assert table[table["level"] == "a"]["point"].min() > 0.7
    assert "rows of class" in table[table["level"] == "b"]["flag"].iloc[0]


def test_bad_levels_are_named() -> None:
    y, p, site, patient = cohort()
    with pytest.raises(PredictionsError, match="no level"):
        subgroup_table(y, p, np.where(site == "a", None, site), patient)
    with pytest.raises(PredictionsError, match="level has"):
        subgroup_table(y, p, site[:-1], patient)
    with pytest.raises(PredictionsError, match="closest"):
        subgroup_table(y, p, site, patient, metrics=["aurocc"])
