"""Fewer copies of one thing among the hits: maximal marginal relevance."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from eosin.errors import NonFiniteError, QueryError

POOL_FACTOR = 10
POOL_LEAST = 100


def pool_size(k: int) -> int:
    """Return how many of the best hits `mmr` should choose `k` from."""
    return max(POOL_LEAST, POOL_FACTOR * k)


def mmr(
    score: npt.NDArray[np.floating], vectors: npt.NDArray[np.floating], *, k: int, weight: float
) -> npt.NDArray[np.int64]:
    """Return the rows of the `k` candidates that are like the query and unlike each other, in the order chosen.

    The next row is the one of greatest ``weight * score_i - (1 - weight) * max_j cos(v_i, v_j)`` over the rows j
    chosen so far (the first: of greatest score); equal values go to the earlier row. Carbonell & Goldstein, SIGIR
    1998, 335, the equation of section 2.

    Args:
        score: cosine of each candidate to the query, (n,).
        vectors: the candidates, (n, dim); any length but zero.
        k: rows wanted; all n, in order, when there are fewer.
        weight: lambda, 0 to 1. 1 is the order of the scores; 0 looks at the query for the first row only.

    Raises:
        QueryError: a weight outside 0-1, `k` below 1, or shapes that do not fit.
        NonFiniteError: a score or vector with NaN or infinity, or a zero vector.
    """
    if not 0 <= weight <= 1:
        raise QueryError(f"the weight of MMR is {weight:g}; it must lie between 0 (all unlike) and 1 (by score alone)")
    if k < 1:
        raise QueryError(f"{k} hits were asked for; needed: at least 1")
    if vectors.ndim != 2 or score.shape != (len(vectors),):
        raise QueryError(f"scores {score.shape} and vectors {vectors.shape} do not fit; needed: (n,) and (n, dim)")
    if not len(vectors):
        return np.empty(0, dtype=np.int64)
    unit = np.asarray(vectors, dtype=np.float64)
    length = np.linalg.norm(unit, axis=1)
    if not (np.isfinite(length).all() and length.all() and np.isfinite(score).all()):
        raise NonFiniteError("a candidate has no direction: its vector is zero or holds NaN or infinity")
    unit = unit / length[:, None]
    relevance = weight * np.asarray(score, dtype=np.float64)
    chosen = np.empty(min(k, len(unit)), dtype=np.int64)
    chosen[0] = int(np.argmax(score))
    nearest = np.full(len(unit), -np.inf)
    for at in range(1, len(chosen)):
        np.maximum(nearest, unit @ unit[chosen[at - 1]], out=nearest)
        value = relevance - (1 - weight) * nearest
        value[chosen[:at]] = -np.inf
        chosen[at] = int(np.argmax(value))
    return chosen
