"""Is acting on the score worth it? Decision curves: the net benefit of a model against treating all or nobody.

Vickers and Elkin 2006 (Med Decis Making 26:565). A threshold t is also the exchange rate of harms: acting at t means
that one missed positive is as bad as (1 - t) / t needless actions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from eosin.errors import PredictionsError
from eosin.evaluation.inputs import check_binary
from eosin.evaluation.sums import Floats, resampled_sums
from eosin.evaluation.weighted import ratio


def decision_curve(
    y: npt.ArrayLike,
    p: npt.ArrayLike,
    *,
    thresholds: npt.ArrayLike | None = None,
    prevalence: float | None = None,
    cluster: npt.ArrayLike | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the net benefit at each threshold, with cluster-bootstrap intervals.

    NB(t) = sensitivity * prevalence - (1 - specificity) * (1 - prevalence) * t / (1 - t), a row being acted on when
    p >= t; with the sample's own prevalence this is TP/n - FP/n * t/(1 - t).

    Args:
        y: (n,) 0/1.
        p: (n,) P(positive), calibrated: a threshold is read as a probability.
        thresholds: in (0, 1), ascending; 0.01, 0.02 ... 0.99 when None.
        prevalence: of the population meant, where the sample was enriched for positives; the sample's own when None.
        cluster: (n,) patient of each row; None: rows are resampled as independent.
        resamples: bootstrap resamples.
        level: of the intervals.
        seed: of the bootstrap.

    Returns:
        One row a threshold: threshold, net_benefit, low, high, treat_all, treat_none, gain (over the better of the
        two), gain_low, gain_high, acted_on (share of rows), n, clusters.

    Raises:
        PredictionsError: bad scores, a threshold or a prevalence outside (0, 1).
    """
    labels, scores = check_binary(y, p)
    t = _thresholds(thresholds, prevalence)
    positive = labels.astype(np.float64)[:, None]
    acted = (scores[:, None] >= t).astype(np.float64)
    columns = np.hstack([acted * positive, acted * (1 - positive), positive, 1 - positive])
    drawn, clusters = resampled_sums(columns, cluster, y=labels, resamples=resamples, seed=seed)
    benefit, treat_all = _net_benefit(columns.sum(0, keepdims=True), t, prevalence)
    each, each_all = _net_benefit(drawn, t, prevalence)
    gain = benefit - np.maximum(treat_all, 0)
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.nanquantile(each, tails, axis=0)
    gain_low, gain_high = np.nanquantile(each - np.maximum(each_all, 0), tails, axis=0)
    return pd.DataFrame(
        {
            "threshold": t,
            "net_benefit": benefit[0],
            "low": low,
            "high": high,
            "treat_all": treat_all[0],
            "treat_none": 0.0,
            **{"gain": gain[0], "gain_low": gain_low, "gain_high": gain_high},
            "acted_on": acted.mean(0),
            "n": len(labels),
            "clusters": clusters,
        }
    )


def _thresholds(thresholds: npt.ArrayLike | None, prevalence: float | None) -> Floats:
    """Return the thresholds (T,), 0.01, 0.02 ... 0.99 when None; they and the prevalence are checked."""
    if prevalence is not None and not 0 < prevalence < 1:
        raise PredictionsError(f"prevalence is {prevalence:g}; it is a fraction between 0 and 1")
    t = np.arange(1, 100) / 100 if thresholds is None else np.atleast_1d(np.asarray(thresholds, dtype=np.float64))
    if not ((t > 0) & (t < 1)).all():
        raise PredictionsError("a decision threshold lies strictly between 0 and 1: it is the odds of harm to benefit")
    return t


def _net_benefit(sums: Floats, t: Floats, prevalence: float | None) -> tuple[Floats, Floats]:
    """Return net benefit of model and of treating all, each (B, T), from sums (B, 2 T + 2)."""
    true, false = sums[:, : len(t)], sums[:, len(t) : 2 * len(t)]
    positives, negatives = sums[:, -2:-1], sums[:, -1:]
    share = ratio(positives, positives + negatives) if prevalence is None else np.full_like(positives, prevalence)
    odds = t / (1 - t)
    model = ratio(true, positives) * share - ratio(false, negatives) * (1 - share) * odds
    return model, share - (1 - share) * odds
