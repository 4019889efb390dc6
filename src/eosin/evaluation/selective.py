"""Selective prediction: how wrong is the model on the rows it is surest of, if it may decline the others?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from eosin.errors import PredictionsError
from eosin.evaluation.bootstrap import bootstrap
from eosin.evaluation.inputs import check_binary, check_multiclass
from eosin.evaluation.interval import Interval
from eosin.evaluation.sums import Floats, resampled_sums
from eosin.evaluation.weighted import ratio

COVERAGES = np.arange(1, 101) / 100


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RiskCoverage:
    """A risk-coverage curve and its area.

    Attributes:
        table: one row per coverage: coverage (share kept, equal confidences kept together), n, confidence (the least
            kept), risk (error rate of the kept rows), low, high.
        aurc: mean risk over all coverages; the error rate for a confidence that says nothing.
        excess: aurc minus that of the ideal order, all errors last (E-AURC, Geifman et al. 2019).
    """

    table: pd.DataFrame
    aurc: Interval
    excess: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {"table": self.table.to_dict("records"), "aurc": self.aurc.to_dict(), "excess": self.excess}


def risk_coverage(
    y: npt.ArrayLike,
    p: npt.ArrayLike,
    *,
    threshold: float = 0.5,
    cluster: npt.ArrayLike | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> RiskCoverage:
    """Return error rate against share of rows kept, the surest first, with cluster-bootstrap intervals.

    AURC = (1/n) sum_k (errors among the k surest) / k (Geifman and El-Yaniv 2017); rows of equal confidence enter as
    in the mean over their orders, so that the order of the table does not matter. Confidence is the top probability
    (multiclass), or the distance of P(positive) from the threshold relative to the room on its side (binary; at 0.5
    the same order as the top probability).

    Args:
        y: (n,) class indices.
        p: (n,) P(positive) or (n, C) probabilities.
        threshold: of the binary decision.
        cluster: (n,) patient of each row; None: rows are resampled as independent.
        resamples: bootstrap resamples.
        level: of the intervals.
        seed: of the bootstrap.

    Raises:
        PredictionsError: bad scores, or a threshold outside (0, 1).
    """
    labels, wrong, confidence = _errors(y, p, threshold)
    n = len(wrong)
    order, expected = _expected_errors(wrong, confidence)
    units = np.arange(n) if cluster is None else np.asarray(cluster)

    def area(weights: npt.NDArray[np.floating]) -> Floats:
        each = weights[:, order]
        kept = np.cumsum(each, axis=1, dtype=np.float64)
        errors = np.cumsum(each * expected, axis=1, dtype=np.float64)
        return (each * ratio(errors, np.maximum(kept, 1))).sum(1) / kept[:, -1]

    aurc = bootstrap(area, units, y=labels, resamples=resamples, level=level, seed=seed)
    ideal = np.cumsum(np.sort(wrong)) / np.arange(1, n + 1)
    least = np.unique(np.quantile(confidence, 1 - COVERAGES, method="lower"))[::-1]
    keep = (confidence[:, None] >= least).astype(np.float64)
    columns = np.hstack([keep * wrong[:, None], keep])
    drawn, _ = resampled_sums(columns, cluster, y=labels, resamples=resamples, seed=seed)
    risks = ratio(drawn[:, : len(least)], drawn[:, len(least) :])
    low, high = np.nanquantile(risks, [(1 - level) / 2, (1 + level) / 2], axis=0)
    kept = keep.sum(0)
    table = pd.DataFrame(
        {
            "coverage": kept / n,
            "n": kept.astype(np.int64),
            "confidence": least,
            "risk": columns[:, : len(least)].sum(0) / kept,
            "low": low,
            "high": high,
        }
    )
    return RiskCoverage(table=table, aurc=aurc, excess=aurc.point - float(ideal.mean()))


def _expected_errors(wrong: Floats, confidence: Floats) -> tuple[npt.NDArray[np.intp], Floats]:
    """Return the order (n,) of falling confidence, and in it each row's error averaged over rows as sure as it."""
    order = np.argsort(-confidence, kind="stable")
    start = np.concatenate([[0], np.flatnonzero(np.diff(confidence[order])) + 1])
    sizes = np.diff(np.append(start, len(order)))
    return order, np.repeat(np.add.reduceat(wrong[order], start) / sizes, sizes)


def _errors(y: npt.ArrayLike, p: npt.ArrayLike, threshold: float) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    """Return (labels, wrong, confidence) (n,): 1.0 where the decision is wrong, and how sure it was."""
    if np.ndim(p) != 1:
        labels, scores = check_multiclass(y, p)
        return labels, (scores.argmax(1) != labels).astype(np.float64), scores.max(1)
    if not 0 < threshold < 1:
        raise PredictionsError(f"threshold is {threshold:g}; needed a value between 0 and 1")
    binary, positive = check_binary(y, p, both=False)
    called = positive >= threshold
    confidence = np.where(called, (positive - threshold) / (1 - threshold), (threshold - positive) / threshold)
    return binary.astype(np.int64), (called != (binary == 1)).astype(np.float64), confidence
