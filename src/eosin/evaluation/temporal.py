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
        windows: start, end (exclusive), n, positives, clusters, metric, point, low, high, se, degenerate, flag, alarm.
        trend: change of the metric per year: regression over the windows that are large enough, weights 1/se^2.
        alarm: start of the first window, among those large enough, whose interval lies wholly beyond the reference by
            more than the margin; None without one, or without a reference.
        reference: what the windows are held against.
        margin: the loss that would not matter, fixed before looking.
    """

    windows: pd.DataFrame
    trend: Interval
    alarm: np.datetime64 | None
    reference: float | None
    margin: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, dates as ISO text."""
        dated = self.windows.assign(**{k: self.windows[k].dt.strftime("%Y-%m-%d") for k in ("start", "end")})
        return {
            "windows": records(dated),
            "trend": self.trend.to_dict(),
            "alarm": None if self.alarm is None else str(self.alarm),
            "reference": self.reference,
            "margin": self.margin,
        }


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
    reference: float | None = None,
    margin: float = 0.05,
    resamples: int = 2000,
    seed: int = 0,
) -> Temporal:
    """Return a metric per window of time with 95 % cluster-bootstrap intervals, its trend and the first alarm.

    Many windows are many looks: with a margin of 0, one stable window in forty alarms by chance.

    Args:
        y: (n,) class indices.
        p: (n,) P(positive) or (n, C) probabilities.
        date: (n,) acquisition date of each row: ISO text, datetime64 or datetime.
        cluster: (n,) patient of each row.
        metric: name of `METRICS`.
        threshold: of the binary decision.
        window_days: length of a window; the first begins on the first date.
        step_days: from one window to the next; `window_days` when None, less for rolling windows.
        reference: value at validation that is to be held; None: no alarm.
        margin: loss below (above, for errors) the reference that would not matter.
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
    worse = 1 if metric in LOWER_IS_BETTER else -1
    near = table["low"] if worse == 1 else -table["high"]
    beyond = np.zeros(len(table), dtype=bool) if reference is None else (near > worse * reference + margin).to_numpy()
    table["alarm"] = beyond & (table["flag"] == "").to_numpy()
    first = facts["start"].to_numpy()[table["alarm"].to_numpy()]
    units = check_clusters(cluster, len(labels))
    return Temporal(
        windows=table,
        trend=_trend(table, draws[metric], n=len(labels), clusters=int(units.max()) + 1),
        alarm=first[0].astype("datetime64[D]") if len(first) else None,
        reference=reference,
        margin=margin,
    )


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
