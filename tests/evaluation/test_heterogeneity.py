"""Heterogeneity against statsmodels; the permutation test's level and power by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import roc_auc_score
from statsmodels.stats.meta_analysis import combine_effects

from eosin.errors import PredictionsError
from eosin.evaluation.heterogeneity import _i2_interval, heterogeneity, interaction_test


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.5])
def test_heterogeneity_equals_statsmodels(spread: float) -> None:
    rng = np.random.default_rng(1)
    error = rng.uniform(0.05, 0.2, 9)
    effect = 0.8 + rng.normal(0, error) + rng.normal(0, spread, 9)
    with np.errstate(invalid="ignore"):  # statsmodels takes roots of a negative tau2
        oracle = combine_effects(effect, error**2, method_re="dl")
    own = heterogeneity(effect, error)
    assert own.q == pytest.approx(oracle.q)
    assert own.df == oracle.df
    assert own.p == pytest.approx(oracle.test_homogeneity().pvalue)
    assert own.i2 == pytest.approx(max(0, oracle.i2))
    assert own.tau2 == pytest.approx(max(0, oracle.tau2))
    assert own.fixed == pytest.approx(oracle.mean_effect_fe)
    assert own.fixed_se == pytest.approx(oracle.sd_eff_w_fe)
    if oracle.tau2 > 0:
        assert own.random == pytest.approx(oracle.mean_effect_re)
        assert own.random_se == pytest.approx(oracle.sd_eff_w_re)
    assert own.i2_low <= own.i2 <= own.i2_high
    assert own.note == ""


def test_i2_interval_of_a_published_example() -> None:
    """Aspirin after infarction (Fleiss 1993, 7 trials): R's meta prints I^2 = 39.7% [0.0%; 74.6%] for Q = 9.95."""
    assert pytest.approx(0.397, abs=5e-4) == (9.95 - 6) / 9.95
    assert _i2_interval(9.95, 6) == pytest.approx((0, 0.746), abs=5e-4)


def test_few_or_broken_sites() -> None:
    assert "only 2 sites" in heterogeneity([0.1, 0.2], [0.1, 0.1]).note
    assert heterogeneity([0.1, 0.1], [0.1, 0.1]).i2 == 0
    with pytest.raises(PredictionsError, match="k >= 2 sites"):
        heterogeneity([0.1], [0.1])
    with pytest.raises(PredictionsError, match="above 0"):
        heterogeneity([0.1, 0.2], [0.1, 0.0])


def sites(
    rng: np.random.Generator, *, worse: float = 0.0, patients: int = 24, rows: int = 4
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Strongly clustered rows: the score's noise is mostly the patient's; half the patients are sick."""
    patient = np.repeat(np.arange(patients), rows)
    site = patient * 3 // patients
    y = (patient % 2).astype(np.int64)
    signal = np.where(site == 2, 1.5 - worse, 1.5)
    score = signal * y + rng.normal(0, 1, patients)[patient] + rng.normal(0, 0.3, len(y))
    return y, 1 / (1 + np.exp(-score)), site, patient


def test_type_one_error_holds_for_patients_and_not_for_rows() -> None:
    rng = np.random.default_rng(0)
    rejected = {"patients": 0, "rows": 0}
    for seed in range(150):
        y, p, site, patient = sites(rng)
        for name, unit in (("patients", patient), ("rows", np.arange(len(y)))):
            rejected[name] += interaction_test(y, p, site, unit, permutations=99, seed=seed).p <= 0.05
    assert rejected["patients"] <= 16  # binomial(150, 0.05): P(> 15) = 0.004
    assert rejected["rows"] >= 40


def test_power_where_one_site_is_worse() -> None:
    y, p, site, patient = sites(np.random.default_rng(1), worse=3, patients=120)
    found = interaction_test(y, p, site, patient, permutations=199)
    assert found.p <= 0.01
    assert (found.scheme, found.levels) == ("between clusters", 3)


def test_p_equals_full_enumeration() -> None:
    """Four sick and four healthy patients on two sites: all 36 labellings can be listed."""
    rng = np.random.default_rng(5)
    y = np.repeat([0, 1], 4)
    p = rng.random(8)
    site = np.array([0, 0, 1, 1, 0, 0, 1, 1])

    def spread(level: npt.NDArray[np.int64]) -> float:
        values = [roc_auc_score(y[level == k], p[level == k]) for k in (0, 1)]
        return float(np.var(values))

    observed, beyond, total = spread(site), 0, 0
    for a, b in itertools.product(itertools.combinations(range(4), 2), repeat=2):
        level = np.ones(8, dtype=int)
        level[list(a)] = 0
        level[[4 + k for k in b]] = 0
        beyond += spread(level) >= observed - 1e-12
        total += 1
    found = interaction_test(y, p, site, np.arange(8), permutations=4999)
    assert found.p == pytest.approx(beyond / total, abs=0.03)


def test_patients_on_several_scanners_are_permuted_within() -> None:
    rng = np.random.default_rng(2)
    patient = np.tile(np.arange(80), 2)
    y = np.tile(np.arange(80) % 2, 2)
    base = np.tile(rng.normal(0, 1, 80) + 1.5 * (np.arange(80) % 2), 2)
    scanner = np.repeat(["x", "y"], 80)
    same = 1 / (1 + np.exp(-(base + rng.normal(0, 0.2, 160))))
    broken = np.where(scanner == "y", rng.permutation(same), same)
    stable = interaction_test(y, same, scanner, patient, permutations=199)
    assert stable.scheme == "within clusters"
    assert stable.p > 0.05
    assert interaction_test(y, broken, scanner, patient, permutations=199).p <= 0.01


def test_a_shift_shows_in_ba_and_not_in_auroc() -> None:
    y, p, site, patient = sites(np.random.default_rng(3), patients=150)
    shifted = 1 / (1 + np.exp(-(np.log(p / (1 - p)) - 0.75 + np.where(site == 1, 2.5, 0))))
    assert interaction_test(y, shifted, site, patient, metric="ba", permutations=199).p <= 0.01


def test_levels_without_a_value_are_left_out_and_named() -> None:
    y, p, site, patient = sites(np.random.default_rng(4), patients=60)
    names = np.where((site == 1) & (y == 1), "empty", np.array(["a", "b", "c"])[site])
    found = interaction_test(y, p, names, patient, permutations=49)
    assert found.levels == 2
    assert found.note.endswith("b, empty")
    with pytest.raises(PredictionsError, match="at least two"):
        interaction_test(y, p, np.where(y == 1, "s", "h"), patient)
