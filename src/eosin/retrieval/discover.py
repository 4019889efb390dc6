"""Discovery: points near a target, on the right side of as many pairs (positive, negative) as can be.

As in Qdrant's discovery search (qdrant.tech/documentation/concepts/explore, "Discovery search"): a point satisfies a
pair when it is more like the positive than the negative example. Points are ranked by

    sum over pairs of (+1 if satisfied, else -1)  +  sigmoid(cosine with the target)

so that the number of pairs satisfied comes first, and likeness to the target decides among equals. Without a target the
pairs alone rank ("context search"): by the sum of min(0, cosine with positive - cosine with negative), its equation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from eosin.errors import QueryError
from eosin.retrieval.filters import Filter
from eosin.retrieval.inputs import check_k, unit_queries
from eosin.retrieval.protocol import Hits, VectorIndex, Vectors

CANDIDATES = 1000
"""Nearest points of each example that are ranked, unless all are."""
BATCH = 4096


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Discovered:
    """Points found, best first.

    Attributes:
        hits: their score is the cosine with the target; the sum of shortfalls without one.
        satisfied: (k,) pairs that each satisfies.
        pairs: how many there are.
        ranked: points that were compared.
        proven: whether these were all that the filter holds for; else another one may rank higher.
    """

    hits: Hits
    satisfied: npt.NDArray[np.int64]
    pairs: int
    ranked: int
    proven: bool


def discover(
    index: VectorIndex,
    target: Vectors | None,
    pairs: Sequence[tuple[Vectors, Vectors]],
    *,
    k: int = 10,
    where: Filter | None = None,
    exact: bool | None = None,
) -> Discovered:
    """Return the points that satisfy most pairs, and among them those nearest to the target.

    Args:
        index: of any engine.
        target: (dim,) to be like; None for the pairs alone.
        pairs: (positive (dim,), negative (dim,)), one or more.
        k: points wanted.
        where: filter on the payload.
        exact: rank every point; by default that is done in an index of the exact engine. Else the `CANDIDATES` nearest
            to the target and to each positive example are ranked, which may miss points far from all of them.

    Raises:
        QueryError: no pair, k below 1, NaN or zero vectors.
        IndexMismatchError: vectors of another length.
    """
    if not pairs:
        raise QueryError("discovery needs one or more pairs of a positive and a negative example; else use search")
    k = check_k(k)
    towards, away = (np.concatenate([unit_queries(pair[side], index.spec) for pair in pairs]) for side in (0, 1))
    goal = None if target is None else unit_queries(target, index.spec)
    if len(towards) != len(pairs) or len(away) != len(pairs) or (goal is not None and len(goal) != 1):
        raise QueryError("target and examples are one vector each; give several examples as several pairs")
    everything = index.stats()["engine"] == "exact" if exact is None else exact
    if everything:
        parts = index.scroll(where=where, batch=BATCH)
    else:
        seeds = towards if goal is None else np.concatenate([goal, towards])
        found = index.search(seeds, k=max(CANDIDATES, k), where=where)
        ids = np.unique(np.concatenate([hits.ids for hits in found]))
        parts = (index.retrieve(ids[start : start + BATCH]) for start in range(0, len(ids), BATCH))
    best, keys, ranked = index.retrieve(np.empty(0, np.uint64)), np.empty((0, 3)), 0
    for hits in parts:
        assert hits.vectors is not None  # scroll and retrieve give vectors
        ranked += len(hits)
        keys = np.concatenate([keys, _keys(hits.vectors.astype(np.float64), goal, towards, away)])
        best = _joined(best, hits)
        order = np.lexsort((best.ids, -keys[:, 1], -keys[:, 0]))[:k]
        best, keys = best.take(order), keys[order]
    return Discovered(
        hits=replace(best, score=keys[:, 1].astype(np.float32), vectors=None, wanted=k),
        satisfied=keys[:, 2].astype(np.int64),
        pairs=len(pairs),
        ranked=ranked,
        proven=everything,
    )


def _keys(
    vectors: npt.NDArray[np.float64], goal: Vectors | None, towards: Vectors, away: Vectors
) -> npt.NDArray[np.float64]:
    """Return of each point (n, 3): what ranks it first, what decides among equals, and how many pairs it satisfies."""
    margin = vectors @ towards.T - vectors @ away.T
    satisfied = (margin > 0).sum(axis=1)
    if goal is None:
        return np.stack([np.zeros(len(vectors)), np.minimum(margin, 0).sum(axis=1), satisfied], axis=1)
    return np.stack([satisfied, (vectors @ goal.T)[:, 0], satisfied], axis=1)


def _joined(one: Hits, other: Hits) -> Hits:
    return Hits(
        ids=np.concatenate([one.ids, other.ids]),
        score=np.concatenate([one.score, other.score]),
        payload={name: np.concatenate([column, other.payload[name]]) for name, column in one.payload.items()},
        vectors=None,
        wanted=one.wanted,
    )
