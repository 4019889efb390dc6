"""Risk-coverage curves against brute force and closed forms."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from eosin.errors import PredictionsError
from eosin.evaluation.selective import risk_coverage


def sample(n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = rng.random(n)
    return (rng.random(n) < p).astype(int), p


def test_area_equals_brute_force() -> None:
    y, p = sample()
    found = risk_coverage(y, p, resamples=20)
    wrong = ((p >= 0.5) != y)[np.argsort(-np.abs(p - 0.5))]
    assert found.aurc.point == pytest.approx(np.mean([wrong[:k].mean() for k in range(1, 401)]))
    ideal = np.sort(wrong)
    best = np.mean([ideal[:k].mean() for k in range(1, 401)])
    assert found.excess == pytest.approx(found.aurc.point - best)


def test_equal_confidences_count_as_the_mean_over_their_orders() -> None:
    y, p = np.array([1, 0, 1, 0, 1]), np.array([0.9, 0.8, 0.8, 0.8, 0.7])
    wrong = (p >= 0.5) != y
    areas = []
    for order in itertools.permutations([1, 2, 3]):
        errors = wrong[[0, *order, 4]]
        areas.append(np.mean([errors[:k].mean() for k in range(1, 6)]))
    assert risk_coverage(y, p, resamples=10).aurc.point == pytest.approx(np.mean(areas))


def test_confidence_that_says_nothing_has_the_error_rate_as_area() -> None:
    y, _ = sample()
    found = risk_coverage(y, np.full(400, 0.7), resamples=50)
    assert found.aurc.point == pytest.approx((y == 0).mean())
    assert len(found.table) == 1
    assert found.table["coverage"][0] == 1


def test_ideal_order_has_no_excess() -> None:
    p = np.array([0.95, 0.9, 0.05, 0.85, 0.6, 0.45])
    y = np.array([1, 1, 0, 1, 0, 1])
    found = risk_coverage(y, p, resamples=10)
    assert found.excess == pytest.approx(0, abs=1e-12)
    assert found.aurc.point == pytest.approx((1 / 5 + 2 / 6) / 6)


def test_table_rows_are_the_risk_of_what_is_kept() -> None:
    y, p = sample()
    table = risk_coverage(y, p, resamples=200).table
    confidence = np.abs(2 * p - 1)
    for _, row in table.iterrows():
        kept = confidence >= row["confidence"] - 1e-12
        assert kept.sum() == row["n"]
        assert row["risk"] == pytest.approx(((p >= 0.5) != y)[kept].mean())
        assert row["low"] - 1e-9 <= row["risk"] <= row["high"] + 1e-9
    assert table["coverage"].is_monotonic_increasing
    assert table["coverage"].iloc[-1] == 1
    assert len(table) == 100


def test_multiclass_of_two_columns_is_the_binary_case() -> None:
    y, p = sample()
    one, two = risk_coverage(y, p, resamples=20), risk_coverage(y, np.column_stack([1 - p, p]), resamples=20)
    assert one.aurc.point == pytest.approx(two.aurc.point)
    assert one.aurc.low == pytest.approx(two.aurc.low)


def test_other_threshold_measures_from_there() -> None:
    y, p = sample()
    found = risk_coverage(y, p, threshold=0.2, resamples=20)
    assert found.table["risk"].iloc[-1] == pytest.approx(((p >= 0.2) != y).mean())
    first = found.table.iloc[0]
    kept = np.where(p >= 0.2, (p - 0.2) / 0.8, (0.2 - p) / 0.2) >= first["confidence"] - 1e-12
    assert (p[kept] < 0.2).any()
    assert (p[kept] > 0.9).any()
    with pytest.raises(PredictionsError, match="threshold"):
        risk_coverage(y, p, threshold=1.0)


def test_interval_covers_the_expected_area() -> None:
    truth = np.mean([risk_coverage(*sample(seed=s), resamples=1).aurc.point for s in range(300, 380)])
    covered = 0
    for seed in range(30):
        found = risk_coverage(*sample(seed=seed), resamples=120).aurc
        covered += found.low <= truth <= found.high
    assert covered >= 25


def test_dictionary_is_plain() -> None:
    y, p = sample(60)
    found = risk_coverage(y, p, cluster=np.arange(60) // 2, resamples=30)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["aurc"]["clusters"] == 30
