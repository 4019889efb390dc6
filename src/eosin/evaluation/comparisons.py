"""Comparisons of two models, and what many comparisons cost.

DeLong and McNemar take the rows as independent; where patients have several rows, use `bootstrap.paired_difference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, chdtrc, ndtr, ndtri
from scipy.stats import rankdata

from eosin.errors import PredictionsError
from eosin.evaluation.bootstrap import Values, check_level
from eosin.evaluation.inputs import check_binary, check_labels, check_same_rows
from eosin.evaluation.interval import AsDict, Difference, Interval

EXACT_BELOW = 25
"""McNemar's test is exact when fewer pairs than this are discordant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class McNemar(AsDict):
    """McNemar's test of two models on the same rows.

    Attributes:
        only_a: rows that only the first model calls right.
        only_b: rows that only the second does.
        statistic: chi-squared with continuity correction, or the smaller count where the test is exact.
        p: two-sided.
        exact: True when the binomial distribution was used.
        n: rows.
    """

    only_a: int
    only_b: int
    statistic: float
    p: float
    exact: bool
    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Equivalence(AsDict):
    """A test of a difference against a margin that was fixed beforehand.

    Attributes:
        point: the difference a - b.
        low: lower end of the interval that decides; -inf where only the other end matters.
        high: upper end; inf where only the other end matters.
        margin: the margin, > 0.
        alpha: one-sided error of the test (of both tests, for TOST).
        p: p-value; of TOST the larger of the two.
        established: True when p < alpha, which is when the interval lies inside the margin.
    """

    point: float
    low: float
    high: float
    margin: float
    alpha: float
    p: float
    established: bool


@overload
def delong(y: npt.ArrayLike, p_a: npt.ArrayLike, p_b: None = None, *, level: float = 0.95) -> Interval: ...
@overload
def delong(y: npt.ArrayLike, p_a: npt.ArrayLike, p_b: npt.ArrayLike, *, level: float = 0.95) -> Difference: ...
def delong(
    y: npt.ArrayLike, p_a: npt.ArrayLike, p_b: npt.ArrayLike | None = None, *, level: float = 0.95
) -> Interval | Difference:
    """Return the AUROC of `p_a`, or the paired difference AUROC(a) - AUROC(b), with DeLong's variance.

    DeLong, DeLong & Clarke-Pearson 1988, computed by midranks (Sun & Xu 2014, algorithm 2) in O(n log n). The interval
    is the normal one, cut to [0, 1] for one model. Rows are taken as independent.

    Args:
        y: (n,) labels in {0, 1}, at least two of each.
        p_a: (n,) probabilities of the first model.
        p_b: (n,) probabilities of the second model on the same rows.
        level: of confidence.

    Raises:
        PredictionsError: unusable predictions, or fewer than two rows of a class.
    """
    check_level(level)
    labels, scores = check_binary(y, p_a)
    models = [scores] if p_b is None else [scores, check_binary(y, p_b)[1]]
    areas, covariance = delong_covariance(labels, np.stack(models))
    z = float(ndtri((1 + level) / 2))
    n = len(labels)
    if p_b is None:
        se = float(np.sqrt(covariance[0, 0]))
        area = float(areas[0])
        low, high = max(0.0, area - z * se), min(1.0, area + z * se)
        note = "no variance: every positive outranks every negative, or the reverse" if se == 0 else ""
        return Interval(point=area, low=low, high=high, level=level, n=n, clusters=n, method="delong", note=note)
    point = float(areas[0] - areas[1])
    se = float(np.sqrt(max(0.0, covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])))
    p = float(2 * ndtr(-abs(point) / se)) if se > 0 else float(point == 0)
    return Difference(
        point=point, low=point - z * se, high=point + z * se, p=p, se=se, level=level, n=n, clusters=n, method="delong"
    )


def delong_covariance(y: npt.NDArray[np.integer], p: Values) -> tuple[Values, Values]:
    """Return AUROCs (M,) and their covariance (M, M) of M models' scores p (M, n).

    Raises:
        PredictionsError: fewer than two rows of a class.
    """
    positive = y == 1
    m, n = int(positive.sum()), int((~positive).sum())
    if min(m, n) < 2:
        raise PredictionsError(f"{m} positives and {n} negatives; DeLong's variance needs at least 2 of each")
    among_all = rankdata(p, axis=1)
    beaten = (among_all[:, positive] - rankdata(p[:, positive], axis=1)) / n  # share of negatives below each positive
    beating = 1 - (among_all[:, ~positive] - rankdata(p[:, ~positive], axis=1)) / m  # of positives above each negative
    return beaten.mean(axis=1), np.atleast_2d(np.cov(beaten)) / m + np.atleast_2d(np.cov(beating)) / n


