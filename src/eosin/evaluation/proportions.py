"""Intervals of a proportion of independent rows (for clustered rows use `bootstrap`)."""

from __future__ import annotations

import math

from scipy.special import betaincinv, ndtri

from eosin.errors import PredictionsError
from eosin.evaluation.bootstrap import check_level
from eosin.evaluation.interval import Interval


def wilson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Return the score interval of a proportion (Wilson 1927; Brown, Cai & DasGupta 2001, eq. 4).

    Args:
        successes: how many of `n`.
        n: independent trials.
        level: of confidence.

    Raises:
        PredictionsError: no trials, or successes outside 0 ... n.
    """
    _check(successes, n, level)
    z = float(ndtri((1 + level) / 2))
    p, shrunk = successes / n, 1 + z**2 / n
    centre = (p + z**2 / (2 * n)) / shrunk
    half = z / shrunk * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(point=p, low=low, high=high, level=level, n=n, clusters=n, method="wilson")


def clopper_pearson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Return the exact interval of a proportion (Clopper & Pearson 1934), by beta quantiles; never too narrow.

    Args:
        successes: how many of `n`.
        n: independent trials.
        level: of confidence.

    Raises:
        PredictionsError: no trials, or successes outside 0 ... n.
    """
    _check(successes, n, level)
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(betaincinv(successes, n - successes + 1, tail))
    high = 1.0 if successes == n else float(betaincinv(successes + 1, n - successes, 1 - tail))
    return Interval(point=successes / n, low=low, high=high, level=level, n=n, clusters=n, method="clopper-pearson")


def _check(successes: int, n: int, level: float) -> None:
    check_level(level)
    if n < 1 or not 0 <= successes <= n:
        raise PredictionsError(f"{successes} of {n} is no proportion; needed n >= 1 and 0 <= successes <= n")
