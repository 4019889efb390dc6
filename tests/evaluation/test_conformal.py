"""Conformal sets: the finite-sample promise by simulation, and its closed forms."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
import pytest
import scipy.special

from eosin.errors import PredictionsError
from eosin.evaluation.conformal import coverage_table, split_conformal

Sample = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]


def draw(n: int, rng: np.random.Generator, *, blur: float = 1.0) -> Sample:
    """Labels and probabilities of a model whose logits are `blur` times too sharp."""
    logits = rng.normal(0, 1.5, (n, 3))
    truth = scipy.special.softmax(logits, axis=1)
    y = (rng.random(n)[:, None] > truth.cumsum(1)).sum(1)
    return y, scipy.special.softmax(blur * logits, axis=1)


@pytest.mark.parametrize(("n", "alpha"), [(19, 0.1), (50, 0.2), (30, 0.1)])
def test_coverage_is_the_exact_rank_over_n_plus_1(n: int, alpha: float) -> None:
    rng = np.random.default_rng(n)
    hits = []
    for _ in range(400):
        y, p = draw(n + 50, rng, blur=3)
        found = split_conformal(p[:n], y[:n], p[n:], alpha=alpha)
        hits.append(found.sets[np.arange(50), y[n:]].mean())
    exact = np.ceil((n + 1) * (1 - alpha)) / (n + 1)
    assert exact >= 1 - alpha
    assert np.mean(hits) == pytest.approx(exact, abs=0.016)
    assert np.mean(np.array(hits)) > 1 - alpha - 0.016
    lower = split_conformal(p[:n], y[:n], p[n:], alpha=alpha).calibration["coverage_p05"][0]
    wide = [c for c in _exact_coverages(n, alpha)]
    assert np.mean(np.array(wide) >= lower) == pytest.approx(0.95, abs=0.02)


def _exact_coverages(n: int, alpha: float) -> npt.NDArray[np.float64]:
    """Coverage given the calibration set is the rank-th order statistic of n uniforms."""
    rank = int(np.ceil((n + 1) * (1 - alpha)))
    return np.sort(np.random.default_rng(0).random((4000, n)), axis=1)[:, rank - 1]


def test_threshold_is_the_order_statistic_by_hand() -> None:
    p_true = np.array([0.9, 0.5, 0.8, 0.3, 0.7, 0.6, 0.95, 0.4, 0.2])
    found = split_conformal(p_true, np.ones(9, dtype=int), [0.85, 0.5, 0.1], alpha=0.2)
    assert found.calibration["rank"][0] == 8  # ceil(10 * 0.8)
    assert found.calibration["threshold"][0] == pytest.approx(0.7)
    np.testing.assert_array_equal(found.sets, [[False, True], [True, True], [True, False]])


def test_one_threshold_fails_a_bad_site_and_its_own_does_not() -> None:
    rng = np.random.default_rng(1)
    per_site: dict[str, list[float]] = {"pooled": [], "own": []}
    for _ in range(60):
        good, bad = draw(700, rng, blur=1), draw(300, rng, blur=-1)
        y, p = np.concatenate([good[0], bad[0]]), np.vstack([good[1], bad[1]])
        site = np.array(["good"] * 700 + ["bad"] * 300)
        cal = rng.random(1000) < 0.5
        for name, sites in (("pooled", (None, None)), ("own", (site[cal], site[~cal]))):
            found = split_conformal(p[cal], y[cal], p[~cal], site_cal=sites[0], site_test=sites[1])
            table = coverage_table(y[~cal], found.sets, site=site[~cal], resamples=2).set_index("site")
            per_site[name].append(table.loc["bad", "coverage"])
    assert np.mean(per_site["pooled"]) < 0.85
    assert np.mean(per_site["own"]) == pytest.approx(0.9, abs=0.015)


def test_small_sites_are_flagged_and_get_every_class() -> None:
    y, p = draw(508, np.random.default_rng(2))
    site = np.array(["large"] * 500 + ["tiny"] * 8)
    found = split_conformal(p, y, p[-4:], site_cal=site, site_test=site[-4:])
    table = found.calibration.set_index("site")
    assert found.sets.all()
    assert np.isinf(table.loc["tiny", "threshold"])
    assert "9 are the least" in table.loc["tiny", "flag"]
    assert table.loc["large", "flag"] == ""
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [row["threshold"] is None for row in plain["calibration"]] == [False, True]
    few = split_conformal(p[:20], y[:20], p)
    assert "few calibration rows" in few.calibration["flag"][0]


def test_least_number_of_rows_is_enough() -> None:
    y, p = draw(9, np.random.default_rng(3))
    assert np.isfinite(split_conformal(p, y, p).calibration["threshold"][0])
    assert np.isinf(split_conformal(p[:8], y[:8], p).calibration["threshold"][0])


def test_coverage_table_counts_by_hand() -> None:
    sets = np.array([[True, False], [True, True], [False, False], [False, True]])
    table = coverage_table([0, 1, 1, 0], sets, site=["a", "a", "b", "b"], cluster=["p", "q", "r", "r"], resamples=100)
    assert list(table["site"]) == ["all", "a", "b"]
    np.testing.assert_allclose(table["coverage"], [0.5, 1, 0])
    np.testing.assert_allclose(table["mean_size"], [1, 1.5, 0.5])
    np.testing.assert_allclose(table["empty"], [0.25, 0, 0.5])
    np.testing.assert_allclose(table["single"], [0.5, 0.5, 0.5])
    assert list(table["clusters"]) == [3, 2, 1]
    assert "clusters" in table["flag"][0]


def test_bad_arguments_are_named() -> None:
    y, p = draw(40, np.random.default_rng(4))
    site = np.repeat(["a", "b"], 20)
    with pytest.raises(PredictionsError, match="no calibration rows for the sites c"):
        split_conformal(p, y, p, site_cal=site, site_test=np.where(site == "b", "c", "a"))
    with pytest.raises(PredictionsError, match="both or neither"):
        split_conformal(p, y, p, site_cal=site)
    with pytest.raises(PredictionsError, match="alpha"):
        split_conformal(p, y, p, alpha=1.0)
    with pytest.raises(PredictionsError, match="classes"):
        split_conformal(p, y, p[:, 0])
    with pytest.raises(PredictionsError, match="sets have shape"):
        coverage_table([0, 3], np.ones((2, 3), dtype=bool))
