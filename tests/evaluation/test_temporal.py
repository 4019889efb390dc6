"""Windows, trend and alarm against statsmodels, scikit-learn and simulated decay."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
import pytest
import statsmodels.api as sm
from sklearn.metrics import roc_auc_score

from eosin.errors import PredictionsError
from eosin.evaluation.temporal import first_alarm, temporal_performance, weighted_slope

START = np.datetime64("2022-01-01")
Data = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.datetime64], npt.NDArray[np.int64]]


def decay(*, loss: float = 0.0, broken_from: int | None = None, seed: int = 0, patients: int = 480) -> Data:
    """Four years, one patient every three days; the signal fades by `loss` a year, or breaks on a day."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), 4)
    day = np.repeat((np.arange(patients) * 1460) // patients, 4)
    y = (rng.random(len(day)) < 0.4).astype(np.int64)
    signal = 2.0 - loss * day / 365.25
    if broken_from is not None:
        signal = np.where(day >= broken_from, 0.2, 2.0)
    score = signal * (y - 0.5) + rng.normal(0, 1, len(day)) + rng.normal(0, 0.3, patients)[patient]
    return y, 1 / (1 + np.exp(-score)), START + day, patient


def test_windows_equal_scikit_learn() -> None:
    y, p, date, patient = decay()
    found = temporal_performance(y, p, date, patient, window_days=365, resamples=50)
    assert found.windows["n"].sum() == len(y)
    for _, row in found.windows.iterrows():
        mine = (date >= np.datetime64(row["start"])) & (date < np.datetime64(row["end"]))
        assert row["point"] == pytest.approx(roc_auc_score(y[mine], p[mine]))
        assert row["n"] == mine.sum()
        assert row["clusters"] == len(np.unique(patient[mine]))
        assert row["low"] <= row["point"] <= row["high"]


def test_slope_equals_weighted_least_squares() -> None:
    rng = np.random.default_rng(1)
    x, v, w = rng.random(7), rng.random((3, 7)), rng.random(7)
    oracle = [sm.WLS(row, sm.add_constant(x), weights=w).fit().params[1] for row in v]
    np.testing.assert_allclose(weighted_slope(x, v, w), oracle)


def test_trend_of_windows_is_their_regression() -> None:
    y, p, date, patient = decay(loss=0.4)
    found = temporal_performance(y, p, date, patient, window_days=180, resamples=300)
    windows = found.windows[found.windows["flag"] == ""]
    years = (windows["start"] - windows["start"].iloc[0]).dt.days / 365.25
    fit = sm.WLS(windows["point"], sm.add_constant(years), weights=windows["se"] ** -2).fit()
    assert found.trend.point == pytest.approx(fit.params.iloc[1])
    assert found.trend.high < 0
    assert found.trend.clusters == 480


def test_a_stable_model_has_no_trend_and_no_alarm() -> None:
    y, p, date, patient = decay(seed=2)
    found = temporal_performance(y, p, date, patient, window_days=120, resamples=300)
    assert found.trend.low < 0 < found.trend.high
    assert first_alarm(found.windows, reference=roc_auc_score(y, p)) is None


def test_the_alarm_is_the_first_broken_window() -> None:
    y, p, date, patient = decay(broken_from=720)
    windows = temporal_performance(y, p, date, patient, window_days=90, resamples=300).windows
    alarm = first_alarm(windows, reference=0.92, margin=0.05)
    assert alarm == START + 720
    assert windows.set_index("start").loc[alarm, "high"] < 0.92 - 0.05
    assert (windows[windows["start"] < alarm]["high"] >= 0.87).all()
    assert first_alarm(windows, reference=0.92, margin=0.6) is None
    with pytest.raises(PredictionsError, match="margin"):
        first_alarm(windows, reference=0.92, margin=-0.1)


def test_errors_alarm_upwards() -> None:
    y, p, date, patient = decay(broken_from=720)
    found = temporal_performance(y, p, date, patient, metric="brier", window_days=180, resamples=200)
    alarm = first_alarm(found.windows, reference=0.13, margin=0.02)
    assert alarm == START + 720
    assert found.trend.point > 0
    assert found.windows.set_index("start").loc[alarm, "low"] > 0.15


def test_rolling_windows_overlap() -> None:
    y, p, date, patient = decay()
    found = temporal_performance(y, p, date, patient, window_days=180, step_days=90, resamples=50)
    assert (found.windows["start"].diff().dropna().dt.days == 90).all()
    assert found.windows["n"].sum() > 1.8 * len(y)
    assert found.windows["end"].iloc[-1] > np.datetime64(date.max())


def test_small_windows_are_flagged_and_cannot_alarm() -> None:
    y, p, date, patient = decay(patients=60, broken_from=0)
    found = temporal_performance(y, p, date, patient, window_days=60, resamples=100)
    assert (found.windows["flag"] != "").all()
    assert (found.windows["high"] < 0.99).any()
    assert first_alarm(found.windows, reference=0.99, margin=0) is None
    assert np.isnan(found.trend.point)
    assert "a trend needs 3" in found.trend.note
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["trend"]["point"] is None
    assert plain["windows"][0]["start"] == "2022-01-01"


def test_empty_windows_are_skipped() -> None:
    y, p, date, patient = decay()
    gap = (date < START + 400) | (date >= START + 800)
    found = temporal_performance(y[gap], p[gap], date[gap], patient[gap], window_days=100, resamples=30)
    assert (found.windows["n"] > 0).all()
    assert len(found.windows) == 4 + 7


def test_dates_as_text_are_the_same() -> None:
    y, p, date, patient = decay()
    one, two = (temporal_performance(y, p, d, patient, window_days=365, resamples=30) for d in (date, date.astype(str)))
    np.testing.assert_array_equal(one.windows["low"], two.windows["low"])


def test_bad_dates_and_windows_are_named() -> None:
    y, p, date, patient = decay()
    text = date.astype(str).astype(object)
    with pytest.raises(PredictionsError, match="cannot be read"):
        temporal_performance(y, p, np.where(np.arange(len(y)) == 3, "soon", text), patient)
    with pytest.raises(PredictionsError, match="no date"):
        temporal_performance(y, p, np.where(np.arange(len(y)) == 3, None, text), patient)
    with pytest.raises(PredictionsError, match="gap"):
        temporal_performance(y, p, date, patient, step_days=100)
    with pytest.raises(PredictionsError, match="windows of 1 days"):
        temporal_performance(y, p, date, patient, window_days=1)
