"""Exact nearest neighbours over features.

`nearest` screens with float32 matrix products, block by block, keeps a few more candidates than asked, and measures
those again in float64. Every query then carries a proof: its k-th exact similarity lies above everything that was
dropped by more than float32 rounding can hide. Queries without that proof (many near-equal neighbours) are searched
again without dropping any. So the answer is the exact one, ties go to the lower row, and no block size changes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from eosin.errors import NonFiniteError

Metric = Literal["cosine", "euclidean"]
Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

QUERY_BLOCK = 1024
SPARE = 16  # candidates kept beyond k; fewer mean more queries searched twice
ROUNDING = float(np.finfo(np.float32).eps) / 2
LENGTHS = (1e-15, 1e15)  # row lengths whose squares float32 still holds


def nearest(
    queries: Array, base: Array, k: int, *, metric: Metric = "cosine", block: int = 8192
) -> tuple[Floats, Indices]:
    """Return distances and rows of the `k` base rows nearest to each query, nearest first.

    Memory beside the inputs and the answer is about `block` x (D + 1300) x 8 bytes and 100 MB, whatever the number of
    rows; `base` may be a memory map. A query that is itself a base row finds itself.

    Args:
        queries: (q, D) features, any float type.
        base: (n, D) features.
        k: neighbours per query, 1 to n.
        metric: "cosine" (1 - cosine similarity, 0 to 2) or "euclidean".
        block: base rows screened at once.

    Returns:
        Distances (q, k) float64, ascending, and base rows (q, k) int64; equal distances in row order.

    Raises:
        ValueError: shapes, k, block or metric that make no search.
        NonFiniteError: NaN, infinity, a length float32 cannot square, or (cosine) a row of zeros.
    """
    _check(queries, base, k, metric, block)
    space = _space(base, metric, block)
    lengths = _lengths(queries)
    _check_lengths(lengths, "query", metric)
    keep = min(k + SPARE, len(base))
    distance = np.empty((len(queries), k))
    index = np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        distance[rows], index[rows] = _search(queries[rows], base, space, k, keep, block)
    return distance, index


@dataclass(frozen=True, kw_only=True, slots=True)
class _Space:
    """How rows become float32 vectors of length <= 1 whose product, less `half`, ranks them.

    Cosine: v = x / |x|, score = v.w. Euclidean: v = (x - centre) / scale, score = v.w - |w|^2 / 2, which orders as
    the distance does and, being centred, does not cancel.
    """

    metric: Metric
    inverse: npt.NDArray[np.float64]  # (n,) 1 / length of base rows (cosine)
    centre: npt.NDArray[np.float32]  # (D,) (euclidean)
    scale: float
    half: npt.NDArray[np.float32]  # (n,) |w|^2 / 2 (euclidean), zeros (cosine)

    def base_vectors(self, rows: Array, start: int) -> npt.NDArray[np.float32]:
        """Return the screening vectors of base rows that begin at row `start`."""
        if self.metric == "cosine":
            inverse = self.inverse[start : start + len(rows), None]
            return (rows * inverse.astype(np.promote_types(rows.dtype, np.float32))).astype(np.float32, copy=False)
        return self._shifted(rows)

    def query_vectors(self, rows: Array) -> npt.NDArray[np.float32]:
        """Return the screening vectors of queries."""
        if self.metric == "cosine":
            return (rows / _lengths(rows)[:, None]).astype(np.float32)
        return self._shifted(rows)

    def _shifted(self, rows: Array) -> npt.NDArray[np.float32]:
        return ((rows - self.centre) / np.float32(self.scale)).astype(np.float32, copy=False)

    def scores(
        self, vectors: npt.NDArray[np.float32], rows: Array, start: int, out: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Return (q, rows) float32 scores of base rows that begin at `start`, in `out`; larger is nearer."""
        found = np.matmul(vectors, self.base_vectors(rows, start).T, out=out[:, : len(rows)])
        if self.metric == "euclidean":
            found -= self.half[start : start + len(rows)]
        return found

    def exact_scores(self, distance: Floats, vectors: npt.NDArray[np.float32]) -> Floats:
        """Return the scores (q,) that exact distances (q,) stand for."""
        if self.metric == "cosine":
            return 1 - distance
        return (np.square(vectors.astype(np.float64)).sum(axis=1) - np.square(distance / self.scale)) / 2

    def rounding(self, vectors: npt.NDArray[np.float32]) -> Floats:
        """Return (q,) bounds on the float32 error of a score: (D + 8) u |v||w|, Higham 2002, section 3.1."""
        reach = np.sqrt(np.square(vectors.astype(np.float64)).sum(axis=1))
        # the reconstructed exact score squares |v|, whose own rounding grows with its square
        return (vectors.shape[1] + 8) * ROUNDING * (reach + 0.5) + 4 * ROUNDING * np.square(reach)


