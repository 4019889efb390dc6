"""Discrete codes of features: an integer key whose order means likeness.

A key is a residual quantisation (Chen et al., Sensors 2010): the nearest of up to 256 k-means centres, then the nearest
centre of what is left of the vector, four levels in all. The centres of each level are numbered along a path through
them on which neighbours are alike (the leaves of their hierarchical clustering in optimal order, Bar-Joseph et al.
2001), so that keys that are close as integers stand for vectors that are close. The first level is the highest byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import leaves_list, linkage
from sklearn.cluster import MiniBatchKMeans
from threadpoolctl import threadpool_limits

Floats = npt.NDArray[np.float32]
Keys = npt.NDArray[np.int64]

LEVELS = 4
LEVEL_BITS = 8
SAMPLE = 50_000
"""Rows that centres are learned from."""
BLOCK = 8192


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Codebook:
    """Centres of the levels, each numbered along its path.

    Attributes:
        centres: float32 (levels, K, D), K <= 256.
        half: float32 (K * K,), half the squared length of the sum of each first and each second centre.
    """

    centres: Floats
    half: Floats


def fit_codebook(vectors: npt.NDArray[Any], *, cells: int = 256, seed: int = 0) -> Codebook:
    """Learn the centres from `vectors` (n, D), of which a seeded sample is used when there are more than `SAMPLE`.

    Args:
        vectors: of length 1, float16 or float32; n >= 1.
        cells: centres a level, 2 to 256; fewer are used when there are fewer than 4 rows for each.
        seed: of sample and centres; the same seed and rows give the same codebook.

    Raises:
        ValueError: `cells` outside 2-256, or no rows.
    """
    if not 2 <= cells <= 1 << LEVEL_BITS:
        raise ValueError(f"cells is {cells}; a level has 2 to {1 << LEVEL_BITS} centres")
    if not len(vectors):
        raise ValueError("no vectors to learn codes from; give at least one")
    rng = np.random.default_rng(seed)
    rows = np.arange(len(vectors))
    if len(rows) > SAMPLE:
        rows = np.sort(rng.choice(len(vectors), SAMPLE, replace=False))
    rest = vectors[rows].astype(np.float32)
    cells = min(cells, max(1, len(rest) // 4))
    centres = np.empty((LEVELS, cells, rest.shape[1]), np.float32)
    for level in centres:
        state = int(rng.integers(2**31))
        with threadpool_limits(limits=1):  # sums in another order would move a centre now and then
            learned = MiniBatchKMeans(cells, batch_size=4096, n_init="auto", random_state=state).fit(rest)
        means = np.asarray(learned.cluster_centers_, np.float32)
        level[:] = means[path_order(means)]
        rest -= level[_nearest(rest, level)]
    return codebook_of(centres)


def codebook_of(centres: Floats) -> Codebook:
    """Return the codebook of `centres`, with what `probes` needs of each pair."""
    first, second = centres[:2].astype(np.float64)
    square = np.square(first).sum(axis=1)[:, None] + np.square(second).sum(axis=1)[None]
    return Codebook(centres=centres, half=(square / 2 + first @ second.T).astype(np.float32).ravel())


def path_order(centres: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.int64]:
    """Return the rows of `centres` (K, D) in the order of a path on which neighbours are alike, (K,).

    The leaves of average-linkage clustering, its branches turned so that the path is as short as the tree allows.
    """
    if len(centres) < 3:
        return np.arange(len(centres))
    return leaves_list(linkage(centres, "average", optimal_ordering=True)).astype(np.int64)


def encode(vectors: npt.NDArray[Any], codebook: Codebook) -> Keys:
    """Return the key (n,) of each vector (n, D)."""
    keys = np.zeros(len(vectors), np.int64)
    for start in range(0, len(vectors), BLOCK):
        rest = vectors[start : start + BLOCK].astype(np.float32)
        keys[start : start + BLOCK] = _descend(rest, keys[start : start + BLOCK], codebook.centres)
    return keys


def digit(keys: Keys, level: int) -> Keys:
    """Return the number (n,) of the centre that each key names at `level`, 0 the coarsest."""
    return (keys >> LEVEL_BITS * (LEVELS - 1 - level)) & ((1 << LEVEL_BITS) - 1)


def occupied_cells(keys: Keys, codebook: Codebook) -> npt.NDArray[np.bool_]:
    """Return which pairs of a first and a second centre any key names, (K * K,)."""
    cells = codebook.centres.shape[1]
    found = np.zeros(cells * cells, bool)
    found[digit(keys, 0) * cells + digit(keys, 1)] = True
    return found


def likeness(keys: Keys, tables: Floats) -> Floats:
    """Return the inner product (n,) of a query with what each key stands for, the sum of its centres.

    Args:
        keys: (n,).
        tables: (levels, K), inner products of the query with every centre: ``codebook.centres @ query``.
    """
    found = tables[0, digit(keys, 0)]
    for level in range(1, LEVELS):
        found = found + tables[level, digit(keys, level)]
    return found


def probes(
    query: Floats, codebook: Codebook, tables: Floats, occupied: npt.NDArray[np.bool_], count: int
) -> tuple[Keys, Floats]:
    """Return where to look for a query: the key it would have in each of the `count` nearest occupied cells.

    A cell is a pair of a first and a second centre. All K * K are compared, which does not depend on how many vectors
    are stored.

    Args:
        query: (D,), length 1.
        codebook: the centres.
        tables: (levels, K), ``codebook.centres @ query``.
        occupied: (K * K,), from `occupied_cells`; at least one.
        count: cells wanted, at least 1.

    Returns:
        Keys int64 (p,), nearest cell first, p <= count, and the inner product (p,) of the query with each cell.
    """
    cells = codebook.centres.shape[1]
    worth = (tables[0][:, None] + tables[1][None]).ravel()
    nearness = np.where(occupied, worth - codebook.half, -np.inf)
    count = min(count, int(np.count_nonzero(occupied)))
    best = np.argpartition(-nearness, count - 1)[:count]
    best = best[np.lexsort((best, -nearness[best]))]
    first, second = np.divmod(best, cells)
    rest = query - codebook.centres[0, first] - codebook.centres[1, second]
    keys = _descend(rest, (first << LEVEL_BITS) + second, codebook.centres[2:])
    return keys, worth[best]


def _descend(rest: Floats, keys: Keys, centres: Floats) -> Keys:
    """Return `keys` (n,) followed by the nearest centre at each level; `rest` (n, D) is what is left, used up."""
    for level in centres:
        nearest = _nearest(rest, level)
        rest -= level[nearest]
        keys = (keys << LEVEL_BITS) + nearest
    return keys


def _nearest(vectors: Floats, centres: Floats) -> npt.NDArray[np.int64]:
    """Return the nearest centre (n,) of each vector; equal distances go to the first."""
    half = np.square(centres).sum(axis=1) / 2
    found = np.empty(len(vectors), np.int64)
    for start in range(0, len(vectors), BLOCK):
        found[start : start + BLOCK] = (vectors[start : start + BLOCK] @ centres.T - half).argmax(axis=1)
    return found