def mcnemar(y: npt.ArrayLike, calls_a: npt.ArrayLike, calls_b: npt.ArrayLike) -> McNemar:
    """Return McNemar's test (1947) of whether two models err equally often on the same rows.

    Exact (binomial) where fewer than 25 rows are discordant, else chi-squared with Edwards' continuity correction.

    Args:
        y: (n,) true classes.
        calls_a: (n,) classes called by the first model.
        calls_b: (n,) classes called by the second.

    Raises:
        PredictionsError: lengths differ, or something else than class indices.
    """
    truth, a, b = check_labels(y), check_labels(calls_a), check_labels(calls_b)
    check_same_rows("calls_a", len(a), len(truth))
    check_same_rows("calls_b", len(b), len(truth))
    right_a, right_b = a == truth, b == truth
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    discordant, exact = only_a + only_b, only_a + only_b < EXACT_BELOW
    if exact:
        statistic = float(min(only_a, only_b))
        p = min(1.0, 2 * float(bdtr(statistic, discordant, 0.5))) if discordant else 1.0
    else:
        statistic = max(0, abs(only_a - only_b) - 1) ** 2 / discordant
        p = float(chdtrc(1, statistic))
    return McNemar(only_a=only_a, only_b=only_b, statistic=statistic, p=p, exact=exact, n=len(truth))


def holm(p: npt.ArrayLike) -> Values:
    """Return p-values (m,) adjusted so that the chance of any false claim stays below alpha (Holm 1979).

    Raises:
        PredictionsError: not p-values.
    """
    values = _p_values(p)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    return _back(np.minimum(stepped, 1.0), order)


def benjamini_hochberg(p: npt.ArrayLike) -> Values:
    """Return p-values (m,) adjusted so that the expected share of false finds stays below alpha (BH 1995).

    Raises:
        PredictionsError: not p-values.
    """
    values = _p_values(p)
    order = np.argsort(values, kind="stable")
    m = len(values)
    stepped = np.minimum.accumulate((values[order] * m / np.arange(1, m + 1))[::-1])[::-1]
    return _back(np.minimum(stepped, 1.0), order)


def non_inferiority(difference: Difference, *, margin: float, alpha: float = 0.025) -> Equivalence:
    """Return the test that a is not worse than b by `margin` or more (higher is better), by the normal distribution.

    Args:
        difference: a - b, as `paired_difference` or `delong` return it.
        margin: > 0, fixed before looking.
        alpha: one-sided error; 0.025 is what regulators expect.

    Raises:
        PredictionsError: a margin or alpha that cannot be, or a difference without a standard error.
    """
    _check_margin(difference, margin, alpha)
    low = difference.point - float(ndtri(1 - alpha)) * difference.se
    p = float(ndtr(-(difference.point + margin) / difference.se))
    return Equivalence(
        point=difference.point, low=low, high=np.inf, margin=margin, alpha=alpha, p=p, established=p < alpha
    )


def tost(difference: Difference, *, margin: float, alpha: float = 0.05) -> Equivalence:
    """Return the two one-sided tests that |a - b| < `margin` (Schuirmann 1987), by the normal distribution.

    Args:
        difference: a - b, as `paired_difference` or `delong` return it.
        margin: > 0, fixed before looking.
        alpha: error of each one-sided test; the deciding interval has the level 1 - 2 alpha.

    Raises:
        PredictionsError: a margin or alpha that cannot be, or a difference without a standard error.
    """
    _check_margin(difference, margin, alpha)
    half = float(ndtri(1 - alpha)) * difference.se
    p = float(ndtr((abs(difference.point) - margin) / difference.se))
    return Equivalence(
        point=difference.point,
        low=difference.point - half,
        high=difference.point + half,
        margin=margin,
        alpha=alpha,
        p=p,
        established=p < alpha,
    )


def _check_margin(difference: Difference, margin: float, alpha: float) -> None:
    if not margin > 0:
        raise PredictionsError(f"the margin is {margin:g}; needed a positive difference that would not matter")
    if not 0 < alpha < 0.5:
        raise PredictionsError(f"alpha is {alpha:g}; needed a one-sided error between 0 and 0.5")
    if not difference.se > 0:
        raise PredictionsError(
            f"the difference has the standard error {difference.se:g}; without spread nothing can be tested "
            "(are the two models the same, or are there too few clusters?)"
        )


def _p_values(p: npt.ArrayLike) -> Values:
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not ((values >= 0) & (values <= 1)).all():
        raise PredictionsError(f"p-values of shape {values.shape} must be (m,), not NaN, and in [0, 1]")
    return values


def _back(sorted_values: Values, order: npt.NDArray[np.intp]) -> Values:
    result = np.empty_like(sorted_values)
    result[order] = sorted_values
    return result