def _search(queries: Array, base: Array, space: _Space, k: int, keep: int, block: int) -> tuple[Floats, Indices]:
    """Return exact distances and rows for one block of queries."""
    vectors = space.query_vectors(queries)
    score, index = _screen(vectors, base, space, keep, block)
    index.sort(axis=1)
    exact = _distances(queries, base, index, space.metric)
    order = np.argsort(exact, axis=1, kind="stable")[:, :k]
    distance, index = np.take_along_axis(exact, order, 1), np.take_along_axis(index, order, 1)
    if keep < len(base):
        error = space.rounding(vectors)
        reached = space.exact_scores(distance[:, -1], vectors)
        open_ = np.flatnonzero(reached <= score + error)
        if len(open_):
            floor = reached[open_] - 2 * error[open_]
            distance[open_], index[open_] = _settle(queries[open_], vectors[open_], floor, base, space, k, block)
    return distance, index


def _screen(
    vectors: npt.NDArray[np.float32], base: Array, space: _Space, keep: int, block: int
) -> tuple[npt.NDArray[np.float32], Indices]:
    """Return the `keep`-th best score (q,) and the rows (q, keep) of the best scores."""
    score = np.full((len(vectors), keep), -np.inf, np.float32)
    index = np.full((len(vectors), keep), len(base), np.int64)
    out = np.empty((len(vectors), min(block, len(base))), np.float32)
    for start in range(0, len(base), block):
        found = space.scores(vectors, base[start : start + block], start, out)
        above = found > score[:, -1:]
        if np.count_nonzero(above) > 4 * score.size:  # crowded, as the first block is: cut each row down first
            column = _largest(found, min(keep, found.shape[1]))
            row = np.repeat(np.arange(len(found)), column.shape[1])
            column = column.ravel()
        else:
            row, column = np.divmod(np.flatnonzero(above), found.shape[1])
        if len(row):
            _merge(score, index, row, found[row, column], column + start)
    return score[:, -1], index


def _largest(found: npt.NDArray[np.float32], count: int) -> Indices:
    """Return the columns (q, count) of the largest scores of each row, in no order."""
    at = found.shape[1] - count
    parts = [found[start : start + 128] for start in range(0, len(found), 128)]
    return np.concatenate([np.argpartition(part, at, axis=1)[:, at:] for part in parts])


def _merge(
    score: npt.NDArray[np.float32],
    index: Indices,
    row: Indices,
    new_score: npt.NDArray[np.float32],
    new_index: Indices,
) -> None:
    """Put newcomers (query `row`, score, base row) among the best (q, keep), in place, best first."""
    keep = score.shape[1]
    touched = np.unique(row)
    rows = np.concatenate([row, np.repeat(touched, keep)])
    scores = np.concatenate([new_score, score[touched].ravel()])
    indices = np.concatenate([new_index, index[touched].ravel()])
    order = np.lexsort((indices, -scores, rows))
    ordered = rows[order]
    place = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    best = order[place < keep]
    score[touched] = scores[best].reshape(-1, keep)
    index[touched] = indices[best].reshape(-1, keep)


