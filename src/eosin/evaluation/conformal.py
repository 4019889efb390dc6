"""Prediction sets that hold the true class with a chosen probability: split conformal, per site where asked.

The score of a row is 1 - P(class) (Sadinle, Lei and Wasserman 2019; Vovk et al. 2005 for split and Mondrian). With n
calibration rows the threshold is the ceil((n + 1)(1 - alpha))-th smallest score, and a new row exchangeable with them
is covered with probability at least 1 - alpha. Two limits, stated in the table: averaged over calibration sets, not
for each (`coverage_p05`); and rows of one patient are not exchangeable one by one, so that with few patients the true
spread is wider than the table's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.stats

from eosin.errors import PredictionsError
from eosin.evaluation.bootstrap import bootstrap
from eosin.evaluation.inputs import check_binary, check_labels, check_multiclass, check_same_rows
from eosin.evaluation.weighted import mean_metric

Floats = npt.NDArray[np.float64]

ROUNDING = 1e-12
TOLERATED_SHORTFALL = 0.05
ALL_SITES = "all"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ConformalSets:
    """Prediction sets and how they were calibrated.

    Attributes:
        sets: (n, C) True where the class belongs to the row's set; binary tasks have C = 2.
        alpha: tolerated share of misses.
        calibration: one row per site: site, n, rank, threshold (on 1 - p; infinite = all classes), coverage_p05 (the
            coverage that 95 % of calibration sets of this size exceed), flag.
    """

    sets: npt.NDArray[np.bool_]
    alpha: float
    calibration: pd.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """Return alpha, the sizes and the calibration table as plain values; an infinite threshold is None."""
        size = self.sets.sum(1)
        sites = self.calibration.to_dict("records")
        return {
            "alpha": self.alpha,
            "n": len(self.sets),
            "mean_size": float(size.mean()),
            "empty": int((size == 0).sum()),
            "calibration": [
                {**s, "threshold": s["threshold"] if math.isfinite(s["threshold"]) else None} for s in sites
            ],
        }


def split_conformal(
    p_cal: npt.ArrayLike,
    y_cal: npt.ArrayLike,
    p_test: npt.ArrayLike,
    *,
    alpha: float = 0.1,
    site_cal: npt.ArrayLike | None = None,
    site_test: npt.ArrayLike | None = None,
) -> ConformalSets:
    """Return a set of classes for every test row that misses the truth with probability at most `alpha`.

    With sites (Mondrian) every site has its own threshold and the promise holds within each. A site with fewer than
    1/alpha - 1 calibration rows gets the set of all classes, and a flag.

    Args:
        p_cal: (m,) P(positive) or (m, C) of calibration rows that the model was not trained on.
        y_cal: (m,) their class indices.
        p_test: (n,) or (n, C) of the rows to predict.
        alpha: in (0, 1).
        site_cal: (m,) site of each calibration row; None: one threshold for all.
        site_test: (n,) site of each test row.

    Raises:
        PredictionsError: bad scores, sites for one side only, or a test site that was not calibrated.
    """
    if not 0 < alpha < 1:
        raise PredictionsError(f"alpha is {alpha:g}; it is the tolerated share of misses, between 0 and 1")
    labels, cal = _two_columns(y_cal, p_cal)
    unlabelled = np.zeros(len(np.atleast_1d(np.asarray(p_test))), dtype=np.int64)
    _, test = _two_columns(unlabelled, p_test)  # the scores are checked as those of calibration; labels are not known
    if cal.shape[1] != test.shape[1]:
        raise PredictionsError(f"calibrated on {cal.shape[1]} classes, asked for sets of {test.shape[1]}")
    if (site_cal is None) != (site_test is None):
        raise PredictionsError("sites were given for calibration or test alone; give both or neither")
    here = np.full(len(cal), ALL_SITES) if site_cal is None else np.asarray(site_cal, dtype=object)
    there = np.full(len(test), ALL_SITES) if site_test is None else np.asarray(site_test, dtype=object)
    check_same_rows("site_cal", len(here), len(cal))
    check_same_rows("site_test", len(there), len(test))
    unknown = sorted(map(str, set(there) - set(here)))
    if unknown:
        raise PredictionsError(
            f"no calibration rows for the sites {', '.join(unknown)}; calibrate them, or leave the sites out: "
            "then one threshold serves all, and the promise is for the mixture only"
        )
    score = 1 - cal[np.arange(len(cal)), labels]
    rows = []
    thresholds = np.empty(len(test))
    for site in pd.unique(here):
        rows.append({"site": site, **_threshold(score[here == site], alpha)})
        thresholds[there == site] = rows[-1]["threshold"]
    return ConformalSets(sets=1 - test <= thresholds[:, None] + ROUNDING, alpha=alpha, calibration=pd.DataFrame(rows))


def coverage_table(
    y: npt.ArrayLike,
    sets: npt.NDArray[np.bool_],
    *,
    site: npt.ArrayLike | None = None,
    cluster: npt.ArrayLike | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Return how often the sets held the truth, over all rows and per site, with cluster-bootstrap intervals.

    Args:
        y: (n,) class indices.
        sets: (n, C) of `split_conformal`.
        site: (n,) site of each row; None: one row for all.
        cluster: (n,) patient of each row; None: rows are resampled as independent.
        resamples: bootstrap resamples.
        level: of the intervals.
        seed: of the bootstrap.

    Returns:
        site ("all" first), n, clusters, coverage, low, high, mean_size, empty, single (shares of the rows), flag.

    Raises:
        PredictionsError: shapes that do not fit.
    """
    labels = check_labels(y)
    if sets.ndim != 2 or labels.min() < 0 or labels.max() >= sets.shape[1]:
        raise PredictionsError(f"sets have shape {sets.shape} for labels {labels.min()} to {labels.max()}")
    check_same_rows("sets", len(sets), len(labels))
    sites = np.full(len(labels), ALL_SITES) if site is None else np.asarray(site, dtype=object)
    check_same_rows("site", len(sites), len(labels))
    units = np.arange(len(labels)) if cluster is None else np.asarray(cluster)
    hit = sets[np.arange(len(labels)), labels].astype(np.float64)
    size = sets.sum(1)
    rows = []
    groups = [(ALL_SITES, np.ones(len(labels), dtype=bool))]
    groups += [] if site is None else [(name, sites == name) for name in pd.unique(sites)]
    for name, mine in groups:
        found = bootstrap(mean_metric(hit[mine]), units[mine], resamples=resamples, level=level, seed=seed)
        rows.append(
            {
                "site": name,
                "n": found.n,
                "clusters": found.clusters,
                "coverage": found.point,
                "low": found.low,
                "high": found.high,
                "mean_size": float(size[mine].mean()),
                "empty": float((size[mine] == 0).mean()),
                "single": float((size[mine] == 1).mean()),
                "flag": found.note,
            }
        )
    return pd.DataFrame(rows)


