"""Does the model hold over time? The metric per window of acquisition dates, its trend, and the first alarm.

Train on what came before, evaluate what came after: the dates are of the rows that are scored. All windows see the
same resampled patients, so that the trend has an honest interval even where windows overlap or patients come back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from eosin.errors import PredictionsError
from eosin.evaluation.inputs import check_clusters, check_labels, check_same_rows
from eosin.evaluation.interval import Interval
from eosin.evaluation.subgroups import LOWER_IS_BETTER, describe, metric_rows, records, subset_values

Floats = npt.NDArray[np.float64]

DAYS_PER_YEAR = 365.25
MIN_WINDOWS = 3
MAX_WINDOWS = 500
ONE_DAY = np.timedelta64(1, "D")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Temporal:
    """A metric over time.

    Attributes:
        windows: start, end (exclusive), n, positives, clusters, metric, point, low, high, se, degenerate, flag.
        trend: change of the metric per year: regression over the windows that are large enough, weights 1/se^2.
    """

    windows: pd.DataFrame
    trend: Interval

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, dates as ISO text."""
        dated = self.windows.assign(**{k: self.windows[k].dt.strftime("%Y-%m-%d") for k in ("start", "end")})
        return {"windows": records(dated), "trend": self.trend.to_dict()}


def temporal_performance(
    y: npt.ArrayLike,
    p: npt.ArrayLike,
    date: npt.ArrayLike,
    cluster: npt.ArrayLike,
    *,
    metric: str = "auroc",
    threshold: float = 0.5,
    window_days: int = 90,
    step_days: int | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Temporal:
    """Return a metric per window of time with 95 % cluster-bootstrap intervals, and its trend.

    Args:
        y: (n,) class indices.
        p: (n,) P(positive) or (n, C) probabilities.
        date: (n,) acquisition date of each row: ISO text, datetime64 or datetime.
        cluster: (n,) patient of each row.
        metric: name of `METRICS`.
        threshold: of the binary decision.
        window_days: length of a window; the first begins on the first date.
        step_days: from one window to the next; `window_days` when None, less for rolling windows.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Raises:
        PredictionsError: bad scores, rows without a date, windows that make no sense.
    """
    labels = check_labels(y)
    days = _days(date, len(labels))
    starts = _starts(days, window_days, window_days if step_days is None else step_days)
    subsets = [np.flatnonzero((days >= start) & (days < start + window_days)) for start in starts]
    starts = starts[[len(rows) > 0 for rows in subsets]]
    subsets = [rows for rows in subsets if len(rows)]
    points, draws = subset_values(
        labels,
        p,
        cluster,
        subsets,
        metrics=[metric],
        threshold=threshold,
        strata=labels,
        resamples=resamples,
        seed=seed,
    )
    facts = pd.DataFrame([describe(labels, p, cluster, rows) for rows in subsets])
    facts.insert(0, "start", starts * ONE_DAY + np.datetime64(0, "D"))
    facts.insert(1, "end", facts["start"] + pd.Timedelta(days=window_days))
    table = metric_rows(facts, metric, points[metric], draws[metric], 0.95)
    units = check_clusters(cluster, len(labels))
    trend = _trend(table, draws[metric], n=len(labels), clusters=int(units.max()) + 1)
    return Temporal(windows=table, trend=trend)


def first_alarm(windows: pd.DataFrame, *, reference: float, margin: float = 0.05) -> np.datetime64 | None:
    """Return the first day of the first window that is worse than the reference by more than the margin, or None.

    Worse: the whole interval lies below reference - margin (above reference + margin for errors such as "brier").
    Flagged windows cannot alarm. Many windows are many looks: with a margin of 0 and a stable model one window in
    forty alarms by chance.

    Args:
        windows: of `temporal_performance`.
        reference: the value at validation that is to be held.
        margin: the loss that would not matter, fixed before looking.

    Raises:
        PredictionsError: a margin below 0.
    """
    if not margin >= 0:
        raise PredictionsError(f"the margin is {margin:g}; it is a loss that would not matter, 0 or more")
    error = windows["metric"].isin(list(LOWER_IS_BETTER)).to_numpy()
    low, high = windows["low"].to_numpy(), windows["high"].to_numpy()
    beyond = np.where(error, low > reference + margin, high < reference - margin) & (windows["flag"] == "").to_numpy()
    starts = windows["start"].to_numpy()[beyond]
    return starts.min().astype("datetime64[D]") if len(starts) else None


def weighted_slope(x: npt.ArrayLike, values: Floats, weight: npt.ArrayLike) -> Floats:
    """Return the least-squares slope (...,) of values (..., k) on x (k,) with weights (k,).

    slope = sum w (x - mean) (v - mean) / sum w (x - mean)^2, means weighted by w.
    """
    at, w = np.asarray(x, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    centred = at - (w * at).sum() / w.sum()
    return (w * centred * values).sum(-1) / (w * centred**2).sum()


def _days(date: npt.ArrayLike, n: int) -> npt.NDArray[np.int64]:
    """Return days since 1970 of each row."""
    values = np.asarray(date)
    check_same_rows("date", len(values), n)
    try:
        parsed = pd.to_datetime(pd.Series(values)).to_numpy()
    except (ValueError, TypeError) as error:
        raise PredictionsError(f"a date cannot be read ({error}); write dates as 2024-03-31") from error
    missing = np.flatnonzero(np.isnat(parsed))
    if missing.size:
        raise PredictionsError(
            f"{missing.size} of {n} rows have no date (first: row {missing[0]}); leave these rows out"
        )
    return parsed.astype("datetime64[D]").astype(np.int64)


def _starts(days: npt.NDArray[np.int64], window: int, step: int) -> npt.NDArray[np.int64]:
    """Return the first day of every window; the last one holds the last date."""
    if window < 1 or step < 1 or step > window:
        raise PredictionsError(f"windows of {window} days every {step}; needed at least 1, and no gap between windows")
    count = 1 + max(0, -(-(int(days.max()) + 1 - int(days.min()) - window) // step))
    if count > MAX_WINDOWS:
        raise PredictionsError(
            f"{count} windows of {window} days every {step}; make them longer (at most {MAX_WINDOWS})"
        )
    return days.min() + step * np.arange(count)


def _trend(table: pd.DataFrame, draws: Floats, *, n: int, clusters: int) -> Interval:
    """Return the slope per year over the windows that are not flagged and have a standard error above 0."""
    usable = ((table["flag"] == "") & (table["se"] > 0)).to_numpy()
    nan = float("nan")
    point, low, high, resamples, degenerate, note = nan, nan, nan, len(draws), 0, ""
    if usable.sum() < MIN_WINDOWS:
        note = f"{usable.sum()} windows are large enough; a trend needs {MIN_WINDOWS}"
    else:
        years = table["start"].to_numpy()[usable].astype("datetime64[D]").astype(np.float64) / DAYS_PER_YEAR
        weight = table["se"].to_numpy()[usable] ** -2.0
        point = float(weighted_slope(years, table["point"].to_numpy()[usable], weight))
        slopes = weighted_slope(years, draws[:, usable], weight)
        slopes = slopes[np.isfinite(slopes)]
        degenerate = resamples - len(slopes)
        low, high = (float(v) for v in np.quantile(slopes, [0.025, 0.975])) if len(slopes) else (nan, nan)
        lost = int((~usable).sum())
        note = f"{lost} windows are too small and left out" if lost else ""
    return Interval(
        point=point,
        low=low,
        high=high,
        level=0.95,
        n=n,
        clusters=clusters,
        resamples=resamples,
        degenerate=degenerate,
        method="percentile",
        note=note,
    )