def _settle(
    queries: Array,
    vectors: npt.NDArray[np.float32],
    floor: Floats,
    base: Array,
    space: _Space,
    k: int,
    block: int,
) -> tuple[Floats, Indices]:
    """Return exact neighbours of queries by measuring every base row whose score reaches `floor` (q,)."""
    distance = np.full((len(queries), k), np.inf)
    index = np.full((len(queries), k), len(base), np.int64)
    out = np.empty((len(vectors), min(block, len(base))), np.float32)
    for start in range(0, len(base), block):
        found = space.scores(vectors, base[start : start + block], start, out)
        for query in np.flatnonzero((found >= floor[:, None]).any(axis=1)):
            hits = np.flatnonzero(found[query] >= floor[query]) + start
            measured = _distances(queries[query : query + 1], base, hits[None], space.metric)[0]
            distances = np.concatenate([distance[query], measured])
            indices = np.concatenate([index[query], hits])
            order = np.lexsort((indices, distances))[:k]
            distance[query], index[query] = distances[order], indices[order]
    return distance, index


def _distances(queries: Array, base: Array, index: Indices, metric: Metric) -> Floats:
    """Return float64 distances (q, m) between queries and their own base rows `index` (q, m).

    Each is a sum over contiguous features of one pair, so that equal rows get equal distances wherever they lie.
    """
    out = np.empty(index.shape)
    step = max(1, 2_000_000 // (index.shape[1] * base.shape[1]))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        near = base[index[rows]].astype(np.float64, copy=False)
        far = queries[rows].astype(np.float64, copy=False)[:, None]
        if metric == "cosine":
            norms = np.sqrt(np.square(near).sum(axis=2) * np.square(far).sum(axis=2))
            out[rows] = np.clip(1 - (near * far).sum(axis=2) / norms, 0, 2)
        else:
            out[rows] = np.sqrt(np.square(near - far).sum(axis=2))
    return out


def _space(base: Array, metric: Metric, block: int) -> _Space:
    """Return the screening space of `base`, after one look at every row."""
    lengths = np.concatenate([_lengths(base[start : start + block]) for start in range(0, len(base), block)])
    _check_lengths(lengths, "base", metric)
    if metric == "cosine":
        zeros = np.zeros(0, np.float32)
        return _Space(metric=metric, inverse=1 / lengths, centre=zeros, scale=1.0, half=zeros)
    sums = [base[start : start + block].sum(axis=0, dtype=np.float64) for start in range(0, len(base), block)]
    centre = (np.sum(sums, axis=0) / len(base)).astype(np.float32)
    spread = [_lengths(base[start : start + block] - centre) for start in range(0, len(base), block)]
    moved = np.concatenate(spread)
    largest = float(np.float32(moved.max()))
    scale = largest if largest > LENGTHS[0] else 1.0
    half = (np.square(moved / scale) / 2).astype(np.float32)
    return _Space(metric=metric, inverse=np.zeros(0), centre=centre, scale=scale, half=half)


def _lengths(rows: Array) -> Floats:
    """Return the Euclidean lengths (n,) of rows, summed in float64."""
    return np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))


def _check(queries: Array, base: Array, k: int, metric: str, block: int) -> None:
    if queries.ndim != 2 or base.ndim != 2 or queries.shape[1] != base.shape[1] or not len(base):
        raise ValueError(f"queries {queries.shape} and base {base.shape} must be (q, D) and (n, D) with the same D")
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"unknown metric {metric!r}; one of cosine, euclidean")
    if not 1 <= k <= len(base):
        raise ValueError(f"k is {k}; the base has {len(base)} rows, so it must be 1 to {len(base)}")
    if block < 1:
        raise ValueError(f"block is {block}; it must be at least 1 row")


def _check_lengths(lengths: Floats, role: str, metric: Metric) -> None:
    low = LENGTHS[0] if metric == "cosine" else -1.0
    bad = np.flatnonzero(~((lengths >= low) & (lengths <= LENGTHS[1])))
    if len(bad):
        raise NonFiniteError(
            f"{len(bad)} {role} rows cannot be compared by {metric} distance, first row {bad[0]} of length "
            f"{lengths[bad[0]]:g}; remove rows of zeros, NaN or infinity"
        )