def _two_columns(y: npt.ArrayLike, p: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return labels (n,) and probabilities (n, C), a binary P(positive) spread over two columns."""
    if np.ndim(p) == 1:
        labels, positive = check_binary(y, p, both=False)
        return labels.astype(np.int64), np.column_stack([1 - positive, positive])
    return check_multiclass(y, p)


def _threshold(score: Floats, alpha: float) -> dict[str, Any]:
    """Return n, rank, threshold, coverage_p05 and flag of one site's calibration scores."""
    n = len(score)
    rank = math.ceil((n + 1) * (1 - alpha) - ROUNDING)
    if rank > n:
        least = math.ceil(1 / alpha - 1 - ROUNDING)
        flag = f"only {n} calibration rows, {least} are the least for alpha {alpha:g}: every class is in every set"
        return {"n": n, "rank": rank, "threshold": math.inf, "coverage_p05": 1.0, "flag": flag}
    p05 = float(scipy.stats.beta.ppf(0.05, rank, n + 1 - rank))
    few = f"few calibration rows: one set in twenty covers less than {p05:.2f}"
    return {
        "n": n,
        "rank": rank,
        "threshold": float(np.partition(score, rank - 1)[rank - 1]),
        "coverage_p05": p05,
        "flag": few if p05 < 1 - alpha - TOLERATED_SHORTFALL else "",
    }
