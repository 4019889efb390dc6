"""Metrics as functions of row weights: one resample of the bootstrap is one vector of weights.

Two shapes cover all: functions of weighted sums (`LinearMetric`) and of the weighted ranking (`RankMetric`). Both
restate themselves over clusters, and take a batch of weightings in one call. Undefined values are NaN.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import numpy.typing as npt
from scipy import sparse

from eosin.errors import PredictionsError
from eosin.evaluation.bootstrap import ClusterMetric, Codes, Values, Weights

DENSE_CELLS = 5_000_000
RULES = ("youden", "balanced_accuracy", "sensitivity>=X", "specificity>=X")
TIE = 1e-12


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class LinearMetric:
    """finish(weights @ terms), for numbers that depend on the rows through weighted sums only.

    Attributes:
        terms: (n, m) what each row adds to each of m sums; dense, or sparse rows.
        finish: (B, m) sums -> (B,) values.
    """

    terms: npt.NDArray[np.float64] | sparse.csr_array
    finish: Callable[[Values], Values]

    def __call__(self, weights: Weights, /) -> Values:
        """Return (B,) values for weights (B, n)."""
        return self.finish(np.asarray(weights @ self.terms, dtype=np.float64))

    def by_cluster(self, codes: Codes, clusters: int) -> LinearMetric:
        """Return the same metric over cluster counts: the rows of a cluster are summed once for all."""
        belongs = sparse.csr_array((np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(clusters, len(codes)))
        if isinstance(self.terms, np.ndarray):
            return replace(self, terms=belongs @ self.terms)
        total = sparse.csr_array(belongs @ self.terms)
        rows, columns = cast(tuple[int, int], total.shape)
        return replace(self, terms=total.toarray() if rows * columns <= DENSE_CELLS else total)


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class RankMetric:
    """A number of the weighted ranking at G cut-offs, which need not be distinct scores of all rows.

    Attributes:
        positives: (P,) index of each positive row's weight, highest score first.
        negatives: (N,) index of each negative row's weight, highest score first.
        tp_at: (G,) positives at or above each cut-off, cut-offs descending.
        fp_above: (G,) negatives strictly above it.
        fp_at: (G,) negatives at or above it.
        finish: tp (B, G), fp above (B, G), fp at (B, G), all positives (B, 1), all negatives (B, 1) -> (B,).
    """

    positives: npt.NDArray[np.intp]
    negatives: npt.NDArray[np.intp]
    tp_at: npt.NDArray[np.intp]
    fp_above: npt.NDArray[np.intp]
    fp_at: npt.NDArray[np.intp]
    finish: Callable[[Values, Values, Values, Values, Values], Values]

    def __call__(self, weights: Weights, /) -> Values:
        """Return (B,) values for weights (B, n)."""
        double = weights.astype(np.float64)
        positive, negative = _cumulated(double, self.positives), _cumulated(double, self.negatives)
        above, at = (np.take(negative, cutoffs, axis=1) for cutoffs in (self.fp_above, self.fp_at))
        return self.finish(np.take(positive, self.tp_at, axis=1), above, at, positive[:, -1:], negative[:, -1:])

    def by_cluster(self, codes: Codes, clusters: int) -> RankMetric:
        """Return the same metric over cluster counts: a row looks its weight up at its cluster."""
        return replace(self, positives=codes[self.positives], negatives=codes[self.negatives])


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class MeanMetric:
    """The mean of several metrics; NaN where one of them is."""

    parts: tuple[ClusterMetric, ...]

    def __call__(self, weights: Weights, /) -> Values:
        """Return (B,) values for weights (B, n)."""
        return np.mean([part(weights) for part in self.parts], axis=0)

    def by_cluster(self, codes: Codes, clusters: int) -> MeanMetric:
        """Return the mean of the parts over cluster counts."""
        parts = [part.by_cluster(codes, clusters) for part in self.parts]
        return MeanMetric(parts=tuple(part for part in parts if isinstance(part, ClusterMetric)))


def mean_metric(terms: npt.NDArray[np.float64]) -> LinearMetric:
    """Return the weighted mean of one number a row, terms (n,)."""
    return LinearMetric(terms=np.column_stack([terms, np.ones(len(terms))]), finish=lambda s: ratio(s[:, 0], s[:, 1]))


def confusion_metric(y: Codes, calls: Codes, classes: int, finish: Callable[[Values], Values]) -> LinearMetric:
    """Return a function of the confusion table; finish takes tables (B, C, C), rows true, columns predicted."""
    cells = sparse.csr_array((np.ones(len(y)), (np.arange(len(y)), y * classes + calls)), shape=(len(y), classes**2))
    return LinearMetric(terms=cells, finish=lambda sums: finish(sums.reshape(-1, classes, classes)))


def auroc_metric(y: npt.NDArray[np.integer], p: Values) -> RankMetric:
    """Return the area under the ROC curve: P(score of a positive > of a negative), ties one half."""

    def finish(tp: Values, above: Values, at: Values, positives: Values, negatives: Values) -> Values:
        gained = np.diff(tp, axis=1, prepend=0.0)
        beaten = np.einsum("bg,bg->b", gained, 2 * negatives - above - at) / 2
        return ratio(beaten, (positives * negatives)[:, 0])

    return _ranked(y, p, np.unique(p[y == 1]), finish)


def average_precision_metric(y: npt.NDArray[np.integer], p: Values) -> RankMetric:
    """Return the average precision: the sum over cut-offs of (gain in recall) x precision; no interpolation."""

    def finish(tp: Values, above: Values, at: Values, positives: Values, negatives: Values) -> Values:
        gained = np.diff(tp, axis=1, prepend=0.0)
        precision = np.divide(tp, tp + at, out=np.zeros_like(tp), where=tp + at > 0)
        area = ratio(np.einsum("bg,bg->b", gained, precision), positives[:, 0])
        return np.where(negatives[:, 0] > 0, area, np.nan)

    return _ranked(y, p, np.unique(p[y == 1]), finish)


def threshold_metric(y: npt.NDArray[np.integer], p: Values, rule: str) -> RankMetric:
    """Return the threshold that `rule` chooses, as a number of the ranking; see `metrics.choose_threshold`.

    Raises:
        PredictionsError: an unknown rule.
    """
    scores = np.unique(p)
    wanted = re.fullmatch(r"(sensitivity|specificity)>=(0?\.\d+|0|1|1\.0*)", rule)
    if wanted is None and rule not in RULES[:2]:
        raise PredictionsError(f"unknown threshold rule {rule!r}; choose {', '.join(RULES)} with X in 0-1")
    middles = (scores[:-1] + scores[1:]) / 2
    middles = np.where(middles > scores[:-1], middles, scores[1:])
    thresholds = np.concatenate([[np.nextafter(1.0, 2.0)], middles[::-1], [0.0]])

    def finish(tp: Values, above: Values, at: Values, positives: Values, negatives: Values) -> Values:
        sensitivity = np.pad(ratio(tp, positives), ((0, 0), (1, 0)))
        specificity = 1 - np.pad(ratio(at, negatives), ((0, 0), (1, 0)))
        if wanted is None:
            both = sensitivity + specificity
            best = both >= both.max(axis=1, keepdims=True) - TIE
            chosen = np.where(best, -np.abs(thresholds - 0.5), -np.inf).argmax(axis=1)
        elif wanted[1] == "sensitivity":
            chosen = (sensitivity >= float(wanted[2]) - TIE).argmax(axis=1)
        else:
            chosen = thresholds.size - 1 - (specificity >= float(wanted[2]) - TIE)[:, ::-1].argmax(axis=1)
        return np.where((positives * negatives)[:, 0] > 0, thresholds[chosen], np.nan)

    return _ranked(y, p, scores, finish)


def ratio(top: Values, bottom: Values) -> Values:
    """Return top / bottom, NaN where the bottom is 0."""
    top, bottom = np.broadcast_arrays(top, bottom)
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0)


def _ranked(
    y: npt.NDArray[np.integer],
    p: Values,
    cutoffs: Values,
    finish: Callable[[Values, Values, Values, Values, Values], Values],
) -> RankMetric:
    """Return the metric of the ranking of p (n,), where y == 1 is positive, at ascending cut-offs (G,)."""
    order = np.argsort(-p, kind="stable")
    positives, negatives = order[y[order] == 1], order[y[order] != 1]
    pos, neg = -p[positives], -p[negatives]
    down = -cutoffs[::-1]
    return RankMetric(
        positives=positives,
        negatives=negatives,
        tp_at=np.searchsorted(pos, down, side="right"),
        fp_above=np.searchsorted(neg, down, side="left"),
        fp_at=np.searchsorted(neg, down, side="right"),
        finish=finish,
    )


def _cumulated(weights: Values, rows: npt.NDArray[np.intp]) -> Values:
    """Return (B, len(rows) + 1) running sums of the rows' weights, from 0."""
    sums = np.zeros((len(weights), len(rows) + 1))
    np.cumsum(np.take(weights, rows, axis=1), axis=1, out=sums[:, 1:])
    return sums
