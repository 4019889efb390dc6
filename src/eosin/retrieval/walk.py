"""Walks over sorted keys: predecessor after predecessor, successor after successor, as far as a budget goes.

A van Emde Boas tree answers "which stored key comes next" in O(log log U). A sorted array answers it by one binary
search, and every further step is the next place of the array: the same answers, one cache line instead of a tree. A key
may be stored many times; each entry is a place of its own, so a walk of s steps sees s entries however many share one.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.int64]
Places = npt.NDArray[np.int64]

STRIDE = 8
"""Entries walked before directions are compared again."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Walked:
    """Where a walk went.

    Attributes:
        places: int64 (m,), places in the sorted keys of the entries that pass, in the order they were met.
        examined: entries looked at, those that do not pass included.
    """

    places: Places
    examined: int


def predecessors(keys: Keys, key: int, count: int) -> Places:
    """Return the places of up to `count` entries with a smaller key than `key`, the largest key first.

    Args:
        keys: (n,), ascending.
        key: where to start; need not be stored.
        count: steps.
    """
    at = int(np.searchsorted(keys, key))
    return np.arange(at - 1, max(at - count, 0) - 1, -1)


def successors(keys: Keys, key: int, count: int) -> Places:
    """Return the places of up to `count` entries with `key` or a larger key, the smallest first."""
    at = int(np.searchsorted(keys, key))
    return np.arange(at, min(at + count, len(keys)))


def guided_walk(
    keys: Keys,
    seeds: Keys,
    worth: npt.NDArray[np.floating],
    rate: Callable[[slice], float],
    *,
    budget: int,
    passes: Callable[[slice], npt.NDArray[np.bool_]] | None = None,
    limit: int | None = None,
) -> Walked:
    """Walk from every seed both ways, the most promising direction first, until `budget` entries are found.

    A direction takes the next `STRIDE` entries (predecessors or successors of its seed), and its worth becomes the rate
    of those. It ends where the keys end, where another seed stands, and where that seed's walk has been: every entry is
    met once, and the walks together can reach all. So with `budget` or more entries stored, exactly `budget` are found.

    Args:
        keys: (n,), ascending.
        seeds: (p,) keys to start from, p >= 1; they need not be stored.
        worth: (p,), how promising each seed is, on the scale of `rate`; larger is better.
        rate: from a slice of places to how promising these were.
        budget: entries to find.
        passes: from a slice of places to whether each counts as found; None: all do.
        limit: entries to look at, at most; None: `budget`.
    """
    limit = budget if limit is None else limit
    starts, first = _starts(np.searchsorted(keys, seeds), np.asarray(worth))
    # Seeds cut the array into gaps; gap g lies left of start g and is walked from both its ends.
    low, high = [0, *starts], [*starts, len(keys)]
    heap = [(-w, side, g + 1 - side) for g, w in enumerate(first) for side in (0, 1)]
    heapq.heapify(heap)
    places: list[Places] = []
    found = examined = 0
    while heap and found < budget and examined < limit:
        _, backwards, gap = heapq.heappop(heap)
        step = min(STRIDE, high[gap] - low[gap], budget - found, limit - examined)
        if not step:
            continue
        if backwards:
            high[gap] -= step
            block = slice(high[gap], high[gap] + step)
            met = np.arange(block.stop - 1, block.start - 1, -1)
        else:
            block = slice(low[gap], low[gap] + step)
            low[gap] += step
            met = np.arange(block.start, block.stop)
        if passes is not None:
            held = passes(block)
            met = met[held[::-1] if backwards else held]
        places.append(met)
        found, examined = found + len(met), examined + step
        heapq.heappush(heap, (-rate(block), backwards, gap))
    return Walked(places=np.concatenate(places) if places else np.empty(0, np.int64), examined=examined)


def _starts(at: Places, worth: npt.NDArray[np.floating]) -> tuple[list[int], list[float]]:
    """Return the distinct places of seeds, ascending, and the largest worth among the seeds of each."""
    order = np.lexsort((-worth, at))
    starts, first = np.unique(at[order], return_index=True)
    return starts.tolist(), worth[order][first].tolist()
