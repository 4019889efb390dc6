"""One pass over many rows that keeps the best few for each query, whatever scores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from eosin.retrieval.protocol import Floats, Vectors

Rows = npt.NDArray[np.int64]
Block = slice | Rows
Score = Callable[[Block], Floats]
"""Scores (q, rows) of a block of rows, given as a slice or as their numbers."""

BLOCK = 8192  # rows scored at once
SPARSE = 4  # a filter that keeps fewer than one row in so many is searched row by row
WIDEN = 256  # rows of float16 widened at once: they stay in the cache


def best_rows(
    score: Score, allowed: npt.NDArray[np.bool_], first: int, k: int, margin: float, queries: int
) -> list[Rows]:
    """Return the rows a query whose score is within `margin` of its k-th best, or better; all when there are fewer.

    Args:
        score: of a block of rows, (q, rows).
        allowed: rows that may be found (n,).
        first: row that `allowed` begins with.
        k: how many.
        margin: that a score may be wrong by.
        queries: q.
    """
    best = np.full((queries, k), -np.inf, np.float32)
    floor = np.full(queries, -np.inf, np.float32)
    kept: list[tuple[Rows, Rows, Floats]] = []
    for block, rows, chosen in _blocks(allowed, first):
        found = score(block)
        found = found if chosen is None else found[:, chosen]
        hot = np.flatnonzero(found.max(axis=1) >= floor)
        if not len(hot):
            continue
        found = found[hot]
        top = found if found.shape[1] <= k else np.partition(found, found.shape[1] - k, axis=1)[:, -k:]
        both = np.concatenate([best[hot], top], axis=1)
        best[hot] = np.partition(both, both.shape[1] - k, axis=1)[:, -k:]
        floor[hot] = best[hot].min(axis=1) - np.float32(margin)
        at, place = np.nonzero(found >= floor[hot, None])
        kept.append((hot[at], rows[place], found[at, place]))
    if not kept:
        return [np.empty(0, np.int64)] * queries
    query, row, value = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    last = value >= floor[query]
    query, row = query[last], row[last]
    order = np.lexsort((row, query))
    return np.split(row[order], np.searchsorted(query[order], np.arange(1, queries)))


def _blocks(allowed: npt.NDArray[np.bool_], first: int) -> Iterator[tuple[Block, Rows, Rows | None]]:
    """Yield blocks to score, the allowed rows in them, and where in the block those are (None: everywhere)."""
    chosen = np.flatnonzero(allowed)
    if len(chosen) * SPARSE < len(allowed):
        for start in range(0, len(chosen), BLOCK):
            rows = chosen[start : start + BLOCK] + first
            yield rows, rows, None
        return
    for start in range(0, len(allowed), BLOCK):
        stop = min(start + BLOCK, len(allowed))
        local = np.flatnonzero(allowed[start:stop])
        if len(local):
            yield (
                slice(first + start, first + stop),
                local + (first + start),
                None if len(local) == stop - start else local,
            )


def as_float32(vectors: Vectors) -> Floats:
    """Return vectors (n, dim) as float32.

    float16 is widened by moving its bits and scaling by 2^112, which is exact for every finite number and several
    times faster than numpy's conversion.
    """
    if vectors.dtype == np.float32:
        return vectors
    wide = np.empty(vectors.shape, np.float32)
    for start in range(0, len(vectors), WIDEN):
        part = wide[start : start + WIDEN]
        bits = part.view(np.int32)
        bits[...] = vectors[start : start + WIDEN].view(np.int16)
        bits <<= 13
        bits &= -0x70002000  # the sign, and the 15 bits of exponent and fraction where float32 has them
        part *= np.float32(2.0**112)
    return wide
